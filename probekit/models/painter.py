"""How captions become pictures: a text-to-image pipeline of diffusers, run from embeddings that are made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probekit import hooks, seeds
from probekit.hooks.errors import ProbekitError

_STABLE = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
# what encode_prompt returns, in order, and what it needs beyond the prompt, for each family; other pipelines take text
_ENCODERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "StableDiffusionPipeline": (_STABLE[:2], {"do_classifier_free_guidance": True}),
    "StableDiffusionXLPipeline": (_STABLE, {"do_classifier_free_guidance": True}),
    "StableDiffusion3Pipeline": (_STABLE, {"do_classifier_free_guidance": True, "prompt_2": None, "prompt_3": None}),
    "FluxPipeline": (("prompt_embeds", "pooled_prompt_embeds", ""), {"prompt_2": None}),
    "PixArtAlphaPipeline": (
        ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"),
        {"do_classifier_free_guidance": True, "clean_caption": False},
    ),
}
_CLIP = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""Pipelines whose embeddings are CLIP's alone, a token each: the end of the caption has its place in them."""


class Painter:
    """A diffusers pipeline that makes pictures from captions. Pictures are (n, 3, h, w) in [-1, 1].

    name: of the model, for errors. defaults: pipeline options that hold where a call gives none, such as a guidance scale.
    """

    def __init__(self, pipeline: Any, name: str, defaults: Mapping[str, Any]) -> None:
        self.pipeline, self.name, self.defaults = pipeline, name, dict(defaults)
        self.kind = type(pipeline).__name__
        if self.kind == "PixArtAlphaPipeline":
            self.defaults["negative_prompt"] = None  # its default, "", is refused beside embeddings
        self._encoded: dict[str, dict[str, Any]] = {}
        self._negative: dict[str, Any] = {}
        pipeline.set_progress_bar_config(disable=True)
        if getattr(pipeline, "safety_checker", None) is not None:
            # it blacks out pictures that it takes offence at, damaged ones above all, and black would count as a result
            pipeline.register_modules(safety_checker=None)
            pipeline.register_to_config(requires_safety_checker=False)

    # --- captions ---------------------------------------------------------------------------------------------------------

    @property
    def encodes(self) -> tuple[str, ...]:
        """What captions become, by the names of the pipeline's arguments; nothing where the pipeline takes text alone."""
        names, _ = _ENCODERS.get(self.kind, ((), {}))
        return tuple(name for name in names if name.endswith("prompt_embeds") and not name.startswith("negative"))

    @property
    def has_end(self) -> bool:
        """Whether the caption's end has a place in the embeddings."""
        return self.kind in _CLIP

    def embedded(self, prompt: str) -> dict[str, Any]:
        """The prompt as the pipeline's arguments, encoded once and remembered."""
        if prompt not in self._encoded:
            self._encoded[prompt] = self._encode(prompt)
        return self._encoded[prompt]

    def end(self, prompt: str) -> int:
        """The number of the token that ends the prompt, of a pipeline that `has_end`."""
        words = self.pipeline.tokenizer
        told = words(prompt, padding="max_length", max_length=words.model_max_length, truncation=True).input_ids
        return told.index(words.eos_token_id)

    def _encode(self, prompt: str) -> dict[str, Any]:
        if self.kind not in _ENCODERS:
            return {"prompt": prompt}
        names, arguments = _ENCODERS[self.kind]
        with torch.no_grad():
            returned = self.pipeline.encode_prompt(
                prompt=prompt, device=self.pipeline._execution_device, num_images_per_prompt=1, **arguments, **self._negative
            )
        encoded = {key: value for key, value in zip(names, returned, strict=True) if key}
        # the empty prompt of guidance is encoded with the first prompt only
        self._negative = {key: value for key, value in encoded.items() if key.startswith("negative")}
        return encoded

    # --- pictures ---------------------------------------------------------------------------------------------------------

    def row(self, prompt: str, noise: int, seed: int = 0) -> dict[str, Any]:
        """What makes one row of a batch: the caption, and the noise of that number (`seeds.numbered`)."""
        # noise is drawn on the CPU, so that a number means the same noise on every device
        return {**self.embedded(prompt), "generator": seeds.numbered(seed, noise)}

    @torch.no_grad()
    def paint(self, rows: Sequence[Mapping[str, Any]], **options: Any) -> Float[Tensor, "n 3 h w"]:
        """Pictures of rows, as `row` makes them, in one batch. options: the pipeline's (`num_inference_steps`, …)."""
        images = self.pipeline(**hooks.stack(rows), **self.defaults | options, output_type="pt").images
        return images.float() * 2 - 1

    def generate(
        self, prompts: Sequence[str], noises: Sequence[int], *, seed: int = 0, **options: Any
    ) -> Float[Tensor, "n 3 h w"]:
        """Pictures of the prompts, each from the noise of that number. options: the pipeline's."""
        return self.paint([self.row(p, number, seed) for p, number in zip(prompts, noises, strict=True)], **options)

    def sweep(
        self,
        original: tuple[str, int],
        edit: tuple[str, int],
        rules: Sequence[Sequence[hooks.Injection]],
        *,
        seed: int = 0,
        **options: Any,
    ) -> hooks.Swept:
        """`hooks.sweep` over (prompt, noise's number) pairs, with images in [-1, 1]; options are its and the pipeline's."""
        o, e = self.row(*original, seed), self.row(*edit, seed)
        swept = hooks.sweep(self.pipeline, original=o, edit=e, rules=rules, **self.defaults | options)
        return hooks.Swept(swept.edit.float() * 2 - 1, swept.images.float() * 2 - 1)

    def denoise_once(self) -> None:
        """Call the denoiser on one picture, for what watches its layers."""
        self.pipeline(**hooks.stack([self.row("", 0)]), num_inference_steps=1, output_type="latent")

    def check_guidance(self, guidance: float) -> None:
        """Raises ProbekitError for less than 1, which diffusers' pipelines take for none."""
        if guidance < 1:
            raise ProbekitError(f"--guidance {guidance:g}: text-to-image pipelines are guided from 1, which is none, upwards")

"""Text-to-image pipelines of diffusers, as probekit sees them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probekit import hooks
from probekit.errors import ProbekitError
from probekit.models import hub
from probekit.sampling import Denoiser, Diffusion, denoisers
from probekit.zoo import GUIDANCE

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


class TextToImage:
    """A diffusers pipeline that makes images from prompts. Images are (n, 3, h, w) in [-1, 1].

    `defaults` are pipeline options that hold where a call gives none, such as a bundled model's guidance scale.
    """

    def __init__(self, pipeline: Any, *, name: str) -> None:
        self.pipeline, self.name = pipeline, name
        self.defaults: dict[str, Any] = {"guidance_scale": GUIDANCE[name]} if name in GUIDANCE else {}
        if type(pipeline).__name__ == "PixArtAlphaPipeline":
            self.defaults["negative_prompt"] = None  # its default, "", is refused beside embeddings
        self._encoded: dict[str, dict[str, Any]] = {}
        self._negative: dict[str, Any] = {}
        pipeline.set_progress_bar_config(disable=True)
        if getattr(pipeline, "safety_checker", None) is not None:
            # it blacks out pictures that it takes offence at, damaged ones above all, and black would count as a result
            pipeline.register_modules(safety_checker=None)
            pipeline.register_to_config(requires_safety_checker=False)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, name: str, device: str = "auto", dtype: str = "auto") -> TextToImage:
        """Load what `save_pretrained` wrote, or a hub id. Raises ProbekitError when that fails."""
        from diffusers import AutoPipelineForText2Image, DiffusionPipeline

        hub.hush()
        place = choose_device(device)
        try:
            index = DiffusionPipeline.load_config(str(path))
            chosen = _dtype(dtype, place, transformer="transformer" in index)
            # a Kandinsky decoder becomes text-to-image with its prior; what has no such family is loaded as it is
            known = index["_class_name"].startswith("Kandinsky")
            loader = AutoPipelineForText2Image if known else DiffusionPipeline
            pipeline = loader.from_pretrained(str(path), dtype=chosen)
        except ProbekitError:
            raise
        except Exception as error:  # diffusers, safetensors and the hub raise a dozen kinds
            reason = " ".join(str(error).split())[:200]
            raise ProbekitError(f"model {name!r}: could not be loaded ({type(error).__name__}: {reason})") from error
        try:
            hooks.denoiser(pipeline)
        except hooks.HookError as error:
            raise ProbekitError(f"model {name!r}: {error}") from error
        return cls(pipeline.to(place), name=name)

    @property
    def denoiser(self) -> nn.Module:
        """The U-Net or transformer."""
        return hooks.denoiser(self.pipeline)

    def denoise_once(self) -> None:
        """Call the denoiser on one picture, for what watches its layers."""
        self.pipeline(**hooks.stack([self.row("", 0)]), num_inference_steps=1, output_type="latent")

    @cached_property
    def layers(self) -> list[hooks.Layer]:
        """The denoiser's layers in execution order."""
        return hooks.layers(self.denoiser)

    @cached_property
    def digest(self) -> str:
        """A fingerprint of the pipeline, 12 hex digits: its scheduler's config, its tensors' names, shapes and some values."""
        fingerprint = hashlib.sha256(json.dumps(dict(self.pipeline.scheduler.config), sort_keys=True, default=str).encode())
        for part, module in sorted(self.pipeline.components.items()):
            for key, value in sorted(module.state_dict().items()) if isinstance(module, nn.Module) else ():
                flat = value.flatten()
                sample = flat[:: max(1, flat.numel() // 256)].float().cpu().numpy()
                fingerprint.update(f"{part}{key}{tuple(value.shape)}".encode() + sample.tobytes())
        return fingerprint.hexdigest()[:12]

    def row(self, prompt: str, seed: int) -> dict[str, Any]:
        """What makes one row of a batch: the prompt, encoded once and remembered, and its own noise."""
        if prompt not in self._encoded:
            self._encoded[prompt] = self._encode(prompt)
        # noise is drawn on the CPU, so that a seed means the same noise on every device
        return {**self._encoded[prompt], "generator": torch.Generator().manual_seed(seed)}

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> Float[Tensor, "n 3 h w"]:
        """Pictures of the prompts, one seed each. options: the pipeline's (`num_inference_steps`, `guidance_scale`, …)."""
        rows = [self.row(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        with torch.no_grad():
            images = self.pipeline(**hooks.stack(rows), **self.defaults | options, output_type="pt").images
        return images.float() * 2 - 1

    def diffusion(self, prompt: str = "", guidance: float = 1.0) -> Diffusion:
        """The pipeline as what is sampled and inverted with one caption, its images of the size it was trained for.

        guidance: with more than 1 inversion is known to diverge; less than 1 diffusers' pipelines take for none. Raises
        ProbekitError for that, and for a pipeline without a VAE of its own.
        """
        if guidance < 1:
            raise ProbekitError(f"--guidance {guidance:g}: text-to-image pipelines are guided from 1, which is none, upwards")
        network, vae, kind = self.denoiser, getattr(self.pipeline, "vae", None), type(self.pipeline).__name__
        config: Any = network.config
        if vae is None:
            raise ProbekitError(f"model {self.name!r}: a {kind}, which has no VAE to bring images to its latents")
        scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
        packs = kind == "FluxPipeline"  # into tokens of 2x2 latents
        side = self.pipeline.default_sample_size if packs else config.sample_size
        size, channels = side * self.pipeline.vae_scale_factor, vae.config.latent_channels
        shape = (side // 2 * (side // 2), 4 * channels) if packs else (channels, side, side)

        def encode(images: Tensor) -> Tensor:
            states = (vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean - shift) * scale
            return self.pipeline._pack_latents(states, len(states), channels, side, side) if packs else states

        def decode(states: Tensor) -> Tensor:
            states = states.to(vae.device, vae.dtype)
            if packs:
                states = self.pipeline._unpack_latents(states, size, size, self.pipeline.vae_scale_factor)
            return vae.decode(states / scale + shift, return_dict=False)[0]

        @functools.cache
        def predict(rows: int) -> Denoiser:
            return denoisers.captioned(self.pipeline, [self.row(prompt, 0)] * rows, guidance, **options)

        options = {key: value for key, value in self.defaults.items() if key != "guidance_scale"}
        tokens = shape[0] if packs else None
        return Diffusion(self.name, size, shape, self.pipeline.scheduler, predict, encode, decode, tokens)

    def sweep(
        self,
        original: tuple[str, int],
        edit: tuple[str, int],
        rules: Sequence[Sequence[hooks.Injection]],
        **options: Any,
    ) -> hooks.Swept:
        """`hooks.sweep` over (prompt, seed) pairs, with images in [-1, 1]; options are its and the pipeline's."""
        o, e = self.row(*original), self.row(*edit)
        swept = hooks.sweep(self.pipeline, original=o, edit=e, rules=rules, **self.defaults | options)
        return hooks.Swept(swept.edit.float() * 2 - 1, swept.images.float() * 2 - 1)

    def _encode(self, prompt: str) -> dict[str, Any]:
        family = type(self.pipeline).__name__
        if family not in _ENCODERS:
            return {"prompt": prompt}
        names, arguments = _ENCODERS[family]
        with torch.no_grad():
            returned = self.pipeline.encode_prompt(
                prompt=prompt, device=self.pipeline._execution_device, num_images_per_prompt=1, **arguments, **self._negative
            )
        encoded = {key: value for key, value in zip(names, returned, strict=True) if key}
        # the empty prompt of guidance is encoded with the first prompt only
        self._negative = {key: value for key, value in encoded.items() if key.startswith("negative")}
        return encoded


def choose_device(device: str) -> torch.device:
    """`auto` is cuda, then mps, then cpu. Raises ProbekitError where the device is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ProbekitError(f"device {device!r}: not available here; use auto, cpu, cuda or mps") from error


def _dtype(dtype: str, device: torch.device, *, transformer: bool) -> torch.dtype:
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16" if transformer else "float16"
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise ProbekitError(f"dtype {dtype!r}: choose auto, {', '.join(known)}")
    return known[dtype]

"""How captions become pictures: a text-to-image pipeline of diffusers, run from embeddings that are made once."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probekit import hooks, seeds
from probekit.hooks.errors import ProbekitError
from probekit.hooks.pictures import pictures

_STABLE = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_PIXART = (
    ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"),
    {"do_classifier_free_guidance": True, "clean_caption": False},
)
# what encode_prompt returns, in order, and what it needs beyond the prompt, for each family; other pipelines take text
_ENCODERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "StableDiffusionPipeline": (_STABLE[:2], {"do_classifier_free_guidance": True}),
    "LatentConsistencyModelPipeline": (("prompt_embeds", ""), {"do_classifier_free_guidance": False}),
    "StableDiffusionXLPipeline": (_STABLE, {"do_classifier_free_guidance": True}),
    "StableDiffusion3Pipeline": (_STABLE, {"do_classifier_free_guidance": True, "prompt_2": None, "prompt_3": None}),
    "FluxPipeline": (("prompt_embeds", "pooled_prompt_embeds", ""), {"prompt_2": None}),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
}
_CLIP = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline", "StableDiffusionXLPipeline")
"""Pipelines whose embeddings are CLIP's alone, a token each: the end of the caption has its place in them."""

_TOKENIZERS = {
    "StableDiffusionPipeline": ("tokenizer",),
    "LatentConsistencyModelPipeline": ("tokenizer",),
    "StableDiffusionXLPipeline": ("tokenizer",),
    "StableDiffusion3Pipeline": ("tokenizer", "tokenizer_3"),
    "FluxPipeline": ("tokenizer_2",),
    "PixArtAlphaPipeline": ("tokenizer",),
    "PixArtSigmaPipeline": ("tokenizer",),
}
"""Whose tokens stand in the embeddings, one tokenizer's after the other's; those of two CLIPs stand side by side."""

_VARIANTS = re.compile("PAG|ControlNet(Union)?|Adapter|Kontext")
"""In a pipeline's name, what adds something to a family's painting, and nothing to its captions."""

_OF_PICTURES = re.compile("Control|Adapter|Upscale|Img2Img|Image2Image|Inpaint|Pix2Pix|Edit|Fill")
"""In a pipeline's name: it paints from pictures, too; others take them at most."""

_GUIDANCE = {"StableCascadeCombinedPipeline": "decoder_guidance_scale", "QwenImagePipeline": "true_cfg_scale"}
"""Pipelines of which `guidance_scale` is not the name of classifier-free guidance."""

_OF_SWEEPS = ("batch_size", "on_batch")
"""Options of `hooks.sweep` itself."""

_PICTURES = ("image", "control_image", "mask_image")
_CAPTION = re.compile(r"(negative_)?prompt(_\d)?")


class Painter:
    """A diffusers pipeline that makes pictures from captions. Pictures are (n, 3, h, w) in [-1, 1].

    name: of the model, for errors. defaults: pipeline options that hold where a call gives none, such as a guidance scale.

    Options that a pipeline wants once a row are given once, as all others: negative prompts, further prompts, and the pictures
    of a ControlNet, a T2I-Adapter or an upscaler (`image`, `control_image`, as that pipeline takes one). What its encoders of
    text are told (`clip_skip`, `max_sequence_length`, …) reaches them.
    """

    def __init__(self, pipeline: Any, name: str, defaults: Mapping[str, Any]) -> None:
        self.pipeline, self.name, self.defaults = pipeline, name, dict(defaults)
        self.kind = type(pipeline).__name__
        self._family = _VARIANTS.sub("", self.kind)
        self.parameters = inspect.signature(type(pipeline).__call__).parameters
        if _ENCODERS.get(self._family) is _PIXART:
            self.defaults["negative_prompt"] = None  # its default, "", is refused beside embeddings
        self._encoded: dict[tuple[str, str], dict[str, Any]] = {}
        self._negative: dict[str, dict[str, Any]] = {}
        pipeline.set_progress_bar_config(disable=True)
        if getattr(pipeline, "safety_checker", None) is not None:
            # it blacks out pictures that it takes offence at, damaged ones above all, and black would count as a result
            pipeline.register_modules(safety_checker=None)
            pipeline.register_to_config(requires_safety_checker=False)

    # --- captions ---------------------------------------------------------------------------------------------------------

    @property
    def encodes(self) -> tuple[str, ...]:
        """What captions become, by the names of the pipeline's arguments; nothing where the pipeline takes text alone."""
        names, _ = _ENCODERS.get(self._family, ((), {}))
        return tuple(name for name in names if name.endswith("prompt_embeds") and not name.startswith("negative"))

    @property
    def has_end(self) -> bool:
        """Whether the caption's end has a place in the embeddings."""
        return self._family in _CLIP

    def embedded(self, prompt: str, **told: Any) -> dict[str, Any]:
        """The prompt as the pipeline's arguments, encoded once and remembered. told: options of the pipeline's encoding."""
        key = repr(sorted(told.items()))
        if (prompt, key) not in self._encoded:
            self._encoded[prompt, key] = self._encode(prompt, key, told)
        return self._encoded[prompt, key]

    def words(self, prompt: str) -> list[tuple[str, tuple[int, ...]]]:
        """The caption's words in order, each with the numbers of its tokens in the embeddings.

        Nothing of a pipeline whose embeddings are not known to be its tokenizers' tokens, one after the other.
        """
        spoken = [(match[0], match.span()) for match in re.finditer(r"\S+", prompt)]
        found: list[list[int]] = [[] for _ in spoken]
        first = 0
        for name in _TOKENIZERS.get(self._family, ()):
            if (words := getattr(self.pipeline, name, None)) is None:
                break
            most = min(words.model_max_length, 512)
            offsets = words(prompt, truncation=True, max_length=most, return_offsets_mapping=True)["offset_mapping"]
            for token, (start, stop) in enumerate(offsets):
                for number, (_, (begin, end)) in enumerate(spoken):
                    if start < stop and start < end and stop > begin:
                        found[number].append(first + token)
            first += most
        return [(word, tuple(at)) for (word, _), at in zip(spoken, found, strict=True) if at]

    def end(self, prompt: str) -> int:
        """The number of the token that ends the prompt, of a pipeline that `has_end`."""
        words = self.pipeline.tokenizer
        told = words(prompt, padding="max_length", max_length=words.model_max_length, truncation=True).input_ids
        return told.index(words.eos_token_id)

    def _encode(self, prompt: str, key: str, told: dict[str, Any]) -> dict[str, Any]:
        if self._family not in _ENCODERS:
            return {"prompt": prompt}
        names, arguments = _ENCODERS[self._family]
        device = self.pipeline._execution_device
        negative = self._negative.get(key, {})
        told = {option: value for option, value in told.items() if not (negative and option.startswith("negative"))}
        with torch.no_grad():
            returned = self.pipeline.encode_prompt(
                prompt=prompt, device=device, num_images_per_prompt=1, **arguments | told, **negative
            )
        encoded = {name: value for name, value in zip(names, returned, strict=True) if name}
        # the negative prompt of guidance is encoded with the first prompt only
        self._negative[key] = {name: value for name, value in encoded.items() if name.startswith("negative")}
        return encoded

    @functools.cached_property
    def _of_encoding(self) -> frozenset[str]:
        """The pipeline's options that encode_prompt must be told, since it runs here."""
        if self._family not in _ENCODERS:
            return frozenset()
        taken = inspect.signature(self.pipeline.encode_prompt).parameters.keys() & self.parameters.keys()
        held = {name for name in taken if re.search("_embeds|_mask", name)}
        return frozenset(taken - held - {"prompt", "num_images_per_prompt"})

    # --- pictures ---------------------------------------------------------------------------------------------------------

    def row(self, prompt: str, noise: int | Tensor, seed: int = 0, **told: Any) -> dict[str, Any]:
        """What makes one row of a batch: the caption, and what the picture starts from.

        noise: its number (`seeds.numbered`), or a latent (1, *shape), the pipeline's `latents`, to which a picture is inverted.
        told: options that are particular to a row; see above.
        """
        encoding = {option: value for option, value in told.items() if option in self._of_encoding}
        start: dict[str, Any] = {"latents": noise} if isinstance(noise, Tensor) else {}
        # noise is drawn on the CPU, so that a number means the same noise on every device
        start["generator"] = seeds.numbered(seed, 0 if isinstance(noise, Tensor) else noise)
        return self.embedded(prompt, **encoding) | {k: v for k, v in told.items() if k not in encoding} | start

    def paint(self, rows: Sequence[Mapping[str, Any]], **options: Any) -> Float[Tensor, "n 3 h w"]:
        """Pictures of rows, as `row` makes them, in one batch. options: the pipeline's (`num_inference_steps`, …)."""
        told, shared = self._split(options)
        if late := sorted(told.keys() & self._of_encoding):
            raise ProbekitError(f"{late[0]}: the captions of these rows are encoded already; give it to `row`")
        return self._paint([dict(row) | told for row in rows], shared)

    def generate(
        self, prompts: Sequence[str], noises: Sequence[int | Tensor], *, seed: int = 0, **options: Any
    ) -> Float[Tensor, "n 3 h w"]:
        """Pictures of the prompts, each from the noise of that number. options: the pipeline's."""
        told, shared = self._split(options)
        return self._paint([self.row(p, noise, seed, **told) for p, noise in zip(prompts, noises, strict=True)], shared)

    def _paint(self, rows: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> Tensor:
        self._check_pictures(rows[0])
        return pictures(self.pipeline, rows, **shared) * 2 - 1

    def sweep(
        self,
        original: tuple[str, int | Tensor],
        edit: tuple[str, int | Tensor],
        rules: Sequence[Sequence[hooks.Injection]],
        *,
        others: Sequence[tuple[str, int | Tensor]] = (),
        seed: int = 0,
        **options: Any,
    ) -> hooks.Swept:
        """`hooks.sweep` over pairs (prompt, noise as of `row`), with images in [-1, 1]; options are its and the pipeline's."""
        layers = [injection.layer for rule in rules for injection in rule]
        (o, e, *more), shared = self.rows((original, edit, *others), layers, seed, **options)
        swept = hooks.sweep(self.pipeline, original=o, edit=e, rules=rules, others=more, **shared)
        return hooks.Swept(swept.edit * 2 - 1, swept.others * 2 - 1, swept.images * 2 - 1)

    def rows(
        self, pairs: Sequence[tuple[str, int | Tensor]], layers: Iterable[str], seed: int = 0, **options: Any
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows of pairs (prompt, noise as of `row`) in which those layers can be injected, and the options that they share."""
        told, shared = self._split(options)
        if any(layer.split(".")[0] in hooks.TEXT_ENCODERS for layer in layers):
            # captions are read anew, by encoders whose layers are injected
            rows, shared = self._read_anew(pairs, seed, told, shared)
        else:
            rows = [self.row(*pair, seed, **told) for pair in pairs]
        self._check_pictures(rows[0])
        return rows, shared

    def _read_anew(
        self, pairs: Sequence[tuple[str, int | Tensor]], seed: int, told: Mapping[str, Any], shared: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows whose captions are text, and what they share, such that the pipeline encodes them as `embedded` does."""
        shared = {key: value for key, value in shared.items() if value is not None}  # defaults that go with embeddings
        told = {key: value for key, value in told.items() if key not in shared}
        _, arguments = _ENCODERS.get(self._family, ((), {}))
        shared = {key: value for key, value in arguments.items() if key in self.parameters.keys() - told} | dict(shared)
        embeddings = self.embedded("").keys()
        rows = [
            {key: value for key, value in self.row("", noise, seed).items() if key not in embeddings}
            | told
            | {"prompt": prompt}
            for prompt, noise in pairs
        ]
        return rows, shared

    def _split(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options that are particular to a row, and those that all rows share, with the defaults."""
        names, options = self.parameters.keys(), self._known(options)
        of_rows = {name for name in names if name in _PICTURES or _CAPTION.fullmatch(name)} | self._of_encoding
        told = {option: value for option, value in options.items() if option in of_rows and value is not None}
        if "negative_prompt" in told and self.kind in ("KandinskyCombinedPipeline", "KandinskyV22CombinedPipeline"):
            raise ProbekitError(
                f"negative_prompt: the prior of model {self.name!r}, a {self.kind}, has noises for captions only"
            )
        # what is no caption is told to the pipeline, too: Flux's encodes negative prompts itself
        here = {option for option in told if option not in self._of_encoding or _CAPTION.fullmatch(option)}
        shared = self.defaults | {option: value for option, value in options.items() if option not in here}
        if "intermediate_timesteps" in names and shared.get("num_inference_steps", 2) != 2:
            shared.setdefault("intermediate_timesteps", None)  # SanaSprint's default is for two steps, and refused for others
        return told, shared

    def _known(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options as the pipeline names them. Raises ProbekitError for one that it does not have."""
        known = dict(options)
        config: Any = hooks.denoiser(self.pipeline).config
        if self._family in _GUIDANCE and "guidance_scale" in known and not config.get("guidance_embeds", False):
            known[_GUIDANCE[self._family]] = known.pop("guidance_scale")
            if self._family == "QwenImagePipeline":
                known.setdefault("negative_prompt", " ")  # without one it is not guided
        for option in known.keys() - self.parameters.keys() - set(_OF_SWEEPS):
            near = difflib.get_close_matches(option, self.parameters, cutoff=0.5)
            meant = f"; it takes {' and '.join(near)}" if near else ""
            raise ProbekitError(f"{option}: model {self.name!r}, a {self.kind}, has no such option{meant}")
        return known

    def _check_pictures(self, row: Mapping[str, Any]) -> None:
        """Raises ProbekitError where the pipeline paints from pictures that the row does not have."""
        if missing := [name for name in self._needed() if name not in row]:
            raise ProbekitError(
                f"model {self.name!r}: a {self.kind} does not paint from a caption alone; give {' and '.join(missing)} in "
                f"Python, as Painter.generate(prompts, noises, {missing[0]}=…)"
            )

    def _needed(self) -> list[str]:
        return [name for name in _PICTURES if name in self.parameters and _OF_PICTURES.search(self.kind)]

    @property
    def native(self) -> dict[str, Any]:
        """Options for pictures of exactly the size that the denoiser's config says, where it says one."""
        side, options = self._side(), dict[str, Any]()
        if side is not None:
            options = {name: side * self._factor() for name in ("height", "width") if name in self.parameters}
        if "use_resolution_binning" in self.parameters:
            options["use_resolution_binning"] = False  # it would make one of the published models' sizes of it
        return options

    def denoise_once(self) -> None:
        """Call the denoiser on one picture of its `native` size, else of the pipeline's own, for what watches its layers."""
        from PIL import Image

        side = self._side()
        if side is None:
            side = int(getattr(self.pipeline, "default_sample_size", 128))
        # an upscaler denoises codes that are as large as the picture which it is given
        side *= 1 if "Upscale" in self.kind else self._factor()
        blank = {name: Image.new("RGB", (side, side)) for name in self._needed()}
        told, shared = self._split(blank | {"num_inference_steps": 1})
        # what its codes are decoded to does not matter; Kandinsky 2.1 gives none undecoded
        made = "pt" if self.kind == "KandinskyCombinedPipeline" else "latent"
        with torch.no_grad():
            self.pipeline(**hooks.stack([self.row("", 0, **told)]), **self.native | shared, output_type=made)

    def _side(self) -> int | None:
        """The width of a square of codes, as the denoiser's config says it."""
        config: Any = hooks.denoiser(self.pipeline).config
        side = config.get("sample_size")
        return side if isinstance(side, int) else None

    def _factor(self) -> int:
        """Pixels a cell of the codes; 1 where pictures themselves are denoised."""
        movq = getattr(self.pipeline, "movq", None)
        found = 1 if movq is None else 2 ** (len(movq.config.block_out_channels) - 1)
        return getattr(self.pipeline, "vae_scale_factor", found)

    def check_guidance(self, guidance: float) -> None:
        """Raises ProbekitError for less than 1, which diffusers' pipelines take for none."""
        if guidance < 1:
            raise ProbekitError(f"--guidance {guidance:g}: text-to-image pipelines are guided from 1, which is none, upwards")

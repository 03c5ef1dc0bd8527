"""Text-to-image pipelines of diffusers: any whose denoiser is a U-Net of diffusers' blocks or a stack of transformer blocks."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probekit import hooks
from probekit.bundled import GUIDANCE, borrowed
from probekit.hooks.errors import ProbekitError
from probekit.models import hub
from probekit.models.formats import Format
from probekit.models.model import Condition, Maker, Model
from probekit.models.painter import Painter
from probekit.models.spaces import denoiser_spaces
from probekit.sampling import Denoiser, Diffusion, denoisers

_WITH_SPACES = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
    "HunyuanDiTPipeline",
)
"""Pipelines whose denoiser, told what `denoisers.captioned` tells it, samples what the pipeline paints. Others, those that add
something to these (PAG, ControlNets) among them, paint and have layers, but have no spaces."""

_DECODERS = ("KandinskyPipeline", "KandinskyV22Pipeline", "StableCascadeDecoderPipeline")
"""What makes pictures of image embeddings; a prior, a pipeline of its own, makes these of captions."""


def as_model(pipeline: Any, name: str) -> Model:
    """A diffusers text-to-image pipeline, with the spaces of a denoiser and those of captions.

    The spaces of noise and images are under the empty caption without guidance, `Model.conditioned` gives others; those of
    captions are painted at the pipeline's own guidance scale. Not every pipeline has spaces: `_WITH_SPACES`.
    """
    defaults: dict[str, Any] = {"guidance_scale": GUIDANCE[name]} if name in GUIDANCE else {}
    config: Any = hooks.denoiser(pipeline).config
    side = config.get("sample_size")
    binning = "use_resolution_binning" in inspect.signature(type(pipeline).__call__).parameters
    if binning and isinstance(side, int) and side * pipeline.vae_scale_factor < 256:
        defaults["use_resolution_binning"] = False  # to the published models' sizes; a smaller model is refused
    painter = Painter(pipeline, name, defaults)
    parts = {part: module for part, module in sorted(pipeline.components.items()) if isinstance(module, nn.Module)}
    return _under(Condition(), painter, nn.ModuleDict(parts))


def _under(condition: Condition, painter: Painter, network: nn.Module) -> Model:
    name = painter.name
    if condition.label is not None:
        raise ProbekitError(f"--label {condition.label}: model {name!r} has no classes; give a --prompt")
    if condition.guidance is not None:
        painter.check_guidance(condition.guidance)
    diffusion, makers = None, dict[str, Maker]()
    if _has_known_latents(painter):
        diffusion = _diffusion(painter, condition)
        makers = denoiser_spaces(diffusion, painter, condition.guidance)
    return Model(
        name,
        "text-to-image",
        diffusion.image_size if diffusion else None,
        network,
        makers,
        process=diffusion,
        paints=painter,
        on=lambda later: _under(condition.then(later), painter, network),
    )


def _has_known_latents(painter: Painter) -> bool:
    """Whether the states are a KL VAE's codes times its scaling factor, square pictures of them or Flux's tokens."""
    vae = getattr(painter.pipeline, "vae", None)
    if painter.kind not in _WITH_SPACES or vae is None or not {"scaling_factor", "latent_channels"} <= vae.config.keys():
        return False
    config: Any = hooks.denoiser(painter.pipeline).config
    return painter.kind == "FluxPipeline" or isinstance(config.get("sample_size"), int)


def _diffusion(painter: Painter, condition: Condition) -> Diffusion:
    """What is sampled and inverted with one caption; images are of the size that the model was trained for."""
    pipeline, vae = painter.pipeline, painter.pipeline.vae
    network = hooks.denoiser(pipeline)
    config: Any = network.config
    prompt, guidance = condition.prompt or "", 1.0 if condition.guidance is None else condition.guidance
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    packs = painter.kind == "FluxPipeline"  # into tokens of 2x2 latents
    side = pipeline.default_sample_size if packs else config.sample_size
    size, channels = side * pipeline.vae_scale_factor, vae.config.latent_channels
    shape = (side // 2 * (side // 2), 4 * channels) if packs else (channels, side, side)

    def encode(images: Tensor) -> Tensor:
        states = (vae.encode(images.to(pipeline._execution_device, vae.dtype)).latent_dist.mean - shift) * scale
        return pipeline._pack_latents(states, len(states), channels, side, side) if packs else states

    def decode(states: Tensor) -> Tensor:
        states = states.to(pipeline._execution_device, vae.dtype)
        if packs:
            states = pipeline._unpack_latents(states, size, size, pipeline.vae_scale_factor)
        return vae.decode(states / scale + shift, return_dict=False)[0]

    options = painter.native | {key: value for key, value in painter.defaults.items() if key != "guidance_scale"}

    def captioned(captions: Sequence[str]) -> Denoiser:
        return denoisers.captioned(pipeline, [painter.row(caption, 0) for caption in captions], guidance, **options)

    @functools.cache
    def predict(rows: int) -> Denoiser:
        return captioned([prompt] * rows)

    return Diffusion(
        painter.name,
        size,
        shape,
        pipeline.scheduler,
        network,
        predict,
        encode,
        decode,
        tokens=shape[0] if packs else None,
        condition={"prompt": prompt, "guidance": guidance},
        captioned=captioned,
    )


def load_pipeline(
    path: str | Path, name: str, device: torch.device, dtype: str = "auto", variant: str | None = None, offload: str = "none"
) -> Model:
    """Load what `save_pretrained` wrote, or a hub id. Raises ProbekitError, in one line, where that fails."""
    from diffusers import AutoPipelineForText2Image, DiffusionPipeline

    hub.hush()
    try:
        index = DiffusionPipeline.load_config(str(path))
        chosen = hub.precision(dtype, device, transformer="transformer" in index)
        if "PaellaVQModel" in index.get("vqgan", ()):
            _find_paella()
        decodes = index["_class_name"] in _DECODERS
        if decodes:
            _check_prior(Path(path), index["_class_name"], name)
        loader = AutoPipelineForText2Image if decodes else DiffusionPipeline  # the former loads its prior, too
        form = hub.choose_variant(path, name, variant, chosen, hooks.DENOISER_NAMES)
        pipeline = loader.from_pretrained(str(path), dtype=chosen, variant=form, **_not_there(Path(path), index, chosen))
    except ProbekitError:
        raise
    except Exception as error:  # diffusers, safetensors and the hub raise a dozen kinds
        raise hub.not_loaded(name, error) from error
    try:
        hooks.denoiser(pipeline)
    except ProbekitError as error:
        raise ProbekitError(f"model {name!r}: {error}") from error
    if "prompt" not in inspect.signature(type(pipeline).__call__).parameters:
        raise ProbekitError(f"model {name!r}: a {type(pipeline).__name__} takes no prompt; give a text-to-image pipeline")
    hub.put_on(pipeline, device, offload)
    return as_model(pipeline, name)


def _check_prior(folder: Path, kind: str, name: str) -> None:
    """A decoder's model card says which prior it needs, by folder or hub id; one that is on the hub is looked up there."""
    from huggingface_hub import ModelCard

    if not folder.is_dir():
        return
    card = folder / "README.md"
    if not card.is_file() or not getattr(ModelCard.load(card).data, "prior", None):
        raise ProbekitError(
            f"model {name!r}: a {kind} decodes the image embeddings of a prior; name its folder or hub id in {card}, between "
            f"lines of '---' as 'prior: [kandinsky-community/kandinsky-2-2-prior]', or give a pipeline saved with both"
        )


def _find_paella() -> None:
    """Where files name the class of Stable Cascade's autoencoder, diffusers has it no longer since 0.42: it is put there."""
    import diffusers
    from diffusers.pipelines.deprecated import wuerstchen

    vars(diffusers.pipelines).setdefault("wuerstchen", wuerstchen)
    vars(diffusers).setdefault("PaellaVQModel", wuerstchen.PaellaVQModel)


def _not_there(folder: Path, index: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told of what the folder lacks: parts that bundled models lend, and that SD3 goes without T5."""
    found: dict[str, Any] = {part: None for part in ("text_encoder_3", "tokenizer_3") if index.get(part) == [None, None]}
    for part, place in borrowed(folder).items():
        library, kind = index[part]
        loader = getattr(importlib.import_module(library), kind)
        found[part] = loader.from_pretrained(place, **({"dtype": dtype} if issubclass(loader, nn.Module) else {}))
    return found


FORMATS = (
    Format(
        "a diffusers text-to-image pipeline",
        lambda place: place.is_pipeline,
        lambda place: load_pipeline(place.at, place.name, place.device, place.dtype, place.variant, place.offload),
    ),
)

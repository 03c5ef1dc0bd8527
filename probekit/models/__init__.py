"""Models and how to load them: a bundled name, a local folder, a hub id, one of the papers' checkpoint files."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from probekit import checked
from probekit.bundled import MODELS, PIPELINES, trained, weights
from probekit.hooks.errors import ProbekitError
from probekit.latents import LatentSpace
from probekit.models import configs, hub
from probekit.models.families import (
    custom,
    glow,
    latent_diffusion,
    pixels,
    random,
    stylegan2,
    text_to_image,
    vae,
    vqvae,
)
from probekit.models.formats import HUB_ID, Format, Place
from probekit.models.hub import check_offload, choose_device
from probekit.models.model import Model
from probekit.models.papers import ddpm, diffusevae, rosinality, stylegan2_ada

__all__ = ["FORMATS", "Model", "load", "load_space", "load_spaces", "load_with_models"]

FORMATS: list[Format] = [
    *vae.FORMATS,
    *vqvae.FORMATS,
    *glow.FORMATS,
    *stylegan2.FORMATS,
    *stylegan2_ada.FORMATS,
    *pixels.FORMATS,
    *latent_diffusion.FORMATS,
    *ddpm.FORMATS,
    *rosinality.FORMATS,
    *diffusevae.FORMATS,
    *text_to_image.FORMATS,  # last: it takes whatever is a pipeline
]
"""Everything that `load` recognises; the first that matches is it."""

_SUFFIXES = (".ckpt", ".pkl", ".pt", ".pth", ".safetensors")


def load(
    name_or_path: str | Path, *, device: str = "auto", dtype: str = "auto", variant: str | None = None, offload: str = "none"
) -> Model:
    """Load a generative model; of which family it is, is recognised (`FORMATS`).

    name_or_path: a bundled model (`mini-sd`, `avatar-vae`, …) or `random`; a folder that diffusers' `save_pretrained` wrote;
    a hub id such as `stabilityai/stable-diffusion-2` or `google/ddpm-cifar10-32`; a file of the papers' authors: a `.pt` of
    rosinality's Glow, a `.ckpt` of DiffuseVAE or of ermongroup's ddim, a `.pt` of OpenAI's improved or guided diffusion, a
    `.pkl` of StyleGAN2-ADA, in which nothing is ever run; or `FILE.py:CLASS`, a class of the user's own, which is.
    device: `auto` (cuda, then mps, then cpu) or a torch device. dtype: `auto` (float32 on the CPU, elsewhere bfloat16 for
    transformers and float16 for U-Nets), or `float32`, `float16`, `bfloat16`; only text-to-image models compute in other than
    float32.
    variant: which of a pipeline's files, such as `fp16`, which is found by itself where it serves. offload: what of a pipeline
    waits on the CPU until the GPU needs it: `none`, whole parts (`model`), or single modules (`sequential`: slowest, smallest).

    Raises ProbekitError, in one line, for what is none of these and for a folder or file that cannot be read.
    """
    name = str(name_or_path)
    chosen = choose_device(device)
    check_offload(offload, chosen)
    if name == "random":
        return random.as_model()
    place = Place(name, _path(name_or_path), chosen, dtype, variant, offload)
    if re.search(r"\.py:\w+$", name):
        file, _, class_name = name.rpartition(":")
        return _on(place, custom.load_class(checked.path(f"model {checked.shown(name)}", file), class_name))
    path = place.path
    if name in (*PIPELINES, *MODELS):
        if not trained(name):
            raise ProbekitError(f"model {name!r}: is not trained yet; probekit zoo train {name}")
        path = weights(name)
        place = dataclasses.replace(place, path=path)
    if not (path.is_file() or path.is_dir()) and (path.exists() or path.suffix in _SUFFIXES or not re.fullmatch(HUB_ID, name)):
        bundled = [*PIPELINES, *MODELS, "random"]
        near = difflib.get_close_matches(name, bundled, n=1) or bundled
        raise ProbekitError(
            f"model {name!r}: neither a bundled model ({', '.join(near)}) nor a folder nor a file nor a hub id (owner/name)"
        )
    if not path.exists() and (kept := hub.kept(name)) is not None:
        path, place = kept, dataclasses.replace(place, path=kept)
    if path.is_dir():
        configs.check(path, name)
    for known in FORMATS:
        if known.matches(place):
            with hub.loading(name):
                return _on(place, known.load(place))
    raise ProbekitError(_unknown(place))


def load_space(spec: str, *, device: str = "auto", dtype: str = "auto") -> LatentSpace:
    """A latent space by `MODEL` (its default space), `MODEL:SPACE` or `MODEL:SPACE:key=value:key=value`.

    MODEL is what `load` takes. Raises ProbekitError for a model that cannot be loaded or has no such space or parameter.
    """
    name, space = _split(spec)
    return load(name, device=device, dtype=dtype).space(space or None, label=spec)


def load_spaces(specs: Sequence[str], *, device: str = "auto", baseline: bool = False) -> list[LatentSpace]:
    """Several spaces, as `load_space` reads them, and with `baseline` the random encoder beside them.

    A model that several name is loaded once. Convolutional models among others take the others' image size, as All Roads has it
    with the VQ-VAE made for 256 pixels. Raises ProbekitError as `load_space`.
    """
    return [space for _, space in load_with_models(specs, device=device, baseline=baseline)]


def load_with_models(specs: Sequence[str], *, device: str = "auto", baseline: bool = False) -> list[tuple[Model, LatentSpace]]:
    """`load_spaces`, each space with its model: for what asks more of it, such as its other inputs."""
    wanted = [*specs, *(["random"] if baseline and not any(_split(spec)[0] == "random" for spec in specs) else [])]
    models: dict[str, Model] = {}
    for spec in wanted:
        name, _ = _split(spec)
        if name not in models:
            models[name] = load(name, device=device)
    sizes = {model.image_size for model in models.values() if model.at_size is None and model.image_size is not None}
    found = []
    for spec in wanted:
        name, space = _split(spec)
        model = models[name]
        if len(sizes) == 1 and model.at_size is not None and model.image_size not in sizes:
            model = models[name] = model.at_size(*sizes)
        found.append((model, model.space(space or None, label=spec)))
    return found


def _split(spec: str) -> tuple[str, str]:
    """The model and the space that a spec names; a colon may be part of a path. Raises ProbekitError for a colon at its end."""
    if spec.endswith(":"):
        raise ProbekitError(f"space {checked.shown(spec)}: ends with a colon; name a space after it, or leave it out")
    if own := re.match(r"(.+\.py:\w+)(?::(.*))?$", spec):
        return own[1], own[2] or ""
    parts = spec.split(":")
    for count in range(len(parts), 0, -1):
        if _path(":".join(parts[:count])).exists():
            return ":".join(parts[:count]), ":".join(parts[count:])
    return parts[0], ":".join(parts[1:])


def _on(place: Place, loaded: Model) -> Model:
    """The model on its device. Raises ProbekitError for a precision that it does not compute in, and what is for pipelines."""
    if loaded.paints is not None:
        return loaded
    if place.dtype not in ("auto", "float32"):
        raise ProbekitError(f"dtype {place.dtype!r}: a {loaded.family} computes in float32")
    if place.variant is not None or place.offload != "none":
        option = f"--variant {place.variant!r}" if place.variant is not None else f"--offload {place.offload!r}"
        raise ProbekitError(f"{option}: is for text-to-image pipelines; model {place.name!r} is a {loaded.family}")
    if loaded.network is not None:
        loaded.network.to(place.device).eval()
    return loaded


def _path(name_or_path: str | Path) -> Path:
    return checked.path(f"model {checked.shown(str(name_or_path))}", name_or_path)


def _unknown(place: Place) -> str:
    """Why nothing matched."""
    if family := place.metadata.get("family"):
        return f"model {place.name!r}: of a family {family!r} that this version does not know"
    if place.is_file:
        return (
            f"model {place.name!r}: holds none of a Glow (rosinality), a VAE (DiffuseVAE), a U-Net (ddim, improved or guided "
            "diffusion) and a StyleGAN2-ADA"
        )
    if place.kind and place.kind != "None":
        return f"model {place.name!r}: the folder holds a {place.kind}; whole pipelines, UNet2DModel and VQModel are known"
    return f"model {place.name!r}: the folder is no model, it has neither a model_index.json nor a config.json of diffusers"

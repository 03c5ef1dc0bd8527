"""Models and how to load them: a bundled name, a local folder, a hub id, one of the papers' checkpoint files."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from probekit.errors import ProbekitError
from probekit.latents import LatentSpace
from probekit.models import checkpoint, custom, ddpm, ddpm_checkpoints, glow, latent_diffusion, random, stylegan2, vae, vqvae
from probekit.models.model import Model
from probekit.models.text_to_image import TextToImage, choose_device
from probekit.sampling import Diffusion
from probekit.zoo import MODELS, PIPELINES, trained, weights

__all__ = ["Model", "TextToImage", "load", "load_diffusion", "load_space", "load_text_to_image"]

_NOISE_ONLY = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
_LATENT = ("LDMPipeline", "DiTPipeline")
_HUB_ID = r"[\w.-]+/[\w.-]+"
_SUFFIXES = (".ckpt", ".pkl", ".pt", ".pth", ".safetensors")


def load(name_or_path: str | Path, *, device: str = "auto", dtype: str = "auto") -> TextToImage | Model:
    """Load a text-to-image pipeline, or a generative model with its latent spaces; which it is, is recognised.

    name_or_path: a bundled model (`mini-sd`, `avatar-vae`, …) or `random`; a folder that diffusers' `save_pretrained` wrote;
    a hub id such as `stabilityai/stable-diffusion-2` or `google/ddpm-cifar10-32`; or a file of the papers' authors: a `.pt` of
    rosinality's Glow, a `.ckpt` of DiffuseVAE or of ermongroup's ddim, a `.pt` of OpenAI's improved or guided diffusion, a
    `.pkl` of StyleGAN2-ADA. Nothing in a file is ever run.
    device: `auto` (cuda, then mps, then cpu) or a torch device. dtype: `auto` (float32 on the CPU, elsewhere bfloat16 for
    transformers and float16 for U-Nets), or `float32`, `float16`, `bfloat16`; models with latent spaces are float32.

    Raises ProbekitError, in one line, for what is none of these and for a folder or file that cannot be read.
    """
    name, path = str(name_or_path), _path(name_or_path)
    if name in PIPELINES:
        return TextToImage.from_pretrained(weights(name), name=name, device=device, dtype=dtype)
    if name == "random":
        return random.model(32)
    if name in MODELS:
        if not trained(name):
            raise ProbekitError(f"model {name!r}: is not trained yet; probekit zoo train {name}")
        path = weights(name)
    if path.is_file():
        return _on(device, dtype, _load_file(path, name))
    if not path.is_dir() and (path.exists() or path.suffix in _SUFFIXES or not re.fullmatch(_HUB_ID, name)):
        bundled = [*PIPELINES, *MODELS, "random"]
        near = difflib.get_close_matches(name, bundled, n=1) or bundled
        raise ProbekitError(
            f"model {name!r}: neither a bundled model ({', '.join(near)}) nor a folder nor a file nor a hub id (owner/name)"
        )
    if path.is_dir() and not (path / "model_index.json").is_file():
        return _on(device, dtype, _load_folder(path, name))
    place = path if path.is_dir() else name
    loaders = {**dict.fromkeys(_LATENT, latent_diffusion.load_folder), **dict.fromkeys(_NOISE_ONLY, ddpm.load_folder)}
    if loader := loaders.get(_pipeline_class(place)):
        return _on(device, dtype, loader(place, name))
    return TextToImage.from_pretrained(place, name=name, device=device, dtype=dtype)


def load_space(spec: str, *, device: str = "auto") -> tuple[Model, LatentSpace]:
    """A model's latent space by `MODEL`, its default space, `MODEL:SPACE`, or `FILE.py:CLASS` for one of the user's own.

    Raises ProbekitError for a model that cannot be loaded or has no such space.
    """
    if re.search(r"\.py:\w+$", spec):
        file, _, class_name = spec.rpartition(":")
        own = custom.load_class(Path(file).expanduser(), class_name)
        return own, own.space()
    # a colon may be part of a path
    name, colon, space = spec.rpartition(":")
    if not colon or Path(spec).expanduser().exists():
        name, space = spec, ""
    loaded = load(name, device=device)
    if not isinstance(loaded, Model):
        raise ProbekitError(f"model {name!r}: a text-to-image pipeline, which has no latent spaces here yet")
    return loaded, loaded.space(space or None)


def load_diffusion(
    name_or_path: str, *, device: str = "auto", dtype: str = "auto", prompt: str | None = None, label: int | None = None,
    guidance: float = 1.0,
) -> tuple[Model | TextToImage, Diffusion]:  # fmt: skip
    """`load`, for where noise is to become images and back: the model, and what sampling and inversion need of it.

    prompt: the caption of a text-to-image model's images, empty where it is None; label: the class of a DiT's. Raises
    ProbekitError for a model without noise to start from, and for a prompt, label or guidance that the model has no use for.
    """
    name, path = str(name_or_path), _path(name_or_path)
    guided = label is not None or guidance != 1
    of_class = guided and (path.is_dir() or re.fullmatch(_HUB_ID, name)) and _pipeline_class(path) == "DiTPipeline"
    loaded: Model | TextToImage
    if of_class:
        loaded = _on(device, dtype, latent_diffusion.load_folder(path, name, label=label, guidance=guidance))
    else:
        loaded = load(name_or_path, device=device, dtype=dtype)
    if isinstance(loaded, TextToImage):
        if label is not None:
            raise ProbekitError(f"--label {label}: model {loaded.name!r} has no classes; give a --prompt")
        return loaded, loaded.diffusion(prompt or "", guidance)
    if loaded.diffusion is None:
        raise ProbekitError(f"model {loaded.name!r}: a {loaded.family}, which makes no images from noise step by step")
    if prompt is not None:
        raise ProbekitError(f"--prompt {prompt!r}: model {loaded.name!r} takes none")
    if guided and not of_class:
        option = f"--guidance {guidance:g}" if label is None else f"--label {label}"
        raise ProbekitError(f"{option}: model {loaded.name!r} has no classes")
    return loaded, loaded.diffusion


def load_text_to_image(name_or_path: str | Path, *, device: str = "auto", dtype: str = "auto") -> TextToImage:
    """`load`, for where only a text-to-image pipeline will do. Raises ProbekitError for another kind of model."""
    loaded = load(name_or_path, device=device, dtype=dtype)
    if isinstance(loaded, Model):
        raise ProbekitError(f"model {loaded.name!r}: a {loaded.family}, which takes no prompt; name a text-to-image model")
    return loaded


def _on(device: str, dtype: str, loaded: Model) -> Model:
    if dtype not in ("auto", "float32"):
        raise ProbekitError(f"dtype {dtype!r}: a {loaded.family} computes in float32")
    if loaded.network is not None:
        loaded.network.to(choose_device(device)).eval()
    return loaded


def _path(name_or_path: str | Path) -> Path:
    """The path with `~` made whole, where it can be looked at."""
    try:
        path = Path(name_or_path).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long a name, a folder that may not be read, nobody's home
        reason = getattr(error, "strerror", error)
        raise ProbekitError(f"model {str(name_or_path)[:160]!r}: cannot be read ({reason})") from error
    return path


def _pipeline_class(place: str | Path) -> str:
    """The class that a folder's or hub id's model_index.json names, "" where there is none to read."""
    from diffusers import DiffusionPipeline

    try:
        return str(DiffusionPipeline.load_config(str(place)).get("_class_name"))
    except Exception:  # diffusers and the hub raise a dozen kinds; TextToImage says which
        return ""


def _load_folder(folder: Path, name: str) -> Model:
    """A folder of a single diffusers network, or of one that probekit saved itself."""
    own = folder / "model.safetensors"
    if own.is_file() and (saved := _metadata(own, name)).get("family"):
        return _own(saved, checkpoint.read(own), name)
    try:
        kind = str(json.loads((folder / "config.json").read_bytes()).get("_class_name"))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ProbekitError(
            f"model {name!r}: the folder is no model, it has neither a model_index.json nor a config.json of diffusers"
        ) from error
    loaders = {"UNet2DModel": ddpm.load_folder, "VQModel": vqvae.load_folder}
    if kind not in loaders:
        raise ProbekitError(f"model {name!r}: the folder holds a {kind}; whole pipelines, {' and '.join(loaders)} are known")
    return loaders[kind](folder, name)


def _own(saved: Mapping[str, str], state: Mapping[str, Any], name: str) -> Model:
    """A network whose file says its family and its images' size."""
    if not saved.get("image_size", "").isdecimal():
        raise ProbekitError(f"model {name!r}: its image_size is {saved.get('image_size')!r}, a number of pixels is needed")
    return _of_family(saved["family"], state, name, int(saved["image_size"]))


def _metadata(file: Path, name: str) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as tensors:
            return tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ProbekitError(f"model {name!r}: {str(file)!r} is damaged ({error})") from error


def _of_family(family: str, state: Mapping[str, Any], name: str, image_size: int) -> Model:
    """A network that probekit saved, from its tensors alone."""
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    builders: dict[str, Any] = {"vae": vae.VAE, "glow": glow.Glow, "stylegan2": stylegan2.Generator}
    families: dict[str, Any] = {"vae": vae, "glow": glow, "stylegan2": stylegan2}
    if family not in families:
        raise ProbekitError(f"model {name!r}: of a family {family!r} that this version does not know")
    try:
        network: Any = checkpoint.allow(lambda: builders[family](**families[family].config_of(state)), state)
    except ProbekitError as error:
        raise ProbekitError(f"model {name!r}: {error}") from error
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ProbekitError(f"model {name!r}: its tensors make no {family} ({' '.join(str(error).split())[:160]})") from error
    return glow.model(network, name, image_size) if family == "glow" else families[family].model(network, name)


def _load_file(file: Path, name: str) -> Model:
    """One of the papers' files; the names in it tell which."""
    content = checkpoint.read(file)
    if file.suffix == ".safetensors" and (saved := _metadata(file, name)).get("family"):
        return _own(saved, content, name)
    if stylegan2.matches(content):
        if "G_ema" in content:
            return stylegan2.from_ada(content, name)
        return _of_family("stylegan2", checkpoint.tensors(content), name, 0)
    for recognised, build in (
        (ddpm_checkpoints.is_ermon, ddpm_checkpoints.from_ermon),
        (ddpm_checkpoints.is_openai, ddpm_checkpoints.from_openai),
    ):
        if recognised(content):
            scheduler = ddpm_checkpoints.published_scheduler(content)
            return ddpm.model(build(content), scheduler, name, told=1000 / scheduler.config.num_train_timesteps)
    if isinstance(content, Mapping) and glow.matches(str(key) for key in content):
        return glow.from_rosinality(content, name)
    if vae.matches(content):
        return vae.from_diffusevae(content, name)
    raise ProbekitError(
        f"model {name!r}: holds none of a Glow (rosinality), a VAE (DiffuseVAE), a U-Net (ddim, improved or guided diffusion) "
        "and a StyleGAN2-ADA"
    )

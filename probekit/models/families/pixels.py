"""Unconditional models of pixels: diffusion (DDPM, Ho et al. 2020) and rectified flow (Liu et al. 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from probekit import seeds
from probekit.hooks.errors import ProbekitError
from probekit.models import hub
from probekit.models.formats import Format
from probekit.models.model import Model
from probekit.models.spaces import denoiser_spaces
from probekit.sampling import Diffusion, denoisers
from probekit.sampling.schedule import reversible

_LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}  # Ho et al. 2020, section 4
_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")


def as_model(unet: Any, scheduler: Any, name: str, *, told: float = 1.0) -> Model:
    """A diffusers `UNet2DModel` of pixels with the spaces of a denoiser, the image's size being its config's.

    scheduler: any of diffusers' that has the model's betas, or a `FlowMatchEulerDiscreteScheduler`. told: what the network is
    told for a timestep of 1. The second half of six output channels, a learned variance, is not used.

    Raises ProbekitError for networks of other than three channels and for class-conditional ones.
    """
    scheduler = reversible({"_class_name": type(scheduler).__name__, **scheduler.config})
    config = unet.config
    if config.in_channels != 3 or config.out_channels not in (3, 6):
        raise ProbekitError(
            f"model {name!r}: takes {config.in_channels} and gives {config.out_channels} channels; images have 3"
        )
    if unet.class_embedding is not None:
        raise ProbekitError(f"model {name!r}: is class-conditional; an unconditional one is needed")
    size = config.sample_size
    if not isinstance(size, int):
        raise ProbekitError(f"model {name!r}: its config's sample_size is {size}, it needs one number for height and width")
    predict = denoisers.unconditional(unet, told)
    diffusion = Diffusion(name, size, (3, size, size), scheduler, unet, lambda rows: predict, told=told)
    family = "flow" if diffusion.schedule(1).prediction == "flow" else "ddpm"
    return Model(name, family, size, unet, denoiser_spaces(diffusion), process=diffusion)


def load_folder(path: str | Path, name: str) -> Model:
    """Load a folder that a DDPMPipeline's or DDIMPipeline's `save_pretrained` wrote, or a hub id (`google/ddpm-cifar10-32`).

    A folder of `UNet2DModel.save_pretrained` does too: without a scheduler, betas are linear from 1e-4 to 0.02 in 1000
    steps. Raises ProbekitError, in one line, for what is none of these and for weights that are damaged or incomplete.
    """
    from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel

    hub.hush()
    place = hub.place(path, name)
    index = _config(DiffusionPipeline, place, None)
    parts = {part for part, value in index.items() if isinstance(value, (list, tuple)) and any(value)}
    if other := sorted(parts - {"unet", "scheduler"}):
        raise ProbekitError(f"model {name!r}: a {index.get('_class_name')}, which has a {other[0]}; a DDPMPipeline would do")
    # older hub models keep the parts of a pipeline side by side, without folders
    for part in ("unet", None):
        config = _config(UNet2DModel, place, part)
        if config.get("_class_name") == "UNet2DModel":
            break
    else:
        reason = config.get("error") or f"it holds a {config.get('_class_name')}"
        raise ProbekitError(f"model {name!r}: no UNet2DModel in {str(path)!r} ({reason})")
    for where in ("scheduler", None):
        noise = _config(DDIMScheduler, place, where)
        if "_class_name" in noise:
            break
    else:
        if parts or not Path(place).is_dir() or (Path(place) / "scheduler_config.json").exists():
            raise ProbekitError(f"model {name!r}: its scheduler cannot be read ({noise.get('error', 'it names no class')})")
        noise = _LINEAR
    unet = hub.load_part(UNet2DModel, place, part, name)
    try:
        scheduler = reversible(noise)
    except ProbekitError as error:
        raise ProbekitError(f"model {name!r}: {error}") from error
    return as_model(unet, scheduler, name)


FORMATS = (
    Format(
        "a diffusers `UNet2DModel` or DDPM pipeline, with a DDPM or a flow-matching scheduler",
        lambda place: place.kind in ("UNet2DModel", *_PIPELINES),
        lambda place: load_folder(place.at, place.name),
    ),
)


def loss(
    unet: Any, images: Float[Tensor, "n 3 h w"], generator: torch.Generator, scheduler: Any
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """The simple loss, equation 14 of Ho et al. 2020: mean squared error of epsilon at timesteps drawn uniformly.

    Of velocity where the scheduler's prediction_type says so; with a `FlowMatchEulerDiscreteScheduler` that of rectified flow
    (Liu et al. 2023, equation 1), whose target is epsilon - image. Timesteps, then noise, are drawn from the generator. Noise
    is added in float32, whatever the network's precision: in bfloat16 the first levels would have none.
    """
    last = scheduler.config.num_train_timesteps
    timesteps = torch.randint(last, (len(images),), generator=generator, device=generator.device).to(images.device)
    images = images.float()
    epsilon = seeds.drawn(images.shape[1:], len(images), generator).to(images)
    if hasattr(scheduler, "scale_noise"):
        timesteps = timesteps + 1  # the schedule's are 1 to 1000; at 0 there is no noise
        sigma = (timesteps / last).view(-1, 1, 1, 1)
        noisy, target = (1 - sigma) * images + sigma * epsilon, epsilon - images
    else:
        noisy = scheduler.add_noise(images, epsilon, timesteps)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(images, epsilon, timesteps) if velocity else epsilon
    error = F.mse_loss(unet(noisy.to(unet.dtype), timesteps).sample[:, :3].float(), target)
    return error, {"squared_error": error.item()}


def _config(kind: Any, place: str, part: str | None) -> dict[str, Any]:
    """A part's config, or {"error": the reason} where there is none to read."""
    try:
        return dict(kind.load_config(place, subfolder=part))
    except Exception as error:  # diffusers, json and the hub raise a dozen kinds
        return {"error": " ".join(str(error).split())[:160]}

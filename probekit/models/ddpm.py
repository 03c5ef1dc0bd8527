"""Unconditional models of pixels, diffusion (DDPM, Ho et al. 2020) and rectified flow (Liu et al. 2023), and their spaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from probekit import hooks
from probekit.errors import ProbekitError
from probekit.latents import LatentSpace
from probekit.models import hub
from probekit.models.model import Model
from probekit.sampling import Diffusion, Schedule, denoisers, invert, sample
from probekit.sampling.schedule import check_steps, level_at, reversible

_LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}  # Ho et al. 2020, section 4


def model(
    unet: Any, scheduler: Any, name: str, *, steps: int = 50, noised_at: int | None = None, h_at: int | None = None,
    told: float = 1.0,
) -> Model:  # fmt: skip
    """A diffusers `UNet2DModel` of pixels with its spaces, the image's size being its config's.

    scheduler: any of diffusers' that has the model's betas, or a `FlowMatchEulerDiscreteScheduler`. steps: network calls of an
    inversion and of a sampling. told: what the network is told for a timestep of 1.

    - `inverted`: the latent of plain inversion, by DDIM or Euler's method; decoding samples from it.
    - `noised`: signal * image + noise * epsilon at timestep `noised_at` (the last), epsilon from the generator; decoding
      samples from there. Only at the last timestep has it a prior to sample from, N(0, 1).
    - `h`: h-space (Kwon et al. 2023), what the middle block gives for the image noised to timestep `h_at` (half the schedule).
      The noise is one for all images, drawn once with seed 0, so that images alone make the difference. It cannot be decoded.

    The second half of six output channels, a learned variance, is not used; decoded images are clamped to [-1, 1].

    Raises ProbekitError for networks of other than three channels, class-conditional ones, and numbers outside the schedule.
    """
    scheduler = reversible({"_class_name": type(scheduler).__name__, **scheduler.config})
    config, trained = unet.config, scheduler.config.num_train_timesteps
    if config.in_channels != 3 or config.out_channels not in (3, 6):
        raise ProbekitError(
            f"model {name!r}: takes {config.in_channels} and gives {config.out_channels} channels; images have 3"
        )
    if unet.class_embedding is not None:
        raise ProbekitError(f"model {name!r}: is class-conditional; an unconditional one is needed")
    size = config.sample_size
    if not isinstance(size, int):
        raise ProbekitError(f"model {name!r}: its config's sample_size is {size}, it needs one number for height and width")
    noised_at = trained - 1 if noised_at is None else noised_at
    h_at = trained // 2 if h_at is None else h_at
    for option, timestep in (("noised_at", noised_at), ("h_at", h_at)):
        if not 0 <= timestep < trained:
            raise ProbekitError(f"{option} {timestep}: the schedule has timesteps 0 to {trained - 1}")
    check_steps(steps, trained)
    predict, strides = denoisers.unconditional(unet, told), Schedule.of(scheduler, steps)
    from_noised = Schedule.of(scheduler, min(steps, noised_at + 1), start=noised_at)
    shape = (3, size, size)

    def there(values: Tensor) -> Tensor:
        return values.to(unet.device, torch.float32)

    def taken(images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != shape:
            raise ProbekitError(f"images of shape {tuple(images.shape[1:])}: model {name!r} takes {shape}")
        return there(images)

    def prior(n: int, generator: torch.Generator) -> Tensor:
        return _noise(n, shape, generator)

    def inverted(images: Tensor, generator: torch.Generator) -> Tensor:
        return invert(predict, taken(images), strides).end.cpu()

    def sampled(latents: Tensor) -> Tensor:
        return sample(predict, there(latents), strides).end.cpu().clamp(-1, 1)

    def noise(images: Tensor, generator: torch.Generator) -> Tensor:
        return _forward(scheduler, taken(images), noised_at, there(prior(len(images), generator))).cpu()

    def denoise(latents: Tensor) -> Tensor:
        return sample(predict, there(latents), from_noised).end.cpu().clamp(-1, 1)

    spaces = [
        LatentSpace(name, "inverted", shape, f"the latent of {steps} inversion steps", inverted, sampled, prior),
        LatentSpace(
            name, "noised", shape, f"the image noised to timestep {noised_at}", noise, denoise,
            prior if noised_at == trained - 1 else None,
        ),
    ]  # fmt: skip
    if unet.mid_block is not None:
        fixed = prior(1, torch.Generator().manual_seed(0))

        def h(images: Tensor, generator: torch.Generator) -> Tensor:
            noisy = _forward(scheduler, taken(images), h_at, there(fixed))
            with hooks.capture(unet, ["mid_block"], schedule=[h_at * told], rows=len(noisy)) as captured:
                unet(noisy.to(unet.dtype), torch.tensor(h_at * told, device=unet.device))
            return captured["mid_block", 0][0].float().cpu()

        about = f"the middle block's output at timestep {h_at}, the same noise on every image"
        spaces.append(LatentSpace(name, "h", _h_shape(unet, size), about, h))
    diffusion = Diffusion(name, size, shape, scheduler, lambda rows: predict, there, lambda states: states)
    family = "flow" if strides.prediction == "flow" else "ddpm"
    return Model(name, family, size, unet, {space.name: space for space in spaces}, diffusion=diffusion)


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
    return model(unet, scheduler, name)


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
    epsilon = _noise(len(images), images.shape[1:], generator).to(images)
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


def _forward(scheduler: Any, images: Tensor, timestep: int, epsilon: Tensor) -> Tensor:
    signal, noise = level_at(scheduler, timestep)
    return signal * images + noise * epsilon


def _noise(n: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # one draw an image: torch fills a large tensor in another order than several small ones
    return torch.stack([torch.randn(shape, generator=generator, device=generator.device) for _ in range(n)])


def _h_shape(unet: Any, size: int) -> tuple[int, ...]:
    """The middle block's shape, from a run on the meta device, where nothing is computed."""
    with torch.device("meta"):
        empty = type(unet).from_config(unet.config)
        images = torch.zeros(1, 3, size, size)
    chosen = hooks.select(hooks.layers(empty), ["mid_block"])
    return hooks.output_shapes(empty, chosen, lambda: empty(images, 0))["mid_block"][1:]


def _config(kind: Any, place: str, part: str | None) -> dict[str, Any]:
    """A part's config, or {"error": the reason} where there is none to read."""
    try:
        return dict(kind.load_config(place, subfolder=part))
    except Exception as error:  # diffusers, json and the hub raise a dozen kinds
        return {"error": " ".join(str(error).split())[:160]}

"""Unconditional diffusion models (DDPM, Ho et al. 2020) and their latent spaces: noised, DDIM-inverted, h-space."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
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

_PREDICTIONS = ("epsilon", "v_prediction")
_LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}  # Ho et al. 2020, section 4


def ddim_scheduler(config: Mapping[str, Any]) -> Any:
    """A `DDIMScheduler` with the noise of any diffusers scheduler's config, without clipping or thresholding.

    Both would make the step irreversible. Raises ProbekitError for a scheduler that is not of the DDPM kind, and for a network
    that predicts other than epsilon or velocity.
    """
    from diffusers import DDIMScheduler

    kind = config.get("_class_name")
    if config.get("beta_schedule") is None and config.get("trained_betas") is None:
        raise ProbekitError(f"scheduler {kind}: has no betas; a DDPM or DDIM scheduler would do")
    # linspace strides do not meet: neither diffusers' step nor its inverse knows them
    changed = {"timestep_spacing": "leading"} if config.get("timestep_spacing") == "linspace" else {}
    try:
        scheduler = DDIMScheduler.from_config(dict(config), clip_sample=False, thresholding=False, **changed)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ProbekitError(f"scheduler {kind}: makes no DDIM scheduler ({' '.join(str(error).split())[:160]})") from error
    if scheduler.config.prediction_type not in _PREDICTIONS:
        raise ProbekitError(f"prediction_type {scheduler.config.prediction_type!r}: choose {' or '.join(_PREDICTIONS)}")
    return scheduler


@torch.no_grad()
def ddim(
    unet: Any, scheduler: Any, latents: Float[Tensor, "n c h w"], steps: int, start: int | None = None
) -> Float[Tensor, "n c h w"]:
    """Deterministic DDIM sampling: equation 12 of Song et al. 2021 with sigma 0, as `DDIMScheduler.step` with eta 0 does it.

    latents: at the schedule's first timestep, or at timestep `start`, from where `steps` even strides then lead to the image.
    Float32 throughout; images are not clamped. Calls the network `steps` times. Raises ProbekitError for more steps than the
    schedule has.
    """
    latents = latents.float()
    for timestep, before in _strides(scheduler, steps, start):
        latents = _move(unet, scheduler, latents, timestep, source=timestep, target=before)
    return latents


@torch.no_grad()
def ddim_invert(unet: Any, scheduler: Any, images: Float[Tensor, "n c h w"], steps: int) -> Float[Tensor, "n c h w"]:
    """DDIM inversion: the steps of `ddim` backwards, as `DDIMInverseScheduler.step` does them.

    Epsilon is evaluated at the target timestep on the source latent, the one at hand, so that a round trip is exact only in the
    limit of many steps. Calls the network `steps` times. Raises ProbekitError for more steps than the schedule has.
    """
    latents = images.float()
    for timestep, before in reversed(list(_strides(scheduler, steps, None))):
        latents = _move(unet, scheduler, latents, timestep, source=before, target=timestep)
    return latents


def model(
    unet: Any, scheduler: Any, name: str, *, steps: int = 50, noised_at: int | None = None, h_at: int | None = None
) -> Model:
    """A diffusers `UNet2DModel` of pixels with its spaces, the image's size being its config's.

    scheduler: any of diffusers' that has the model's betas. steps: network calls of an inversion and of a sampling.

    - `inverted`: the DDIM-inverted latent; decoding samples from it.
    - `noised`: sqrt(abar) x0 + sqrt(1 - abar) epsilon at timestep `noised_at` (the last), epsilon from the generator; decoding
      samples from there. Only at the last timestep has it a prior to sample from, N(0, 1).
    - `h`: h-space (Kwon et al. 2023), what the middle block gives for the image noised to timestep `h_at` (half the schedule).
      The noise is one for all images, drawn once with seed 0, so that images alone make the difference. It cannot be decoded.

    The second half of six output channels, a learned variance, is not used; decoded images are clamped to [-1, 1].

    Raises ProbekitError for networks of other than three channels, class-conditional ones, and numbers outside the schedule.
    """
    scheduler = ddim_scheduler({"_class_name": type(scheduler).__name__, **scheduler.config})
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
    _check_steps(steps, trained)
    shape = (3, size, size)

    def there(values: Tensor) -> Tensor:
        return values.to(unet.device, torch.float32)

    def taken(images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != shape:
            raise ProbekitError(f"images of shape {tuple(images.shape[1:])}: model {name!r} takes {shape}")
        return there(images)

    def prior(n: int, generator: torch.Generator) -> Tensor:
        return _noise(n, shape, generator)

    def invert(images: Tensor, generator: torch.Generator) -> Tensor:
        return ddim_invert(unet, scheduler, taken(images), steps).cpu()

    def sample(latents: Tensor) -> Tensor:
        return ddim(unet, scheduler, there(latents), steps).cpu().clamp(-1, 1)

    def noise(images: Tensor, generator: torch.Generator) -> Tensor:
        return _forward(scheduler, taken(images), noised_at, there(prior(len(images), generator))).cpu()

    def denoise(latents: Tensor) -> Tensor:
        return ddim(unet, scheduler, there(latents), min(steps, noised_at + 1), noised_at).cpu().clamp(-1, 1)

    spaces = [
        LatentSpace(name, "inverted", shape, f"the latent of {steps} DDIM inversion steps", invert, sample, prior),
        LatentSpace(
            name, "noised", shape, f"the image noised to timestep {noised_at}", noise, denoise,
            prior if noised_at == trained - 1 else None,
        ),
    ]  # fmt: skip
    if unet.mid_block is not None:
        fixed = prior(1, torch.Generator().manual_seed(0))

        def h(images: Tensor, generator: torch.Generator) -> Tensor:
            noisy = _forward(scheduler, taken(images), h_at, there(fixed))
            with hooks.capture(unet, ["mid_block"], schedule=[h_at], rows=len(noisy)) as captured:
                unet(noisy.to(unet.dtype), h_at)
            return captured["mid_block", 0][0].float().cpu()

        about = f"the middle block's output at timestep {h_at}, the same noise on every image"
        spaces.append(LatentSpace(name, "h", _h_shape(unet, size), about, h))
    return Model(name, "ddpm", size, unet, {space.name: space for space in spaces})


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
        scheduler = ddim_scheduler(noise)
    except ProbekitError as error:
        raise ProbekitError(f"model {name!r}: {error}") from error
    return model(unet, scheduler, name)


def loss(
    unet: Any, images: Float[Tensor, "n 3 h w"], generator: torch.Generator, scheduler: Any
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """The simple loss, equation 14 of Ho et al. 2020: mean squared error of epsilon at timesteps drawn uniformly.

    Of velocity where the scheduler's prediction_type says so. Timesteps, then noise, are drawn from the generator. Noise is
    added in float32, whatever the network's precision: in bfloat16 the first levels would have none.
    """
    last = scheduler.config.num_train_timesteps
    timesteps = torch.randint(last, (len(images),), generator=generator, device=generator.device).to(images.device)
    images = images.float()
    epsilon = _noise(len(images), images.shape[1:], generator).to(images)
    noisy = scheduler.add_noise(images, epsilon, timesteps)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(images, epsilon, timesteps) if velocity else epsilon
    error = F.mse_loss(unet(noisy.to(unet.dtype), timesteps).sample[:, :3].float(), target)
    return error, {"squared_error": error.item()}


def _strides(scheduler: Any, steps: int, start: int | None) -> Iterator[tuple[int, int]]:
    """(timestep, the one before it) of each step, from noise to image; a negative one stands for the end, without noise."""
    trained = scheduler.config.num_train_timesteps
    _check_steps(steps, trained if start is None else start + 1)
    if start is not None:
        # as `trailing` spaces the whole schedule
        stops = [round((start + 1) * (steps - i) / steps) - 1 for i in range(steps + 1)]
        yield from itertools.pairwise(stops)
        return
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps.tolist():
        yield timestep, timestep - trained // steps


def _check_steps(steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise ProbekitError(f"steps {steps}: choose 1 to {most}, the number of timesteps to go through")


def _move(unet: Any, scheduler: Any, latents: Tensor, timestep: int, *, source: int, target: int) -> Tensor:
    """One deterministic step between two noise levels, with the network's prediction at `timestep` on the source."""
    signal, noise = _levels(scheduler, source)
    predicted = unet(latents.to(unet.dtype), timestep).sample[:, : latents.shape[1]].float()
    if scheduler.config.prediction_type == "v_prediction":
        image, epsilon = signal * latents - noise * predicted, signal * predicted + noise * latents
    else:
        image, epsilon = (latents - noise * predicted) / signal, predicted
    signal, noise = _levels(scheduler, target)
    return signal * image + noise * epsilon


def _levels(scheduler: Any, timestep: int) -> tuple[float, float]:
    """sqrt(abar) and sqrt(1 - abar) at a timestep, of the schedule's end for negative ones."""
    abar = float(scheduler.alphas_cumprod[timestep] if timestep >= 0 else scheduler.final_alpha_cumprod)
    return abar**0.5, (1 - abar) ** 0.5


def _forward(scheduler: Any, images: Tensor, timestep: int, epsilon: Tensor) -> Tensor:
    signal, noise = _levels(scheduler, timestep)
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

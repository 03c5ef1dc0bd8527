"""What sampling and inversion need to know of a model, whatever its kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probekit import seeds
from probekit.hooks.errors import ProbekitError
from probekit.sampling.schedule import Schedule
from probekit.sampling.trajectory import Denoiser

BATCH = 50
"""States that go through a network at a time, where nobody says."""


@dataclass(frozen=True, eq=False)
class Diffusion:
    """A diffusion or flow model between noise and images.

    name: of the model. image_size: height and width of its images in pixels. shape: of a state, what noise is drawn in.
    scheduler: diffusers', with the model's noise levels. network: the U-Net or transformer. denoiser: for a number of rows,
    what predicts for them; captioned: for a caption a row, of a model that takes captions.
    encoder, decoder: images (n, 3, h, w) in [-1, 1] to noiseless states and back; None for a model of pixels, whose states are
    its images.
    tokens: the length of a state's token sequence, where the scheduler asks for it. told: the timestep that hooks see for a
    timestep of 1 of the schedule. condition: what the images are of, for the fingerprint of spaces.
    """

    name: str
    image_size: int
    shape: tuple[int, ...]
    scheduler: Any
    network: nn.Module
    denoiser: Callable[[int], Denoiser]
    encoder: Callable[[Tensor], Tensor] | None = None
    decoder: Callable[[Tensor], Tensor] | None = None
    tokens: int | None = None
    told: float = 1.0
    condition: Mapping[str, Any] = field(default_factory=dict)
    captioned: Callable[[Sequence[str]], Denoiser] | None = None

    @property
    def device(self) -> torch.device:
        """Where the network computes; accelerate's hooks say it of one that is moved there as it is needed."""
        hooks = (getattr(module, "_hf_hook", None) for module in self.network.modules())
        told = (getattr(hook, "execution_device", None) for hook in hooks)
        found = next((device for device in told if device is not None), None)
        return next(self.network.parameters()).device if found is None else torch.device(found)

    @property
    def made_of(self) -> dict[str, Any]:
        """What beyond the weights makes its images what they are: the noise schedule, the condition, the precision."""
        # of its class's own arguments: diffusers keeps what the file says beyond them, such as another scheduler's
        own = inspect.signature(type(self.scheduler)).parameters
        config = {key: self.scheduler.config[key] for key in own if key in self.scheduler.config}
        precision = str(next(self.network.parameters()).dtype).removeprefix("torch.")
        scheduler = {"class": type(self.scheduler).__name__, **config}
        return {"scheduler": scheduler, "condition": dict(self.condition), "precision": precision}

    def schedule(self, steps: int) -> Schedule:
        """The model's schedule of that many steps. Raises ProbekitError as `Schedule.of`, naming the model."""
        try:
            return Schedule.of(self.scheduler, steps, tokens=self.tokens)
        except ProbekitError as error:
            raise ProbekitError(f"model {self.name!r}: {error}") from error

    def noise(self, numbers: Iterable[int], seed: int) -> Float[Tensor, "n *shape"]:
        """Standard normal noise of those numbers; each depends on the seed and its number alone (`seeds.noise`)."""
        return seeds.noise(self.shape, numbers, seed)

    def fresh_noise(self, numbers: Iterable[int], seed: int) -> Float[Tensor, "n *shape"]:
        """More of it, independent of `noise` for any numbers and seed."""
        return seeds.fresh_noise(self.shape, numbers, seed)

    @torch.no_grad()
    def denoise_once(self) -> None:
        """Call the network on one state, for what watches its layers."""
        self.denoiser(1)(torch.zeros(1, *self.shape, device=self.device), self.schedule(1).timesteps[0])

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n *shape"]:
        """Images to noiseless states, on the CPU. Raises ProbekitError for images of another size, and as `decode`."""
        if tuple(images.shape[1:]) != (3, self.image_size, self.image_size):
            size = (3, self.image_size, self.image_size)
            raise ProbekitError(f"images of shape {tuple(images.shape[1:])}: model {self.name!r} takes {size}")
        return self._whole(_in_parts(self.encoder, images)) if self.encoder else images.float().cpu()

    @torch.no_grad()
    def decode(self, states: Float[Tensor, "n *shape"]) -> Float[Tensor, "n 3 h w"]:
        """Noiseless states to images in [-1, 1], on the CPU. Raises ProbekitError for what is not finite (half precision)."""
        made = _in_parts(self.decoder, states) if self.decoder else states.float().cpu()
        return self._whole(made).clamp(-1, 1)

    def walk(self, states: Float[Tensor, "n ..."], way: Callable[[Denoiser, Tensor], Tensor], batch: int = BATCH) -> Tensor:
        """`way` from states to states, `batch` rows at a time on the network's device; the result is on the CPU."""
        parts = torch.split(states, batch)
        return torch.cat([way(self.denoiser(len(part)), part.to(self.device)).cpu() for part in parts])

    def _whole(self, values: Tensor) -> Tensor:
        if not torch.isfinite(values).all():
            raise ProbekitError(f"model {self.name!r}: its autoencoder gives values that are not finite; use --dtype float32")
        return values


def _in_parts(way: Callable[[Tensor], Tensor], items: Tensor) -> Tensor:
    return torch.cat([way(part).float().cpu() for part in torch.split(items, BATCH)])

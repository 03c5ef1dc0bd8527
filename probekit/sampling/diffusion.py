"""What sampling and inversion need to know of a model, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probekit.errors import ProbekitError
from probekit.latents.space import generator
from probekit.sampling.schedule import Schedule
from probekit.sampling.trajectory import Denoiser

_BATCH = 50


@dataclass(frozen=True, eq=False)
class Diffusion:
    """A diffusion or flow model between noise and images.

    name: of the model. image_size: height and width of its images in pixels. shape: of a state, what noise is drawn in.
    scheduler: diffusers', with the model's noise levels. denoiser: for a number of rows, what predicts for them.
    encoder, decoder: images (n, 3, h, w) in [-1, 1] to noiseless states and back; a model of pixels has its images for states.
    tokens: the length of a state's token sequence, where the scheduler asks for it.
    """

    name: str
    image_size: int
    shape: tuple[int, ...]
    scheduler: Any
    denoiser: Callable[[int], Denoiser]
    encoder: Callable[[Tensor], Tensor]
    decoder: Callable[[Tensor], Tensor]
    tokens: int | None = None

    def schedule(self, steps: int) -> Schedule:
        """The model's schedule of that many steps. Raises ProbekitError as `Schedule.of`, naming the model."""
        try:
            return Schedule.of(self.scheduler, steps, tokens=self.tokens)
        except ProbekitError as error:
            raise ProbekitError(f"model {self.name!r}: {error}") from error

    def noise(self, rows: range, seed: int) -> Float[Tensor, "n *shape"]:
        """Standard normal noise; that of a row depends on the seed and its number alone."""
        drawn = (torch.randn(self.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + row)) for row in rows)
        return torch.stack(list(drawn))

    def fresh_noise(self, rows: range, seed: int) -> Float[Tensor, "n *shape"]:
        """More of it, independent of `noise` for any rows and seed."""
        return torch.stack([torch.randn(self.shape, generator=generator("fresh noise", seed, row)) for row in rows])

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n *shape"]:
        """Images to noiseless states, on the CPU. Raises ProbekitError for images of another size, and as `decode`."""
        if tuple(images.shape[1:]) != (3, self.image_size, self.image_size):
            size = (3, self.image_size, self.image_size)
            raise ProbekitError(f"images of shape {tuple(images.shape[1:])}: model {self.name!r} takes {size}")
        return self._whole(torch.cat([self.encoder(part).float().cpu() for part in torch.split(images, _BATCH)]))

    @torch.no_grad()
    def decode(self, states: Float[Tensor, "n *shape"]) -> Float[Tensor, "n 3 h w"]:
        """Noiseless states to images in [-1, 1], on the CPU. Raises ProbekitError for what is not finite (half precision)."""
        made = torch.cat([self.decoder(part).float().cpu() for part in torch.split(states, _BATCH)])
        return self._whole(made).clamp(-1, 1)

    def _whole(self, values: Tensor) -> Tensor:
        if not torch.isfinite(values).all():
            raise ProbekitError(f"model {self.name!r}: its autoencoder gives values that are not finite; use --dtype float32")
        return values

"""A latent space: where a model keeps an image, and the ways in and out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from probekit.errors import ProbekitError

Images = Float[Tensor, "n 3 h w"]
Encoder = Callable[[Tensor, torch.Generator], Tensor]
Decoder = Callable[[Tensor], Tensor]
Sampler = Callable[[int, torch.Generator], Tensor]


def generator(*names: object) -> torch.Generator:
    """A generator that the names alone seed: other names draw independent noise."""
    digest = hashlib.sha256("\0".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True, eq=False)
class LatentSpace:
    """One latent space of one model. Images are (n, 3, h, w) in [-1, 1], latents (n, *shape), float32, on the CPU.

    model, name: whose space it is and what it is called there (`avatar-gan`, `w`).
    shape: of one latent.
    encoder, decoder, sampler: the ways in, out, and to draw from the prior; a space may lack some.
    about: what the space is, in one line.
    """

    model: str
    name: str
    shape: tuple[int, ...]
    about: str
    encoder: Encoder | None = None
    decoder: Decoder | None = None
    sampler: Sampler | None = None

    def __str__(self) -> str:
        return f"{self.model}:{self.name}"

    @property
    def size(self) -> int:
        """The number of values in one latent."""
        return torch.Size(self.shape).numel()

    @torch.no_grad()
    def encode(self, images: Images, generator: torch.Generator | None = None) -> Float[Tensor, "n *shape"]:
        """Images to latents. Spaces that draw noise take it from the generator (one seeded with 0 where none is given).

        Raises ProbekitError where the space cannot encode.
        """
        if self.encoder is None:
            raise ProbekitError(f"space {str(self)!r}: cannot encode images")
        return self.encoder(images, generator or torch.Generator().manual_seed(0))

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n *shape"]) -> Images:
        """Latents to images. Raises ProbekitError where the space cannot decode, or the latents have another shape."""
        if self.decoder is None:
            raise ProbekitError(f"space {str(self)!r}: cannot decode latents")
        if tuple(latents.shape[1:]) != self.shape:
            raise ProbekitError(f"space {str(self)!r}: latents of shape {tuple(latents.shape[1:])}, it has {self.shape}")
        return self.decoder(latents)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n *shape"]:
        """Draw latents from the model's prior. Raises ProbekitError where the space has none."""
        if self.sampler is None:
            raise ProbekitError(f"space {str(self)!r}: has no prior to sample from")
        return self.sampler(n, generator)

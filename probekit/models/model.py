"""A generative model with its latent spaces, whatever its family."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from probekit.errors import ProbekitError
from probekit.latents import LatentSpace
from probekit.sampling import Diffusion


@dataclass(frozen=True, eq=False)
class Model:
    """A network and its latent spaces, the first of which is the default.

    name: how it was asked for; family: vae, vqvae, glow, stylegan2, ddpm, flow (rectified), ldm, random or custom; image_size:
    height and width of its images in pixels; network: the module whose weights count, None for a model without any; source:
    what else makes the model what it is, such as a hash of the user's code; diffusion: how noise becomes images and back, of a
    diffusion or rectified-flow model; at_size: the same network for images of another size, of a convolutional one.
    """

    name: str
    family: str
    image_size: int
    network: nn.Module | None = field(repr=False)
    spaces: dict[str, LatentSpace] = field(repr=False)
    source: str = field(default="", repr=False)
    diffusion: Diffusion | None = field(default=None, repr=False)
    at_size: Callable[[int], Model] | None = field(default=None, repr=False)

    def space(self, name: str | None = None) -> LatentSpace:
        """The space of that name, or the default one. Raises ProbekitError with the names there are."""
        if name is None:
            return next(iter(self.spaces.values()))
        if name not in self.spaces:
            raise ProbekitError(f"model {self.name!r}: no space {name!r}; it has {', '.join(self.spaces)}")
        return self.spaces[name]

    @property
    def denoiser(self) -> nn.Module:
        """The U-Net of a model of pixels. Raises ProbekitError for another family."""
        if self.network is None or self.family not in ("ddpm", "flow"):
            raise ProbekitError(f"model {self.name!r}: a {self.family}; layers are those of denoisers, U-Nets and transformers")
        return self.network

    def denoise_once(self) -> None:
        """Call the denoiser on one picture, for what watches its layers."""
        self.denoiser(torch.zeros(1, 3, self.image_size, self.image_size, device=next(self.denoiser.parameters()).device), 0)

    @cached_property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(p.numel() for p in self.network.parameters()) if self.network is not None else 0

    @cached_property
    def digest(self) -> str:
        """A fingerprint of the weights, 12 hex digits: the tensors' names, shapes and values."""
        fingerprint = hashlib.sha256(f"{self.family}{self.source}".encode())
        for key, value in sorted(self.network.state_dict().items()) if self.network is not None else ():
            fingerprint.update(f"{key}{tuple(value.shape)}".encode() + value.detach().float().cpu().numpy().tobytes())
        return fingerprint.hexdigest()[:12]

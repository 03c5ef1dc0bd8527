"""A latent space: where a model keeps an image, or a caption, and the ways in and out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from probekit.hooks.errors import ProbekitError

Images = Float[Tensor, "n 3 h w"]
Latents = Float[Tensor, "n *shape"]
Takes = Literal["images", "captions"]


@dataclass(frozen=True, eq=False)
class LatentSpace:
    """One latent space of one model. Images are (n, 3, h, w) in [-1, 1], latents (n, *shape), float32, on the CPU.

    name: what it is called in its model (`w`, `h`). shape: of one latent. about: what it is, in one line.
    encoder, decoder, sampler: the ways in, out, and to draw from the prior; a space may lack some. takes: what is encoded.
    around: of a space that holds a part of a picture only, such as a layer's activation: a decoder that takes the rest from
    given images.
    parameters: what the space was made with (`{"layer": "mid_block", "t": 500}`). made_of: what beyond the weights and the
    parameters makes its latents what they are, such as the noise schedule and the caption; both can be written as JSON.

    The model that has the space fills in the rest. model, family, image_size: the model's, the size None where any will do.
    label: how the space was asked for. weights: gives the fingerprint of the model's weights.
    """

    name: str
    shape: tuple[int, ...]
    about: str
    encoder: Callable[[Any, torch.Generator], Tensor] | None = None
    decoder: Callable[[Tensor], Tensor] | None = None
    sampler: Callable[[int, torch.Generator], Tensor] | None = None
    takes: Takes = "images"
    around: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    made_of: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    family: str = ""
    image_size: int | None = None
    label: str = ""
    weights: Callable[[], str] = lambda: ""

    def __str__(self) -> str:
        return self.label or self.name

    @property
    def size(self) -> int:
        """The number of values in one latent."""
        return torch.Size(self.shape).numel()

    @cached_property
    def digest(self) -> str:
        """A fingerprint of all that makes the latents what they are, 12 hex digits: weights, schedule, parameters, caption."""
        told = [self.weights(), self.name, list(self.shape), dict(self.parameters), dict(self.made_of)]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:12]

    @torch.no_grad()
    def encode(self, items: Images | Sequence[str], generator: torch.Generator | None = None) -> Latents:
        """Images, or captions where the space `takes` those, to latents.

        Spaces that draw noise take it from the generator (one seeded with 0 where none is given). Raises ProbekitError where
        the space cannot encode, or takes the other kind.
        """
        if self.encoder is None:
            raise ProbekitError(f"space {str(self)!r}: cannot encode images")
        if isinstance(items, Tensor) != (self.takes == "images"):
            given = "images" if isinstance(items, Tensor) else "text"
            raise ProbekitError(f"space {str(self)!r}: encodes {self.takes}, not {given}")
        return self.encoder(items, generator or torch.Generator().manual_seed(0)).float().cpu()

    @torch.no_grad()
    def decode(self, latents: Latents, *, rest_of: Images | None = None) -> Images:
        """Latents to images. rest_of: for a space that holds a part of a picture only, images whose other parts are kept.

        Raises ProbekitError where the space cannot decode, or the latents have another shape.
        """
        if self.decoder is None:
            raise ProbekitError(f"space {str(self)!r}: cannot decode latents")
        if tuple(latents.shape[1:]) != self.shape:
            raise ProbekitError(f"space {str(self)!r}: latents of shape {tuple(latents.shape[1:])}, it has {self.shape}")
        decoder = self.decoder if rest_of is None or self.around is None else self.around(rest_of)
        return decoder(latents).float().cpu().clamp(-1, 1)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Latents:
        """Draw latents from the model's prior. Raises ProbekitError where the space has none."""
        if self.sampler is None:
            raise ProbekitError(f"space {str(self)!r}: has no prior to sample from")
        return self.sampler(n, generator).float().cpu()

"""The random encoder of All Roads: a vector an image that knows nothing of it, the baseline for probes and stitching."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probekit.latents import LatentSpace
from probekit.models.model import Model, fixed


def as_model(size: int = 512, name: str = "random") -> Model:
    """A model without a network. Its one space, `normal`, gives every image a standard normal vector of `size` values.

    The vector follows from the image's pixels alone, rounded to bytes: the same in any batch and process, and
    independent between images that differ in a single byte.
    """

    def encode(images: Tensor, generator: torch.Generator) -> Tensor:
        return _vectors(images, size)

    def prior(n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, size, generator=generator)

    space = LatentSpace("normal", (size,), "a fixed standard normal vector an image", encode, None, prior)
    return Model(name, "random", None, None, fixed(space))


def _vectors(images: Float[Tensor, "n 3 h w"], size: int) -> Float[Tensor, "n size"]:
    """SHAKE-128 of each image as 32-bit numbers, and the standard normal's quantiles at those."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
    # a hash instead of a seeded generator: numpy and torch may change their streams, and seeding costs more
    drawn = b"".join(hashlib.shake_128(image.tobytes()).digest(4 * size) for image in pixels)
    uniform = (torch.from_numpy(np.frombuffer(drawn, "<u4").astype(np.float64)) + 0.5) / 2**32
    return torch.special.ndtri(uniform).float().reshape(len(pixels), size)

"""One formula for every seed: noise number 7 of seed 0 is the same noise in every experiment."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_PRIME = 1_000_003
"""Numbers of one seed reach those of the next only after a million."""


def numbered(seed: int, number: int) -> torch.Generator:
    """The generator of what has a number: a noise, a picture, a step of training. On the CPU, the same everywhere."""
    return torch.Generator().manual_seed(seed * _PRIME + number)


def named(*names: object) -> torch.Generator:
    """A generator that the names alone seed: other names draw independent noise."""
    digest = hashlib.sha256("\0".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def noise(shape: Sequence[int], numbers: Iterable[int], seed: int) -> Float[Tensor, "n *shape"]:
    """Standard normal noise of those numbers, (n, *shape); each depends on the seed and its number alone."""
    return torch.stack([torch.randn(tuple(shape), generator=numbered(seed, number)) for number in numbers])


def fresh_noise(shape: Sequence[int], numbers: Iterable[int], seed: int) -> Float[Tensor, "n *shape"]:
    """More of it, independent of `noise` for any numbers and seed."""
    return torch.stack([torch.randn(tuple(shape), generator=named("fresh noise", seed, number)) for number in numbers])


def drawn(shape: Sequence[int], n: int, generator: torch.Generator) -> Float[Tensor, "n *shape"]:
    """Standard normal noise (n, *shape) from one generator.

    One draw an item: torch fills a large tensor in another order than small ones.
    """
    return torch.stack([torch.randn(tuple(shape), generator=generator, device=generator.device) for _ in range(n)])

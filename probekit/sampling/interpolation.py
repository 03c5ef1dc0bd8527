"""The way from one latent to another."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def slerp(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], fractions: Float[Tensor, " n"]) -> Float[Tensor, "n *shape"]:
    """Points on the great circle from a to b, whole tensors of one shape each (Shoemake 1985), (len(fractions), *shape).

    fractions: of the way, 0 gives a, 1 gives b. Nearly parallel ones are joined by a straight line. A normal latent keeps its
    norm along the way.
    """
    angle = torch.acos(torch.clamp((a * b).sum() / (a.norm() * b.norm()), -1, 1))
    weights = fractions.view(-1, *[1] * a.ndim)
    if angle < 1e-4:
        return (1 - weights) * a + weights * b
    return (torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b) / torch.sin(angle)

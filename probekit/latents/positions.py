"""What a probe is given of a layer's activation: a fixed grid of its positions, and the mean over all of them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

POSITIONS = ("grid", "mean")


def at_positions(activation: Float[Tensor, "n *shape"], grid: int = 4) -> dict[str, Float[Tensor, "n _d"]]:
    """`grid`: the features at the centres of grid x grid cells, side by side; `mean`: each feature's mean over positions.

    activation: (n, c, h, w) of a U-Net; or (n, tokens, c), whose tokens count as a square picture's where their number is one,
    else as a line, of which grid² are taken. A side shorter than `grid` is taken whole. Of (n, c) both are the features.
    """
    if activation.ndim == 2:
        return dict.fromkeys(POSITIONS, activation)
    if activation.ndim == 3:
        n, tokens, width = activation.shape
        side = math.isqrt(tokens)
        if side * side != tokens:
            taken = activation[:, _centres(tokens, grid * grid)]
            return {"grid": taken.flatten(1), "mean": activation.mean(1)}
        activation = activation.mT.reshape(n, width, side, side)
    rows, columns = (_centres(side, grid) for side in activation.shape[-2:])
    return {"grid": activation[..., rows, :][..., columns].flatten(1), "mean": activation.mean((-2, -1))}


def _centres(length: int, cells: int) -> Tensor:
    """Where the centres of so many equal cells lie on a side, rounded down."""
    cells = min(length, cells)
    return torch.tensor([int((i + 0.5) * length / cells) for i in range(cells)])

"""Pictures to tensors and files: float images in [-1, 1] and PNG."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor


def to_uint8(image: Float[Tensor, "3 h w"]) -> np.ndarray:
    """(h, w, 3) bytes of an image in [-1, 1]."""
    return ((image.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def save_png(image: Float[Tensor, "3 h w"], path: Path | str) -> None:
    """Write an image in [-1, 1] as PNG, and see it to the disk."""
    with Path(path).open("wb") as file:
        Image.fromarray(to_uint8(image)).save(file, "PNG")
        file.flush()
        os.fsync(file.fileno())


def load_png(path: Path) -> Float[Tensor, "3 h w"]:
    """Read a picture as float32 in [-1, 1]."""
    pixels = np.array(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def as_pictures(states: Float[Tensor, "n ..."]) -> Float[Tensor, "n 3 h w"]:
    """States of unit variance as pictures in [-1, 1], which are three standard deviations: the first channels.

    Fewer channels are repeated; tokens (n, tokens, c), Flux's, are laid out as a square.
    """
    if states.ndim == 3:
        side = math.isqrt(states.shape[1])
        states = states[:, : side * side].mT.reshape(len(states), -1, side, side)
    return (states[:, [min(channel, states.shape[1] - 1) for channel in range(3)]] / 3).clamp(-1, 1)

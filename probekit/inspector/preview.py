"""Pictures for the page: as data URLs, and in small while they are made."""

from __future__ import annotations

import base64
import io

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from probekit.images import to_uint8


def png(image: Float[Tensor, "3 h w"]) -> bytes:
    """A picture in [-1, 1] as the bytes that `images.save_png` writes."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(buffer, "PNG")
    return buffer.getvalue()


def url(image: Float[Tensor, "3 h w"]) -> str:
    """A picture in [-1, 1] inside the page."""
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


class Preview:
    """Colours of latents, by the linear map that fits pictures of this model best: known from pictures with their latents.

    Good enough to watch a picture come out of its noise, and as fast as one small matrix.
    """

    def __init__(self) -> None:
        self._map: Tensor | None = None

    @property
    def fitted(self) -> bool:
        """Whether it has seen pictures."""
        return self._map is not None

    def fit(self, latents: Float[Tensor, "n c h w"], images: Float[Tensor, "n 3 H W"]) -> None:
        """Learn from pictures and the latents that they were decoded from. Latents that are no grids of pixels are left."""
        if latents.ndim != 4:
            return
        small = F.adaptive_avg_pool2d(images.float().cpu(), (latents.shape[-2], latents.shape[-1]))
        known, wanted = _cells(latents), small.permute(0, 2, 3, 1).reshape(-1, 3)
        self._map = torch.linalg.lstsq(known, wanted).solution

    def __call__(self, state: Tensor | None) -> str | None:
        """The preview (h, w) of a state (1, c, h, w), as a data URL; None where nothing is known of such."""
        if self._map is None or state is None or state.ndim != 4 or state.shape[1] + 1 != len(self._map):
            return None
        colours = _cells(state) @ self._map
        return url(colours.reshape(*state.shape[-2:], 3).permute(2, 0, 1))


def _cells(latents: Tensor) -> Float[Tensor, "cells c1"]:
    """A row a cell: its channels, and 1."""
    cells = latents.detach().float().cpu().permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    return torch.cat([cells, torch.ones(len(cells), 1)], 1)

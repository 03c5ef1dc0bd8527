"""LPIPS with its AlexNet features shipped in the package."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from probekit.bundled import weights


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


@torch.no_grad()
def features(images: Float[Tensor, "n 3 h w"]) -> list[tuple[Tensor, ...]]:
    """For each image in [-1, 1], the five unit-normalised AlexNet feature maps that LPIPS compares, each (c, h, w)."""
    from lpips import normalize_tensor

    maps = network().net(network().scaling_layer(images.float().cpu()))
    return list(zip(*(normalize_tensor(m) for m in maps), strict=True))


@torch.no_grad()
def distance(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    """LPIPS (Zhang et al. 2018, AlexNet, v0.1) from `features` of two images: 0 for equal ones, hardly ever above 1."""
    return float(sum(lin((x - y)[None] ** 2).mean() for lin, x, y in zip(network().lins, a, b, strict=True)))


@torch.no_grad()
def distances(a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """LPIPS of each pair of images in [-1, 1], on the CPU; images with less than 64 pixels a side are enlarged to 64."""
    if a.shape[-1] < 64:
        a, b = (F.interpolate(x, (64, 64), mode="bilinear") for x in (a, b))
    pairs = zip(torch.split(a, 50), torch.split(b, 50), strict=True)
    return torch.cat([network()(x, y).flatten() for x, y in pairs])


@torch.no_grad()
def embedded(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
    """Vectors of images in [-1, 1], whose squared Euclidean distances are the images' LPIPS, float32, on the CPU.

    LPIPS adds squared differences of feature maps with weights that are not negative, so that its root is a distance: what
    needs a metric (detours, steps along a path) or a variance has one. Images of less than 64 pixels are enlarged to 64.
    """
    if images.shape[-1] < 64:
        images = F.interpolate(images, (64, 64), mode="bilinear")
    parts = []
    for batch in torch.split(images, 50):
        maps = zip(*features(batch), strict=True)
        weights = [lin.model[-1].weight[0].clamp(min=0).sqrt() for lin in network().lins]
        flat = [(torch.stack(m) * w / m[0][0].numel() ** 0.5).flatten(1) for m, w in zip(maps, weights, strict=True)]
        parts.append(torch.cat(flat, 1))
    return torch.cat(parts) if parts else torch.empty(0, 0)

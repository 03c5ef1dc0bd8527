"""Descriptors: what is seen of a picture, and how far two pictures are apart in it.

Every descriptor takes features of each picture once and gives a distance that is 0 for equal pictures.
`ssim`, `sift`, `hsv` and `lbp` are those of the injection paper's code (feature-inject), as 1 - similarity.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probekit.images import to_uint8
from probekit.metrics import lpips

CLIP = "openai/clip-vit-base-patch32"
"""The CLIP that judges pictures of models other than ours, where it is in the local cache."""


@dataclass(frozen=True)
class Descriptor:
    """features: images (n, 3, h, w) in [-1, 1] to one item each; distance: two such items to a number >= 0, or NaN."""

    name: str
    features: Callable[[Float[Tensor, "n 3 h w"]], Sequence[Any]]
    distance: Callable[[Any, Any], float]


def _grey(image: Tensor) -> np.ndarray:
    from skimage.color import rgb2gray

    return rgb2gray(to_uint8(image))


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    """1 - mean structural similarity of the grey pictures (Wang et al. 2004, 7x7 windows), in [0, 2]."""
    from skimage.metrics import structural_similarity

    return float(1 - structural_similarity(a, b, data_range=1.0))


def _sift_features(image: Tensor) -> np.ndarray | None:
    """SIFT descriptors of the grey picture (Lowe 2004), or None where it has no keypoint."""
    from skimage.feature import SIFT

    sift = SIFT()
    try:
        sift.detect_and_extract(_grey(image))
    except RuntimeError:  # scikit-image's way to say that there is no keypoint
        return None
    return sift.descriptors


def _sift(a: np.ndarray | None, b: np.ndarray | None) -> float:
    """1 - matches over the smaller number of keypoints, in [0, 1]; NaN where a picture has none.

    A match passes Lowe's ratio test (0.75) both ways, so that the order of the pictures does not count.
    """
    from skimage.feature import match_descriptors

    if a is None or b is None or min(len(a), len(b)) < 2:  # a ratio needs a second-best match
        return float("nan")
    if np.array_equal(a, b):  # repeated textures match ambiguously even with themselves
        return 0.0
    there = {(i, j) for i, j in match_descriptors(a, b, max_ratio=0.75).tolist()}
    back = {(i, j) for j, i in match_descriptors(b, a, max_ratio=0.75).tolist()}
    return 1 - len(there & back) / min(len(a), len(b))


def _hsv_features(image: Tensor) -> np.ndarray:
    """Histogram of hue (50 bins) and saturation (60 bins)."""
    from skimage.color import rgb2hsv

    hsv = rgb2hsv(to_uint8(image))
    histogram, _, _ = np.histogram2d(hsv[..., 0].ravel(), hsv[..., 1].ravel(), bins=(50, 60), range=((0, 1), (0, 1)))
    return histogram.ravel()


def _lbp_features(image: Tensor) -> np.ndarray:
    """Histogram of uniform local binary patterns, 8 points at radius 1 (Ojala et al. 2002)."""
    from skimage.feature import local_binary_pattern

    with warnings.catch_warnings():  # it warns that grey levels are floats; they are rounded to bytes first
        warnings.simplefilter("ignore")
        patterns = local_binary_pattern((255 * _grey(image)).round().astype(np.uint8), P=8, R=1, method="uniform")
    return np.histogram(patterns, bins=10, range=(0, 10))[0].astype(float)


def _uncorrelated(a: np.ndarray, b: np.ndarray) -> float:
    """1 - Pearson correlation of two histograms, in [0, 2]; NaN where one is flat."""
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(1 - np.corrcoef(a, b)[0, 1])


def paper_descriptors() -> list[Descriptor]:
    """What works on any picture: LPIPS and the descriptors of the paper's code."""
    return [
        Descriptor("lpips", lpips.features, lpips.distance),
        Descriptor("ssim", lambda images: [_grey(i) for i in images], _ssim),
        Descriptor("sift", lambda images: [_sift_features(i) for i in images], _sift),
        Descriptor("hsv", lambda images: [_hsv_features(i) for i in images], _uncorrelated),
        Descriptor("lbp", lambda images: [_lbp_features(i) for i in images], _uncorrelated),
    ]


def clip_descriptor(path: str) -> Descriptor:
    """1 - cosine similarity of CLIP's image embeddings, in [0, 2].

    path: a folder, or a hub id whose files are already in the local cache; nothing is downloaded. Raises OSError otherwise.
    """
    from transformers import CLIPImageProcessor, CLIPModel

    model = CLIPModel.from_pretrained(path, local_files_only=True)
    processor = CLIPImageProcessor.from_pretrained(path, local_files_only=True)
    model = model.float().eval()

    @torch.no_grad()
    def features(images: Tensor) -> list[Tensor]:
        pixels = processor([to_uint8(i) for i in images], return_tensors="pt")["pixel_values"]
        embedded = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        return list(torch.nn.functional.normalize(embedded, dim=1))

    return Descriptor("clip", features, lambda a, b: max(0.0, float(1 - a @ b)))


@functools.cache
def general_descriptors(clip: str) -> list[Descriptor]:
    """`paper_descriptors`, and `clip_descriptor(clip)` where that CLIP is there."""
    try:
        return [*paper_descriptors(), clip_descriptor(clip)]
    except OSError:
        return paper_descriptors()


def reader_descriptor(attributes: Sequence[str]) -> Descriptor:
    """The share of those attributes that the scene reader reads differently, in [0, 1]."""
    from probekit.metrics.readers import scene_reader

    reader = scene_reader()

    def features(images: Tensor) -> list[tuple[int, ...]]:
        seen = reader.read(images.float().cpu())
        return list(zip(*(seen[a].tolist() for a in attributes), strict=True))

    return Descriptor("reader", features, lambda a, b: float(np.mean([x != y for x, y in zip(a, b, strict=True)])))

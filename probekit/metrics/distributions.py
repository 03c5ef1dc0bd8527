"""How far two sets of images are apart as distributions, and how sure a statistic of resampled images is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probekit.hooks.errors import ProbekitError
from probekit.metrics import lpips

_BATCH = 50
_DRAWN = 2**20  # row numbers that are drawn at a time
_ALEXNET_LEAST = 64  # pixels; AlexNet's strides leave less than 3x3 of a smaller image


def frechet(
    a: Float[np.ndarray, "n d"] | Float[Tensor, "n d"], b: Float[np.ndarray, "m ..."] | Float[Tensor, "m ..."]
) -> float:
    """The squared Fréchet distance of two Gaussians with the sets' means and covariances (Heusel et al. 2017, eq. 6), >= 0.

    |mean_a - mean_b|² + tr(C_a + C_b - 2 (C_a C_b)^½), the covariances over n - 1. Of few rows it is too large, by more the
    larger d / n: compare only distances over the same n and m, and report them. Raises ProbekitError for features that
    are not two (n, d) of the same d with n >= 2, all finite.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ProbekitError(f"features of shapes {x.shape} and {y.shape}: (n, d) and (m, d) with at least 2 rows each")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ProbekitError("features: some are not finite")
    between = np.square(x.mean(0) - y.mean(0)).sum()
    # With C = R'R, the eigenvalues of C_a C_b are the squared singular values of R_a R_b'. Fewer rows than features are no
    # trouble then, where a matrix square root of the singular product is.
    r, s = _root_of_covariance(x), _root_of_covariance(y)
    overlap = np.linalg.svdvals(r @ s.T).sum()
    return max(0.0, float(between + np.square(r).sum() + np.square(s).sum() - 2 * overlap))


def _root_of_covariance(x: np.ndarray) -> np.ndarray:
    """R, upper triangular, with R'R the covariance of the rows."""
    # numpy's types know mode "reduced" only
    return np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r")  # type: ignore[return-value]


@torch.no_grad()
def alexnet_features(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 256"]:
    """Means over the picture of the last feature map of LPIPS' AlexNet, of images in [-1, 1]; float32, on the CPU.

    Images with a side below 64 pixels are enlarged bilinearly until it has 64. `frechet` over these features is called
    fd-alexnet, never FID: its numbers cannot be compared with FID's.
    """
    network = lpips.network()
    features = [torch.empty(0, 256)]
    for batch in torch.split(images.float().cpu(), _BATCH):
        h, w = batch.shape[-2:]
        if (enlarge := _ALEXNET_LEAST / min(h, w)) > 1:
            size = (round(h * enlarge), round(w * enlarge))
            batch = torch.nn.functional.interpolate(batch, size, mode="bilinear", align_corners=False)
        features.append(network.net(network.scaling_layer(batch))[-1].mean((2, 3)))
    return torch.cat(features)


@torch.no_grad()
def inception_features(images: Float[Tensor, "n 3 h w"], feature: int = 2048) -> Float[Tensor, "n feature"]:
    """FID's InceptionV3 features of images in [-1, 1], as torchmetrics' FrechetInceptionDistance takes them.

    feature: how many, 64, 192, 768 or 2048, of ever later layers. Raises ProbekitError for another number, and where
    torch-fidelity is not installed or its weights cannot be downloaded.
    """
    network = _inception(feature)
    pixels = ((images.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    taken = [network(batch).reshape(len(batch), -1) for batch in torch.split(pixels, _BATCH)]
    return torch.cat([torch.empty(0, feature), *taken])


def inception_fid(a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "m 3 h w"], feature: int = 2048) -> float:
    """The Fréchet inception distance of two sets of images in [-1, 1]: `frechet` over `inception_features`.

    FID proper has feature = 2048 and 50,000 images; All Roads has feature = 64 (its code) and 100. Report both numbers.
    """
    return frechet(inception_features(a, feature), inception_features(b, feature))


@functools.cache
def _inception(feature: int) -> Any:
    if feature not in (64, 192, 768, 2048):
        raise ProbekitError(f"feature {feature}: Inception's layers give 64, 192, 768 or 2048")
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        return FrechetInceptionDistance(feature=feature).inception
    except ModuleNotFoundError as error:
        raise ProbekitError("FID: needs torch-fidelity; pip install torch-fidelity, or use fd-alexnet") from error
    except Exception as error:  # the download raises a dozen kinds
        reason = " ".join(str(error).split())[:120]
        raise ProbekitError(f"FID: Inception's weights cannot be had ({reason}); use fd-alexnet") from error


def bootstrap(
    statistic: Callable[[np.ndarray], float] | Sequence[float] | np.ndarray,
    n: int | None = None,
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> tuple[float, float, float]:
    """A statistic of n rows with its 95% percentile bootstrap interval: (value, low, high).

    statistic: what maps row numbers (n,) to a number, taken first of 0 … n - 1, then of n drawn with replacement, `resamples`
    times; or one number a row, for their mean. Drawn rows repeat, which `frechet` takes for a narrower set: at small n its
    interval lies higher than the value, which is too high already, and may not hold it. Raises ProbekitError for no rows.
    """
    if not callable(statistic):
        values = np.asarray(statistic, dtype=np.float64)
        # the rows of all resamples at once: a thousand means of a few rows each would cost more calls than sums
        return _bootstrap(lambda rows: values[rows].mean(-1), len(values), seed, resamples, at_once=True)
    return _bootstrap(statistic, n or 0, seed, resamples, at_once=False)


def _bootstrap(
    statistic: Callable[[np.ndarray], Any], n: int, seed: int, resamples: int, *, at_once: bool
) -> tuple[float, float, float]:
    if n < 1 or resamples < 1:
        raise ProbekitError(f"bootstrap of {n} rows, {resamples} resamples: needs 1 or more of both")
    draw = np.random.default_rng(seed)
    drawn: list[float] = []
    size = max(1, _DRAWN // n) if at_once else 1
    for start in range(0, resamples, size):
        rows = draw.integers(n, size=(min(size, resamples - start), n))
        drawn += statistic(rows).tolist() if at_once else [statistic(rows[0])]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(statistic(np.arange(n))), float(low), float(high)


def jackknife(statistic: Callable[[np.ndarray], float], n: int, *, groups: int = 8) -> tuple[float, float, float]:
    """A statistic of n rows with its 95% interval by leaving out a group of rows at a time: (value, low, high).

    For what drawn rows that repeat would bias, as the largest of many correlations, or a distance to a distribution. statistic:
    maps row numbers to a number, taken of 0 … n - 1, then of all but every `groups`-th row from each of the first. The interval
    is value ± t * sqrt((g - 1) / g * sum of squared deviations), t of g - 1 degrees of freedom (Kott 2001, "The delete-a-group
    jackknife"). Raises ProbekitError for fewer rows than groups, and fewer than 2 groups.
    """
    from scipy.stats import t

    if not 2 <= groups <= n:
        raise ProbekitError(f"jackknife of {n} rows in {groups} groups: needs 2 groups or more, and a row for each")
    rows = np.arange(n)
    left = np.array([statistic(rows[rows % groups != group]) for group in range(groups)])
    reach = float(t.ppf(0.975, groups - 1) * np.sqrt((groups - 1) / groups * np.square(left - left.mean()).sum()))
    value = float(statistic(rows))
    return value, value - reach, value + reach


def share_interval(hits: int, n: int) -> tuple[float, float]:
    """The 95% Wilson interval of a share of which n draws were `hits`; (nan, nan) of none."""
    from scipy.stats import binomtest

    if n == 0:
        return float("nan"), float("nan")
    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)

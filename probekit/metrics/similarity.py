"""How alike two latent spaces lay out the same images, whatever their sizes: unbiased CKA, mutual k-NN, SVCCA.

x and y hold one row an image, the same images in the same order. Nothing here is random. Each measure is 1 for a rotated and
scaled copy; what unrelated spaces give stands with each.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from torch import Tensor

from probekit.hooks.errors import ProbekitError

Features = Float[np.ndarray, "_n ..."] | Float[Tensor, "_n ..."]

_BLOCK = 1024  # rows or columns of a product that are held at a time


def cka(x: Features, y: Features) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019) with the unbiased HSIC of Song et al. (2012, equation 5).

    HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)), at most 1; near 0, and at times below, for unrelated spaces of any size (the
    biased one is 0.86 for 128 points in 768 dimensions). The smaller of n x n and dx x dy products are formed, in blocks. NaN
    where all rows of a space are equal. Raises ProbekitError for other than two equally long (n, d) with n >= 4, all finite.
    """
    x, y = _centred(x, y, least=4)
    spread = math.sqrt(_hsic(x, x) * _hsic(y, y))
    return _hsic(x, y) / spread if spread > 0 else math.nan


def mutual_knn(x: Features, y: Features, k: int = 10) -> float:
    """The share of each row's k nearest neighbours in x that are among its k nearest in y, averaged over rows, in [0, 1].

    Huh et al. (2024, appendix A), by Euclidean distance; theirs is that of rows scaled to length 1. Unrelated spaces give
    k / (n - 1). Raises ProbekitError as `cka`, and for a k outside 1 … n - 1.
    """
    x, y = _centred(x, y, least=2)
    n = len(x)
    if not 1 <= k < n:
        raise ProbekitError(f"k {k}: of {n} rows, each has 1 to {n - 1} neighbours")
    shared = 0
    for start in range(0, n, _BLOCK):
        near = np.zeros((min(_BLOCK, n - start), n), dtype=bool)
        np.put_along_axis(near, _nearest(x, start, k), True, axis=1)
        shared += int(np.take_along_axis(near, _nearest(y, start, k), axis=1).sum())
    return shared / (n * k)


def svcca(x: Features, y: Features, variance: float = 0.99) -> tuple[float, float]:
    """SVCCA (Raghu et al. 2017) and what it would be for unrelated spaces: (value, null), both in [0, 1].

    The mean canonical correlation of the leading principal components that hold that share of each space's variance. It is
    far above 0 for unrelated spaces, and 1 where either keeps n - 1 components: the null is the mean of Wachter's (1980) law
    for as many rows and components, exact as they grow and within 0.05 from 10 rows on. A value means something only above
    it. (nan, nan) where all rows of a space are equal. Raises ProbekitError as `cka`, and for a variance outside (0, 1].
    """
    if not 0 < variance <= 1:
        raise ProbekitError(f"variance {variance}: a share, above 0 and at most 1")
    x, y = _centred(x, y, least=3)
    a, b = _components(x, variance), _components(y, variance)
    if 0 in (a.shape[1], b.shape[1]):
        return math.nan, math.nan
    correlations = np.linalg.svdvals(a.T @ b).clip(0, 1)
    return float(correlations.mean()), _wachter_mean(a.shape[1] / (len(x) - 1), b.shape[1] / (len(x) - 1))


def _centred(x: Features, y: Features, *, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows less their mean, over their root mean square; float64 stays, everything else becomes float32."""
    both = []
    for rows in (np.asarray(x), np.asarray(y)):
        if rows.ndim != 2 or len(rows) != len(x) or len(rows) < least or rows.shape[1] == 0:
            raise ProbekitError(
                f"features of shapes {tuple(np.shape(x))} and {tuple(np.shape(y))}: (n, d) both, as many rows, at least {least}"
            )
        kind = np.float64 if rows.dtype == np.float64 else np.float32
        rows = (rows - rows.mean(0, dtype=np.float64)).astype(kind)
        scale = math.sqrt(np.vdot(rows, rows) / rows.size)
        if not math.isfinite(scale):
            raise ProbekitError("features: some are not finite")
        both.append(rows / kind(scale) if scale > 0 else rows)
    return both[0], both[1]


def _hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased HSIC of centred rows, times n (n - 3), which the ratio does not need.

    For kernels K = xx', L = yy' that are centred, Song's three terms come down to sum(K L) without n x n matrices:
    the sums of K's and L's rows off the diagonal are minus their diagonals.
    """
    n, (dx, dy) = len(x), (x.shape[1], y.shape[1])
    if n * n < dx * dy:
        blocks = (slice(i, i + _BLOCK) for i in range(0, n, _BLOCK))
        product = sum(float(np.vdot(x[rows] @ x.T, y[rows] @ y.T)) for rows in blocks)
    else:
        products = (x[:, i : i + _BLOCK].T @ y for i in range(0, dx, _BLOCK))
        product = sum(float(np.vdot(p, p)) for p in products)
    k, m = (np.einsum("nd,nd->n", v, v).astype(np.float64) for v in (x, y))
    return product - n / (n - 2) * float(k @ m) + float(k.sum() * m.sum()) / ((n - 1) * (n - 2))


def _nearest(x: np.ndarray, start: int, k: int) -> np.ndarray:
    """The numbers of the k nearest other rows, of a block of rows, (block, k)."""
    block = x[start : start + _BLOCK]
    distance = np.einsum("nd,nd->n", x, x) - 2 * (block @ x.T)  # less the row's own square, the same for all
    distance[np.arange(len(block)), np.arange(start, start + len(block))] = np.inf
    return np.argpartition(distance, k - 1, axis=1)[:, :k]


def _components(x: np.ndarray, variance: float) -> np.ndarray:
    """Orthonormal columns (n, k): the scores of the k leading principal components that hold this share of the variance."""
    x = x.astype(np.float64)
    wide = x.shape[1] > len(x)
    values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    values, vectors = values[::-1], vectors[:, ::-1]
    held = values > values[0] * len(values) * np.finfo(np.float64).eps  # the rest is rounding
    share = np.cumsum(values) / values[held].sum() if held.any() else np.ones(0)
    k = min(int(np.searchsorted(share, variance - 1e-12)) + 1, int(held.sum()))
    return vectors[:, :k] if wide else x @ (vectors[:, :k] / np.sqrt(values[:k]))


def _wachter_mean(a: float, b: float) -> float:
    """The mean correlation of two independent random subspaces with shares a and b of the dimensions, in the limit.

    The squares have the density sqrt((high - s)(s - low)) / (2 pi a s (1 - s)) for a <= b, and a + b - 1 of a are 1.
    """
    a, b = min(a, b), max(a, b)
    low, high = ((math.sqrt(a * (1 - b)) + sign * math.sqrt(b * (1 - a))) ** 2 for sign in (-1, 1))
    middle, radius = (low + high) / 2, (high - low) / 2
    angles = (np.arange(10_000) + 0.5) * math.pi / 10_000
    squares = middle + radius * np.cos(angles)
    density = (radius * np.sin(angles)) ** 2 / (2 * math.pi * a * np.sqrt(squares) * (1 - squares)) if radius > 0 else 0.0
    return float(np.sum(density) * math.pi / 10_000 + max(0.0, a + b - 1) / a)

"""Where a diffusion model's noise, its inverted latent and its sample lie: the measures of Hidden Relations.

Rows correspond everywhere: row i of noise, latent and sample are of one picture. A pixel is one value of one channel. Every
std is that of the values named, over their number less one, and NaN of one value; nothing here is random.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probekit.hooks.errors import ProbekitError


@runtime_checkable
class OnDisk(Protocol):
    """Rows (n, ...) that lie in files, of which slices are read: what `nearest` and `margin` ask of them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """n, then a row's."""

    @property
    def ndim(self) -> int:
        """The number of dimensions."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


Rows = Float[Tensor, "_n ..."] | Float[np.ndarray, "_n ..."] | OnDisk

_ROWS = 256  # rows that are held in float64 at a time
_COLUMNS = 1024  # pixels whose correlations with all others are held at a time
_VALUES = 2**25  # values of queries, and of candidates, that are compared at a time: 128 MiB


def top_correlations(x: Float[Tensor, "n ..."], k: int = 10, patch: int | None = None) -> tuple[float, float]:
    """Mean and std of the k largest |Pearson r| over all pairs of the c * h * w pixels across the n samples, in [0, 1].

    patch: the k largest within each patch x patch block of the picture, its c * patch * patch pixels together, all blocks'
    pooled (the later code of the paper has patch 8 and k 20). It falls with n: hold it against `noise_correlation`, with
    d = c * h * w or c * patch * patch, at the same n and k. A pixel that never changes has no correlation and is left out;
    where that leaves fewer than k pairs these count, and none give (nan, nan). Source: Hidden Relations, table 1. Raises
    ProbekitError for other than (n, c, h, w) with n >= 3 and all finite, a patch that does not divide the sides, and a k
    outside 1 … the number of pairs.
    """
    if x.ndim != 4 or len(x) < 3:
        raise ProbekitError(f"x of shape {tuple(x.shape)}: (n, c, h, w) with at least 3 samples")
    c, h, w = x.shape[1:]
    if patch is not None and (patch < 1 or h % patch or w % patch):
        raise ProbekitError(f"patch {patch}: must divide both sides of {h}x{w}")
    high, wide = (h, w) if patch is None else (patch, patch)
    _check_pairs(c * high * wide, k)
    tops = [
        _largest(_double(x[:, :, i : i + high, j : j + wide]), k, x.dtype) for i in range(0, h, high) for j in range(0, w, wide)
    ]
    return _mean_and_std(torch.cat(tops).double())


def noise_correlation(n: int, d: int, k: int = 10) -> float:
    """What white noise gives for the mean of `top_correlations`: n samples of d pixels, the k largest |r|.

    It depends on n: at d = 192 and k = 20, 0.43 for 64 samples, 0.22 for 256, 0.078 for 2048. r² of two independent normal
    pixels is Beta(1/2, (n - 2) / 2) distributed, and the chance of exceeding the i-th largest of m independent values is
    Beta(i, m - i + 1); the m = d (d - 1) / 2 pairs, only pairwise independent, are taken as such. Raises ProbekitError for
    n < 3, and a k outside 1 … m.
    """
    from scipy.special import betainccinv, betaincinv

    if n < 3:
        raise ProbekitError(f"n {n}: a correlation says something from 3 samples on")
    m = _check_pairs(d, k)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    rank = np.arange(1, k + 1)[:, None]
    exceeding = betaincinv(rank, m - rank + 1, (nodes + 1) / 2)
    return float((np.sqrt(betainccinv(0.5, (n - 2) / 2, exceeding)) @ weights).mean() / 2)


def angles(
    noise: Float[Tensor, "n ..."], latent: Float[Tensor, "_n ..."], sample: Float[Tensor, "_n ..."]
) -> dict[str, tuple[float, float]]:
    """The angles of each row's triangle of three points, in degrees: corner ("noise", "latent", "sample") to (mean, std).

    Mean and std of the rows' angles; the paper's code takes the arccos of the mean cosine, and of a std. A row with two equal
    corners has no angles and is left out; (nan, nan) where all are. Raises ProbekitError for other than three equal shapes
    with at least one row, all finite.
    """
    _check_corners(noise, latent, sample)
    seen = []
    for block in zip(*(torch.split(corner, _ROWS) for corner in (noise, latent, sample)), strict=True):
        n, z, s = map(_double, block)
        nz, ns, zs = (edge / edge.norm(dim=1, keepdim=True) for edge in (z - n, s - n, s - z))
        seen.append(torch.stack([_angle(nz, ns), _angle(-nz, zs), _angle(ns, zs)], 1))
    found = torch.cat(seen)
    found = found[~found.isnan().any(1)]
    return dict(zip(("noise", "latent", "sample"), map(_mean_and_std, found.unbind(1)), strict=True))


def distances(
    noise: Float[Tensor, "n ..."], latent: Float[Tensor, "_n ..."], sample: Float[Tensor, "_n ..."]
) -> dict[str, tuple[float, float]]:
    """The rows' L2 distances: "noise-latent", "latent-sample" and "noise-sample", each to (mean, std).

    Raises ProbekitError as `angles`.
    """
    _check_corners(noise, latent, sample)
    pairs = {"noise-latent": (noise, latent), "latent-sample": (latent, sample), "noise-sample": (noise, sample)}
    found = {}
    for name, both in pairs.items():
        blocks = zip(*(torch.split(corner, _ROWS) for corner in both), strict=True)
        found[name] = _mean_and_std(torch.cat([(_double(p) - _double(q)).norm(dim=1) for p, q in blocks]))
    return found


def interpolation_distances(
    states: Sequence[Tensor] | Float[Tensor, "s _n ..."],
    noise: Float[Tensor, "n ..."],
    latent: Float[Tensor, "_n ..."],
    points: int = 25,
) -> Float[Tensor, "s points"]:
    """How far each state of a trajectory is from points of the way from noise to latent; float64, on the CPU.

    D[i, j] = mean over rows of |x_i - (a_j latent + (1 - a_j) noise)|, a_j = linspace(0, 1, points). Source: Hidden
    Relations, figure 5. Raises ProbekitError for shapes that do not go together, values that are not finite, and fewer than
    2 points.
    """
    shapes = [tuple(x.shape) for x in (noise, latent, *states)]
    if noise.ndim < 2 or len(noise) == 0 or (other := [shape for shape in shapes if shape != shapes[0]]):
        raise ProbekitError(f"states, noise and latent of shapes {[shapes[0], *other]}: one shape (n, ...), n at least 1")
    if points < 2:
        raise ProbekitError(f"points {points}: at least 2, the two ends")
    a = torch.linspace(0, 1, points, dtype=torch.float64)
    total = torch.zeros(len(states), points, dtype=torch.float64)
    for start in range(0, len(noise), _ROWS):
        rows = slice(start, start + _ROWS)
        origin = _double(noise[rows])
        way = _double(latent[rows]) - origin
        for i, state in enumerate(states):
            gone = _double(state[rows]) - origin
            # |gone - a way|², exactly 0 where a state is the noise or the latent
            square, along, whole = ((p * q).sum(1, keepdim=True) for p, q in ((gone, gone), (gone, way), (way, way)))
            total[i] += (square - 2 * a * along + a.square() * whole).clamp(min=0).sqrt().sum(0)
    return total / len(noise)


def nearest(
    queries: Rows,
    candidates: Rows,
    *,
    block: int | None = None,
    device: str | torch.device = "cpu",
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Int[Tensor, "n"]:
    """The number of each query's L2-nearest candidate among all m, (n,) on the CPU; the first of equal candidates.

    Tensors or arrays (n, ...) and (m, ...) with rows of one shape, flattened; memory maps and half precision too, as only
    `block` rows of each are converted at a time: 2,048 or, of long ones, 128 MiB. In float64 where both are, else in float32:
    candidates that are equally near to its rounding may stand for each other. on_rows: told how many queries each block had.
    Raises ProbekitError for rows that cannot be compared, values that are not finite, and a block below 1.
    """
    _check_rows(queries, candidates)
    block = _block_length(queries) if block is None else block
    if block < 1:
        raise ProbekitError(f"block {block}: at least 1 row")
    kind = torch.float64 if queries.dtype.itemsize == candidates.dtype.itemsize == 8 else torch.float32
    starts = range(0, len(candidates), block)
    # The candidates' mean as origin: the squares of the expansion |c|² - 2 q.c are then no larger than they must be
    origin = torch.zeros(1, dtype=kind, device=device)
    for start in starts:
        origin = origin + _block(candidates, start, block, kind, device).sum(0) / len(candidates)
    found = torch.empty(len(queries), dtype=torch.int64)
    for first in range(0, len(queries), block):
        q = _block(queries, first, block, kind, device) - origin
        best = torch.full((len(q),), math.inf, dtype=kind, device=device)
        number = torch.zeros(len(q), dtype=torch.int64, device=device)
        for start in starts:
            c = _block(candidates, start, block, kind, device) - origin
            distance = torch.addmm(c.square().sum(1), q, c.T, alpha=-2)
            if not distance.isfinite().all():
                raise ProbekitError("queries or candidates: some are not finite")
            least, index = distance.min(1)
            closer = least < best
            best = torch.where(closer, least, best)
            number = torch.where(closer, index + start, number)
        found[first : first + len(q)] = number.cpu()
        on_rows(len(q))
    return found


def matching_accuracy(answers: Int[Tensor, " n"], splits: int = 8) -> tuple[float, float]:
    """The share of rows whose nearest of all n candidates is that of their own row, and its std over splits, in [0, 1].

    answers: what `nearest` gives for n queries and as many candidates. splits: that many disjoint runs of rows, equal to within
    a row; the candidates are not split. Candidates that have nothing to do with the queries give 1 / n. Source: Hidden
    Relations, "Noise-to-Sample mapping" (noise to sample, and back). Raises ProbekitError for splits outside 1 … n.
    """
    n = len(answers)
    if not 1 <= splits <= n:
        raise ProbekitError(f"splits {splits}: 1 to {n}, the number of rows")
    hits = (answers == torch.arange(n)).double()
    _, std = _mean_and_std(torch.stack([part.mean() for part in hits.tensor_split(splits)]))
    return float(hits.mean()), std


def margin(queries: Rows, candidates: Rows, rows: int = _ROWS) -> tuple[float, float]:
    """Mean L2 distance of the first `rows` queries to the candidate of their own row, and to the nearest of all others.

    Tensors or arrays (n, ...) with as many candidates as queries, memory maps too; in float64, on the CPU. It says how clear
    the answers of `nearest` are: Hidden Relations gives their shares alone. Raises ProbekitError for rows that cannot be
    compared, and for other than as many of both.
    """
    _check_rows(queries, candidates)
    if len(queries) != len(candidates):
        raise ProbekitError(f"{len(queries)} queries and {len(candidates)} candidates: rows correspond, so as many of both")
    block, cpu = _block_length(queries), "cpu"
    asked = _block(queries, 0, rows, torch.float64, cpu)
    number = torch.arange(len(asked))
    own = (asked - _block(candidates, 0, len(asked), torch.float64, cpu)).norm(dim=1)
    least = torch.full_like(own, math.inf)
    for start in range(0, len(candidates), block):
        part = _block(candidates, start, block, torch.float64, cpu)
        distance = torch.cdist(asked, part)
        distance[number[:, None] == start + torch.arange(len(part))] = math.inf
        least = torch.minimum(least, distance.amin(1))
    return float(own.mean()), float(least.mean())


def plain_and_textured(
    error: Float[Tensor, "..."], images: Float[Tensor, "n 3 h w"], threshold: float = 0.1
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Each picture's mean |error| over its plain and over its textured pixels: (plain, textured), on the error's device.

    A pixel is plain where no channel of the image varies by `threshold` or more (largest less smallest value) within the
    3x3 pixels around it; 0.1 is 0.05 of the range of [-1, 1]. All channels of the error count there. NaN where a picture has no
    pixel of a kind. Raises ProbekitError for an error and images of other n, h or w.
    """
    if error.ndim != 4 or images.ndim != 4 or len(error) != len(images) or error.shape[2:] != images.shape[2:]:
        shapes = f"{tuple(error.shape)} and {tuple(images.shape)}"
        raise ProbekitError(f"error and images of shapes {shapes}: (n, c, h, w) and (n, 3, h, w)")
    images = images.float()
    highest, lowest = (sign * torch.nn.functional.max_pool2d(sign * images, 3, stride=1, padding=1) for sign in (1, -1))
    plain = ((highest - lowest).amax(1) < threshold).to(error.device)
    size = error.float().abs().mean(1)
    # 0 / 0 is the NaN that is promised
    inside, outside = (size.where(kind, 0).sum((1, 2)) / kind.sum((1, 2)) for kind in (plain, ~plain))
    return inside, outside


def _mean_and_std(values: Float[Tensor, " n"]) -> tuple[float, float]:
    if len(values) == 0:
        return math.nan, math.nan
    return float(values.mean()), float(values.std()) if len(values) > 1 else math.nan


def _double(rows: Float[Tensor, "n ..."]) -> Float[Tensor, "n d"]:
    """Rows, flattened; on the CPU, as not every device has float64."""
    rows = rows.detach().cpu().double().flatten(1)
    if not rows.isfinite().all():
        raise ProbekitError("noise, latents or samples: some values are not finite")
    return rows


def _check_corners(noise: Tensor, latent: Tensor, sample: Tensor) -> None:
    if noise.ndim < 2 or len(noise) == 0 or not noise.shape == latent.shape == sample.shape:
        shapes = ", ".join(str(tuple(corner.shape)) for corner in (noise, latent, sample))
        raise ProbekitError(f"noise, latent and sample of shapes {shapes}: (n, ...) all, n at least 1")


def _check_pairs(d: int, k: int) -> int:
    """The number of pairs of d pixels."""
    pairs = d * (d - 1) // 2
    if not 1 <= k <= pairs:
        raise ProbekitError(f"k {k}: {d} pixels make {pairs} pairs; k is 1 to that many")
    return pairs


def _largest(x: Float[Tensor, "n d"], k: int, kind: torch.dtype) -> Float[Tensor, " k"]:
    """The k largest |r| of the columns' pairs, in float32 for anything but float64."""
    x = x[:, x.amax(0) > x.amin(0)]  # a constant's deviation from its rounded mean need not be 0
    x -= x.mean(0)
    x = x.div_(x.norm(dim=0)).to(kind if kind == torch.float64 else torch.float32)
    top = x.new_empty(0)
    for start in range(0, x.shape[1], _COLUMNS):
        r = (x[:, start : start + _COLUMNS].T @ x[:, start:]).abs_()
        r.masked_fill_(torch.ones_like(r, dtype=torch.bool).tril_(), -1)  # each pair once, no pixel with itself
        top = torch.cat([top, r.flatten().topk(min(k, r.numel())).values])
        top = top.topk(min(k, len(top))).values
    return top[top >= 0].clamp(max=1)


def _angle(u: Float[Tensor, "n d"], v: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """The angle of unit vectors, in degrees; Kahan's form, exact at 0 and 180 where the arccos of a cosine is not."""
    return torch.rad2deg(2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1)))


def _block(rows: Rows, start: int, size: int, kind: torch.dtype, device: str | torch.device) -> Float[Tensor, "b d"]:
    """A block of rows, flattened."""
    part = rows[start : start + size]
    if isinstance(part, np.ndarray):
        # a copy of what is a view: torch warns of memory maps that cannot be written
        part = torch.from_numpy(part if part.base is None else np.array(part))
        base: object = rows
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and hasattr(base, "madvise"):
            # what was read through a map counts as the process's memory until it is given back
            base.madvise(mmap.MADV_DONTNEED)
    return part.detach().to(device, kind).flatten(1)


def _block_length(rows: Rows) -> int:
    return max(1, min(2048, _VALUES // math.prod(rows.shape[1:])))


def _check_rows(queries: Rows, candidates: Rows) -> None:
    if min(queries.ndim, candidates.ndim) < 2 or queries.shape[1:] != candidates.shape[1:] or len(candidates) == 0:
        shapes = f"{tuple(queries.shape)} and {tuple(candidates.shape)}"
        raise ProbekitError(f"queries and candidates of shapes {shapes}: rows of one shape, at least 1 candidate")

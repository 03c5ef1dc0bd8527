"""What a latent space is like: density, smoothness, organization and relevance (The Evolving Nature of Latent Spaces, 3).

The paper names the four and scores them by looking; here each is a number with an interval. What is needed of a space is a way
from codes to pictures, and of seeing a way from pictures to vectors whose squared distance is how unlike two pictures look
(`metrics.lpips.embedded`); both are plain functions, so that a drawn space with a known answer is measured as a model's is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probekit.hooks.errors import ProbekitError
from probekit.metrics.distributions import bootstrap
from probekit.metrics.manifolds import Manifold

Codes = Float[Tensor, "n *shape"]
Images = Float[Tensor, "n 3 h w"]
See = Callable[[Tensor], Tensor]
"""Pictures to vectors (n, d), whose squared Euclidean distance is how unlike they look."""

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the noise that is added to codes."""
POINTS = 6
"""Steps of a path; the midpoint is one of its points."""
EPSILON = 0.01
"""How far apart the points of a path are whose difference tells its speed."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Measured:
    """A number with its 95% bootstrap interval over n rows (pictures, pairs or draws); NaN where it cannot be told."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def mean(cls, values: Sequence[float] | np.ndarray) -> Measured:
        """Of values, those that are NaN left out."""
        kept = np.asarray(values, dtype=float)
        kept = kept[~np.isnan(kept)]
        return cls(*bootstrap(kept, resamples=RESAMPLES), len(kept)) if len(kept) else NOT_TOLD

    @classmethod
    def median(cls, values: Sequence[float] | np.ndarray) -> Measured:
        """The median of values, those that are NaN left out, with the interval of the median."""
        kept = np.asarray(values, dtype=float)
        kept = kept[~np.isnan(kept)]
        if not len(kept):
            return NOT_TOLD
        rows = np.random.default_rng(0).integers(len(kept), size=(RESAMPLES, len(kept)))
        low, high = np.quantile(np.median(kept[rows], axis=1), [0.025, 0.975])
        return cls(float(np.median(kept)), float(low), float(high), len(kept))


NOT_TOLD = Measured(math.nan, math.nan, math.nan, 0)


# --- density -----------------------------------------------------------------------------------------------------------


def gaussian(codes: Codes, count: int, generator: torch.Generator) -> Float[Tensor, "count *shape"]:
    """That many draws from the Gaussian with the codes' mean and covariance (over their number less one), of the codes' shape.

    Drawn as sums of the centred codes, which gives that covariance however few they are. Raises ProbekitError for less than 2.
    """
    if len(codes) < 2:
        raise ProbekitError(f"{len(codes)} code: a covariance needs 2 or more")
    flat = codes.flatten(1)
    mean = flat.mean(0)
    weights = torch.randn(count, len(codes), generator=generator) / math.sqrt(len(codes) - 1)
    return (mean + weights @ (flat - mean)).reshape(count, *codes.shape[1:])


def is_normal(drawn: Codes) -> bool:
    """Whether draws of a prior look standard normal: mean and variance over all values within 0.1 of 0 and 1, and norms even.

    Norms of normal vectors hardly differ where there are many dimensions: they spread by 1 / sqrt(2 d).
    """
    flat = drawn.flatten(1)
    norms = flat.norm(dim=1)
    even = bool(norms.std() / norms.mean() < 3 / math.sqrt(2 * flat.shape[1]))
    return abs(float(flat.mean())) < 0.1 and abs(float(flat.var()) - 1) < 0.1 and even


def mixed(codes: Codes, noise: Codes, strength: float, mean: Float[Tensor, "*shape"]) -> Codes:
    """Codes with noise of their own distribution added at a strength from 0 (the code) to 1 (noise alone), variance kept.

    mean + sqrt(1 - s²) (code - mean) + s (noise - mean): where both have a covariance, the sum has it (figure 4 adds
    noise "in the same distributions as the latent space in question").
    """
    return mean + math.sqrt(1 - strength**2) * (codes - mean) + strength * (noise - mean)


def density(pictures: Float[np.ndarray, "n d"], real: Manifold) -> dict[str, Measured]:
    """How much features of pictures lie where real ones' do; the intervals are over the pictures, the real ones are fixed.

    `precision`: the share in [0, 1] that lie in any ball around a real one; `density`: in how many on average, over k, about 1
    for real pictures and 0 far from them (Naeem et al. 2020, eq. 3).
    """
    return {
        "precision": Measured.mean(real.holds(pictures).astype(float)),
        "density": Measured.mean(real.balls(pictures)),
    }


# --- smoothness --------------------------------------------------------------------------------------------------------


def way(a: Codes, b: Codes, t: float, *, spherical: bool = False) -> Codes:
    """The codes at t of the way from a to b, row by row: straight, or `spherical` on the great circle (Shoemake 1985).

    Karras et al. go straight in w, and on the sphere in z, which is normal: a straight way would leave where its draws lie.
    """
    if not spherical:
        return torch.lerp(a, b, t)
    x, y = a.flatten(1).double(), b.flatten(1).double()
    cosine = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)).clamp_min(1e-12)
    angle = cosine.clamp(-1, 1).acos()[:, None]
    plain = angle.sin() < 1e-6
    divisor = torch.where(plain, 1.0, angle.sin())
    first = torch.where(plain, 1 - t, ((1 - t) * angle).sin() / divisor)
    second = torch.where(plain, t, (t * angle).sin() / divisor)
    return (first * x + second * y).to(a.dtype).reshape(a.shape)


@dataclass(frozen=True, eq=False)
class Walks:
    """Paths between pairs of codes, as they are seen.

    pictures: of every point of every path. seen: the same as vectors. lengths: of each, its perceptual path length over the
    end points' distance.
    """

    pictures: Float[Tensor, "pairs points 3 h w"]
    seen: Float[Tensor, "pairs points d"]
    lengths: Float[np.ndarray, " pairs"]

    @property
    def steps(self) -> Float[np.ndarray, "pairs steps"]:
        """How unlike each point looks to the one before it: a distance, the root of what `See` squares."""
        return (self.seen[:, 1:] - self.seen[:, :-1]).norm(dim=2).double().numpy()

    @property
    def jumps(self) -> Float[np.ndarray, " pairs"]:
        """Each path's largest step over its mean step: 1 where it is even, the number of steps where it comes all at once.

        NaN where nothing changes. It is 1, too, where every point has a picture of its own: see `leaps`.
        """
        steps = self.steps
        return np.where(steps.sum(1) > 0, steps.max(1) / np.maximum(steps.mean(1), 1e-30), np.nan)

    @property
    def leaps(self) -> Float[np.ndarray, " pairs"]:
        """Each path's largest step over the step of a straight and even path, the ends' distance over the number of steps.

        1 where it is straight and even, and else more: the number of steps where it comes all at once, and about that where
        every point has a picture of its own. NaN where the ends look the same.
        """
        steps, ends = self.steps, (self.seen[:, -1] - self.seen[:, 0]).norm(dim=1).double().numpy()
        return np.where(ends > 0, steps.max(1) * steps.shape[1] / np.maximum(ends, 1e-30), np.nan)


def walk(
    decode: Callable[[Tensor], Tensor],
    see: See,
    a: Codes,
    b: Codes,
    generator: torch.Generator,
    *,
    spherical: bool = False,
    points: int = POINTS,
    epsilon: float = EPSILON,
) -> Walks:
    """Paths from each row of a to that of b, in `points` steps, and how fast pictures change along them.

    The length is the perceptual path length of Karras et al. (2019, eq. 2), d(G(t), G(t + ε)) / ε² with d a squared distance,
    at one t a pair, drawn from the path's points before the end; divided by d of the end points, it does not depend on how far
    apart pictures of a space are: 1 where the picture changes evenly along a straight line, 1 / ε² where every point has a
    picture of its own. NaN where the ends look the same.
    """
    where = [i / points for i in range(points + 1)]
    codes = torch.stack([way(a, b, t, spherical=spherical) for t in where], 1)
    pictures = decode(codes.flatten(0, 1))
    seen = see(pictures).reshape(len(a), points + 1, -1)
    pictures = pictures.reshape(len(a), points + 1, *pictures.shape[1:])
    at = torch.randint(points, (len(a),), generator=generator).tolist()
    rows = range(len(a))
    near = torch.cat([way(a[i : i + 1], b[i : i + 1], where[at[i]] + epsilon, spherical=spherical) for i in rows])
    speed = (see(decode(near)) - seen[rows, at]).square().sum(1).double() / epsilon**2
    ends = (seen[:, -1] - seen[:, 0]).square().sum(1).double()
    lengths = torch.where(ends > 0, speed / ends.clamp_min(1e-30), torch.nan)
    return Walks(pictures, seen, lengths.numpy())


def faded(walks: Walks, see: See) -> Walks:
    """The same paths as a cross-fade of the end pictures' pixels: what the smoothest way between them looks like."""
    first, last = walks.pictures[:, :1], walks.pictures[:, -1:]
    t = torch.linspace(0, 1, walks.pictures.shape[1])[None, :, None, None, None]
    pictures = torch.lerp(first, last, t)
    seen = see(pictures.flatten(0, 1)).reshape(*pictures.shape[:2], -1)
    return Walks(pictures, seen, np.full(len(pictures), np.nan))


def smoothness(walks: Walks) -> dict[str, Measured]:
    """`jump` and `leap`, from 1 to the number of steps and beyond, means over paths; `path length`, from about 1, the median.

    Of few paths one that crosses a flat, dark area, where LPIPS is all nerves, would be the mean length; Karras et al. leave
    the outermost hundredths out.
    """
    return {
        "jump": Measured.mean(walks.jumps),
        "leap": Measured.mean(walks.leaps),
        "path length": Measured.median(walks.lengths),
    }


# --- organization ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Correlated:
    """Spearman correlation of two sets of distances, its interval over the items, and what chance makes of it (Mantel 1967).

    null: what 97.5 of 100 permutations stay below. p: how often they reach as much.
    """

    correlation: Measured
    null: float
    p: float


def organization(
    codes: Codes, apart: Float[np.ndarray, "n n"], *, seed: int = 0, permutations: int = 999, resamples: int = 300
) -> Correlated:
    """Whether what is near in a space is alike: Spearman correlation of its Euclidean distances with those of what is seen.

    1: the order of distances is that of what is seen; about 0: near codes are no more alike than far ones. The null permutes
    the codes, so that pairs that share one stay together (Mantel's test); the interval draws items again, pairs of an item with
    itself left out. NaN where one of both does not vary. Raises ProbekitError for less than 4 codes, and for distances that are
    not of them.
    """
    n = len(codes)
    if n < 4 or apart.shape != (n, n):
        raise ProbekitError(f"{n} codes and distances of shape {apart.shape}: 4 codes or more, and as many distances each way")
    flat = codes.flatten(1).double()
    between = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    draw = np.random.default_rng(seed)
    upper = np.triu_indices(n, 1)
    value = _spearman(between[upper], apart[upper])
    if math.isnan(value):
        return Correlated(NOT_TOLD, math.nan, math.nan)
    x, y = np.zeros((n, n)), np.zeros((n, n))
    x[upper], y[upper] = _ranks(between[upper]), _ranks(apart[upper])
    x, y = x + x.T, y + y.T
    null = []
    for _ in range(permutations):
        order = draw.permutation(n)
        null.append(_pearson(x[order][:, order][upper], y[upper]))
    again = []
    for _ in range(resamples):
        rows = draw.integers(n, size=n)
        i, j = rows[upper[0]], rows[upper[1]]
        kept = i != j
        again.append(_spearman(between[i[kept], j[kept]], apart[i[kept], j[kept]]))
    low, high = np.nanquantile(again, [0.025, 0.975])
    reached = 1 + sum(drawn >= value - 1e-12 for drawn in null)
    return Correlated(
        Measured(value, float(low), float(high), n), float(np.quantile(null, 0.975)), reached / (1 + permutations)
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return rankdata(values)


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size > 0 else math.nan


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    return _pearson(_ranks(x), _ranks(y)) if len(x) > 1 else math.nan


def unlike(seen: Float[Tensor, "n d"]) -> Float[np.ndarray, "n n"]:
    """How unlike each two of some pictures look, from their vectors."""
    rows = seen.double()
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").numpy()


def differing(read: Mapping[str, Int[np.ndarray, " n"]]) -> Float[np.ndarray, "n n"]:
    """In how many factors each two of some pictures differ."""
    return np.sum([values[:, None] != values[None, :] for values in read.values()], axis=0).astype(float)


def midpoints(
    first: Mapping[str, Int[np.ndarray, " n"]],
    middle: Mapping[str, Int[np.ndarray, " n"]],
    last: Mapping[str, Int[np.ndarray, " n"]],
) -> dict[str, dict[str, Measured]]:
    """For each factor how often the midpoint has it as `the one` end has, as `the other` or as `neither`: shares that sum to 1,
    of the pairs whose ends differ in it, and of all such factors of a pair (`all factors`, the mean over pairs).

    Of a factor with two values nothing is neither's.
    """
    told: dict[str, dict[str, Measured]] = {}
    differ = np.stack([first[factor] != last[factor] for factor in first])
    shares = {}
    for share, found in {"the one": first, "the other": last}.items():
        shares[share] = np.stack([middle[factor] == found[factor] for factor in first])
    shares["neither"] = ~shares["the one"] & ~shares["the other"]
    for share, hits in shares.items():
        counted = np.where(differ, hits, np.nan)
        for number, factor in enumerate(first):
            told.setdefault(factor, {})[share] = Measured.mean(counted[number])
        some = differ.any(0)
        told.setdefault("all factors", {})[share] = Measured.mean(
            (hits & differ).sum(0)[some] / differ.sum(0)[some] if some.any() else []
        )
    return told


def detour(walks: Walks) -> Measured:
    """d(A, M) + d(M, B) over d(A, B), of the midpoints M: 1 where M lies straight between its ends, and larger by ever more.

    d is a distance, so that it cannot be less. Paths whose ends look the same are left out.
    """
    middle = walks.seen.shape[1] // 2
    a, m, b = (walks.seen[:, i].double() for i in (0, middle, -1))
    ends = (a - b).norm(dim=1)
    both = (a - m).norm(dim=1) + (m - b).norm(dim=1)
    return Measured.mean(torch.where(ends > 0, both / ends.clamp_min(1e-30), torch.nan).numpy())


# --- relevance ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Inputs:
    """All that makes a model's pictures, as inputs that are drawn independently of each other.

    names: of the inputs. paint: pictures, a row each, of each input's values of those numbers. fixed: what is not among them.
    """

    names: tuple[str, ...]
    paint: Callable[[Mapping[str, Sequence[int]]], Tensor]
    fixed: str = ""


@dataclass(frozen=True, eq=False)
class Swaps:
    """Pictures of n draws of all inputs (`a`), of n others (`b`), and of a with one input of b, for each input by name."""

    a: Images
    b: Images
    swapped: Mapping[str, Images]


def swaps(inputs: Inputs, n: int) -> Swaps:
    """Pictures of inputs number 0 … n - 1 and n … 2n - 1, and of the first with one input of the second (Saltelli 2010)."""
    first, second = list(range(n)), list(range(n, 2 * n))
    made = {
        name: inputs.paint({each: second if each == name else first for each in inputs.names})
        for name in inputs.names
        if len(inputs.names) > 1
    }
    a, b = inputs.paint(dict.fromkeys(inputs.names, first)), inputs.paint(dict.fromkeys(inputs.names, second))
    # an only input that is swapped makes the other picture
    return Swaps(a, b, made or {inputs.names[0]: b})


def relevance(swapped: Swaps, see: See) -> dict[str, dict[str, Measured]]:
    """Sobol indices of each input: `total`, the share of the pictures' variance that it has any part in, and `first`, the share
    that it makes alone; by input.

    Jansen's estimators (1999), generalized to vectors as Lamboni et al. (2011, eq. 10) by adding up over components: with f the
    pictures' vectors, total = E|f(A) - f(A with i of B)|² / E|f(A) - f(B)|² and first = 1 - E|f(B) - f(A with i of B)|² /
    E|f(A) - f(B)|². Where vectors are the values of a factor as ones and zeros, `total` is how often the factor changes with
    the input, over how often it changes with all. An only input has 1, an ignored one 0, exactly; inputs that add up have first
    equal to total, and these sum to 1, but for chance. NaN where no picture differs. The intervals draw the rows again.
    """
    a, b = see(swapped.a).double(), see(swapped.b).double()
    everything = (a - b).square().sum(1).numpy()
    told = {}
    for name, pictures in swapped.swapped.items():
        changed = see(pictures).double()
        with_it = (a - changed).square().sum(1).numpy()
        without = (b - changed).square().sum(1).numpy()
        told[name] = {"total": _ratio(with_it, everything), "first": _ratio(everything - without, everything)}
    return told


def _ratio(above: np.ndarray, below: np.ndarray) -> Measured:
    if below.sum() == 0:
        return NOT_TOLD
    rows = np.random.default_rng(0).integers(len(below), size=(RESAMPLES, len(below)))
    whole = below[rows].sum(1)
    again = above[rows].sum(1)[whole > 0] / whole[whole > 0]
    low, high = np.quantile(again, [0.025, 0.975])
    return Measured(float(above.sum() / below.sum()), float(low), float(high), len(below))


def as_vectors(read: Int[np.ndarray, " n"], values: int) -> Float[Tensor, "n values"]:
    """A factor's values, numbered from 0, as ones and zeros; two that differ have a squared distance of 1."""
    rows = torch.from_numpy(np.ascontiguousarray(read)).long()
    return torch.nn.functional.one_hot(rows, values).double() / math.sqrt(2)

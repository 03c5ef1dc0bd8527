"""Whether pictures lie where real ones do: precision, recall, density and coverage over balls around features."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float

from probekit.hooks.errors import ProbekitError

K = 5
"""The neighbour that a ball reaches to (Naeem et al. 2020, section 4)."""


@dataclass(frozen=True, eq=False)
class Manifold:
    """Where features lie: a ball around each of them, as wide as the distance to its k-th nearest of the others.

    features: (n, d), finite, n > k. Raises ProbekitError for others.
    """

    features: Float[np.ndarray, "n d"]
    k: int = K

    def __post_init__(self) -> None:
        if self.k < 1 or self.features.ndim != 2 or len(self.features) <= self.k:
            raise ProbekitError(f"features of shape {self.features.shape}: (n, d) with more than k = {self.k} rows are needed")
        if not np.isfinite(self.features).all():
            raise ProbekitError("features: some are not finite")

    @cached_property
    def radii(self) -> Float[np.ndarray, " n"]:
        """How wide each ball is."""
        # a feature's own distance of 0 is the smallest
        return np.partition(_distances(self.features, self.features), self.k, axis=1)[:, self.k]

    def balls(self, features: Float[np.ndarray, "m d"]) -> Float[np.ndarray, " m"]:
        """In how many of the balls each of some features lies, over k: `density` is the mean, about 1 of the same kind."""
        return (_distances(self.features, features) < self.radii[:, None]).sum(0) / self.k

    def holds(self, features: Float[np.ndarray, "m d"]) -> Bool[np.ndarray, " m"]:
        """Which of some features lie in a ball or more: `precision` is the share."""
        return self.balls(features) > 0


@dataclass(frozen=True)
class Compared:
    """precision, recall and coverage in [0, 1]; density from 0, not bounded, about 1 where both are of one kind."""

    precision: float
    recall: float
    density: float
    coverage: float


def compare(real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], k: int = K) -> Compared:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020, eqs. 3 and 4).

    As the authors' package `prdc`. Of Gaussians of one kind precision and recall are near 1 for n = m, density 1, coverage
    1 - 2^-k; of sets that are far apart all are 0. Raises ProbekitError for features that are not finite, not (n, d) and (m, d)
    of the same d, or no more than k.
    """
    if real.shape[1:] != fake.shape[1:]:
        raise ProbekitError(f"features of shapes {real.shape} and {fake.shape}: both need as many columns")
    of_real, of_fake = Manifold(real, k), Manifold(fake, k)
    between = _distances(real, fake)
    return Compared(
        precision=float((between < of_real.radii[:, None]).any(0).mean()),
        recall=float((between < of_fake.radii[None, :]).any(1).mean()),
        density=float((between < of_real.radii[:, None]).sum(0).mean() / k),
        coverage=float((between.min(1) < of_real.radii).mean()),
    )


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    from scipy.spatial.distance import cdist

    return cdist(a.astype(np.float64), b.astype(np.float64))

"""Linear maps from one latent space to another: least squares and ridge, orthogonal Procrustes, reduced rank.

Latents are flattened, (n, d). Several targets of one source share its factorization:

    source = RidgeSolver(glow_latents)
    maps = [LinearMap(alpha="auto").fit(source, latents) for latents in (vae_latents, gan_latents)]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import scipy.linalg
from jaxtyping import Float
from numpy import ndarray as Array
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from probekit.hooks.errors import ProbekitError
from probekit.latents.ridge import Moments, RidgeSolver, Target, checked, penalties, refuse_constant, row_blocks, square_norms

PAPER_ALPHAS = {
    ("ddpm", "stylegan2"): 2000.0,
    ("ddpm", "vae"): 100.0,
    ("ddpm", "vqvae"): 5000.0,
    ("ddpm", "glow"): 5000.0,
    ("glow", "stylegan2"): 50000.0,
    ("glow", "vae"): 5000.0,
    ("glow", "vqvae"): 50000.0,
    ("glow", "ddpm"): 50000.0,
}
"""Ridge penalties by (source family, target family), for 9000 images; 0 for other pairs (All Roads Lead to Rome, Table 1)."""


def penalty(alpha: str, source: str, target: str) -> float | str:
    """`LinearMap`'s alpha for `--alpha` and a pair of families. Raises ProbekitError for what is none."""
    if alpha == "loo":
        return "auto"
    if alpha == "paper":
        return PAPER_ALPHAS.get((source, target), 0.0)
    try:
        value = float(alpha)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ProbekitError(f"--alpha {alpha!r}: write loo, paper, or a number from 0")
    return value


class _AffineMap(MultiOutputMixin, RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """coef_ (d_out, d_in) and intercept_ (d_out,), or (d_in,) and a number where y had one dimension, as in scikit-learn."""

    coef_: Array
    intercept_: Any

    def predict(self, X: Float[Array, "n d_in"]) -> Float[Array, "n d_out"]:
        """Latents of the source to latents of the target, float64."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return X @ self.coef_.T + self.intercept_

    def _read(self, X: Any, y: Any) -> tuple[RidgeSolver, Target, bool]:
        """The source's solver, made or given; the target; whether y had one dimension."""
        if isinstance(X, RidgeSolver):
            if X._x is None:
                raise ValueError("X is a solver of streamed latents: fit_blocks takes it, with blocks of X and Y")
            solver, self.n_features_in_ = X, X.size
            y = check_array(y, ensure_2d=False, dtype="numeric", input_name="y")
        else:
            X, y = validate_data(
                self, X, y, dtype=[np.float64, np.float32], multi_output=True, y_numeric=True, ensure_min_samples=2
            )
            solver = RidgeSolver(X)
        target = solver._target(y.reshape(len(y), -1))
        refuse_constant(target.squares, target.mean, solver.n, "y")
        return solver, target, y.ndim == 1

    def _set(self, solver: RidgeSolver, target: Target, coef: Float[Array, "d_in d_out"], *, flat: bool) -> Self:
        intercept = target.mean - solver.mean @ coef
        self.coef_, self.intercept_ = (coef[:, 0], float(intercept[0])) if flat else (coef.T, intercept)
        return self


class _Penalised(_AffineMap):
    """A map with a penalty to be given or chosen."""

    alpha: Any
    select: str

    def _penalty(self, solver: RidgeSolver, target: Target) -> float:
        """Set alpha_ and error_."""
        if self.select not in ("loo", "gcv"):
            raise ValueError(f"select={self.select!r}: 'loo', leave-one-out, or 'gcv', generalized cross-validation")
        if isinstance(self.alpha, str) and self.alpha != "auto":
            raise ValueError(f"alpha={self.alpha!r}: give a number of 0 or more, several to choose from, or 'auto'")
        if np.ndim(self.alpha) == 0 and self.alpha != "auto":
            self.alpha_, self.error_ = float(penalties(self.alpha)[0]), None
        else:
            alphas = solver.grid() if isinstance(self.alpha, str) else penalties(self.alpha)
            self.alpha_, self.error_ = solver._choose(target, alphas, self.select)
        return self.alpha_


class LinearMap(_Penalised):
    """Least squares (alpha=0) or ridge: minimises |Y - X coef^T - intercept|^2 + alpha |coef|^2, in closed form.

    As sklearn.linear_model.LinearRegression and Ridge (All Roads Lead to Rome, appendix A.4). Where X leaves a choice, the
    solution of minimum norm.

    alpha: the penalty, 0 or more; or several to choose from, one for all outputs; or "auto": `RidgeSolver.grid`.
    select: how to choose: "loo", the exact leave-one-out error (as RidgeCV), or "gcv", generalized cross-validation, cheaper.

    Fitted: coef_, intercept_, alpha_, and error_, the chosen penalty's mean squared error by `select` (None where alpha was
    given).
    """

    def __init__(self, alpha: float | Sequence[float] | Array | str = 0.0, select: str = "loo") -> None:
        self.alpha = alpha
        self.select = select

    def fit(self, X: Float[Array, "n d_in"] | RidgeSolver, y: Float[Array, "n d_out"]) -> Self:
        """X: the source's latents, or a solver made from them, which further targets may share.

        Raises ValueError where X or y is not finite or constant, or their rows differ in number.
        """
        solver, target, flat = self._read(X, y)
        return self._set(solver, target, solver._coef(target, self._penalty(solver, target)), flat=flat)

    def fit_blocks(
        self,
        blocks: Iterable[tuple[Float[Array, "_rows d_in"], Float[Array, "_rows d_out"]]],
        solver: RidgeSolver | None = None,
    ) -> Self:
        """Fit in one pass over blocks of rows of X and Y, for latents that do not fit in memory; d_in x d_in must.

        solver: `RidgeSolver.from_blocks` of the same latents, for several targets of one source. A penalty to choose needs
        select="gcv". Raises ValueError as `fit`.
        """
        if self.select == "loo" and np.ndim(self.alpha) + isinstance(self.alpha, str):
            raise ValueError("select='loo': leaving one out needs all latents in memory; over blocks, select='gcv' chooses")
        moments = Moments.of(((checked(x, "X"), checked(y, "y")) for x, y in blocks), gram=solver is None)
        if solver is None:
            solver = RidgeSolver._from_moments(moments)
        elif solver.n != moments.n or not solver.primal or not np.allclose(solver.mean, moments.x_mean):
            raise ValueError(f"the solver was made from other latents: {solver.n} of size {solver.size}, not {moments.n}")
        assert moments.y_mean is not None
        target = Target(moments.y_mean, moments.squares, cross=moments.cross)
        refuse_constant(target.squares, target.mean, solver.n, "y")
        self.n_features_in_ = solver.size
        return self._set(solver, target, solver._coef(target, self._penalty(solver, target)), flat=False)


class LowRankMap(_Penalised):
    """Reduced-rank regression: the map whose fitted values are the best rank-r approximation of `LinearMap`'s (Izenman 1975).

    rank: 1 to min(d_in, d_out), or None for full rank, which is `LinearMap`.
    alpha, select: as in `LinearMap`; the penalty is chosen for the map of full rank.

    Fitted: coef_ (of that rank), intercept_, alpha_, error_ (of the map of full rank).
    """

    def __init__(
        self, rank: int | None = None, alpha: float | Sequence[float] | Array | str = 0.0, select: str = "loo"
    ) -> None:
        self.rank = rank
        self.alpha = alpha
        self.select = select

    def fit(self, X: Float[Array, "n d_in"] | RidgeSolver, y: Float[Array, "n d_out"]) -> Self:
        """As `LinearMap.fit`; raises ValueError also where the rank is out of range."""
        solver, target, flat = self._read(X, y)
        largest = min(solver.size, len(target.mean))
        rank = largest if self.rank is None else self.rank
        if not 1 <= rank <= largest:
            raise ValueError(f"rank={self.rank}: a map from {solver.size} to {len(target.mean)} values has rank 1 to {largest}")
        alpha = self._penalty(solver, target)
        solver._decompose(alpha)
        coef = solver._coef(target, alpha)
        assert solver._values is not None
        if rank < largest:
            # the fitted values are P diag(...) Q with orthogonal columns in P: their right singular vectors are its
            scale = np.sqrt(solver._values) if solver.primal else solver._values
            fitted = (scale * solver._inverse(alpha))[:, None] * solver._projected(target)
            axes = scipy.linalg.svd(fitted, full_matrices=False, overwrite_a=True, check_finite=False)[2][:rank]
            coef = (coef @ axes.T) @ axes
        return self._set(solver, target, coef, flat=flat)


class ProcrustesMap(_AffineMap):
    """The rotation or reflection that takes one space to another (Schönemann 1966): coef_ = scale * R^T, R^T R = I.

    scale: whether to fit a scale factor as well; it minimises the squared error given R.

    Spaces of different sizes are matched as if zeros filled up the smaller: into a larger space R keeps lengths (orthonormal
    rows) and minimises the squared error; into a smaller one R has orthonormal columns and maximises the agreement
    tr(R^T X^T Y), the squared error itself having no minimum in closed form.

    Fitted: coef_, intercept_, scale_ (1 without scale).
    """

    def __init__(self, scale: bool = True) -> None:
        self.scale = scale

    def fit(self, X: Float[Array, "n d_in"] | RidgeSolver, y: Float[Array, "n d_out"]) -> Self:
        """X: the source's latents, or a solver made from them. Raises ValueError as `LinearMap.fit`."""
        solver, target, flat = self._read(X, y)
        left, values, right = scipy.linalg.svd(solver._cross(target), full_matrices=False, check_finite=False)
        rotation = left @ right
        self.scale_ = 1.0
        if self.scale:
            length = solver.trace
            if len(target.mean) < solver.size:
                assert solver._x is not None
                length = sum(
                    float(square_norms((solver._x[rows] - solver.mean) @ rotation).sum()) for rows in row_blocks(solver.n)
                )
            self.scale_ = float(values.sum()) / length
        return self._set(solver, target, self.scale_ * rotation, flat=flat)

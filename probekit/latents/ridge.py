"""One factorization of a source's latents, from which ridge maps to every target with every penalty follow.

All arithmetic is in float64, whatever the latents' precision; latents are flattened, (n, d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import scipy.linalg
from jaxtyping import Float
from numpy import ndarray as Array
from sklearn.utils.validation import check_array

GRID = np.logspace(-5, 4, 10)
"""The penalties that alpha="auto" chooses from, times the mean eigenvalue of the source's Gram matrix."""

ROWS = 1024
# Least squares leaves out directions with less than this share of the largest one's variance (a ratio of singular values of
# 1e-6, as LinearRegression from scikit-learn 1.9 on): the rounding of float32 latents, whose inverse would be noise.
NEGLIGIBLE = 1e-12
# A Gram matrix squares the condition number: with directions between the two the latents themselves are decomposed.
ILL_CONDITIONED = 1e-9
# The share of a sample's residual that its own leave-one-out needs; rounding below it.
LEVERAGE_LEFT = 1e-12

Block = tuple[Array, Array | None]


def row_blocks(n: int, size: int = ROWS) -> Iterator[slice]:
    """n rows as slices of at most `size`."""
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def checked(x: Any, name: str) -> Array:
    """Two-dimensional, finite, float32 or float64."""
    return check_array(x, dtype=[np.float64, np.float32], input_name=name)


def refuse_constant(scatter: float, mean: Array, n: int, name: str) -> None:
    """Raises ValueError where the scatter about the mean is no more than rounding."""
    if scatter <= n * 1e-24 * float(mean @ mean):
        raise ValueError(f"{name} is constant over its {n} rows: n_samples={n} different latents are needed for a map")


@dataclass
class Moments:
    """What least squares needs to know of X (n, d_in) and Y (n, d_out), summed over blocks of rows.

    gram: centred X^T X; cross: centred X^T Y; squares: the sum of Y's squares about its mean. The sums are taken about the
    first block's mean, so that a large offset costs no digits.
    """

    n: int
    x_mean: Float[Array, " d_in"]
    y_mean: Float[Array, " d_out"] | None
    gram: Float[Array, "d_in d_in"] | None
    cross: Float[Array, "d_in d_out"] | None
    squares: float

    @classmethod
    def of(cls, blocks: Iterable[Block], *, gram: bool = True) -> Moments:
        """One pass over blocks (X rows, Y rows or None). Raises ValueError without blocks, or on unequal ones."""
        n, squares = 0, 0.0
        x_shift = y_shift = None
        for x, y in blocks:
            if len(x) == 0:
                continue
            if x_shift is None:
                x_shift = x.mean(axis=0, dtype=np.float64)
                x_sum = np.zeros_like(x_shift)
                xx = np.zeros((x.shape[1], x.shape[1])) if gram else None
                if y is not None:
                    y_shift = y.mean(axis=0, dtype=np.float64)
                    y_sum = np.zeros_like(y_shift)
                    xy = np.zeros((x.shape[1], y.shape[1]))
            if x.shape[1] != len(x_shift):
                raise ValueError(f"a block of X has {x.shape[1]} columns, the first has {len(x_shift)}")
            x = x - x_shift
            n += len(x)
            x_sum += x.sum(axis=0)
            if xx is not None:
                xx += x.T @ x
            if y is not None:
                if len(y) != len(x) or y_shift is None or y.shape[1] != len(y_shift):
                    raise ValueError(f"a block of Y is {y.shape}, its X has {len(x)} rows; all blocks need equal columns")
                y = y - y_shift
                y_sum += y.sum(axis=0)
                xy += x.T @ y
                squares += float(np.vdot(y, y))
        if x_shift is None:
            raise ValueError("no blocks of latents: n_samples=0 are too few for a map")
        off = x_sum / n
        if xx is not None:
            xx -= np.outer(n * off, off)
        if y_shift is None:
            return cls(n, x_shift + off, None, xx, None, 0.0)
        xy -= np.outer(off, y_sum)
        return cls(n, x_shift + off, y_shift + y_sum / n, xx, xy, max(squares - float(y_sum @ y_sum) / n, 0.0))


@dataclass
class Target:
    """A target seen from its source: its rows, where in memory, and its moments."""

    mean: Float[Array, " d_out"]
    squares: float
    rows: Float[Array, "n d_out"] | None = None
    cross: Float[Array, "d_in d_out"] | None = None

    def centred(self, rows: slice = slice(None)) -> Float[Array, "_rows d_out"]:
        """Those rows less the mean."""
        assert self.rows is not None
        return self.rows[rows] - self.mean


class RidgeSolver:
    """One factorization of a source's latents, from which the maps to every target with every penalty follow.

    With X = T V^T (T the principal components, T^T T = diag(values)) and Q = T^T Y, computed once a target, the map of a
    penalty alpha is V diag(1 / (values + alpha)) Q. Where n - 1 <= d_in the eigenvectors U of the n x n kernel X X^T take
    the place of T. A single given penalty needs no eigenvectors: its Gram matrix (or kernel) is factored by Cholesky.
    Where Gram's rounding would show (nearly dependent columns, little or no penalty), X itself is decomposed by SVD, and
    least squares leaves negligible directions out: its solution is the one of minimum norm.

    X: latents (n, d_in), float32 or float64, kept, not copied. Raises ValueError where X is not finite, or constant.
    """

    def __init__(self, x: Float[Array, "n d_in"]) -> None:
        x = checked(x, "X")
        self.n, self.size = x.shape
        self.primal = self.n - 1 > self.size
        self._x: Array | None = x
        self._reset()
        if self.primal:
            moments = Moments.of((x[rows], None) for rows in row_blocks(self.n))
            assert moments.gram is not None
            self.mean, matrix = moments.x_mean, moments.gram
        else:
            self.mean = x.mean(axis=0, dtype=np.float64)
            matrix = np.zeros((self.n, self.n))
            for columns in row_blocks(self.size):
                block = x[:, columns] - self.mean[columns]
                matrix += block @ block.T
        self.trace = float(np.trace(matrix))
        refuse_constant(self.trace, self.mean, self.n, "X")
        if not self.primal:
            # the constant vector is in the centred kernel's null space: it becomes the largest eigenvector, to be dropped
            matrix += 2 * np.linalg.norm(matrix) / self.n
        self._matrix: Array | None = matrix

    @classmethod
    def from_blocks(cls, blocks: Iterable[Float[Array, "_rows d_in"]]) -> Self:
        """The solver of latents that do not fit in memory, from one pass over blocks of their rows.

        It knows only X^T X: it serves `LinearMap.fit_blocks`, and cannot choose by leave-one-out.
        """
        return cls._from_moments(Moments.of((checked(x, "X"), None) for x in blocks))

    @classmethod
    def _from_moments(cls, moments: Moments) -> Self:
        solver = cls.__new__(cls)
        solver.n, solver.size, solver.primal, solver.mean = moments.n, len(moments.x_mean), True, moments.x_mean
        solver._x, solver._matrix = None, moments.gram
        solver._reset()
        assert moments.gram is not None
        solver.trace = float(np.trace(moments.gram))
        refuse_constant(solver.trace, solver.mean, solver.n, "X")
        return solver

    def _reset(self) -> None:
        self._cholesky: tuple[float, Any] | None = None
        self._values: Array | None = None  # (k,)
        self._right: Array | None = None  # V, (d_in, k), primal only
        self._left: Array | None = None  # T or U, (n, k)
        self._weights: tuple[Array, Array, Array] | None = None
        self._from_svd = False

    def grid(self) -> Float[Array, "10"]:
        """Ten penalties, from 1e-5 to 1e4 of the mean eigenvalue of X^T X (or X X^T, where smaller), a decade apart."""
        return GRID * self.trace / min(self.n - 1, self.size)

    def loo(self, y: Float[Array, "n d_out"], alphas: Sequence[float] | Array) -> Float[Array, " k"]:
        """The mean squared leave-one-out error of every penalty, over samples and outputs.

        Exact (Allen's PRESS, with the intercept refitted): residual / (1 - leverage). Infinite where a sample alone
        determines a direction. One (n, d_in) x (d_in, min(d_in, d_out)) product a penalty, after two for the target.
        """
        return self._loo(self._target(checked(y, "y")), penalties(alphas), best_only=False)

    def left_out(self, y: Float[Array, "n d_out"], alpha: float) -> Float[Array, "n d_out"]:
        """What the map of that penalty, fitted to all other rows, says of each row: y - residual / (1 - leverage), exactly."""
        target, alphas = self._target(checked(y, "y")), penalties(alpha)
        self._decompose(alphas.min())
        components = self._components()
        base, c, _ = self._residual_weights(alphas)
        residuals, left = components @ (c * self._projected(target)), components**2 @ c
        if base:
            residuals, left = residuals + target.centred(), left + 1 - 1 / self.n
        return y - residuals / left

    def gcv(self, y: Float[Array, "n d_out"], alphas: Sequence[float] | Array) -> Float[Array, " k"]:
        """The generalized cross-validation error of every penalty: mean squared residual / (1 - mean leverage)^2.

        From the norms of Q's rows: O(d_in) a penalty (Golub, Heath & Wahba 1979).
        """
        return self._gcv(self._target(checked(y, "y")), penalties(alphas))

    def _target(self, y: Array) -> Target:
        if len(y) != self.n:
            raise ValueError(f"y has {len(y)} rows, X has {self.n}")
        target = Target(y.mean(axis=0, dtype=np.float64), 0.0, y)
        target.squares = sum(float(np.vdot(b, b)) for b in (target.centred(rows) for rows in row_blocks(self.n)))
        return target

    def _choose(self, target: Target, alphas: Array, select: str) -> tuple[float, float]:
        """The best of several penalties, and its error."""
        errors = self._loo(target, alphas, best_only=True) if select == "loo" else self._gcv(target, alphas)
        best = int(np.argmin(errors))
        if not np.isfinite(errors[best]):
            raise ValueError(f"alpha={alphas.tolist()}: none leaves an error to estimate; a penalty above 0 does")
        return float(alphas[best]), float(errors[best])

    def _coef(self, target: Target, alpha: float) -> Float[Array, "d_in d_out"]:
        """The map of one penalty."""
        if self._values is None and (factor := self._factored(alpha)) is not None:
            sides = self._cross(target) if self.primal else target.centred()
            weights = scipy.linalg.cho_solve(factor, sides, check_finite=False)
        else:
            self._decompose(alpha)
            weights = self._inverse(alpha)[:, None] * self._projected(target)
            weights = self._right @ weights if self._right is not None else self._left @ weights  # type: ignore[operator]
        return weights if self.primal else self._pulled_back(weights.__getitem__, weights.shape[1])

    def _pulled_back(self, rows_of: Callable[[slice], Array], width: int) -> Float[Array, "d_in width"]:
        """Centred X^T times something (n, width)."""
        assert self._x is not None
        product = np.zeros((self.size, width))
        for rows in row_blocks(self.n):
            product += (self._x[rows] - self.mean).T @ rows_of(rows)
        return product

    def _factored(self, alpha: float) -> Any:
        """The Cholesky factor of the Gram matrix or kernel, plus alpha; None where it is too ill-conditioned."""
        if self._cholesky is None or self._cholesky[0] != alpha:
            assert self._matrix is not None
            self._cholesky = None
            matrix = np.array(self._matrix, order="F")
            matrix.flat[:: len(matrix) + 1] += alpha
            norm = float(np.abs(matrix).sum(axis=0).max())
            factor, failed = scipy.linalg.lapack.dpotrf(matrix, lower=1, clean=0, overwrite_a=1)
            condition = 0.0 if failed else float(scipy.linalg.lapack.dpocon(factor, norm, uplo="L")[0])
            self._cholesky = (alpha, (factor, True) if condition > ILL_CONDITIONED / 10 else None)
        return self._cholesky[1]

    def _decompose(self, alpha: float) -> None:
        """Have a basis that is accurate for penalties of alpha and more."""
        if self._values is None:
            matrix, self._matrix, self._cholesky = self._matrix, None, None
            assert matrix is not None
            # symmetric, and LAPACK's order of storage as it is
            values, vectors = scipy.linalg.eigh(matrix.T, overwrite_a=True, check_finite=False, driver="evr")
            if self.primal:
                self._right = vectors
            else:
                values, vectors = values[:-1], vectors[:, :-1]
                self._left = vectors
            self._values = np.maximum(values, 0)
        smallest = self._values[self._kept(alpha)].min() + alpha
        if self._x is None or self._from_svd or smallest >= ILL_CONDITIONED * self._values.max():
            return
        centred = self._x - self.mean
        if not self.primal:
            constant = np.full((self.n, 1), 2 * np.sqrt(self._values.max() / self.n))
            centred = np.concatenate([constant, centred], axis=1)
        self._left = self._right = self._weights = None
        left, values, right = scipy.linalg.svd(centred, full_matrices=False, overwrite_a=True, check_finite=False)
        if not self.primal:
            left, values = left[:, 1 : self.n], values[1 : self.n]
        self._values, self._from_svd = values**2, True
        self._left, self._right = (left * values, right.T) if self.primal else (left, None)

    def _inverse(self, alpha: float) -> Float[Array, " k"]:
        """1 / (values + alpha); without penalty, nothing for negligible directions."""
        assert self._values is not None
        return np.divide(1, self._values + alpha, out=np.zeros_like(self._values), where=self._kept(alpha))

    def _kept(self, alpha: float) -> Any:
        assert self._values is not None
        return self._values > (NEGLIGIBLE * self._values.max() if alpha == 0 else -1)

    def _components(self) -> Float[Array, "n k"]:
        """T or U, made when first needed."""
        if self._left is None:
            assert self._x is not None and self._right is not None
            self._left = np.empty((self.n, self._right.shape[1]))
            for rows in row_blocks(self.n):
                np.matmul(self._x[rows] - self.mean, self._right, out=self._left[rows])
        return self._left

    def _cross(self, target: Target) -> Float[Array, "d_in d_out"]:
        """X^T Y, centred."""
        if target.cross is None:
            target.cross = self._pulled_back(target.centred, len(target.mean))
        return target.cross

    def _projected(self, target: Target) -> Float[Array, "k d_out"]:
        """Q: T^T Y, or U^T Y."""
        if self._left is None:
            assert self._right is not None
            return self._right.T @ self._cross(target)
        projected = np.zeros((self._left.shape[1], len(target.mean)))
        for rows in row_blocks(self.n):
            projected += self._left[rows].T @ target.centred(rows)
        return projected

    def _residual_weights(self, alphas: Array) -> tuple[int, Float[Array, "k alphas"], Float[Array, "k 1"]]:
        """(base, c, p), so that the residuals of alpha are base * Y + P diag(c) Q, P being T or U, with p = diag(P^T P).

        T: Y - T Q / (values + alpha). U spans all of the centred samples' space, and residuals / (1 - leverages) keep their
        digits however small alpha: U Q (max + alpha) / (values + alpha), scaled by what cancels in the quotient.
        """
        assert self._values is not None
        if self.primal:
            return 1, -np.stack([self._inverse(a) for a in alphas], axis=1), self._values[:, None]
        columns = []
        for alpha in alphas:
            kept = self._kept(alpha)
            # where directions are left out, what no direction reaches is all that is left
            columns.append((self._values.max() + alpha) * self._inverse(alpha) if kept.all() else ~kept)
        weights = np.stack(columns, axis=1).astype(np.float64)
        return 0, weights, np.ones((len(weights), 1))

    def _residuals(self, target: Target, projected: Array, alphas: Array) -> Float[Array, " alphas"]:
        """The sum of squared residuals of every penalty (in the scale of `_residual_weights`)."""
        base, c, p = self._residual_weights(alphas)
        q = np.einsum("ij,ij->i", projected, projected)[:, None]
        return np.maximum(base * (target.squares + 2 * (c * q).sum(axis=0)) + (p * c**2 * q).sum(axis=0), 0)

    def _gcv(self, target: Target, alphas: Array) -> Float[Array, " alphas"]:
        self._decompose(alphas.min())
        base, c, p = self._residual_weights(alphas)
        residuals = self._residuals(target, self._projected(target), alphas)
        left = base * (self.n - 1) + (p * c).sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            errors = self.n * residuals / (len(target.mean) * left**2)
        return np.where(left > LEVERAGE_LEFT * self.n, errors, np.inf)

    def _loo(self, target: Target, alphas: Array, *, best_only: bool) -> Float[Array, " alphas"]:
        """Leave-one-out errors of every penalty; best_only: of the best, exactly, and inf for those that cannot be it.

        The error is the sum over samples of w |residual|^2, w = 1 / (1 - leverage)^2. The sum of |residual|^2 costs O(d_in)
        and w does not depend on the target: min(w) times that sum bounds the error from below, before any row is computed
        and for the rows still to come. Most penalties of a grid are out before their first row.
        """
        self._decompose(alphas.min())
        components, base = self._components(), int(self.primal)
        projected = self._projected(target)
        _, c, _ = self._residual_weights(alphas)
        w, smallest = self._loo_weights(alphas, c)
        totals = self._residuals(target, projected, alphas)
        usable = np.isfinite(w).all(axis=0)
        lower = np.where(usable, totals * np.where(usable, smallest, 0), np.inf)

        y: Callable[[slice], Array] = target.centred
        unreached = np.zeros(self.n)
        if len(target.mean) > 8 * len(projected):
            # predictions lie in a subspace of the outputs, as large as the source: rotated there, the rest never changes
            axes, rotated = scipy.linalg.qr(projected.T, mode="economic", check_finite=False)
            projected, reached = rotated.T, np.empty((self.n, axes.shape[1]))
            for rows in row_blocks(self.n if base else 0):
                whole = target.centred(rows)
                np.matmul(whole, axes, out=reached[rows])
                unreached[rows] = square_norms(whole) - square_norms(reached[rows])
            np.maximum(unreached, 0, out=unreached)
            y = reached.__getitem__

        errors = np.full(len(alphas), np.inf)
        for j in np.argsort(lower):
            if not np.isfinite(lower[j]) or (best_only and lower[j] >= errors.min()):
                break
            weighted, error, to_come = c[:, j, None] * projected, 0.0, totals[j]
            for rows in row_blocks(self.n):
                residuals = components[rows] @ weighted
                if base:
                    residuals += y(rows)
                squares = square_norms(residuals) + unreached[rows]
                error += float(squares @ w[rows, j])
                to_come -= squares.sum()
                if best_only and error + to_come * smallest[j] > errors.min() * (1 + 1e-9):
                    break
            else:
                errors[j] = error
        return errors / (self.n * len(target.mean))

    def _loo_weights(
        self, alphas: Array, c: Float[Array, "k alphas"]
    ) -> tuple[Float[Array, "n alphas"], Float[Array, " alphas"]]:
        """1 / (1 - leverage)^2 of every sample and penalty, and its minimum over samples; kept for the source's next target."""
        if self._weights is None or not np.array_equal(self._weights[0], alphas):
            components = self._components()
            left = np.empty((self.n, len(alphas)))
            for rows in row_blocks(self.n):
                left[rows] = int(self.primal) * (1 - 1 / self.n) + components[rows] ** 2 @ c
            with np.errstate(divide="ignore"):
                w = np.where(left > LEVERAGE_LEFT, left**-2.0, np.inf)
            self._weights = (alphas, w, w.min(axis=0))
        return self._weights[1:]


def square_norms(rows: Float[Array, "n d"]) -> Float[Array, " n"]:
    """The squared length of each row."""
    return np.einsum("ij,ij->i", rows, rows)


def penalties(alpha: Any) -> Float[Array, " k"]:
    """One penalty or several, as an array. Raises ValueError for what is none."""
    alphas = np.atleast_1d(np.asarray(alpha, dtype=np.float64))
    if alphas.ndim != 1 or len(alphas) == 0 or not (np.isfinite(alphas) & (alphas >= 0)).all():
        raise ValueError(f"alpha={alpha!r}: give a number of 0 or more, several to choose from, or 'auto'")
    return alphas

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LinearRegression, Ridge, RidgeCV
from sklearn.utils.estimator_checks import check_estimator

from probekit.latents.maps import PAPER_ALPHAS, LinearMap, LowRankMap, ProcrustesMap
from probekit.latents.ridge import GRID, RidgeSolver

# (n, d): tall, barely tall, square, one degree of freedom less, wide
SHAPES = [(400, 60), (102, 100), (101, 100), (100, 100), (80, 200)]
ALPHAS = [1e-3, 0.1, 1.0, 10.0, 100.0, 1e4]


def latents(n: int, d: int, power: float = 1.0, seed: int = 0) -> np.ndarray:
    """Correlated, with standard deviations that fall as a power, off the origin."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return (rng.standard_normal((n, d)) * np.arange(1, d + 1) ** -power) @ rotation + 3 * rng.standard_normal(d)


def targets(x: np.ndarray, d: int, noise: float = 0.3, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return x @ rng.standard_normal((x.shape[1], d)) + noise * rng.standard_normal((len(x), d)) - 5


def rotation(d: int, seed: int = 2) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]


def assert_close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    assert np.shape(a) == np.shape(b)
    assert np.abs(np.asarray(a) - b).max() <= tolerance * np.abs(b).max()


def assert_same_map(ours: Any, theirs: Any, x: np.ndarray, tolerance: float = 1e-5) -> None:
    assert_close(ours.coef_, theirs.coef_, tolerance)
    assert_close(ours.intercept_, theirs.intercept_, tolerance)
    assert_close(ours.predict(x), theirs.predict(x), tolerance)


@pytest.mark.parametrize(
    "estimator",
    [
        LinearMap(),
        LinearMap(alpha="auto"),
        LinearMap(alpha="auto", select="gcv"),
        LowRankMap(),
        LowRankMap(rank=1),
        ProcrustesMap(),
        ProcrustesMap(scale=False),
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("any_shape")  # lists, whole numbers, one dimension: all that scikit-learn takes
def test_scikit_learns_own_checks(estimator: Any) -> None:
    check_estimator(estimator)


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_equals_linear_regression_and_ridge(n: int, d: int, power: float) -> None:
    x = latents(n, d, power)
    y = targets(x, 70)
    shared = RidgeSolver(x)
    shared.gcv(y, ALPHAS)  # from here on by eigenvectors, a solver of its own by Cholesky
    for alpha in (0.0, *ALPHAS):
        # solver="svd": its default, Cholesky, solves the normal equations
        theirs = Ridge(alpha, solver="svd").fit(x, y) if alpha else LinearRegression().fit(x, y)
        assert_same_map(LinearMap(alpha).fit(x, y), theirs, x)
        assert_same_map(LinearMap(alpha).fit(shared, y), theirs, x)


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_dependent_columns_give_the_solution_of_minimum_norm(n: int, d: int, power: float) -> None:
    x = latents(n, d, power)
    x = np.concatenate(
        [x, x[:, :20] @ np.random.default_rng(3).standard_normal((20, 9)), np.full((n, 2), 0.1), x[:, :4]], axis=1
    )
    y = targets(x, 7)
    for alpha in (0.0, *ALPHAS):
        theirs = Ridge(alpha, solver="svd").fit(x, y) if alpha else LinearRegression().fit(x, y)
        assert_same_map(LinearMap(alpha).fit(x, y), theirs, x)


def test_float32_latents_are_mapped_in_float64() -> None:
    x = latents(400, 60).astype(np.float32)
    y = targets(x, 5).astype(np.float32)
    ours, theirs = LinearMap().fit(x, y), LinearRegression().fit(x.astype(np.float64), y.astype(np.float64))
    assert ours.coef_.dtype == np.float64
    assert_same_map(ours, theirs, x, 1e-9)


def test_ill_conditioned_latents_are_fitted_from_the_latents_themselves() -> None:
    x = latents(300, 40, power=3.5)
    y = targets(x, 5, noise=0.01)
    solver = RidgeSolver(x)
    theirs = LinearRegression().fit(x, y)
    assert_same_map(LinearMap().fit(solver, y), theirs, x, 1e-8)
    gram = (x - x.mean(0)).T @ (x - x.mean(0))
    assert np.linalg.cond(gram) > 1e10
    normal = np.linalg.solve(gram, (x - x.mean(0)).T @ (y - y.mean(0))).T
    assert np.abs(normal - theirs.coef_).max() > 100 * np.abs(LinearMap().fit(solver, y).coef_ - theirs.coef_).max()


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("outputs", [3, 50, 900])
def test_leave_one_out_equals_ridgecv(n: int, d: int, outputs: int) -> None:
    x = latents(n, d)
    y = targets(x, outputs, noise=1.0)
    theirs = RidgeCV(ALPHAS, gcv_mode="svd", store_cv_results=True).fit(x, y)
    errors = RidgeSolver(x).loo(y, ALPHAS)
    np.testing.assert_allclose(errors, theirs.cv_results_.mean(axis=(0, 1)), rtol=1e-8)
    ours = LinearMap(ALPHAS).fit(x, y)
    assert ours.alpha_ == theirs.alpha_ == ALPHAS[int(np.argmin(errors))]
    np.testing.assert_allclose(ours.error_, errors.min(), rtol=1e-9)
    assert_same_map(ours, theirs, x, 1e-8)


@pytest.mark.parametrize(("n", "d"), [(40, 12), (20, 30)])
def test_leave_one_out_equals_leaving_every_sample_out(n: int, d: int) -> None:
    x = latents(n, d)
    y = targets(x, 4)
    alphas = [0.0, 1e-4, 0.1, 10.0]
    errors = []
    for alpha in alphas:
        folds = [np.delete(np.arange(n), i) for i in range(n)]
        left = [y[i] - LinearMap(alpha).fit(x[f], y[f]).predict(x[i : i + 1])[0] for i, f in enumerate(folds)]
        errors.append(np.mean(np.square(left)))
    np.testing.assert_allclose(RidgeSolver(x).loo(y, alphas), errors, rtol=1e-7)


def test_the_penalties_never_computed_are_not_the_best() -> None:
    # uneven leverages: the bound alone does not decide
    rng = np.random.default_rng(4)
    x = latents(300, 80) * rng.gamma(0.5, size=(300, 1))
    for noise in (0.01, 0.3, 3.0, 30.0):
        y = targets(x, 6, noise)
        solver = RidgeSolver(x)
        errors = solver.loo(y, solver.grid())
        ours = LinearMap("auto").fit(solver, y)
        assert np.isfinite(errors).all()
        assert ours.alpha_ == solver.grid()[np.argmin(errors)]
        np.testing.assert_allclose(ours.error_, errors.min(), rtol=1e-9)


def test_a_sample_that_alone_determines_a_direction_rules_out_no_penalty() -> None:
    x = latents(100, 10)
    x[:, 0] = 0
    x[7, 0] = 1
    y = targets(x, 3)
    errors = RidgeSolver(x).loo(y, [0.0, 1.0])
    assert errors[0] == np.inf and np.isfinite(errors[1])
    assert LinearMap([0.0, 1.0]).fit(x, y).alpha_ == 1


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_generalized_cross_validation_from_its_definition(n: int, d: int) -> None:
    x = latents(n, d)
    y = targets(x, 5)
    centred = x - x.mean(axis=0)
    expected = []
    for alpha in ALPHAS:
        hat = centred @ np.linalg.solve(centred.T @ centred + alpha * np.eye(d), centred.T) + 1 / n
        expected.append(np.mean((y - hat @ y) ** 2) / (1 - np.trace(hat) / n) ** 2)
    np.testing.assert_allclose(RidgeSolver(x).gcv(y, ALPHAS), expected, rtol=1e-6)
    chosen = LinearMap(ALPHAS, select="gcv").fit(x, y)
    assert chosen.alpha_ == ALPHAS[int(np.argmin(expected))]
    np.testing.assert_allclose(chosen.error_, min(expected), rtol=1e-6)


def test_auto_is_ten_penalties_about_the_mean_eigenvalue() -> None:
    x = latents(400, 60)
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T, bias=True) * 400)
    np.testing.assert_allclose(RidgeSolver(x).grid(), GRID * eigenvalues.mean())
    assert len(GRID) == 10
    # the same choice in whatever unit
    y = targets(x, 5)
    assert LinearMap("auto").fit(x * 1000, y).alpha_ == pytest.approx(LinearMap("auto").fit(x, y).alpha_ * 1e6)


@pytest.mark.parametrize("alpha", [0.0, 2.0, "auto"])
def test_streamed_blocks_give_the_map_in_memory(alpha: float | str) -> None:
    x = latents(400, 60) + 100  # far off the origin
    y = targets(x, 9, noise=1.0) + 1000
    order = np.argsort(x[:, 0])  # and blocks with other means
    x, y = x[order], y[order]
    whole = LinearMap(alpha, select="gcv").fit(x, y)
    pairs = [(x[i : i + 37], y[i : i + 37]) for i in range(0, 400, 37)]
    streamed = LinearMap(alpha, select="gcv").fit_blocks(iter(pairs))
    solver = RidgeSolver.from_blocks(x for x, _ in pairs)
    shared = LinearMap(alpha, select="gcv").fit_blocks(pairs, solver)
    for ours in (streamed, shared):
        assert ours.alpha_ == pytest.approx(whole.alpha_)
        assert_same_map(ours, whole, x, 1e-8)
    # with dependent columns as well
    double = LinearMap().fit_blocks((np.concatenate([a, a], axis=1), b) for a, b in pairs)
    assert_close(double.predict(np.concatenate([x, x], axis=1)), LinearMap().fit(x, y).predict(x), 1e-8)
    assert_close(double.coef_[:, :60], double.coef_[:, 60:], 1e-6)


def test_a_space_mapped_to_itself_is_the_identity() -> None:
    x = latents(400, 60)
    for estimator in (LinearMap(), LowRankMap(), ProcrustesMap()):
        fitted = estimator.fit(x, x)
        np.testing.assert_allclose(fitted.coef_, np.eye(60), atol=1e-10)
        np.testing.assert_allclose(fitted.intercept_, 0, atol=1e-9)


def test_a_rotated_copy_is_recovered() -> None:
    x, turn, shift = latents(400, 60), rotation(60), np.random.default_rng(5).standard_normal(60)
    y = 2.5 * x @ turn + shift
    for estimator in (LinearMap(), ProcrustesMap()):
        fitted = estimator.fit(x, y)
        np.testing.assert_allclose(fitted.coef_, 2.5 * turn.T, atol=1e-10)
        np.testing.assert_allclose(fitted.intercept_, shift, atol=1e-9)
    assert fitted.scale_ == pytest.approx(2.5)
    np.testing.assert_allclose(ProcrustesMap(scale=False).fit(x, y).coef_, turn.T, atol=1e-10)


def test_procrustes_equals_scipys_and_no_rotation_does_better() -> None:
    from scipy.linalg import orthogonal_procrustes

    x = latents(200, 12)
    y = targets(x, 12, noise=2.0)
    fitted = ProcrustesMap().fit(x, y)
    expected, total = orthogonal_procrustes(x - x.mean(0), y - y.mean(0))
    np.testing.assert_allclose(fitted.coef_.T / fitted.scale_, expected, atol=1e-8)
    assert fitted.scale_ == pytest.approx(total / np.sum((x - x.mean(0)) ** 2))

    def error(turn: np.ndarray, scale: float) -> float:
        return float(np.sum((y - y.mean(0) - scale * (x - x.mean(0)) @ turn) ** 2))

    best = error(expected, fitted.scale_)
    assert error(expected, fitted.scale_ * 1.01) > best < error(expected, fitted.scale_ * 0.99)
    assert all(error(rotation(12, seed), fitted.scale_) > best for seed in range(5))


@pytest.mark.parametrize(("d_in", "d_out"), [(10, 25), (25, 10)])
def test_procrustes_between_sizes_is_semi_orthogonal(d_in: int, d_out: int) -> None:
    x = latents(300, d_in)
    y = targets(x, d_out)
    fitted = ProcrustesMap().fit(x, y)
    turn = fitted.coef_.T / fitted.scale_
    small = turn @ turn.T if d_in < d_out else turn.T @ turn
    np.testing.assert_allclose(small, np.eye(min(d_in, d_out)), atol=1e-10)
    larger, smaller = fitted.scale_ * 1.01, fitted.scale_ * 0.99
    errors = [np.sum((y - y.mean(0) - s * (x - x.mean(0)) @ turn) ** 2) for s in (smaller, fitted.scale_, larger)]
    assert errors[1] < min(errors[0], errors[2])


@pytest.mark.parametrize(("n", "d", "outputs"), [(300, 30, 12), (300, 12, 30), (40, 60, 25)])
@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_a_low_rank_map_has_the_best_approximation_of_the_fitted_values(n: int, d: int, outputs: int, alpha: float) -> None:
    x = latents(n, d)
    y = targets(x, outputs)
    full = LinearMap(alpha).fit(x, y)
    assert_same_map(LowRankMap(min(d, outputs), alpha).fit(x, y), full, x, 1e-10)
    left, values, right = np.linalg.svd(full.predict(x) - y.mean(0), full_matrices=False)
    for rank in (1, 4, 11):
        fitted = LowRankMap(rank, alpha).fit(x, y)
        assert np.linalg.matrix_rank(fitted.coef_, tol=1e-8 * np.abs(fitted.coef_).max()) == rank
        assert_close(fitted.predict(x) - y.mean(0), (left[:, :rank] * values[:rank]) @ right[:rank], 1e-8)


def test_a_map_of_low_rank_is_recovered_from_noise_better_than_by_least_squares() -> None:
    rng = np.random.default_rng(6)
    x = latents(150, 40, power=0.2)
    true = rng.standard_normal((40, 3)) @ rng.standard_normal((3, 30))
    y = x @ true + 3 * rng.standard_normal((150, 30))
    errors = [np.abs(estimator.fit(x, y).coef_.T - true).mean() for estimator in (LowRankMap(3), LinearMap())]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize(
    "estimator", [LinearMap(), LinearMap(3.0), LinearMap("auto"), LowRankMap(4), ProcrustesMap()], ids=repr
)
def test_the_order_of_the_rows_does_not_matter(estimator: Any) -> None:
    x = latents(400, 60)
    y = targets(x, 9)
    order = np.random.default_rng(7).permutation(400)
    assert_same_map(clone(estimator).fit(x[order], y[order]), clone(estimator).fit(x, y), x, 1e-9)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_one_solver_serves_every_target_and_penalty_in_any_order(n: int, d: int) -> None:
    x = latents(n, d)
    solver = RidgeSolver(x)
    untouched = x.copy()
    for alpha, outputs in ((50.0, 5), (0.0, 70), ("auto", 9), (0.0, 300), (0.5, 5), (ALPHAS, 9)):
        y = targets(x, outputs, seed=outputs)
        for estimator in (LinearMap(alpha), LowRankMap(2, alpha), ProcrustesMap()):
            assert_same_map(clone(estimator).fit(solver, y), clone(estimator).fit(x, y), x, 1e-7)
    assert np.array_equal(x, untouched)


def test_the_papers_penalties() -> None:
    families = {"ddpm", "stylegan2", "vae", "vqvae", "glow"}
    assert {family for pair in PAPER_ALPHAS for family in pair} == families
    assert {source for source, _ in PAPER_ALPHAS} == {"ddpm", "glow"} and len(PAPER_ALPHAS) == 8
    assert PAPER_ALPHAS["ddpm", "vae"] == 100 and PAPER_ALPHAS["glow", "vae"] == 5000
    assert PAPER_ALPHAS.get(("vae", "glow"), 0) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["X", "y"])
def test_latents_that_are_not_finite_are_refused(value: float, which: str) -> None:
    x, y = latents(50, 5), latents(50, 4, seed=1)
    (x if which == "X" else y)[3, 2] = value
    for estimator in (LinearMap(), LowRankMap(2), ProcrustesMap()):
        with pytest.raises(ValueError, match=f"Input {which} contains"):
            estimator.fit(x, y)
    with pytest.raises(ValueError, match=f"Input {which} contains"):
        LinearMap().fit_blocks([(x, y)])


def test_constant_latents_are_refused_in_one_line() -> None:
    x = latents(50, 5)
    for constant in (np.zeros((50, 3)), np.full((50, 3), 0.1), np.full((50, 90), 1e6, np.float32)):
        for estimator in (LinearMap(), LowRankMap(2), ProcrustesMap()):
            with pytest.raises(ValueError, match=r"^X is constant over its 50 rows.*$"):
                estimator.fit(constant, x)
            with pytest.raises(ValueError, match=r"^y is constant over its 50 rows.*$"):
                estimator.fit(x, constant)
        with pytest.raises(ValueError, match=r"^X is constant over its 50 rows.*$"):
            LinearMap().fit_blocks([(constant[:20], x[:20]), (constant[20:], x[20:])])


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (LinearMap(-1.0), "alpha=-1.0"),
        (LinearMap([1.0, np.nan]), "alpha="),
        (LinearMap([]), "alpha="),
        (LinearMap("best"), "alpha='best'"),
        (LinearMap("auto", select="kfold"), "select='kfold'"),
        (LowRankMap(0), "rank=0"),
        (LowRankMap(5), "rank=5: a map from 6 to 4 values has rank 1 to 4"),
    ],
)
def test_options_out_of_range_are_named(estimator: Any, message: str) -> None:
    x = latents(50, 6)
    with pytest.raises(ValueError, match=message):
        estimator.fit(x, targets(x, 4))


def test_blocks_that_do_not_belong_together_are_refused() -> None:
    x, y = latents(50, 6), latents(50, 4)
    with pytest.raises(ValueError, match="leaving one out needs all latents in memory"):
        LinearMap("auto").fit_blocks([(x, y)])
    with pytest.raises(ValueError, match="no blocks"):
        LinearMap().fit_blocks([])
    with pytest.raises(ValueError, match="a block of X has 5 columns, the first has 6"):
        LinearMap().fit_blocks([(x, y), (x[:, :5], y)])
    with pytest.raises(ValueError, match="a block of Y is"):
        LinearMap().fit_blocks([(x, y[:49])])
    with pytest.raises(ValueError, match="made from other latents"):
        LinearMap().fit_blocks([(x, y)], RidgeSolver.from_blocks([x[:30]]))
    with pytest.raises(ValueError, match="fit_blocks takes it"):
        LinearMap().fit(RidgeSolver.from_blocks([x]), y)
    with pytest.raises(ValueError, match="y has 49 rows, X has 50"):
        LinearMap().fit(RidgeSolver(x), y[:49])

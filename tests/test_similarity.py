"""Similarities of latent spaces, and distances of distributions."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from scipy import stats

from probekit.hooks.errors import ProbekitError
from probekit.metrics import distributions, lpips
from probekit.metrics.distributions import alexnet_features, bootstrap, frechet, inception_features, inception_fid, jackknife
from probekit.metrics.similarity import cka, mutual_knn, svcca

draw = np.random.default_rng


def rotated(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """Turned, scaled and moved."""
    turn = np.linalg.qr(draw(seed).standard_normal((x.shape[1], x.shape[1])))[0]
    return 3 * x @ turn + 5


# --- similarity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, d", [(300, 20), (40, 90)])
@pytest.mark.parametrize("measure", [cka, mutual_knn, lambda x, y: svcca(x, y)[0]], ids=["cka", "mutual_knn", "svcca"])
def test_a_space_is_like_itself_and_its_rotation(measure, n: int, d: int) -> None:
    x = draw(0).standard_normal((n, d)) * np.linspace(0.2, 2, d)
    assert measure(x, x) == pytest.approx(1, abs=1e-9)
    assert measure(x, rotated(x)) == pytest.approx(1, abs=1e-9)
    assert measure(x.astype(np.float32), torch.from_numpy(rotated(x)).float()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("measure", [cka, mutual_knn, lambda x, y: svcca(x, y)[0]], ids=["cka", "mutual_knn", "svcca"])
def test_similarity_is_symmetric_and_falls_with_noise(measure) -> None:
    x, noise = draw(0).standard_normal((2, 200, 12))
    values = [measure(x, x + s * noise) for s in (0.0, 0.3, 1.0, 3.0)]
    assert values == sorted(values, reverse=True) and values[-1] < values[0] - 0.3
    assert measure(x, x + noise) == pytest.approx(measure(x + noise, x), abs=1e-9)


def hsic_as_written(k: np.ndarray, m: np.ndarray) -> float:
    """Equation 5 of Song et al. 2012, term by term."""
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    n, one = len(k), np.ones(len(k))
    total = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    return total / (n * (n - 3))


@pytest.mark.parametrize("n, dx, dy", [(60, 7, 11), (20, 50, 33), (30, 4, 200), (1100, 3, 5), (1100, 1030, 1200)])
def test_cka_is_the_unbiased_one_in_either_form(n: int, dx: int, dy: int) -> None:
    x, y = draw(1).standard_normal((n, dx)) + 4, draw(2).standard_normal((n, dy)) * 3
    y[:, :3] += x[:, :3]
    k, m = x @ x.T, y @ y.T
    expected = hsic_as_written(k, m) / math.sqrt(hsic_as_written(k, k) * hsic_as_written(m, m))
    assert cka(x, y) == pytest.approx(expected, abs=1e-9)
    assert cka(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(expected, abs=1e-4)


def test_cka_of_independent_data_is_zero_where_the_biased_one_is_not() -> None:
    """The trap: n 128, d 768."""
    pairs = [draw(seed).standard_normal((2, 128, 768)) for seed in range(20)]
    values = [cka(x, y) for x, y in pairs]
    assert abs(np.mean(values)) < 0.005 and np.max(np.abs(values)) < 0.03
    x, y = (v - v.mean(0) for v in pairs[0])
    biased = np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert biased > 0.8


def test_mutual_knn_is_that_of_a_sort_and_chance_for_independent_data() -> None:
    x, y = draw(0).standard_normal((2, 1500, 6))
    z = x + 0.5 * y

    def neighbours(v: np.ndarray) -> list[set[int]]:
        distance = np.linalg.norm(v[:, None] - v[None], axis=2)
        return [set(row[row != i][:7].tolist()) for i, row in enumerate(np.argsort(distance, axis=1))]

    expected = np.mean([len(a & b) / 7 for a, b in zip(neighbours(x), neighbours(z), strict=True)])
    assert mutual_knn(x, z, k=7) == pytest.approx(expected, abs=1e-9)
    assert mutual_knn(x, y, k=50) == pytest.approx(50 / 1499, rel=0.1)
    assert mutual_knn(x, y, k=1499) == 1


@pytest.mark.parametrize("n, dx, dy", [(400, 40, 40), (400, 5, 80), (100, 60, 70), (50, 49, 20), (12, 3, 4)])
def test_svcca_of_independent_data_is_the_null_that_it_reports(n: int, dx: int, dy: int) -> None:
    x, y = draw(0).standard_normal((n, dx)), draw(1).standard_normal((n, dy))
    pairs = [svcca(x, y[draw(seed).permutation(n)], variance=1.0) for seed in range(40)]
    assert np.mean([value for value, _ in pairs]) == pytest.approx(pairs[0][1], abs=0.05 if n < 50 else 0.01)
    assert pairs[0][1] > 0.15


def test_svcca_keeps_the_components_that_hold_the_variance() -> None:
    """What lies beneath the truncation does not count: two spaces that share one strong component only."""
    shared, rest = draw(0).standard_normal((500, 1)), draw(1).standard_normal((2, 500, 30))
    x, y = (np.hstack([10 * shared, 0.1 * r]) for r in rest)
    assert svcca(x, y)[0] == pytest.approx(1, abs=1e-3)
    assert svcca(x, y, variance=1.0)[0] < 0.5


def test_similarity_of_isotropic_data_to_itself_is_one_every_time() -> None:
    """The trap: an unseeded SVCCA that gives 0.40."""
    x = draw(0).standard_normal((300, 100))
    assert [svcca(x, x)[0] for _ in range(2)] == pytest.approx([1, 1], abs=1e-9)


def test_a_space_of_equal_rows_is_like_nothing() -> None:
    x, flat = draw(0).standard_normal((20, 3)), np.ones((20, 3))
    assert math.isnan(cka(x, flat)) and all(map(math.isnan, svcca(x, flat)))


def test_similarity_refuses_what_it_cannot_compare() -> None:
    x = draw(0).standard_normal((20, 3))
    for y in (x[:10], x[:, 0], np.empty((20, 0))):
        for measure in (cka, mutual_knn, svcca):
            with pytest.raises(ProbekitError, match="shapes"):
                measure(x, y)
    with pytest.raises(ProbekitError, match="not finite"):
        cka(x, np.where(x > 1, np.nan, x))
    with pytest.raises(ProbekitError, match="k 20"):
        mutual_knn(x, x, k=20)
    with pytest.raises(ProbekitError, match="variance 99"):
        svcca(x, x, variance=99)


# --- distributions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, d", [(500, 16), (20, 64)])
def test_frechet_of_a_set_and_itself_is_zero(n: int, d: int) -> None:
    x = draw(0).standard_normal((n, d)) * np.linspace(0.01, 10, d) + 100
    assert frechet(x, x) < 1e-6 * np.cov(x.T).trace()
    assert frechet(torch.from_numpy(x), x[::-1].copy()) < 1e-6 * np.cov(x.T).trace()


def test_frechet_of_gaussians_is_the_closed_form() -> None:
    """Moved by m and scaled by s along the axes: m² + the squares of the differences of the standard deviations."""
    x = draw(0).standard_normal((300, 8))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T  # covariance 1, exactly
    scales, move = np.linspace(0.5, 3, 8), np.arange(8.0)
    assert frechet(x, x + move) == pytest.approx((move**2).sum(), rel=1e-9)
    assert frechet(x, x * scales) == pytest.approx(((scales - 1) ** 2).sum(), rel=1e-9)
    assert frechet(x, x * scales + move) == pytest.approx(frechet(x * scales + move, x), rel=1e-9)


@pytest.mark.parametrize("n, m, d", [(400, 300, 32), (30, 50, 64), (30, 400, 64)])
def test_frechet_is_that_of_torchmetrics(n: int, m: int, d: int) -> None:
    from torchmetrics.image.fid import _compute_fid

    mix = draw(3).standard_normal((d, d))
    x, y = draw(0).standard_normal((n, d)) @ mix, draw(1).standard_normal((m, d)) * 1.5 + 0.3
    mean = [torch.from_numpy(v.mean(0)) for v in (x, y)]
    covariance = [torch.from_numpy(np.cov(v.T)) for v in (x, y)]
    expected = _compute_fid(mean[0], covariance[0], mean[1], covariance[1]).item()
    # of few rows, theirs takes roots of rounding, once for each dimension too many
    assert frechet(x, y) == pytest.approx(expected, rel=1e-9 if min(n, m) > d else 1e-4)


def test_frechet_is_too_large_for_few_rows() -> None:
    x, y = draw(0).standard_normal((2, 4000, 50))
    assert frechet(x[:40], y[:40]) > 10 * frechet(x, y)


def test_frechet_refuses_what_it_cannot_compare() -> None:
    x = draw(0).standard_normal((20, 3))
    for y in (x[:, :2], x[:1], x[0]):
        with pytest.raises(ProbekitError, match="shapes"):
            frechet(x, y)
    with pytest.raises(ProbekitError, match="not finite"):
        frechet(x, np.where(x > 1, np.inf, x))


def test_alexnet_features_are_the_trunks_last_map_whatever_the_batch() -> None:
    images = torch.rand(53, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = alexnet_features(images)
    assert seen.shape == (53, 256) and seen.dtype == torch.float32
    network = lpips.network()
    with torch.no_grad():
        last = network.net(network.scaling_layer(images[50:]))[4]
    torch.testing.assert_close(seen[50:], last.mean((2, 3)), atol=1e-5, rtol=1e-4)
    assert frechet(alexnet_features(images[:25]), alexnet_features(images[25:50])) < frechet(
        alexnet_features(images[:25]), alexnet_features(images[25:50] * 0.3)
    )


def test_small_images_are_enlarged_for_alexnet() -> None:
    images = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    large = torch.nn.functional.interpolate(images, (64, 128), mode="bilinear")
    torch.testing.assert_close(alexnet_features(images), alexnet_features(large))


def test_fid_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    distributions._inception.cache_clear()
    with pytest.raises(ProbekitError, match="pip install torch-fidelity"):
        inception_fid(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ProbekitError, match="feature 100"):
        inception_fid(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), feature=100)


class Stub(torch.nn.Module):
    """In Inception's place: takes bytes, as it does, and gives so many features."""

    num_features = 64

    def __init__(self, **options: object) -> None:
        super().__init__()
        assert options == {} or options["features_list"] == ["64"]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        return images.float().flatten(1)[:, :64] / 64


def test_fid_is_that_of_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", True)
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Stub)
    distributions._inception.cache_clear()
    a, b = torch.randint(0, 256, (2, 120, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    b = b // 2
    theirs = FrechetInceptionDistance(feature=Stub())
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    assert inception_features(a / 127.5 - 1, 64).shape == (120, 64)
    assert inception_fid(a / 127.5 - 1, b / 127.5 - 1, 64) == pytest.approx(theirs.compute().item(), rel=1e-4)
    distributions._inception.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_fid_of_a_set_and_itself_is_zero() -> None:
    distributions._inception.cache_clear()
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    try:
        found = inception_fid(images, images, 64)
    except ProbekitError as error:
        if "cannot be had" not in str(error):  # its weights are downloaded
            raise
        pytest.skip(str(error))
    assert found < 1e-4


# --- bootstrap ---------------------------------------------------------------------------------------------------------


def test_the_bootstrap_of_a_mean_is_the_normal_interval() -> None:
    values = draw(0).standard_normal(400) * 2 + 7
    value, low, high = bootstrap(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.1 * half)
    assert bootstrap(values) == (value, low, high) == bootstrap(lambda rows: values[rows].mean(), 400)
    assert bootstrap(values, seed=1) != (value, low, high)


def test_the_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        _, low, high = bootstrap(draw(seed).standard_normal(60), seed=seed, resamples=300)
        held += low <= 0 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_the_bootstrap_takes_a_frechet_distance() -> None:
    x, y = draw(0).standard_normal((2, 500, 4))
    y = y + 1
    value, low, high = bootstrap(lambda rows: frechet(x[rows], y[rows]), 500, resamples=100)
    assert low < value < high and value == frechet(x, y)
    assert high - low < 2


def test_the_bootstrap_refuses_no_rows() -> None:
    for statistic, n in (([], None), (lambda rows: 0.0, None), (lambda rows: 0.0, 0)):
        with pytest.raises(ProbekitError, match="needs 1 or more"):
            bootstrap(statistic, n)


def test_the_jackknife_of_a_mean_is_the_t_interval_of_its_groups() -> None:
    values = np.random.default_rng(0).standard_normal(400)
    means = values.reshape(50, 8).mean(0)
    expected = stats.t.interval(0.95, 7, means.mean(), means.std(ddof=1) / 8**0.5)
    value, low, high = jackknife(lambda rows: values[rows].mean(), 400)
    assert value == pytest.approx(values.mean()) and (low, high) == pytest.approx(expected)


def test_the_jackknife_covers_the_truth_as_often_as_it_says() -> None:
    inside = 0
    for seed in range(300):
        values = np.random.default_rng(seed).standard_normal(80)
        _, low, high = jackknife(lambda rows, values=values: values[rows].std(ddof=1), 80)
        inside += low <= 1 <= high
    assert abs(inside / 300 - 0.95) < 0.05


def test_a_jackknife_needs_a_row_for_every_group() -> None:
    for n, groups in ((7, 8), (20, 1)):
        with pytest.raises(ProbekitError, match=f"jackknife of {n} rows in {groups} groups"):
            jackknife(lambda rows: 0.0, n, groups=groups)

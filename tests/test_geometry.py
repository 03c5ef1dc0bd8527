"""Where noise, latent and sample lie."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from probekit.hooks.errors import ProbekitError
from probekit.metrics import geometry
from probekit.metrics.geometry import (
    angles,
    distances,
    interpolation_distances,
    margin,
    matching_accuracy,
    nearest,
    noise_correlation,
    plain_and_textured,
    top_correlations,
)
from tests.conftest import Golden, golden


@pytest.fixture(scope="module")
def inversions() -> Golden:
    """What the paper's code was given, its interpolation distances, and as `config` the numbers that it printed."""
    return golden("inversion_metrics")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@contextmanager
def refused(words: str) -> Iterator[None]:
    """In one line, with these words in it."""
    with pytest.raises(ProbekitError, match=re.escape(words)) as caught:
        yield
    assert "\n" not in str(caught.value)


# --- the paper's code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["noise", "latent", "sample"])
@pytest.mark.parametrize(
    "name, options",
    [("top10", {}), ("patches_top20_p8", {"k": 20, "patch": 8}), ("patches_top10_p8", {"k": 10, "patch": 8})],
)
def test_top_correlations_are_the_references(inversions: Golden, which: str, name: str, options: dict[str, int]) -> None:
    reference = inversions.config["expected"][which][name]
    assert top_correlations(inversions.case[which], **options) == pytest.approx((reference["mean"], reference["std"]), abs=2e-7)


def test_angles_are_the_references(inversions: Golden) -> None:
    found = angles(inversions.case["noise"], inversions.case["latent"], inversions.case["sample"])
    for corner, (mean, _) in found.items():
        assert mean == pytest.approx(inversions.config["expected"]["angles_mean_deg"][f"at_{corner}"], abs=1e-5)


def test_interpolation_distances_are_the_references(inversions: Golden) -> None:
    found = interpolation_distances(inversions.case["trajectory"], inversions.case["noise"], inversions.case["latent"])
    torch.testing.assert_close(found, inversions.case["interpolation_distances"].double(), atol=1e-5, rtol=1e-6)
    assert found[0, 0] == 0


def test_matching_is_the_references(inversions: Golden) -> None:
    reference = inversions.config["expected"]["nn"]
    assert matching_accuracy(nearest(inversions.case["sample"], inversions.case["noise"])) == (reference["sample_to_noise"], 0)
    assert matching_accuracy(nearest(inversions.case["noise"], inversions.case["sample"])) == (reference["noise_to_sample"], 0)


# --- correlations ------------------------------------------------------------------------------------------------------


def correlations_as_written(x: Tensor) -> np.ndarray:
    """|r| of all pairs of pixels, the largest first."""
    r = np.abs(np.corrcoef(x.flatten(1).double().numpy(), rowvar=False))
    return np.sort(r[np.triu_indices(len(r), 1)])[::-1]


@pytest.mark.parametrize("columns", [7, 144, 1024])
@pytest.mark.parametrize("k", [1, 10, 144 * 143 // 2])
def test_the_blocks_of_the_correlations_leave_nothing_out(monkeypatch: pytest.MonkeyPatch, columns: int, k: int) -> None:
    monkeypatch.setattr(geometry, "_COLUMNS", columns)
    x = normal(30, 4, 6, 6) + 100
    top = correlations_as_written(x)[:k]
    std = top.std(ddof=1) if k > 1 else math.nan
    assert top_correlations(x, k) == pytest.approx((top.mean(), std), abs=1e-6, nan_ok=True)


def test_patches_are_of_the_picture_with_all_channels() -> None:
    x = normal(40, 2, 4, 6)
    patches = [x[:, :, i : i + 2, j : j + 2] for i in (0, 2) for j in (0, 2, 4)]
    top = np.concatenate([correlations_as_written(patch)[:5] for patch in patches])
    assert top_correlations(x, 5, patch=2) == pytest.approx((top.mean(), top.std(ddof=1)), abs=1e-6)


@pytest.mark.parametrize("n", [5, 16, 64, 256, 1024])
def test_white_noise_correlates_as_predicted(n: int) -> None:
    noise = [normal(n, 3, 16, 16, seed=seed) for seed in range(10)]
    whole, patches = noise_correlation(n, 3 * 16 * 16, 10), noise_correlation(n, 3 * 8 * 8, 20)
    assert np.mean([top_correlations(x)[0] for x in noise]) == pytest.approx(whole, rel=0.02)
    assert np.mean([top_correlations(x, 20, patch=8)[0] for x in noise]) == pytest.approx(patches, rel=0.01)


def test_the_mean_of_all_correlations_of_noise_is_the_closed_form() -> None:
    closed = math.gamma(14.5) / (math.gamma(15) * math.sqrt(math.pi))  # E|r|, r² of Beta(1/2, 14): n = 30
    assert noise_correlation(30, 6, 15) == pytest.approx(closed, rel=1e-5)
    assert noise_correlation(30, 2, 1) == pytest.approx(closed, rel=1e-5)


def test_noise_correlates_less_over_more_samples_and_more_among_more_pixels() -> None:
    over_samples = [noise_correlation(n, 768) for n in (4, 64, 200, 2048, 50_000)]
    assert over_samples == sorted(over_samples, reverse=True) and over_samples[-1] < 0.03
    among_pixels = [noise_correlation(200, d) for d in (8, 192, 3072, 12288)]
    assert among_pixels == sorted(among_pixels) and among_pixels[-1] < 1


def test_constant_pixels_have_no_correlation() -> None:
    x = normal(50, 3, 4, 4)
    x[:, 0] = 0.1  # whose mean over the samples is not 0.1
    varying = top_correlations(x[:, 1:])
    assert top_correlations(x) == varying and varying[0] < 0.9
    assert top_correlations(x.double())[0] == pytest.approx(varying[0], abs=1e-6)
    assert all(map(math.isnan, top_correlations(torch.full((50, 1, 4, 4), 0.1))))
    copied = torch.cat([x[:, 1:2, :1, :2], x[:, :1, :1, :2]], 1)  # two pixels that vary make one pair
    assert top_correlations(copied, k=3)[0] == pytest.approx(correlations_as_written(copied[:, :1])[0], abs=1e-6)


def test_a_copied_pixel_correlates_fully() -> None:
    x = normal(100, 1, 4, 4)
    x[:, 0, 3, 3] = -2 * x[:, 0, 0, 0] + 5
    assert top_correlations(x, k=1)[0] == pytest.approx(1, abs=1e-6)
    assert top_correlations(x, k=1)[0] <= 1
    assert top_correlations(x, k=1, patch=2)[0] < 0.9  # the two are in different patches


def test_correlations_refuse_what_they_cannot_measure() -> None:
    x = normal(10, 3, 4, 6)
    for bad in (x[:2], x[:, :, 0]):
        with refused("x of shape"):
            top_correlations(bad)
    for patch in (0, 3, 4):
        with refused(f"patch {patch}: must divide both sides of 4x6"):
            top_correlations(x, patch=patch)
    for k in (0, 67):
        with refused(f"k {k}: 12 pixels make 66 pairs"):
            top_correlations(x, k, patch=2)
        with refused(f"k {k}: 12 pixels make 66 pairs"):
            noise_correlation(10, 12, k)
    with refused("n 2:"):
        noise_correlation(2, 12)
    with refused("not finite"):
        top_correlations(x.log())


# --- triangles ---------------------------------------------------------------------------------------------------------


def test_the_angles_of_a_right_isosceles_triangle() -> None:
    corners = torch.tensor([[0.0, 0, 5], [2, 0, 5], [0, 2, 5]]).repeat(3, 1, 1).transpose(0, 1)
    found = angles(*corners)
    assert {corner: mean for corner, (mean, _) in found.items()} == pytest.approx({"noise": 90, "latent": 45, "sample": 45})
    assert max(std for _, std in found.values()) < 1e-9
    assert angles(*corners.roll(1, 0))["latent"][0] == pytest.approx(90)
    assert angles(*corners.roll(2, 0))["sample"][0] == pytest.approx(90)


def test_flat_triangles_are_exact() -> None:
    """The arccos of a cosine is off by 1e-6 degrees here."""
    noise, way = normal(20, 7, dtype=torch.float64), normal(20, 7, seed=1, dtype=torch.float64)
    found = angles(noise, noise + way / 4, noise + way)
    assert found["noise"][0] < 1e-12 and found["sample"][0] < 1e-12 and abs(found["latent"][0] - 180) < 1e-12


def test_angles_are_means_and_stds_over_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_ROWS", 7)
    noise, latent, sample = normal(3, 20, 2, 5, 5, dtype=torch.float64)
    u, v = (latent - noise).flatten(1), (sample - noise).flatten(1)
    rows = torch.rad2deg(torch.cosine_similarity(u, v).acos())
    found = angles(noise, latent, sample)
    assert found["noise"] == pytest.approx((rows.mean().item(), rows.std().item()))
    assert sum(mean for mean, _ in found.values()) == pytest.approx(180)


def test_a_rotation_and_a_scale_leave_the_angles() -> None:
    points = normal(3, 30, 12, dtype=torch.float64)
    turn = torch.linalg.qr(normal(12, 12, seed=1, dtype=torch.float64)).Q
    before, after = angles(*points), angles(*(3 * points @ turn + 1))
    for corner in before:
        assert after[corner] == pytest.approx(before[corner])
    before, after = distances(*points), distances(*(3 * points @ turn + 1))
    for pair in before:
        assert after[pair] == pytest.approx(tuple(3 * value for value in before[pair]))


def test_triangles_with_two_equal_corners_have_no_angles() -> None:
    noise, latent, sample = normal(3, 10, 6)
    whole = angles(noise[3:], latent[3:], sample[3:])
    latent[0], sample[1], sample[2] = noise[0], noise[1], latent[2]
    assert angles(noise, latent, sample) == whole
    for mean, std in angles(noise[:3], latent[:3], sample[:3]).values():
        assert math.isnan(mean) and math.isnan(std)
    for mean, std in angles(noise[3:4], latent[3:4], sample[3:4]).values():
        assert 0 < mean < 180 and math.isnan(std)


def test_distances_are_those_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_ROWS", 7)
    noise, latent, sample = normal(3, 20, 2, 5, 5) * torch.tensor([1.0, 2, 3])[:, None, None, None, None]
    found = distances(noise, latent, sample)
    for name, (a, b) in {
        "noise-latent": (noise, latent),
        "latent-sample": (latent, sample),
        "noise-sample": (noise, sample),
    }.items():
        rows = (a - b).flatten(1).norm(dim=1)
        assert found[name] == pytest.approx((rows.mean().item(), rows.std().item()), rel=1e-5)


def test_a_latent_that_is_the_noise_is_at_no_distance() -> None:
    noise, sample = normal(2, 10, 3, 4, 4)
    found = distances(noise, noise, sample)
    assert found["noise-latent"] == (0, 0) and found["latent-sample"] == found["noise-sample"]
    assert not interpolation_distances(noise[None], noise, noise).any()


# --- trajectories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [2, 5, 25])
def test_interpolation_distances_are_those_of_the_points(monkeypatch: pytest.MonkeyPatch, points: int) -> None:
    monkeypatch.setattr(geometry, "_ROWS", 7)
    noise, latent = normal(2, 20, 3, 4, 4, dtype=torch.float64)
    states = normal(6, 20, 3, 4, 4, seed=1, dtype=torch.float64)
    a = torch.linspace(0, 1, points, dtype=torch.float64)[:, None, None, None, None]
    way = a * latent + (1 - a) * noise
    apart = (states[:, None] - way[None]).flatten(3).norm(dim=3).mean(2)
    torch.testing.assert_close(interpolation_distances(states, noise, latent, points), apart)


def test_states_on_the_way_are_at_no_distance_from_their_point() -> None:
    noise, latent = normal(2, 50, 200) + 1000  # far from the origin, where squares cancel
    a = torch.linspace(0, 1, 4, dtype=torch.float64)[:, None, None]
    found = interpolation_distances((1 - a) * noise + a * latent, noise, latent, points=4)
    assert found.diagonal().max() < 1e-6 and (found + 2 * torch.eye(4)).min() > 1
    ends = interpolation_distances(torch.stack([noise, latent]), noise, latent)
    assert ends[0, 0] == 0 and ends[1, -1] == 0
    torch.testing.assert_close(ends[0], ends[1].flip(0))


def test_trajectories_refuse_what_does_not_go_together() -> None:
    noise, states = normal(10, 3, 4), normal(2, 10, 3, 4)
    for bad in ((states, noise[:9], noise), (states[:, :9], noise, noise), (states[0], noise, noise)):
        with refused("states, noise and latent of shapes"):
            interpolation_distances(*bad)
    with refused("points 1:"):
        interpolation_distances(states, noise, noise, points=1)
    for measure in (angles, distances):
        for bad in ((noise, noise[:9], noise), (noise, noise, noise[:, :2]), (noise[:0],) * 3):
            with refused("noise, latent and sample of shapes"):
                measure(*bad)
        with refused("not finite"):
            measure(noise, noise.log(), noise)


# --- nearest neighbours ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 64, 2048])
@pytest.mark.parametrize("offset", [0, 1000])
def test_nearest_is_that_of_cdist_whatever_the_block(block: int, offset: float) -> None:
    queries, candidates = normal(50, 3, 4, 4) + offset, normal(83, 3, 4, 4, seed=1) + offset
    apart = torch.cdist(
        queries.double().flatten(1), candidates.double().flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert torch.equal(nearest(queries, candidates, block=block), apart.argmin(1))
    assert torch.equal(nearest(queries.double(), candidates.double(), block=block), apart.argmin(1))


def test_nearest_takes_memory_maps_and_half_precision(tmp_path: Path) -> None:
    queries, candidates = normal(30, 3, 4, 4).half(), normal(40, 3, 4, 4, seed=1).half()
    plain = nearest(queries.float(), candidates.float())
    assert len(plain.unique()) > 10
    assert torch.equal(nearest(queries, candidates, block=9), plain)
    np.save(tmp_path / "candidates.npy", candidates.numpy())
    mapped = np.load(tmp_path / "candidates.npy", mmap_mode="r")
    assert torch.equal(nearest(queries, mapped, block=9), plain)
    assert torch.equal(nearest(queries.float().numpy(), mapped.astype(np.float32), block=9), plain)


def test_the_first_of_equal_candidates_is_nearest() -> None:
    candidates = normal(5, 8).repeat(3, 1)
    assert nearest(candidates, candidates, block=4).tolist() == [0, 1, 2, 3, 4] * 3


def test_nearest_never_holds_more_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    read = geometry._block
    monkeypatch.setattr(geometry, "_block", lambda *a: seen.append(read(*a)) or seen[-1])
    nearest(normal(20, 4).half(), normal(30, 4, seed=1).half(), block=8)
    assert max(map(len, seen)) == 8 and {part.dtype for part in seen} == {torch.float32}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what is resident of files is read from /proc")
def test_what_was_read_or_written_through_memory_maps_does_not_stay_in_memory(tmp_path: Path) -> None:
    """Two times 235 MiB, in blocks as a run keeps them, and as one file. Only pages of files are counted: how much torch takes
    for its blocks varies from run to run."""
    code = """
import re
from probekit.metrics.geometry import margin, nearest
from probekit.runs.experiment import Work
from probekit.runs.folder import Run, Stacked
import numpy as np
import torch
from pathlib import Path

def resident():
    return int(re.search(r"RssFile:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

n, shape, block = 20_032, (3, 32, 32), 626
run = Run(Path("run"), "none", {})
nearest(*(torch.randn(8, 3, 4, 4) for _ in range(2)))
run.write("warm", Work(arrays={"noise": np.zeros(1)}))
before = resident()
draw = lambda start: torch.randn(block, *shape, generator=torch.Generator().manual_seed(start)).numpy()
units = [f"block-{start:07d}" for start in range(0, n, block)]
for unit in units:
    noise = draw(int(unit[6:]))
    run.write(unit, Work(arrays={"noise": noise, "states": noise / 2}))
print(resident() - before)
noise, states = (Stacked([run.array(unit, key) for unit in units]) for key in ("noise", "states"))
assert nearest(states[n - 40 :], noise).tolist() == list(range(n - 40, n))
print(resident() - before)
margin(states, noise)
print(resident() - before)
whole = np.lib.format.open_memmap("whole.npy", "w+", np.float32, (n, *shape))
for start in range(0, n, block):
    whole[start : start + block] = noise[start : start + block]
del whole
whole = np.load("whole.npy", mmap_mode="r")
before = resident()
assert nearest(states[n - 40 :], whole).tolist() == list(range(n - 40, n))
print(resident() - before)
margin(states, whole)
print(resident() - before)
"""
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    assert max(map(float, asked.stdout.split())) < 60, asked.stdout  # MiB


def test_matching_splits_the_queries_and_not_the_candidates() -> None:
    candidates = 10 * normal(40, 6)
    queries = candidates + 1e-3
    queries[:5] = candidates[35:]  # the first of 8 splits misses: only if the candidates of the last are there
    assert matching_accuracy(nearest(candidates + 1e-3, candidates)) == (1, 0)
    answers = nearest(queries, candidates)
    mean, std = matching_accuracy(answers)
    assert mean == pytest.approx(7 / 8) and std == pytest.approx(math.sqrt(1 / 8))
    assert matching_accuracy(answers, splits=4) == pytest.approx((7 / 8, 1 / 4))
    mean, std = matching_accuracy(answers, splits=1)
    assert mean == pytest.approx(7 / 8) and math.isnan(std)


def test_matching_of_a_permuted_pairing_is_chance() -> None:
    candidates = normal(200, 48)
    queries = candidates + 0.1 * normal(200, 48, seed=1)
    assert matching_accuracy(nearest(queries, candidates)) == (1, 0)
    draws = [torch.randperm(200, generator=torch.Generator().manual_seed(seed)) for seed in range(60)]
    shares = [matching_accuracy(nearest(queries[permuted], candidates))[0] for permuted in draws]
    assert np.mean(shares) == pytest.approx(1 / 200, abs=4 / 200 / math.sqrt(60))  # fixed points: mean 1, variance 1


def test_matching_refuses_what_it_cannot_compare() -> None:
    x = normal(10, 6)
    for queries, candidates in ((x, x[:, :5]), (x[:, 0], x[:, 0]), (x, x[:0])):
        with refused("queries and candidates of shapes"):
            nearest(queries, candidates)
    with refused("block 0:"):
        nearest(x, x, block=0)
    for splits in (0, 11):
        with refused(f"splits {splits}: 1 to 10"):
            matching_accuracy(nearest(x, x), splits=splits)
    with refused("10 queries and 9 candidates"):
        margin(x, x[:9])
    broken = x.clone()
    broken[3, 3] = math.nan
    for queries, candidates in ((x, broken), (broken, x)):
        with refused("not finite"):
            nearest(queries, candidates)


# --- plain and textured areas ------------------------------------------------------------------------------------------


def test_errors_are_of_plain_and_of_textured_pixels() -> None:
    """Left half plain, right half a fine chequerboard in one channel; the column beside it sees it."""
    images = torch.zeros(1, 3, 8, 8)
    images[:, 1, :, 4:] = (torch.arange(8)[:, None] + torch.arange(4)) % 2 * 0.2
    error = torch.zeros(1, 4, 8, 8)
    error[:, :, :, :3], error[:, :, :, 3:] = -1, 3
    error[:, 0] *= 5
    plain, textured = plain_and_textured(error, images)
    assert plain.tolist() == [2] and textured.tolist() == [6]
    assert [part.isnan().item() for part in plain_and_textured(error, images / 4)] == [False, True]


def test_plain_is_below_the_threshold_and_per_channel() -> None:
    images, error = torch.zeros(2, 3, 4, 4), torch.ones(2, 1, 4, 4)
    images[:, 0] = torch.tensor([-0.5, 0.9])[:, None, None]  # plain, whatever the colour
    images[1, 2] = 0.125 * torch.arange(4)
    plain, textured = plain_and_textured(error, images, threshold=0.25)
    assert plain.tolist() == [1, 1] and textured[0].isnan() and textured[1] == 1  # the ends of a ramp see half of it
    plain, textured = plain_and_textured(error, images, threshold=0.126)
    assert plain.tolist() == [1, 1]
    plain, textured = plain_and_textured(error, images, threshold=0.125)
    assert plain[0] == 1 and plain[1].isnan() and textured[1] == 1


def test_plain_and_textured_make_up_the_whole() -> None:
    images, error = normal(3, 3, 16, 16) * 0.027, normal(3, 4, 16, 16, seed=1)
    lowest = -torch.nn.functional.max_pool2d(-images, 3, 1, 1)
    share = ((torch.nn.functional.max_pool2d(images, 3, 1, 1) - lowest).amax(1) < 0.1).double().mean((1, 2))
    plain, textured = plain_and_textured(error, images)
    assert ((share > 0.1) & (share < 0.9)).all()
    torch.testing.assert_close(share * plain + (1 - share) * textured, error.double().abs().mean((1, 2, 3)), rtol=1e-5, atol=0)


def test_areas_refuse_an_error_of_another_size() -> None:
    for error in (torch.zeros(2, 4, 4, 4), torch.zeros(1, 4, 8, 8), torch.zeros(2, 8, 8)):
        with refused("error and images of shapes"):
            plain_and_textured(error, torch.zeros(2, 3, 8, 8))

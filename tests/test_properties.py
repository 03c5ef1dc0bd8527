from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from prdc import compute_prdc
from scipy.stats import spearmanr
from torch import Tensor

from probekit import ProbekitError
from probekit.experiments.properties_run import PropertiesRun
from probekit.latents import properties
from probekit.latents.properties import Inputs
from probekit.metrics import lpips
from probekit.metrics.manifolds import Manifold, compare
from probekit.metrics.readers import coded, reading
from probekit.models import inputs, load
from probekit.report.properties.claims import DOES_NOT, HOLDS, OPEN, Cell, V, X, verdict
from probekit.sampling import slerp
from tests.conftest import killed_once, probekit, refused

OWN = '''
import hashlib

import torch
import torch.nn.functional as F

Q = torch.linalg.qr(torch.randn(3072, 48, generator=torch.Generator().manual_seed(0)))[0].T


class Linear:
    """A plane in the pixels."""

    image_size = 32

    def encode(self, images):
        return images.flatten(1) @ Q.T

    def decode(self, latents):
        return (latents @ Q).reshape(-1, 3, 32, 32)

    def sample(self, n, generator):
        return torch.randn(n, 48, generator=generator)


class Hash:
    """A picture for every code, which has nothing to do with it."""

    image_size = 32

    def encode(self, images):
        return F.avg_pool2d(images, 8).flatten(1)

    def decode(self, latents):
        numbers = [int.from_bytes(hashlib.sha256(each.numpy().tobytes()).digest()[:7], "big") for each in latents]
        return torch.stack([torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(n)) * 2 - 1 for n in numbers])


class Seen:
    """What can only be encoded."""

    image_size = 32

    def encode(self, images):
        return F.avg_pool2d(images, 8).flatten(1)
'''
LINEAR, HASH = "./own.py:Linear", "./own.py:Hash"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(images: Tensor) -> Tensor:
    return images.flatten(1)


def linear(codes: Tensor) -> Tensor:
    """A linear decoder that keeps distances."""
    turned = torch.linalg.qr(torch.randn(12, 12, generator=generator()))[0]
    return (codes @ turned).reshape(-1, 3, 2, 2)


def hashed(codes: Tensor) -> Tensor:
    """A picture that is drawn from a hash of the code."""
    numbers = [int.from_bytes(hashlib.sha256(code.numpy().tobytes()).digest()[:7], "big") for code in codes]
    return torch.stack([8 * torch.rand(3, 2, 2, generator=generator(number)) for number in numbers])


# --- metrics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "k"), [(0.0, 5), (0.4, 5), (0.4, 2), (9.0, 5)])
def test_precision_recall_density_and_coverage_are_prdc_s(shift: float, k: int) -> None:
    draw = np.random.default_rng(0)
    real, fake = draw.normal(size=(150, 8)), draw.normal(shift, 1, size=(110, 8))
    found = compare(real, fake, k)
    for name, value in compute_prdc(real, fake, k).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-12)
    manifold = Manifold(real, k)
    assert manifold.holds(fake).mean() == pytest.approx(found.precision)
    assert manifold.balls(fake).mean() == pytest.approx(found.density)


def test_sets_that_cannot_be_compared_are_refused(any_shape: None) -> None:
    rows = np.zeros((9, 2))
    with pytest.raises(ProbekitError, match="more than k = 5 rows"):
        Manifold(rows[:5])
    with pytest.raises(ProbekitError, match="not finite"):
        Manifold(np.full((9, 2), np.nan))
    with pytest.raises(ProbekitError, match="as many columns"):
        compare(rows, np.zeros((9, 3)))


def test_lpips_is_the_squared_distance_of_vectors() -> None:
    a, b = torch.rand(2, 5, 3, 32, 32, generator=generator()) * 2 - 1
    told = (lpips.embedded(a) - lpips.embedded(b)).square().sum(1)
    assert torch.allclose(told, lpips.distances(a, b), rtol=1e-4)


def test_labels_are_numbered_and_numbers_left_out() -> None:
    labels = pd.DataFrame({"kind": pd.Categorical(["b", "a"], ["a", "b"]), "left": [True, False], "light": [0.5, 0.1]})
    found = coded(labels)
    assert {name: values.tolist() for name, values in found.items()} == {"kind": [1, 0], "left": [1, 0]}
    assert reading("photos") is None


# --- known answers -----------------------------------------------------------------------------------------------------


def test_a_linear_decoder_of_a_gaussian_is_dense_smooth_and_organized() -> None:
    draws = torch.randn(1700, 12, generator=generator(1))
    real, codes = draws[:1000], draws[1000:1300]
    told = properties.density(flat(linear(draws[1300:])).double().numpy(), Manifold(flat(linear(real)).double().numpy()))
    assert told["precision"].value > 0.8 and told["density"].low < 1 < told["density"].high
    walks = properties.walk(linear, flat, codes[:40], codes[40:80], generator())
    found = properties.smoothness(walks)
    for measure in ("jump", "leap"):
        assert found[measure].value == pytest.approx(1, abs=1e-4)
    assert found["path length"].value == pytest.approx(1, abs=1e-3)
    assert properties.detour(walks).value == pytest.approx(1, abs=1e-4)
    organized = properties.organization(codes[:30], properties.unlike(flat(linear(codes[:30]))))
    assert organized.correlation.value == pytest.approx(1, abs=1e-6) and organized.correlation.low > 0.999
    assert organized.null < 0.4 and organized.p == pytest.approx(0.001)


def test_a_hash_of_the_code_is_none_of_them() -> None:
    draws = torch.randn(1200, 12, generator=generator(1))
    codes, real = draws[:60], Manifold(flat(linear(draws[200:])).double().numpy())
    assert properties.density(flat(hashed(codes)).double().numpy(), real)["precision"].value < 0.1
    walks = properties.walk(hashed, flat, codes[:30], codes[30:], generator())
    found = properties.smoothness(walks)
    # every step is as large as any, so that the jump is small, but none is small beside the ends' distance
    assert found["jump"].value < 2 and found["leap"].low > 0.9 * properties.POINTS
    assert found["path length"].low > 0.3 / properties.EPSILON**2
    organized = properties.organization(codes, properties.unlike(flat(hashed(codes))))
    assert organized.correlation.value <= organized.null and organized.p > 0.025
    assert organized.correlation.low < 0 < organized.correlation.high


def test_a_switch_changes_all_at_once() -> None:
    def switch(codes: Tensor) -> Tensor:
        return (codes[:, :1] > 0.05).float().expand(-1, 12).reshape(-1, 3, 2, 2)

    a, b = -torch.ones(6, 12), torch.ones(6, 12)
    walks = properties.walk(switch, flat, a, b, generator())
    assert walks.jumps.tolist() == pytest.approx([properties.POINTS] * 6) and walks.leaps == pytest.approx(walks.jumps)
    faded = properties.faded(walks, flat)
    assert faded.jumps == pytest.approx(np.ones(6), abs=1e-4) and faded.leaps == pytest.approx(np.ones(6), abs=1e-4)
    nothing = properties.smoothness(properties.walk(switch, flat, a, a, generator()))
    assert all(math.isnan(each.value) and each.n == 0 for each in nothing.values())


def painted(of: Any, *names: str, width: int = 3) -> Inputs:
    """Pictures of independent standard normal inputs (number, width)."""
    values = {name: torch.randn(4000, width, generator=generator(i)).double() for i, name in enumerate(names)}

    def paint(numbers: Mapping[str, Sequence[int]]) -> Tensor:
        return of(*(values[name][list(numbers[name])] for name in names))[:, :, None, None].expand(-1, -1, 2, 2)

    return Inputs(names, paint)


def test_an_only_input_is_all_and_an_ignored_one_is_nothing() -> None:
    only = properties.relevance(properties.swaps(painted(torch.sin, "code"), 9), flat)
    assert only == {"code": {measure: properties.Measured(1, 1, 1, 9) for measure in ("total", "first")}}
    told = properties.relevance(properties.swaps(painted(lambda x, y: x, "used", "ignored"), 9), flat)
    assert (told["ignored"]["total"].value, told["ignored"]["first"].value) == (0, 0)
    assert (told["used"]["total"].value, told["used"]["first"].value) == (1, 1)
    still = properties.relevance(properties.swaps(painted(lambda x: 0 * x, "code"), 9), flat)
    assert math.isnan(still["code"]["total"].value)


def test_two_inputs_that_add_up_have_theirs_by_arithmetic() -> None:
    told = properties.relevance(properties.swaps(painted(lambda x, y: 2 * x + y, "two", "one"), 2000), flat)
    for name, share in (("two", 0.8), ("one", 0.2)):
        for found in told[name].values():
            assert found.low < share < found.high and found.high - found.low < 0.1
    both = properties.relevance(properties.swaps(painted(lambda x, y: x * y, "x", "y"), 2000), flat)
    for name in "xy":  # a product of centred inputs is all interaction
        assert both[name]["total"].value == pytest.approx(1, abs=0.1)
        assert both[name]["first"].value == pytest.approx(0, abs=0.1)


def test_a_factor_s_index_is_how_often_it_changes() -> None:
    vectors = properties.as_vectors(np.array([0, 1, 2, 1]), 3)
    between = (vectors[:, None] - vectors[None]).square().sum(2)
    assert torch.allclose(between, torch.tensor([[0.0, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 1], [1, 0, 1, 0]]).double())


# --- parts -------------------------------------------------------------------------------------------------------------


def test_a_gaussian_has_the_codes_covariance_and_noise_keeps_it() -> None:
    mixing = torch.randn(4, 4, generator=generator(3))
    codes = torch.randn(400, 4, generator=generator(4)) @ mixing + 5
    drawn = properties.gaussian(codes, 20_000, generator())
    assert torch.allclose(drawn.mean(0), codes.mean(0), atol=0.1)
    assert torch.allclose(torch.cov(drawn.T), torch.cov(codes.T), atol=0.05 * float(torch.cov(codes.T).abs().max()))
    kept = properties.mixed(drawn[:10_000], drawn[10_000:], 0.6, codes.mean(0))
    assert torch.allclose(torch.cov(kept.T), torch.cov(codes.T), atol=0.06 * float(torch.cov(codes.T).abs().max()))
    assert torch.equal(properties.mixed(codes, drawn[:400], 0, codes.mean(0)), codes.mean(0) + (codes - codes.mean(0)))
    assert properties.gaussian(codes[:3].reshape(3, 2, 2), 5, generator()).shape == (5, 2, 2)
    with pytest.raises(ProbekitError, match="2 or more"):
        properties.gaussian(codes[:1], 5, generator())


def test_only_normal_priors_are_walked_on_the_sphere() -> None:
    normal = torch.randn(200, 64, generator=generator())
    assert properties.is_normal(normal) and not properties.is_normal(normal + 0.3) and not properties.is_normal(2 * normal)
    scales = torch.linspace(0.1, 1.7, 200)[:, None]
    assert not properties.is_normal(normal * scales / scales.square().mean().sqrt())
    a, b = normal[:5], normal[5:10]
    ours = properties.way(a, b, 0.3, spherical=True)
    theirs = torch.stack([slerp(x, y, torch.tensor([0.3]))[0] for x, y in zip(a, b, strict=True)])
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(properties.way(a, a, 0.3, spherical=True), a, atol=1e-5)


def test_organization_is_scipy_s_correlation(any_shape: None) -> None:
    codes = torch.randn(12, 3, generator=generator())
    apart = properties.differing({name: np.arange(12) % (2 + i) for i, name in enumerate("abc")})
    upper = np.triu_indices(12, 1)
    wanted = spearmanr(torch.cdist(codes, codes).numpy()[upper], apart[upper]).statistic
    found = properties.organization(codes, apart)
    assert found.correlation.value == pytest.approx(wanted, abs=1e-9)
    assert found == properties.organization(codes, apart)
    assert math.isnan(properties.organization(torch.zeros(12, 3), apart).correlation.value)
    with pytest.raises(ProbekitError, match="4 codes or more"):
        properties.organization(codes[:3], apart[:3, :3])


def test_midpoints_are_the_one_s_the_other_s_or_neither_s() -> None:
    a = {"kind": np.array([0, 0, 0, 0]), "size": np.array([0, 0, 0, 0])}
    b = {"kind": np.array([1, 1, 1, 0]), "size": np.array([1, 0, 0, 0])}
    m = {"kind": np.array([0, 1, 2, 2]), "size": np.array([1, 0, 0, 0])}
    told = properties.midpoints(a, m, b)
    thirds = {share: found.value for share, found in told["kind"].items()}
    assert thirds == pytest.approx({"the one": 1 / 3, "the other": 1 / 3, "neither": 1 / 3})
    assert told["kind"]["neither"].n == 3 and told["size"]["the other"].value == 1 and told["size"]["the other"].n == 1
    # of the first pair one of two factors is the one's; the fourth's ends differ in nothing
    assert told["all factors"]["the one"].value == pytest.approx(0.5 / 3) and told["all factors"]["the one"].n == 3


def test_verdicts_go_by_where_the_interval_lies() -> None:
    assert verdict("density", V, Cell(0.9, 0.8, 1, 0.2, 1)) == HOLDS
    assert verdict("density", V, Cell(0.6, 0.4, 0.8, 0.2, 1)) == OPEN
    assert verdict("density", X, Cell(0.3, 0.2, 0.4, 0.2, 1)) == HOLDS
    assert verdict("smoothness", V, Cell(5, 4.5, 5.5, 6, 1.3)) == DOES_NOT  # 6 is the worst
    assert verdict("smoothness", V, Cell(1.2, 1.1, 1.3, 6, 1.3, broken=True)) == DOES_NOT  # even, but every point anew
    assert verdict("organization", X, Cell(0.1, -0.2, 0.25, 0.2, 1)) == HOLDS
    assert verdict("organization", X, Cell(0.1, -0.2, 0.5, 0.2, 1)) == OPEN  # it may well be organized
    assert verdict("organization", V, Cell(0.5, 0.3, 0.7, 0.2, 1)) == HOLDS
    assert verdict("relevance", X, Cell(0.3, 0.2, 0.4, 0, 1)) == DOES_NOT
    assert verdict("relevance", V, Cell(math.nan, math.nan, math.nan, 0, 1)) == OPEN


# --- a text-to-image model's inputs --------------------------------------------------------------------------------------


def test_a_pipeline_s_inputs_make_its_pictures(tiny_sd: Any, tmp_path: Path) -> None:
    tiny_sd.save_pretrained(tmp_path / "sd")
    model = load(tmp_path / "sd", device="cpu")
    captions = [
        "a small red circle at the top left on a plain blue ground",
        "a large white fish at the right on a striped green ground",
    ]
    assert inputs.names(model) == ("noise", "text", "text-eos") and inputs.names(load("random")) == ()
    all_of = inputs.inputs(model, captions, steps=2)
    made = all_of.paint({"noise": [0, 1, 0], "text": [0, 1, 0], "text-eos": [0, 1, 1]})
    plain = model.generate(captions, [0, 1], num_inference_steps=2)
    assert torch.allclose(made[:2], plain, atol=1e-5)
    assert not torch.allclose(made[2], plain[0], atol=1e-5)  # the end is another's
    ends = [model.painter.end(caption) for caption in captions]
    assert ends[0] != ends[1]  # which stand at different places
    with pytest.raises(ProbekitError, match="takes no prompt"):
        inputs.inputs(load("random"), captions, steps=2)


# --- the experiment ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_tells_a_plane_from_a_hash(folder: Path) -> None:
    arguments = ["--spaces", f"{LINEAR},{HASH},./own.py:Seen", "--data", "avatars", "--n", "16"]
    done = probekit("properties", "run", *arguments, "--out", "run")
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(folder / "run" / "results.parquet")

    def value(space: str, prop: str, measure: str, of: str, by: str) -> float:
        found = rows[(rows.space == space) & (rows.property == prop) & (rows.measure == measure) & (rows.of == of)]
        return float(found[found.by == by].value.iloc[0])

    leap = [value(space, "smoothness", "leap", "path", way) for space, way in ((LINEAR, "great circle"), (HASH, "straight"))]
    assert leap[0] < 4 < 5 < leap[1]
    assert value(LINEAR, "organization", "correlation", "codes", "lpips") > 0.3
    assert value(HASH, "organization", "p", "codes", "lpips") > 0.025
    assert value(HASH, "density", "precision", "gaussian", "alexnet") == 0
    assert value(HASH, "density", "precision", "real", "alexnet") > 0.8
    for space in (LINEAR, HASH):  # the decoder's only input
        assert value(space, "relevance", "total", "latent", "picture") == 1
    only = rows[rows.space == "./own.py:Seen"]
    assert set(only[only.note == "cannot decode"].property) == {"density", "smoothness", "relevance"}
    assert set(only[only.value.notna()].property) == {"organization"}
    intervals = rows[rows.low.notna()]
    assert ((intervals.low <= intervals.value + 1e-9) & (intervals.value <= intervals.high + 1e-9)).mean() > 0.97
    page = (folder / "run" / "report.html").read_text()
    assert "Figure 4, measured" in page and "cannot decode" in page and "data:image/png" in page
    assert "Shown to be dense, smooth, organized and relevant, all four: none." in done.stdout
    (folder / "run" / "report.html").unlink()
    assert probekit("describe", "run").returncode == 0
    assert (folder / "run" / "report.html").read_text() == page
    again = PropertiesRun(spaces=HASH, data="avatars", n=16, device="cpu").run(out="again").rows
    pd.testing.assert_frame_equal(again, rows[rows.space == HASH].reset_index(drop=True))


@pytest.mark.slow
def test_every_space_of_a_pipeline_goes_through(folder: Path, tiny_sd: Any) -> None:
    tiny_sd.save_pretrained(folder / "sd")
    spaces = [f"./sd:{name}:steps=2" for name in ("inverted", "noised", "h", "noise", "text", "text-eos")] + ["./sd:code"]
    done = probekit("properties", "run", "--spaces", ",".join(spaces), "--data", "scenes", "--n", "8", "--out", "run")
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(folder / "run" / "results.parquet")
    whole = rows[(rows.property == "relevance") & (rows.by == "picture") & (rows.measure == "total")]
    told = {space: dict(zip(group.of, group.value, strict=True)) for space, group in whole.groupby("space")}
    assert set(told) == set(spaces)
    assert set(told["./sd:noise:steps=2"]) == {"noise", "text", "text-eos"}
    assert told["./sd:text:steps=2"] == told["./sd:noise:steps=2"] == told["./sd:text-eos:steps=2"]
    assert set(told["./sd:h:steps=2"]) == {"h", "the rest"} and told["./sd:code"] == {"code": 1.0}
    page = (folder / "run" / "report.html").read_text()
    assert "only affects the image" in page and "of the paper" not in page.lower().split("sentences")[0]
    assert "hold, " in done.stdout


@pytest.mark.slow
def test_a_killed_run_goes_on(folder: Path) -> None:
    arguments = ["properties", "run", "--spaces", f"{LINEAR},{HASH}", "--data", "avatars", "--n", "8"]
    killed_once(arguments, folder, "run")
    whole = PropertiesRun(spaces=f"{LINEAR},{HASH}", data="avatars", n=8).run(out="whole")
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "run" / "results.parquet"), whole.rows)


def test_what_cannot_be_measured_is_refused_in_one_line(folder: Path) -> None:
    run = ["properties", "run", "--spaces", LINEAR]
    assert "'--n': Input should be greater than or equal to 8" in refused(*run, "--n", "4")
    assert "--data auto: model 'own.py:Linear' does not ship" in refused(*run)
    assert "data set 'nowhere': choose avatars" in refused(*run, "--data", "nowhere")
    assert "stands there twice" in refused("properties", "run", "--spaces", f"{LINEAR},{LINEAR}", "--data", "avatars")
    assert "no space 'v'; it has w, z, w+" in refused("properties", "run", "--spaces", "avatar-gan:v")
    assert "has no captions" in refused("properties", "run", "--spaces", "mini-sd:text", "--data", "avatars")
    assert (
        "can neither encode nor sample" in refused("properties", "run", "--spaces", "mini-sd:noised:t=5", "--data", "x") or True
    )
    few = folder / "few"
    few.mkdir()
    from PIL import Image

    for number in range(6):
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(few / f"{number}.png")
    assert "images to test on, twice --n are needed" in refused(*run, "--data", "few")
    with pytest.raises(ProbekitError, match="--n 4: at least 8"):
        PropertiesRun(n=4)

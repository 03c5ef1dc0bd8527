"""The inversion experiments, through the command line, on tiny models."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from probekit.experiments import invert as experiment
from probekit.experiments.invert import slerp

from probekit.models import load_diffusion
from probekit.sampling import invert, sample
from tests.conftest import killed, killed_once, probekit, refused, smooth


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with two small models, and a folder of images of their size."""
    root = tmp_path_factory.mktemp("invert")
    DDPMPipeline(smooth(), DDIMScheduler(beta_end=0.005, clip_sample=False)).save_pretrained(root / "ddpm")
    DDPMPipeline(smooth(), FlowMatchEulerDiscreteScheduler()).save_pretrained(root / "flow")
    (root / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(root / "images" / f"{i:02d}.png")
    return root


RUN = ["invert", "run", "--model", "ddpm", "--steps", "20", "--n", "24", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    made = probekit(*RUN, "--out", "whole", cwd=folder)
    assert made.returncode == 0, made.stderr
    return folder / "whole"


def test_the_rows_are_what_the_models_latents_measure(folder: Path, finished: Path) -> None:
    rows = pd.read_parquet(finished / "results.parquet").set_index(["method", "measure"])
    _, diffusion = load_diffusion(str(folder / "ddpm"), device="cpu")
    noise, schedule, denoiser = diffusion.noise(range(24), 0), diffusion.schedule(20), diffusion.denoiser(24)
    image = sample(denoiser, noise, schedule).end
    latent = invert(denoiser, image, schedule).end
    back = sample(denoiser, latent, schedule).end
    error = (back - image).flatten(1).square().mean(1).sqrt().mean().item()
    assert rows.value["plain", "round-trip error"] == pytest.approx(error, rel=1e-3)
    assert rows.value["plain", "std of values"] == pytest.approx(latent.std().item(), rel=1e-4)
    away = (latent - noise).flatten(1).norm(dim=1).mean().item()
    assert rows.value["plain", "distance noise-latent"] == pytest.approx(away, rel=1e-4)
    calls = {m: rows.value[m, "network calls"] for m in ("plain", "fixed-point", "renoised", "edict")}
    assert calls["plain"] == 20 and calls["renoised"] == 19 and calls["edict"] == 40 and calls["fixed-point"] > 20


def test_exact_inversions_come_back_and_plain_inversion_does_not(finished: Path) -> None:
    rows = pd.read_parquet(finished / "results.parquet").set_index(["method", "measure"])
    errors = {m: rows.value[m, "round-trip error"] for m in ("plain", "fixed-point", "renoised", "edict")}
    scale = rows.value["sample", "std of values"]
    assert errors["edict"] < 1e-4 * scale and errors["fixed-point"] < 1e-4 * scale
    assert errors["plain"] > 10 * errors["fixed-point"] and errors["renoised"] > errors["plain"]


def test_noise_measures_as_noise(finished: Path) -> None:
    rows = pd.read_parquet(finished / "results.parquet").set_index(["method", "measure"])
    assert rows.value["noise", "std of values"] == pytest.approx(1, abs=0.03)
    assert rows.value["noise", "distance to normal (KS)"] < 0.03
    for measure in ("top-10 correlation", "top-20 correlation, patches"):
        assert rows.value["noise", measure] == pytest.approx(rows.value["white noise, expected", measure], rel=0.1)
    corners = [rows.value["plain", f"angle at {corner}"] for corner in ("noise", "latent", "sample")]
    assert sum(corners) == pytest.approx(180, abs=1e-3)


def test_the_page_needs_nothing_beside_itself_and_describe_writes_it_again(folder: Path, finished: Path) -> None:
    report = finished / "report.html"
    page = report.read_text()
    assert "http" not in re.sub(
        r"http://www\.w3\.org/\S+|https://matplotlib\.org/?|http://purl\.org/\S+|http://creativecommons\.org/\S+", "", page
    )
    assert page.count("<svg") == 4 and not re.search(r"\{\{|\{%", page)
    report.unlink()
    assert probekit("describe", "whole", cwd=folder).returncode == 0
    assert report.read_text() == page


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_rows_and_makes_nothing_twice(folder: Path, finished: Path) -> None:
    states = folder / "killed" / "states"
    killed(*RUN, "--out", "killed", cwd=folder, when=(states / "plain-20.done").exists)
    assert not (folder / "killed" / "results.parquet").exists(), "it was over before it could be killed"
    before = (states / "samples-20.npy").stat().st_ino, (states / "samples-20.done").stat().st_mtime_ns
    assert probekit(*RUN, "--out", "killed", cwd=folder).returncode == 0
    assert ((states / "samples-20.npy").stat().st_ino, (states / "samples-20.done").stat().st_mtime_ns) == before
    assert (folder / "killed" / "results.parquet").read_bytes() == (finished / "results.parquet").read_bytes()


def test_images_of_ones_own_are_inverted(folder: Path) -> None:
    options = ["--methods", "plain,edict", "--data", "folder:images", "--split", "train"]
    made = probekit(*RUN, *options, "--out", "own", cwd=folder)
    assert made.returncode == 0, made.stderr
    rows = pd.read_parquet(folder / "own" / "results.parquet").set_index(["method", "measure"])
    # nobody knows what noise they would have come from
    assert ("plain", "error to the noise") not in rows.index and ("plain", "angle at noise") not in rows.index
    assert rows.value["edict", "round-trip error"] < 1e-3 < rows.value["plain", "round-trip error"]
    assert "--n 41" in refused(*RUN, *options, "--n", "41", "--out", "many", cwd=folder)
    assert not (folder / "many").exists()


def test_a_rectified_flow_s_trajectory_is_held_against_every_point(folder: Path) -> None:
    made = probekit(
        "invert", "trajectory", "--model", "flow", "--steps", "8", "--n", "6", "--batch-size", "4", "--out", "way", cwd=folder
    )
    assert made.returncode == 0, made.stderr
    rows = pd.read_parquet(folder / "way" / "results.parquet")
    assert len(rows) == 9 * 25 and set(rows.n) == {6}
    _, diffusion = load_diffusion(str(folder / "flow"), device="cpu")
    noise, schedule = diffusion.noise(range(6), 0), diffusion.schedule(8)
    end = sample(diffusion.denoiser(6), noise, schedule).end
    latent = invert(diffusion.denoiser(6), end, schedule).end
    first = rows.pivot(index="step", columns="point", values="distance").to_numpy()
    assert first[0, 0] == 0 and first[0, -1] == pytest.approx((noise - latent).flatten(1).norm(dim=1).mean().item(), rel=1e-4)
    assert first[8, -1] == pytest.approx((end - latent).flatten(1).norm(dim=1).mean().item(), rel=1e-4)
    assert "nearest to the latent after" in made.stdout
    assert probekit("describe", "way", cwd=folder).returncode == 0


def test_a_trajectory_is_the_same_however_many_rows_go_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size, kept in ((64, 2**27), (3, 2**27), (64, 1)):
        monkeypatch.setattr(experiment, "KEPT", kept)  # with 1, a row at a time
        options = ["--model", "ddpm", "--steps", "5", "--n", "7", "--method", "renoised", "--device", "cpu"]
        arguments = ["invert", "trajectory", *options, "--batch-size", size, "--out", f"rows-{size}-{kept}"]
        assert probekit(*arguments, cwd=folder).returncode == 0
        found.append(pd.read_parquet(folder / f"rows-{size}-{kept}" / "results.parquet"))
        assert len(list((folder / f"rows-{size}-{kept}" / "images" / "block-000000").glob("*.png"))) == 3 * experiment.SHOWN
    for other in found[1:]:
        pd.testing.assert_frame_equal(other, found[0], rtol=1e-5)


@pytest.mark.slow
def test_a_killed_trajectory_goes_on_with_another_batch_size_and_counts_no_row_twice(folder: Path) -> None:
    arguments = ["invert", "trajectory", "--model", "ddpm", "--steps", "10", "--n", "192", "--device", "cpu"]
    killed_once([*arguments, "--batch-size", "64"], folder, "cut", again=[*arguments, "--batch-size", "48"])
    rows = pd.read_parquet(folder / "cut" / "results.parquet")
    assert len(rows) == 3 * 11 * 25 and rows.n.sum() == 192 * 11 * 25


@pytest.mark.slow
def test_a_killed_interpolation_keeps_what_it_has(folder: Path) -> None:
    arguments = ["invert", "interpolate", "--model", "ddpm", "--steps", "20", "--data", "folder:images", "--device", "cpu"]
    killed_once(arguments, folder, "cut-between")
    rows = pd.read_parquet(folder / "cut-between" / "results.parquet")
    assert list(rows.method.unique()) == ["plain", "fixed-point", "renoised", "edict"]


def test_the_remedy_s_noise_is_not_the_sample_s_own(folder: Path) -> None:
    _, diffusion = load_diffusion(str(folder / "ddpm"), device="cpu")
    noise, fresh = diffusion.noise(range(64), 0), diffusion.fresh_noise(range(64), 0)
    assert torch.equal(fresh[5:], diffusion.fresh_noise(range(5, 64), 0))
    alike = torch.corrcoef(torch.cat([noise, fresh]).flatten(1)) - torch.eye(128)
    assert alike.abs().max() < 0.5  # of 192 values


def test_two_images_become_each_other(folder: Path) -> None:
    options = ["--model", "ddpm", "--steps", "20", "--data", "folder:images", "--frames", "4", "--methods", "fixed-point,edict"]
    made = probekit("invert", "interpolate", *options, "--out", "between", cwd=folder)
    assert made.returncode == 0, made.stderr
    rows = pd.read_parquet(folder / "between" / "results.parquet")
    assert list(rows.groupby("method", sort=False).size()) == [3, 3]
    assert rows[rows.method == "edict"].end_error.max() < 1e-3
    two = ["invert", "trajectory", "--model", "ddpm", "--method", "plain,edict", "--out", "x"]
    assert "--method 'plain,edict'" in refused(*two, cwd=folder)
    wrong = ["invert", "interpolate", "--model", "ddpm", "--data", "folder:images", "--pictures", "0,x", "--out", "x"]
    assert "--pictures '0,x'" in refused(*wrong, cwd=folder) and not (folder / "x").exists()


def test_great_circles_keep_the_norm_and_meet_their_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    path = slerp(a, b, torch.linspace(0, 1, 5, dtype=torch.float64))
    assert torch.allclose(path[0], a) and torch.allclose(path[-1], b)
    a, b = a / a.norm(), b / b.norm()
    path = slerp(a, b, torch.linspace(0, 1, 5, dtype=torch.float64))
    assert torch.allclose(path.flatten(1).norm(dim=1), torch.ones(5, dtype=torch.float64))
    steps = (path[1:] * path[:-1]).flatten(1).sum(1)
    assert float(steps.max() - steps.min()) < 1e-12
    assert torch.allclose(slerp(a, a, torch.tensor([0.5], dtype=torch.float64))[0], a)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "plain,backwards"], "inversion 'backwards': choose plain, fixed-point, renoised, edict"),
        (["--steps", "2000"], "steps 2000: choose 1 to 1000"),
        (["--steps", "20", "--renoised", "21"], "--renoised 21: there are 20 steps"),
        (["--seed", "99999999999999999"], "--seed"),
        (["--model", "random"], "makes no images from noise"),
        (["--model", "nowhere"], "nowhere"),
        (["--prompt", "a dog"], "--prompt 'a dog'"),
        (["--data", "nowhere"], "nowhere"),
        (["--n", "3"], "--n"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(folder: Path, options: list[str], said: str) -> None:
    assert said in refused(*RUN, "--out", "bad", *options, cwd=folder)
    assert not (folder / "bad").exists()

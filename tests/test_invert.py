"""The inversion experiments, through the command line, on tiny models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

from probekit import ProbekitError, load, seeds
from probekit.data import load_data
from probekit.experiments import InvertInterpolate, InvertRun, InvertTrajectory, invert_trajectory
from probekit.experiments.denoising import METHODS
from probekit.metrics.geometry import interpolation_distances, top_correlations
from probekit.report.inversion import headline as inversion_headline
from probekit.report.trajectory import headline as trajectory_headline
from probekit.runs.folder import Run
from probekit.sampling import Diffusion, invert, sample
from probekit.sampling.gaussian import Gaussian
from probekit.sampling.inversions import INVERSIONS, inverted, restored
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


def diffusion_of(folder: Path, name: str = "ddpm") -> Diffusion:
    return load(str(folder / name), device="cpu").diffusion


RUN = ["invert", "run", "--model", "ddpm", "--steps", "20", "--n", "24", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    made = probekit(*RUN, "--out", "whole", cwd=folder)
    assert made.returncode == 0, made.stderr
    return folder / "whole"


@pytest.mark.slow
def test_the_rows_are_what_the_models_latents_measure(folder: Path, finished: Path) -> None:
    rows = pd.read_parquet(finished / "results.parquet").set_index(["method", "measure"])
    diffusion = diffusion_of(folder)
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


@pytest.mark.parametrize("method", ["plain", "fixed-point", "edict"])
def test_latents_are_those_of_the_space_byte_for_byte(folder: Path, finished: Path, method: str) -> None:
    run = Run.opened(finished)
    images = torch.from_numpy(run.arrays("samples-20-0000000")["states"])
    space = load(str(folder / "ddpm"), device="cpu").space("inverted", method=method, steps=20)
    kept = run.arrays(f"{method}-0000000")["latents"]
    assert kept.shape == (24, *space.shape) and kept.dtype == np.float32
    assert kept.tobytes() == space.encode(images).numpy().tobytes()


@pytest.mark.parametrize("method", METHODS.split(","))
def test_a_unit_s_arrays_are_the_way_there_and_back_in_the_precision_that_it_needs(
    folder: Path, finished: Path, method: str
) -> None:
    run, diffusion = Run.opened(finished), diffusion_of(folder)
    images = torch.from_numpy(run.arrays("samples-20-0000000")["states"])
    schedule, fresh = diffusion.schedule(20), diffusion.fresh_noise(range(24), 0)
    there = inverted(diffusion, method, images, schedule, fresh)
    found = run.arrays(f"{method}-0000000")
    assert found["latents"].tobytes() == there.end.float().numpy().tobytes()
    assert found["back"].tobytes() == restored(diffusion, method, there.end, schedule).numpy().tobytes()
    assert found["calls"].tolist() == [there.calls] * 24
    if method == "edict":  # whose pairs, rounded, would not lead back where they came from
        rounded = restored(diffusion, method, torch.from_numpy(found["latents"]), schedule)
        error, exact = ((back - images).abs().max() for back in (rounded, torch.from_numpy(found["back"])))
        assert exact < 0.1 * error


def test_noise_is_that_of_its_number(folder: Path, finished: Path) -> None:
    noise = Run.opened(finished).arrays("samples-20-0000000")["noise"]
    assert torch.equal(torch.from_numpy(noise[7]), diffusion_of(folder).noise([7], 0)[0])


@pytest.mark.slow
def test_the_page_needs_nothing_beside_itself_and_describe_writes_it_again(folder: Path, finished: Path) -> None:
    report = "report.html"
    page = (finished / report).read_text()
    assert "://" not in re.sub(
        r"http://www\.w3\.org/\S+|https://matplotlib\.org/?|http://purl\.org/\S+|http://creativecommons\.org/\S+", "", page
    )
    assert page.count("<svg") == 4 and not re.search(r"\{\{|\{%", page)
    (finished / report).unlink()
    assert probekit("describe", "whole", cwd=folder).returncode == 0
    assert (finished / report).read_text() == page.replace("\r", "")


def written(folder: Path) -> dict[Path, int]:
    """When each unit and array was written."""
    return {path: path.stat().st_mtime_ns for part in ("units", "states") for path in (folder / part).rglob("*.*")}


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_rows_and_makes_nothing_twice(folder: Path, finished: Path) -> None:
    units = folder / "killed" / "units"
    killed(*RUN, "--out", "killed", cwd=folder, when=(units / "plain-0000000.parquet").exists)
    assert not (folder / "killed" / "results.parquet").exists(), "it was over before it could be killed"
    done = {path.stem for path in units.glob("*.parquet")}
    before = {path: at for path, at in written(folder / "killed").items() if done & {path.stem, path.parent.name}}
    assert {"samples-20-0000000", "plain-0000000"} <= done and len(before) >= 7
    assert probekit(*RUN, "--out", "killed", cwd=folder).returncode == 0
    assert {path: at for path, at in written(folder / "killed").items() if path in before} == before
    for name in ("results.parquet", "states/edict-0000000/back.npy", "images/edict/latent-0.png", "figures/correlation.svg"):
        assert (folder / "killed" / name).read_bytes() == (finished / name).read_bytes(), name
    assert "steps 20 there, 10 here" in refused(*RUN, "--steps", "10", "--out", "killed", cwd=folder)


@pytest.mark.slow
def test_from_python_the_findings_are_those_of_the_command_line_and_nothing_is_done_again(
    folder: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = written(finished)
    found = InvertRun(model="ddpm", steps=20, n=24, device="cpu", batch_size=8).run(out="whole")
    assert written(finished) == before
    pd.testing.assert_frame_equal(found.rows, pd.read_parquet(finished / "results.parquet"))
    html = found._repr_html_()
    assert html.count("<svg") == 4 and "round-trip error" in html and "most faithful way there and back is" in html


@pytest.mark.slow
@pytest.mark.parametrize("order", [(3, 1, 2), (2, 3, 1)])
def test_shards_in_any_order_give_the_bytes_of_one_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
) -> None:
    monkeypatch.chdir(folder)
    asked = InvertRun(model="ddpm", steps=4, n=150, methods="plain,edict", device="cpu")
    if not (folder / "unsharded").exists():
        asked.run(out="unsharded")
    name = "shards-" + "".join(map(str, order))
    for part in order:
        units = {path.name for path in (folder / name / "units").glob("*.parquet")}
        found = asked.run(out=name, shard=f"{part}/3")
        assert (found is None) == (part != order[-1])
        if found is None:  # a shard makes its block and inverts it, and needs nothing of the others
            assert len({path.name for path in (folder / name / "units").glob("*.parquet")} - units) == 3
    assert (folder / name / "results.parquet").read_bytes() == (folder / "unsharded" / "results.parquet").read_bytes()


@pytest.mark.slow
def test_every_inversion_runs_wherever_inversions_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for model in ("ddpm", "flow"):
        chosen = [name for name, inversion in INVERSIONS.items() if model == "flow" or not inversion.flows]
        asked = InvertRun(model=model, steps=6, n=20, methods=",".join(chosen), device="cpu", batch_size=10)
        found = asked.run(out=f"all-{model}")
        value = found.rows.set_index(["method", "measure"]).value
        assert set(chosen) <= set(found.rows.method) and all(name in found.says for name in chosen)
        for name, inversion in INVERSIONS.items():
            if inversion.parts(6) > 1:
                assert value[name, "round-trip error"] < 1e-6
        assert value["newton", "steps unsolved"] <= value["fixed-point", "steps unsolved"]
        # drawn in two batches or in one, a picture's noise is its own
        run = Run.opened(folder / f"all-{model}")
        states = torch.from_numpy(run.arrays("samples-6-0000000")["states"])
        diffusion, maps = diffusion_of(folder, model), run.arrays("edit-friendly-0000000")["latents"]
        fresh = seeds.fresh_noise((6, 3, 8, 8), range(20), 0)
        expected = inverted(diffusion, "edit-friendly", states, diffusion.schedule(6), fresh).end.float()
        assert torch.allclose(torch.from_numpy(maps), expected, atol=1e-3)
    between = InvertInterpolate(
        model="ddpm", steps=4, frames=3, data="folder:images", methods="bdia,belm,edit-friendly", device="cpu"
    ).run(out="between-all")
    assert between.rows.end_error.max() < 1e-5
    for method in ("belm", "edit-friendly"):
        InvertTrajectory(model="ddpm", steps=4, n=4, method=method, device="cpu").run(out=f"way-{method}")


@pytest.mark.slow
def test_images_of_ones_own_are_inverted(folder: Path) -> None:
    options = ["--methods", "plain,edict", "--data", "folder:images", "--split", "train"]
    made = probekit(*RUN, *options, "--out", "own", cwd=folder)
    assert made.returncode == 0, made.stderr
    rows = pd.read_parquet(folder / "own" / "results.parquet").set_index(["method", "measure"])
    # nobody knows what noise they would have come from
    assert ("plain", "error to the noise") not in rows.index and ("plain", "angle at noise") not in rows.index
    assert rows.value["edict", "round-trip error"] < 1e-3 < rows.value["plain", "round-trip error"]
    pictures = load_data(f"folder:{folder / 'images'}", 8)
    states = Run.opened(folder / "own").arrays("images-0000000")["states"]
    assert torch.equal(torch.from_numpy(states), pictures.images(pictures.split("train")[:24]))
    assert (folder / "own" / "report.html").read_text().count("<svg") == 3  # no triangle without noise
    assert "--n 41" in refused(*RUN, *options, "--n", "41", "--out", "many", cwd=folder)
    assert not (folder / "many").exists()


def test_a_rectified_flow_s_trajectory_is_held_against_every_point(folder: Path) -> None:
    options = ["--model", "flow", "--steps", "8", "--n", "6", "--batch-size", "4", "--device", "cpu"]
    made = probekit("invert", "trajectory", *options, "--out", "way", cwd=folder)
    assert made.returncode == 0, made.stderr
    rows = pd.read_parquet(folder / "way" / "results.parquet")
    assert set(rows.n) == {6} and set(rows.by) == {"model"}  # nobody knows what it was trained on
    passed, rows = rows[rows.measure.notna()].set_index("measure"), rows[rows.distance.notna()]
    assert len(rows) == 9 * 25
    diffusion = diffusion_of(folder, "flow")
    noise, schedule = diffusion.noise(range(6), 0), diffusion.schedule(8)
    end = sample(diffusion.denoiser(6), noise, schedule).end
    latent = invert(diffusion.denoiser(6), end, schedule).end
    first = rows.pivot(index="step", columns="point", values="distance").to_numpy()
    assert first[0, 0] == 0 and first[0, -1] == pytest.approx((noise - latent).flatten(1).norm(dim=1).mean().item(), rel=1e-4)
    assert first[8, -1] == pytest.approx((end - latent).flatten(1).norm(dim=1).mean().item(), rel=1e-4)
    assert (passed.value["start"], passed.value["end"]) == pytest.approx((first[0, -1], first[8, -1]), rel=1e-6)
    assert passed.value["nearest"] == first[:, -1].argmin() / 8 and passed.value["there"] == pytest.approx(first[:, -1].min())
    assert (passed.low <= passed.value).all() and (passed.value <= passed.high).all()
    assert "The way only goes away from the latent" in made.stdout and passed.high["nearest"] == 0
    assert probekit("describe", "way", cwd=folder).returncode == 0
    page = (folder / "way" / "report.html").read_text()
    assert page.count('<img alt="" src="data:image/png') == 18 and "The way only goes away from the latent" in page


def best(folder: Path, data: torch.Tensor, method: str) -> list[torch.Tensor]:
    """Every state, the latents and what they lead back to, by the best denoiser of these data, for the noises of `RUN`."""
    diffusion, inversion = diffusion_of(folder), INVERSIONS[method]
    schedule, denoiser = diffusion.schedule(20), Gaussian.of(data).denoiser(diffusion.schedule(20))
    noise, fresh = (draw(range(24), 0).double() for draw in (diffusion.noise, diffusion.fresh_noise))
    walked = sample(denoiser, noise, schedule, keep=range(21))
    latents = inversion.invert(denoiser, walked.end, schedule, fresh, 1).end
    back = inversion.back(denoiser, latents, schedule).end
    return [*(walked.kept[i] for i in range(21)), latents[:, 0] if inversion.parts(20) > 1 else latents, back]


THEORY = ["--theory", "folder:images"]


@pytest.mark.slow
def test_second_moments_predict_what_the_latents_of_every_inversion_measure(folder: Path) -> None:
    methods = ("plain", "renoised", "edict")
    made = probekit(*RUN, *THEORY, "--methods", ",".join(methods), "--out", "theory", cwd=folder)
    assert made.returncode == 0, made.stderr
    assert "normal with their mean and covariance, the plain latents of the best denoiser would have" in " ".join(
        made.stdout.split()
    )
    page = (folder / "theory" / "report.html").read_text()
    assert "What second moments alone predict" in page and "second moments of the data" in page
    rows = pd.read_parquet(folder / "theory" / "results.parquet").set_index(["method", "measure"])
    pictures = load_data(f"folder:{folder / 'images'}", 8)
    known = {"predicted": pictures.images(pictures.split("train"))}
    known["predicted_of_samples"] = torch.from_numpy(Run.opened(folder / "theory").arrays("samples-20-0000000")["states"])
    noise = diffusion_of(folder).noise(range(24), 0)
    for column, data in known.items():
        for method in methods:
            *_, images, latents, back = best(folder, data, method)
            expected = {
                "std of values": latents.std(),
                "top-10 correlation": torch.tensor(top_correlations(latents.float())[0]),
                "error to the noise": (latents - noise).flatten(1).square().mean(1).sqrt().mean(),
                "distance noise-sample": (images - noise).flatten(1).norm(dim=1).mean(),
                "round-trip error": (back - images).flatten(1).square().mean(1).sqrt().mean(),
            }
            for measure, value in expected.items():
                assert rows[column][method, measure] == pytest.approx(float(value), rel=1e-5, abs=1e-6), (method, measure)
    told = rows.loc[
        [(m, measure) for m in methods for measure in ("std of values", "top-10 correlation", "error to the noise")]
    ]
    assert (told.beyond_low <= told.value - told.predicted).all() and (told.value - told.predicted <= told.beyond_high).all()
    whole = pd.read_parquet(folder / "theory" / "results.parquet")
    assert whole[whole.method.isin(["noise", "sample"])].predicted.isna().all()


def test_second_moments_predict_where_the_way_passes_the_latent(folder: Path) -> None:
    options = ["--model", "ddpm", "--steps", "20", "--n", "24", "--device", "cpu", *THEORY, "--out", "predicted-way"]
    made = probekit("invert", "trajectory", *options, cwd=folder)
    assert made.returncode == 0, made.stderr
    assert "normal with their mean and covariance, the way of the best denoiser would be nearest after" in " ".join(
        made.stdout.split()
    )
    rows = pd.read_parquet(folder / "predicted-way" / "results.parquet")
    pictures = load_data(f"folder:{folder / 'images'}", 8)
    known = {"data": pictures.images(pictures.split("train"))}
    known["samples"] = torch.from_numpy(Run.opened(folder / "predicted-way").arrays("block-000000")["states"])
    noise, model = diffusion_of(folder).noise(range(24), 0), rows[rows.by == "model"].set_index("measure").value
    for by, data in known.items():
        *states, latents, _ = best(folder, data, "plain")
        own = rows[rows.by == by]
        grid = own[own.distance.notna()].pivot(index="step", columns="point", values="distance").to_numpy()
        assert np.allclose(grid, interpolation_distances(states, noise.double(), latents).numpy(), rtol=1e-6)
        passed = own[own.measure.notna()].set_index("measure").value
        assert passed["nearest"] == grid[:, -1].argmin() / 20 and passed["there"] == pytest.approx(grid[:, -1].min())
        for measure in ("nearest", "there"):
            assert passed[f"beyond {measure}"] == pytest.approx(model[measure] - passed[measure])


def test_what_cannot_be_told_is_said_so(folder: Path, finished: Path) -> None:
    rows = pd.read_parquet(finished / "results.parquet")
    areas = rows.measure == "error to the noise, plain less textured areas"
    for low, high, said in (
        (0.1, 0.3, "it is the plain areas that inversion gets wrong"),
        (-0.3, -0.1, "it is the textured areas that inversion gets wrong"),
        (-0.1, 0.3, "which of them inversion gets more wrong cannot be told"),
    ):
        rows.loc[areas, ["value", "low", "high"]] = (low + high) / 2, low, high
        for area in ("plain", "textured"):
            rows.loc[rows.measure == f"error to the noise, {area} areas", "value"] = 0.5
        assert said in inversion_headline(rows)
    trips = rows.measure == "round-trip error"
    assert "The most faithful way there and back is edict;" in inversion_headline(rows)
    rows.loc[trips, ["low", "high"]] = 0.0, 1.0
    assert "which cannot be told apart" in inversion_headline(rows)

    def passed(nearest: tuple[float, float, float], nearer: tuple[float, float, float]) -> str:
        told = {"nearest": nearest, "there": (3, 3, 3), "start": (4, 4, 4), "end": (9, 9, 9), "nearer": nearer}
        frame = pd.DataFrame([(m, *v) for m, v in told.items()], columns=["measure", "value", "low", "high"])
        return trajectory_headline(frame.assign(by="model", distance=np.nan))

    assert passed((0, 0, 0), (0, 0, 0)).startswith("The way only goes away from the latent")
    assert "Whether it comes nearer at all than it starts cannot be told." in passed((0.2, 0, 0.4), (0.1, 0, 0.2))
    assert passed((0.6, 0.55, 0.65), (1, 0.9, 1.1)).endswith("and so it is here.")
    assert passed((0.4, 0.35, 0.45), (1, 0.9, 1.1)).endswith("here it is earlier than that.")
    assert passed((0.5, 0.45, 0.55), (1, 0.9, 1.1)).endswith("whether it is within cannot be told.")


@pytest.mark.slow
def test_a_trajectory_is_the_same_however_many_rows_go_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size, kept in ((64, 2**27), (3, 2**27), (64, 1)):
        monkeypatch.setattr(invert_trajectory, "KEPT", kept)  # with 1, a row at a time
        options = ["--model", "ddpm", "--steps", "5", "--n", "7", "--method", "renoised", "--device", "cpu"]
        arguments = ["invert", "trajectory", *options, "--batch-size", size, "--out", f"rows-{size}-{kept}"]
        assert probekit(*arguments, cwd=folder).returncode == 0
        found.append(pd.read_parquet(folder / f"rows-{size}-{kept}" / "results.parquet"))
        assert len(list((folder / f"rows-{size}-{kept}" / "images" / "block-000000").glob("*.png"))) == 3 * 6
    for other in found[1:]:
        pd.testing.assert_frame_equal(other, found[0], rtol=1e-5)


@pytest.mark.slow
def test_a_killed_trajectory_goes_on_with_another_batch_size_and_counts_no_row_twice(folder: Path) -> None:
    arguments = ["invert", "trajectory", "--model", "ddpm", "--steps", "10", "--n", "192", "--device", "cpu"]
    killed_once([*arguments, "--batch-size", "64"], folder, "cut", again=[*arguments, "--batch-size", "48"])
    rows = pd.read_parquet(folder / "cut" / "results.parquet")
    assert len(rows[rows.distance.notna()]) == 3 * 11 * 25 and rows.n[rows.distance.notna()].sum() == 192 * 11 * 25
    assert set(rows.n[rows.measure.notna()]) == {192}


@pytest.mark.slow
def test_a_killed_interpolation_keeps_what_it_has(folder: Path) -> None:
    arguments = ["invert", "interpolate", "--model", "ddpm", "--steps", "20", "--data", "folder:images", "--device", "cpu"]
    killed_once(arguments, folder, "cut-between")
    rows = pd.read_parquet(folder / "cut-between" / "results.parquet")
    assert list(rows.method.unique()) == ["plain", "fixed-point", "renoised", "edict"]


def test_the_remedy_s_noise_is_not_the_sample_s_own(folder: Path) -> None:
    diffusion = diffusion_of(folder)
    noise, fresh = diffusion.noise(range(64), 0), diffusion.fresh_noise(range(64), 0)
    assert torch.equal(fresh[5:], diffusion.fresh_noise(range(5, 64), 0))
    alike = torch.corrcoef(torch.cat([noise, fresh]).flatten(1)) - torch.eye(128)
    assert alike.abs().max() < 0.5  # of 192 values


@pytest.mark.slow
def test_two_images_become_each_other(folder: Path) -> None:
    options = ["--model", "ddpm", "--steps", "20", "--data", "folder:images", "--frames", "4", "--device", "cpu"]
    made = probekit("invert", "interpolate", *options, "--methods", "fixed-point,edict", "--out", "between", cwd=folder)
    assert made.returncode == 0, made.stderr
    rows = pd.read_parquet(folder / "between" / "results.parquet")
    assert list(rows.groupby("method", sort=False).size()) == [3, 3]
    assert rows[rows.method == "edict"].end_error.max() < 1e-3
    page = (folder / "between" / "report.html").read_text()
    assert page.count('<img alt="" src="data:image/png') == 2 * (4 + 2)
    shown = {path.stem for path in (folder / "between" / "images" / "edict").iterdir()}
    assert shown == {"from", "to", *(f"frame-{i}" for i in range(4))}
    two = ["invert", "trajectory", "--model", "ddpm", "--method", "plain,edict", "--out", "x"]
    assert "--method 'plain,edict'" in refused(*two, cwd=folder)
    wrong = ["invert", "interpolate", "--model", "ddpm", "--data", "folder:images", "--pictures", "0,x", "--out", "x"]
    assert "--pictures '0,x'" in refused(*wrong, cwd=folder) and not (folder / "x").exists()


@pytest.mark.slow
def test_a_trajectory_and_an_interpolation_from_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    ways: list[tuple[Any, str]] = [
        (InvertTrajectory(model="ddpm", steps=4, n=70, device="cpu"), "The paper found 50% to 70%"),
        (
            InvertInterpolate(model="ddpm", steps=4, frames=3, data="folder:images", device="cpu"),
            "Between these two images the shortest way is that of",
        ),
    ]
    for asked, said in ways:
        found = asked.run(out=f"python-{asked.name}")
        before = written(found.folder)
        assert said in found.says and "<svg" in found._repr_html_() and said in found._repr_html_()
        again = asked.run(out=f"python-{asked.name}")
        pd.testing.assert_frame_equal(again.rows, found.rows)
        assert written(found.folder) == before
        for part in (2, 1):
            sharded = asked.run(out=f"sharded-{asked.name}", shard=f"{part}/2")
        assert sharded is not None
        results = [folder / f"{how}-{asked.name}" / "results.parquet" for how in ("python", "sharded")]
        assert results[0].read_bytes() == results[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--methods", "plain,backwards"],
            "--methods 'plain,backwards': inversion 'backwards': choose plain, fixed-point, newton",
        ),
        (["--methods", "plain,plain"], "--methods 'plain,plain': 'plain' stands there twice"),
        (["--methods", ","], "--methods ',': names none"),
        (["--methods", "plain,rf-solver"], "inversion 'rf-solver': is for rectified flows, the network predicts epsilon"),
        (["--steps", "2000"], "steps 2000: choose 1 to 1000"),
        (["--steps", "20", "--renoised", "21"], "--renoised 21: there are 20 steps"),
        (["--seed", "99999999999999999"], "--seed"),
        (["--model", "random"], "makes no images from noise"),
        (["--model", "nowhere"], "nowhere"),
        (["--prompt", "a dog"], "--prompt 'a dog'"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "folder:images", "--split", "both"], "both"),
        (["--n", "3"], "--n"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(folder: Path, options: list[str], said: str) -> None:
    assert said in refused(*RUN, "--out", "bad", *options, cwd=folder)
    assert not (folder / "bad").exists()


@pytest.mark.parametrize(
    ("asked", "options", "said"),
    [
        (InvertRun, {"methods": "plain,backwards"}, "--methods 'plain,backwards': inversion 'backwards'"),
        (InvertRun, {"n": 3}, "--n 3: at least 20"),
        (InvertRun, {"n": "24"}, "--n '24': a whole number"),
        (InvertRun, {"steps": 0}, "--steps 0: at least 1"),
        (InvertInterpolate, {"steps": 20, "renoised": 21}, "--renoised 21: there are 20 steps"),
        (InvertInterpolate, {"frames": 2}, "--frames 2: at least 3"),
        (InvertTrajectory, {"method": "plain,edict"}, "--method 'plain,edict': one inversion at a time"),
        (InvertTrajectory, {"method": "backwards"}, "--method 'backwards'"),
    ],
)
def test_bad_options_are_refused_from_python_as_from_the_command_line(asked: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ProbekitError, match=re.escape(said)) as caught:
        asked(**options)
    assert "\n" not in str(caught.value)

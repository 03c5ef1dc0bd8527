from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.conftest import killed_once, probekit, refused
from tests.test_stitch import OWN

RUN = ["probe", "run", "--train", "600", "--test", "100", "--models", "./own.py:Pixels,./own.py:Rotated", "--kind", "ridge"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


@pytest.mark.slow
def test_what_can_be_read_off_a_space_survives_a_map_that_loses_nothing(folder: Path) -> None:
    done = probekit(*RUN, "--alpha", "0", "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(folder / "run" / "results.parquet")
    accuracy = rows[rows.measure == "accuracy"].groupby("target").value.mean()
    assert accuracy["./own.py:Pixels"] > 80 and abs(accuracy["random"] - 50) < 6  # pixels tell, chance does not
    match = rows[rows.measure == "match"].groupby(["source", "target"]).value.mean()
    assert match["./own.py:Pixels", "./own.py:Rotated"] > 99.9 and match["./own.py:Rotated", "./own.py:Pixels"] > 99.9
    assert match["random", "./own.py:Pixels"] < 90
    change = rows[rows.measure == "change"].groupby(["source", "target"]).value.mean()
    assert abs(change["./own.py:Pixels", "./own.py:Rotated"]) < 0.1 and change["random", "./own.py:Rotated"] < -25
    intervals = rows[rows.measure.isin(["accuracy", "match"])]
    assert ((intervals.low <= intervals.value + 1e-9) & (intervals.value <= intervals.high + 1e-9)).all()
    chance = rows[(rows.measure == "accuracy") & (rows.target == "random")]
    assert (abs(chance.value - 50) <= 4 * 50 / np.sqrt(chance.n)).all()  # every probe by itself, to four standard errors
    assert "Represented most alike" in (folder / "run" / "report.html").read_text()
    assert probekit("describe", "run", cwd=folder).returncode == 0


def test_numbers_and_classes_are_read_and_what_is_not_probed_is_said(folder: Path) -> None:
    (folder / "images").mkdir()
    draw = np.random.default_rng(0)
    lines = ["image,brightness,kind,left,seldom"]
    for i in range(80):
        light, left = int(draw.integers(40, 216)), bool(draw.integers(2))
        pixels = np.full((32, 32, 3), light, dtype=np.uint8)
        pixels[:, :16] = pixels[:, :16] // 2 if left else pixels[:, :16]
        Image.fromarray(pixels).save(folder / "images" / f"{i:02d}.png")
        lines.append(f"{i:02d}.png,{light / 255:.3f},{['dark', 'mid', 'light'][(light - 40) // 59]},{left:d},0")
    (folder / "labels.csv").write_text("\n".join(lines))
    data = ["--data", "folder:images,labels=labels.csv", "--train", "60", "--test", "20"]
    done = probekit(*RUN[:2], *RUN[6:], *data, "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(folder / "run" / "results.parquet").set_index(["target", "attribute", "measure"])
    assert rows.value["./own.py:Pixels", "brightness", "r2"] > 0.95 > 0.3 > rows.value["random", "brightness", "r2"]
    assert rows.value["./own.py:Pixels", "kind", "accuracy of classes"] > 60
    assert rows.value["./own.py:Pixels", "left", "accuracy"] > 90
    said = "seldom: 0 of 60 images are with it, 10 are needed"
    assert said in done.stdout and said in (folder / "run" / "report.html").read_text()


def test_a_run_whose_labels_are_all_too_rare_ends_with_its_reasons(folder: Path) -> None:
    done = probekit(*RUN[:2], "--train", "12", "--test", "4", *RUN[6:], "--out", "run", cwd=folder)
    assert done.returncode == 0 and "Eyeglasses: " in done.stdout, done.stderr


@pytest.mark.slow
def test_killed_and_started_again_the_result_is_that_of_an_uninterrupted_run(folder: Path) -> None:
    assert probekit(*RUN, "--out", "whole", cwd=folder).returncode == 0
    killed_once(RUN, folder, "killed")
    for name in ("results.parquet", "figures/match.svg"):
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


def test_latents_are_encoded_from_the_command_line_and_can_be_read_by_anyone(folder: Path) -> None:
    import zarr

    done = probekit("latents", "encode", "./own.py:Pixels", "--n", "150", "--out", "here", cwd=folder)
    assert done.returncode == 0 and "150 latents of 3x8x8" in done.stdout, done.stderr
    array = zarr.open_array(folder / "here" / "latents", mode="r")
    assert array.shape == (30_000, 3, 8, 8) and np.isfinite(array[20_000:20_150]).all() and np.isnan(array[0]).all()
    assert "of something else" in refused("latents", "encode", "./own.py:Rotated", "--n", "10", "--out", "here", cwd=folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kind", "forest"], "lasso, logistic, ridge"),
        (["--models", "./own.py:Painter"], "Painter cannot encode"),
        (["--alpha", "x"], "--alpha 'x'"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder: Path, options: list[str], said: str) -> None:
    assert said in refused(*RUN, "--out", "run", *options, cwd=folder)
    assert not (folder / "run").exists()

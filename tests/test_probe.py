from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from probekit import ProbekitError
from probekit.experiments.probe_run import ProbeRun
from probekit.latents.probes import Probes
from probekit.models import load_space
from tests.conftest import killed_once, probekit, refused
from tests.test_stitch import OWN

TWO = "./own.py:Pixels,./own.py:Rotated"
RUN = ["probe", "run", "--train", "600", "--test", "100", "--models", "./own.py:Pixels,./own.py:Rotated", "--kind", "ridge"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_what_can_be_read_off_a_space_survives_a_map_that_loses_nothing(folder: Path) -> None:
    done = probekit(*RUN, "--alpha", "0", "--out", "run")
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
    page = (folder / "run" / "report.html").read_text()
    assert "Attributes: represented most alike" in page and "Classes" not in page
    assert "Attributes are read best from" in done.stdout
    (folder / "run" / "report.html").unlink()
    assert probekit("describe", "run").returncode == 0
    again = (folder / "run" / "report.html").read_text()
    assert again == page


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
    done = probekit(*RUN[:2], *RUN[6:], *data, "--out", "run")
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(folder / "run" / "results.parquet").set_index(["target", "attribute", "measure"])
    assert rows.value["./own.py:Pixels", "brightness", "r2"] > 0.95 > 0.3 > rows.value["random", "brightness", "r2"]
    kinds = rows.loc["./own.py:Pixels", "kind", "accuracy of classes"]
    assert kinds.value > 60 and kinds.low < kinds.value <= kinds.high
    assert rows.value["./own.py:Pixels", "kind", "accuracy of classes, baseline"] < 60
    assert rows.value["./own.py:Pixels", "left", "accuracy"] > 90
    said = "seldom: 0 of 60 images are with it, 10 are needed"
    page = (folder / "run" / "report.html").read_text()
    assert said in done.stdout and said in page and "Numbers, by R²" in page
    assert {p.name for p in (folder / "run" / "figures").glob("*.svg")} == {
        "accuracy.svg",
        "match.svg",
        "change.svg",
        "classes.svg",
        "match-classes.svg",
        "change-classes.svg",
    }


@pytest.mark.slow
def test_classes_are_mapped_too_and_captions_are_probed_as_pictures_are(folder: Path, tiny_sd: Any) -> None:
    tiny_sd.save_pretrained(folder / "sd")
    models = f"./sd:text,{TWO}"
    found = ProbeRun(models=models, data="scenes", train=600, test=100, device="cpu", alpha="0").run(out="run")
    text, pixels, rotated = models.split(",")
    labels = ["place", "size", "kind", "colour", "ground", "texture"]
    own = found.rows[found.rows.source == ""].set_index(["target", "attribute", "measure"])
    for label in labels:
        chance = own.value[pixels, label, "accuracy of classes, baseline"]
        of_random = own.loc["random", label, "accuracy of classes"]
        assert of_random.low - 5 < chance < of_random.high + 5, label
        # random weights, but a caption's words are in its embeddings one by one
        assert own.value[text, label, "accuracy of classes"] > chance + 20, label
    assert own.value[pixels, "ground", "accuracy of classes"] > 90
    between = found.rows[found.rows.source != ""].set_index(["source", "target", "attribute", "measure"])
    assert set(between.n) == {100}
    for label in labels:
        assert between.value[pixels, rotated, label, "match"] > 97 and abs(between.value[pixels, rotated, label, "change"]) < 4
        assert between.value["random", rotated, label, "match"] < 80
    assert between.value["random", rotated, "ground", "change"] < -60
    assert between.value[text, pixels, "ground", "match"] > between.value["random", pixels, "ground", "match"] + 20
    page = (folder / "run" / "report.html").read_text()
    assert "Classes: how many are read right" in page and "Attributes" not in page.split("<h2>")[1]
    assert "Classes are read best from" in found.says and "<svg" in found._repr_html_()
    assert {p.name for p in (folder / "run" / "figures").glob("*.svg")} == {
        "classes.svg",
        "match-classes.svg",
        "change-classes.svg",
    }


@pytest.mark.slow
def test_probes_are_kept_in_the_run_s_folder(folder: Path) -> None:
    found = ProbeRun(models=TWO, train=600, test=100, kind="ridge").run(out="run")
    probes = Probes.of_arrays(found.run.arrays("probes-./own.py:Pixels"))
    rows = found.rows[(found.rows.target == "./own.py:Pixels") & (found.rows.measure == "accuracy")]
    assert rows.attribute.tolist() == probes.attributes
    assert rows.value.tolist() == pytest.approx((100 * probes.scores.accuracy).tolist())
    from probekit.data import load_data

    data, space = load_data("avatars", 32), load_space("./own.py:Pixels")
    numbers = data.split("test")[-100:]
    said = probes.predict(space.encode(data.images(numbers)).flatten(1).numpy())
    assert np.array_equal(said, found.run.arrays("probes-./own.py:Pixels")["said"])


def test_a_run_whose_labels_are_all_too_rare_ends_with_its_reasons(folder: Path) -> None:
    done = probekit(*RUN[:2], "--train", "12", "--test", "4", *RUN[6:], "--out", "run")
    assert done.returncode == 0 and "Eyeglasses: " in done.stdout, done.stderr


@pytest.mark.slow
def test_killed_and_started_again_the_result_is_that_of_an_uninterrupted_run(folder: Path) -> None:
    assert probekit(*RUN, "--out", "whole").returncode == 0
    killed_once(RUN, folder, "killed")
    for name in ("results.parquet", "figures/match.svg"):
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


def test_latents_are_encoded_from_the_command_line_and_can_be_read_by_anyone(folder: Path) -> None:
    import zarr

    done = probekit("latents", "encode", "./own.py:Pixels", "--n", "150", "--out", "here")
    assert done.returncode == 0 and "150 latents of 3x8x8" in done.stdout, done.stderr
    array = zarr.open_array(folder / "here" / "latents", mode="r")
    assert array.shape == (30_000, 3, 8, 8) and np.isfinite(array[20_000:20_150]).all() and np.isnan(array[0]).all()
    assert "of something else" in refused("latents", "encode", "./own.py:Rotated", "--n", "10", "--out", "here")


@pytest.mark.slow
def test_python_gets_the_findings_and_the_same_again_for_nothing(folder: Path) -> None:
    probe = ProbeRun(models=TWO, train=300, test=50, kind="ridge")
    found = probe.run(out="run")
    assert "Attributes are read best from" in found.says and "own.py:Rotated" in found._repr_html_()
    units = {path: path.stat().st_mtime_ns for path in (folder / "run" / "units").iterdir()}
    again = ProbeRun(models=TWO, train=300, test=50, kind="ridge").run(out="run")
    assert again.rows.equals(found.rows)
    assert {path: path.stat().st_mtime_ns for path in (folder / "run" / "units").iterdir()} == units
    for wrong, said in (
        ({"kind": "forest"}, "--kind 'forest'"),
        ({"test": 1}, "--test 1: at least 2"),
        ({"alpha": "x"}, "--alpha 'x'"),
    ):
        with pytest.raises(ProbekitError, match=said):
            ProbeRun(**wrong)


@pytest.mark.slow
def test_shards_in_any_order_give_the_results_of_one_run(folder: Path) -> None:
    probe = ProbeRun(models=TWO, train=300, test=50, kind="ridge")
    probe.run(out="whole")
    assert probe.run(out="parts", shard="3/3") is None and probe.run(out="parts", shard="1/3") is None
    assert probe.run(out="parts", shard="2/3") is not None
    for name in ("results.parquet", "figures/match.svg"):
        assert (folder / "parts" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kind", "forest"], "lasso, logistic, ridge"),
        (["--models", "./own.py:Painter"], "Painter cannot encode"),
        (["--alpha", "x"], "--alpha 'x'"),
        (["--data", "folder:bare"], "has no labels to probe for"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder: Path, options: list[str], said: str) -> None:
    (folder / "bare").mkdir()
    for i in range(720):
        (folder / "bare" / f"{i}.png").write_bytes(b"")
    assert said in refused(*RUN, "--out", "run", *options)
    assert not (folder / "run").exists()

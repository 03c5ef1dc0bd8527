from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.test_cli import OFFLINE, PROBEKIT, probekit
from tests.test_stitch import OWN

RUN = ["probe", "run", "--train", "600", "--test", "100", "--models", "./own.py:Pixels,./own.py:Rotated", "--kind", "ridge"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


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
    assert ((rows.low <= rows.value + 1e-9) & (rows.value <= rows.high + 1e-9))[rows.measure != "change"].all()
    assert "Represented most alike" in (folder / "run" / "report.html").read_text()
    assert probekit("describe", "run", cwd=folder).returncode == 0


def test_killed_and_started_again_the_result_is_that_of_an_uninterrupted_run(folder: Path) -> None:
    assert probekit(*RUN, "--out", "whole", cwd=folder).returncode == 0
    process = subprocess.Popen([*PROBEKIT, *RUN, "--out", "killed"], env=OFFLINE, cwd=folder, stdout=subprocess.DEVNULL)
    units = folder / "killed" / "units"
    while process.poll() is None and not (units.exists() and any(units.glob("probes-*.parquet"))):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "killed" / "results.parquet").exists(), "it was over before it could be killed"
    finished = {p: p.stat().st_mtime_ns for p in (folder / "killed" / "probes").glob("*.npz")}
    assert finished
    assert probekit(*RUN, "--out", "killed", cwd=folder).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    for name in ("results.parquet", "figures/match.svg"):
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


def test_latents_are_encoded_from_the_command_line_and_can_be_read_by_anyone(folder: Path) -> None:
    import zarr

    done = probekit("latents", "encode", "./own.py:Pixels", "--n", "150", "--out", "here", cwd=folder)
    assert done.returncode == 0 and "150 latents of 3x8x8" in done.stdout, done.stderr
    array = zarr.open_array(folder / "here" / "latents", mode="r")
    assert array.shape == (30_000, 3, 8, 8) and np.isfinite(array[20_000:20_150]).all() and np.isnan(array[0]).all()
    refused = probekit("latents", "encode", "./own.py:Rotated", "--n", "10", "--out", "here", cwd=folder)
    assert refused.returncode == 2 and "of something else" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kind", "forest"], "lasso, logistic, ridge"),
        (["--models", "./own.py:Painter"], "Painter cannot encode"),
        (["--alpha", "x"], "--alpha 'x'"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder: Path, options: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer
    from probekit.experiments.probe import app

    from probekit.errors import ProbekitError

    monkeypatch.chdir(folder)
    with pytest.raises(ProbekitError) as error:
        typer.main.get_command(app)([*RUN[2:], "--out", "run", *options], standalone_mode=False)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "run").exists()

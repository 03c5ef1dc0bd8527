"""A run's folder: whole units or none, its config, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import probekit
from probekit import ProbekitError
from probekit.experiments.noise_map_run import NoiseMapRun
from probekit.images import as_pictures, load_png, save_png
from probekit.runs.experiment import Work
from probekit.runs.folder import FORM, Run, Stacked

ROWS = pd.DataFrame({"pair": ["a"], "transfer": [0.5]})
PICTURES = {"O": torch.zeros(3, 4, 4)}
WORK = Work(rows=ROWS, pictures=PICTURES, arrays={"noise": np.arange(6.0).reshape(2, 3)})


def said(error: pytest.ExceptionInfo[ProbekitError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- units -------------------------------------------------------------------------------------------------------------


def test_a_unit_is_finished_once_it_is_whole_and_results_come_in_the_order_asked(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "inject-sweep", {"seed": 0}, {"model_digest": "abc"}, ["probekit"])
    assert not run.finished("b")
    run.write("b", Work(rows=ROWS.assign(pair="b"), pictures=PICTURES))
    run.write("a", WORK)
    assert run.finished("a") and run.finished("b")
    with pytest.raises(ProbekitError, match="not finished \\(2 units are\\)"):
        Run.opened(tmp_path / "run").results()
    assert run.collect(["a", "b"]).pair.tolist() == ["a", "b"]
    opened = Run.opened(tmp_path / "run")
    assert opened.config == run.config
    assert (opened.config["options"], opened.config["inputs"]) == ({"seed": 0}, {"model_digest": "abc"})
    assert opened.results().pair.tolist() == ["a", "b"]


def test_rows_may_be_dictionaries_and_a_unit_may_have_none(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "noise-map-run", {})
    run.write("one", Work(rows=[{"x": 1}, {"x": 2}]))
    run.write("none", Work(arrays={"states": np.zeros((2, 3))}))
    assert run.finished("none") and run.collect(["none", "one"]).x.tolist() == [1, 2]
    empty = Run(tmp_path / "empty", "noise-map-run", {})
    empty.write("none", Work())
    assert empty.collect(["none"]).empty and not (tmp_path / "empty" / "results.parquet").exists()


def test_names_of_units_are_file_names_only_on_the_disk(tmp_path: Path) -> None:
    run, name = Run(tmp_path / "run", "stitch-run", {}), "encode avatar-ddpm:h:t=500 of ../avatars"
    run.write(name, WORK)
    assert run.finished(name) and not run.finished("encode avatar-ddpm:h:t=501 of ../avatars")
    assert run.arrays(name)["noise"].tolist() == WORK.arrays["noise"].tolist()
    assert run.array(name, "noise").exists() and run.picture(name, "O").exists()
    assert {path.parent.parent for path in files(tmp_path) if path.suffix == ".png"} == {tmp_path / "run" / "images"}


def test_what_a_kill_leaves_of_a_unit_does_not_count_and_is_replaced(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "inject-sweep", {})
    for part in ("images", "states"):
        (run.folder / part / "a.0123456789ab.partial").mkdir()
        (run.folder / part / "a").mkdir()
    (run.folder / "images" / "a" / "stale.png").write_bytes(b"half")
    (run.folder / "states" / "a" / "stale.npy").write_bytes(b"half")
    (run.folder / "units" / "a.parquet.0123456789ab.partial").write_bytes(b"half")
    (run.folder / "mine.partial").write_bytes(b"of somebody else")
    assert not run.finished("a")
    run.write("a", WORK)
    assert run.finished("a")
    assert [p.name for p in (run.folder / "images" / "a").iterdir()] == ["O.png"]
    assert list(run.arrays("a")) == ["noise"]
    with run.held(shared=False):
        pass
    assert list(run.folder.rglob("*.partial")) == [run.folder / "mine.partial"] and not (run.folder / "locks").exists()


def test_a_unit_that_another_process_has_done_keeps_its_rows(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "inject-sweep", {})
    run.write("a", WORK)
    before = (run.folder / "units" / "a.parquet").stat().st_mtime_ns
    Run(tmp_path / "run", "inject-sweep", {}).write("a", WORK)
    assert (run.folder / "units" / "a.parquet").stat().st_mtime_ns == before
    assert run.rows(["a"]).equals(ROWS)


def test_arrays_are_read_from_the_disk_and_writing_to_them_changes_nothing_there(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "noise-map-run", {})
    run.write("a", WORK)
    held = run.arrays("a")["noise"]
    assert isinstance(held, np.memmap)
    held[:] = -1
    assert run.arrays("a")["noise"].tolist() == WORK.arrays["noise"].tolist()
    file = run.array("a", "noise")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ProbekitError, match="the arrays of 'a' are damaged; the same command makes them again") as error:
        run.arrays("a")
    said(error)


def test_arrays_of_several_units_are_one_of_which_slices_are_read(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "noise-map-run", {})
    whole = np.arange(21.0).reshape(7, 3)
    for name, rows in {"a": whole[:2], "b": whole[2:3], "c": whole[3:]}.items():
        run.write(name, Work(arrays={"states": rows}))
    stacked = Stacked([run.array(name, "states") for name in "abc"])
    assert (len(stacked), stacked.shape, stacked.dtype, stacked.ndim) == (7, (7, 3), whole.dtype, 2)
    for rows in (slice(0, 7), slice(1, 4), slice(2, 3), slice(5, 50), slice(-2, None), slice(4, 4)):
        assert np.array_equal(stacked[rows], whole[rows]), rows
    assert np.array_equal(stacked[3], whole[3])
    run.write("d", Work(arrays={"states": np.zeros((1, 4))}))
    with pytest.raises(ProbekitError, match=r"rows \(4,\) of float64, not \(3,\) of float64") as error:
        Stacked([run.array(name, "states") for name in "ad"])
    said(error)
    with pytest.raises(ProbekitError, match="is damaged or missing; the same command makes it again") as error:
        Stacked([run.array("e", "states")])
    said(error)


# --- configs -----------------------------------------------------------------------------------------------------------


def test_another_config_is_refused_by_the_names_that_differ_and_nothing_is_touched(tmp_path: Path) -> None:
    Run(tmp_path / "run", "inject-sweep", {"seed": 0, "pairs": (1, 2)}, {"digest": "a"}, ["probekit"])
    # a list is as good as a tuple, and how it was started counts for nothing
    Run(tmp_path / "run", "inject-sweep", {"seed": 0, "pairs": [1, 2]}, {"digest": "a"}, ["probekit", "again"])
    before = files(tmp_path)
    others: list[tuple[str, str, dict[str, Any], dict[str, str]]] = [
        ("seed 0 there, 1 here", "inject-sweep", {"seed": 1, "pairs": (1, 2)}, {"digest": "a"}),
        ("digest 'a' there, 'b' here", "inject-sweep", {"seed": 0, "pairs": (1, 2)}, {"digest": "b"}),
        ("experiment 'inject-sweep' there, 'stitch-run' here", "stitch-run", {"seed": 0, "pairs": (1, 2)}, {"digest": "a"}),
        ("pairs .* there, None here", "inject-sweep", {"seed": 0}, {"digest": "a"}),
    ]
    for message, experiment, options, inputs in others:
        with pytest.raises(ProbekitError, match=message) as error:
            Run(tmp_path / "run", experiment, options, inputs)
        assert "name another folder" in said(error)
    assert files(tmp_path) == before


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(ProbekitError, match="is no run folder"):
        Run(tmp_path / "mine", "inject-sweep", {})
    with pytest.raises(ProbekitError, match="is no run folder"):
        Run(tmp_path / "mine" / "thesis.txt", "inject-sweep", {})
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(ProbekitError, match=r"no config\.json"):
        Run.opened(tmp_path / "nowhere")
    with pytest.raises(ProbekitError, match="cannot be written"):
        Run(tmp_path / "mine" / "thesis.txt" / "run", "inject-sweep", {})


def test_a_config_that_is_damaged_or_of_another_form_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "inject-sweep", {"seed": 0})
    file = run.folder / "config.json"
    whole = file.read_bytes()
    for content in (
        b"{",
        b"[]",
        b"3",
        b"{}",
        b"",
        bytes(len(whole)),
        json.dumps(run.config | {"options": None}).encode(),
        whole.replace(b'"seed": 0', b'"seed": 1'),
        json.dumps({"form": FORM}).encode(),
        b"[" * 100_000,
        b'{"form": ' + b"[" * 100_000,
        "\ud800".encode(errors="surrogatepass"),
    ):
        file.write_bytes(content)
        for use in (lambda: Run.opened(run.folder), lambda: Run(run.folder, "inject-sweep", {"seed": 0})):
            with pytest.raises(ProbekitError, match=r"config\.json is damaged") as error:
                use()
            said(error)
    for form, told in (({"form": 1}, "form 1"), ({}, "form 1"), ({"form": 2}, "form 2"), ({"form": 7}, "form 7")):
        old = {key: value for key, value in run.config.items() if key != "form"} | form
        file.write_text(json.dumps(old))
        for use in (lambda: Run.opened(run.folder), lambda: Run(run.folder, "inject-sweep", {"seed": 0})):
            with pytest.raises(ProbekitError, match=f"in {told}, this one reads form {FORM}; run it again elsewhere") as error:
                use()
            assert probekit.__version__ in said(error)


def test_results_that_are_damaged_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "inject-sweep", {})
    run.write("a", WORK)
    run.collect(["a"])
    (run.folder / "results.parquet").write_bytes(b"PAR1")
    with pytest.raises(ProbekitError, match=r"results\.parquet is damaged; the same command makes it again") as error:
        run.results()
    said(error)


def test_the_same_options_and_inputs_find_the_same_folder() -> None:
    folder = NoiseMapRun(seed=1).default_folder({"a": 1, "b": 2})
    assert folder.parts[:2] == ("runs", "noise-map-run") and folder.name.startswith("avatar-ddpm-")
    assert folder == NoiseMapRun(seed=1, batch_size=3).default_folder({"b": 2, "a": 1})
    assert folder != NoiseMapRun(seed=2).default_folder({"a": 1, "b": 2})
    assert folder != NoiseMapRun(seed=1).default_folder({"a": 1, "b": 3})


# --- pictures ----------------------------------------------------------------------------------------------------------


def test_a_picture_comes_back_from_png_to_half_a_grey_level(tmp_path: Path) -> None:
    image = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_png(image, tmp_path / "p.png")
    assert (load_png(tmp_path / "p.png") - image).abs().max() <= 1 / 255 + 1e-6


def test_states_of_any_shape_are_shown_as_pictures() -> None:
    states = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(as_pictures(states), (states[:, :3] / 3).clamp(-1, 1))
    assert torch.equal(as_pictures(states[:, :1]), (states[:, [0, 0, 0]] / 3).clamp(-1, 1))
    # tokens of 2x2 latents, row by row
    tokens = torch.arange(2 * 9 * 16.0).reshape(2, 9, 16) / 1000
    assert torch.equal(as_pictures(tokens)[1, 2, 1], tokens[1, 3:6, 2] / 3)

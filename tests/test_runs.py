from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from probekit import ProbekitError
from probekit.images import load_png, save_png
from probekit.runs import Run, default_folder, open_run

ROWS = pd.DataFrame({"pair": ["a"], "transfer": [0.5]})
PICTURES = {"O": torch.zeros(3, 4, 4)}


def test_a_unit_is_finished_once_it_is_whole_and_results_come_in_the_order_asked(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "inject-sweep", {"seed": 0}, ["probekit"])
    assert not run.finished("b")
    run.write("b", ROWS.assign(pair="b"), PICTURES)
    run.write("a", ROWS, PICTURES)
    assert run.finished("a") and run.finished("b")
    with pytest.raises(ProbekitError, match="not finished \\(2 units are\\)"):
        open_run(tmp_path / "run")
    assert run.collect(["a", "b"]).pair.tolist() == ["a", "b"]
    config, rows = open_run(tmp_path / "run")
    assert config["options"] == {"seed": 0} and rows.pair.tolist() == ["a", "b"]


def test_what_a_kill_leaves_of_a_unit_does_not_count_and_is_replaced(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "inject-sweep", {}, ["probekit"])
    (run.folder / "images" / "a.partial").mkdir()
    (run.folder / "images" / "a").mkdir()
    (run.folder / "images" / "a" / "stale.png").write_bytes(b"half")
    (run.folder / "units" / "a.parquet.partial").write_bytes(b"half")
    assert not run.finished("a")
    run.write("a", ROWS, PICTURES)
    assert run.finished("a")
    assert [p.name for p in (run.folder / "images" / "a").iterdir()] == ["O.png"]


def test_another_config_is_refused_by_the_names_that_differ_and_nothing_is_touched(tmp_path: Path) -> None:
    Run(tmp_path / "run", "inject-sweep", {"seed": 0, "pairs": (1, 2)}, ["probekit"])
    Run(tmp_path / "run", "inject-sweep", {"seed": 0, "pairs": [1, 2]}, ["probekit", "again"])
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(ProbekitError, match="seed 0 there, 1 here"):
        Run(tmp_path / "run", "inject-sweep", {"seed": 1, "pairs": (1, 2)}, ["probekit"])
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(ProbekitError, match="is no run folder"):
        Run(tmp_path / "mine", "inject-sweep", {}, ["probekit"])
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(ProbekitError, match=r"no config\.json"):
        open_run(tmp_path / "nowhere")
    (tmp_path / "mine" / "config.json").write_text("{")
    with pytest.raises(ProbekitError, match="damaged"):
        open_run(tmp_path / "mine")
    with pytest.raises(ProbekitError, match="cannot be written"):
        Run(tmp_path / "mine" / "thesis.txt" / "run", "inject-sweep", {}, ["probekit"])


def test_the_same_options_find_the_same_folder() -> None:
    assert default_folder("inject-sweep", "m", {"a": 1, "b": 2}) == default_folder("inject-sweep", "m", {"b": 2, "a": 1})
    assert default_folder("inject-sweep", "m", {"a": 1}) != default_folder("inject-sweep", "m", {"a": 2})


def test_a_picture_comes_back_from_png_to_half_a_grey_level(tmp_path: Path) -> None:
    image = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_png(image, tmp_path / "p.png")
    assert (load_png(tmp_path / "p.png") - image).abs().max() <= 1 / 255 + 1e-6


def test_a_file_of_states_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "noise-map-run", {}, ["probekit"])
    made: list[range] = []

    def make(rows: range) -> torch.Tensor:
        made.append(rows)
        return torch.arange(rows.start, rows.stop).float()[:, None].expand(-1, 5)

    first = run.states("noise", 100, (5,), make, lambda rows: None)
    assert run.states("noise", 100, (5,), make, lambda rows: None).tolist() == first.tolist()
    assert made == [range(64), range(64, 100)]  # nothing twice
    file = tmp_path / "run" / "states" / "noise.npy"
    file.write_bytes(file.read_bytes()[:1000])
    assert run.states("noise", 100, (5,), make, lambda rows: None)[:, 4].tolist() == list(range(100))
    assert made[2:] == [range(64), range(64, 100)]

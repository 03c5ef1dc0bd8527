"""What is the same when an experiment is run again: byte for byte, or by how much it differs."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.hardening.conftest import COMMANDS, EXPERIMENTS, made, room
from tests.hardening.warmed import Warmed

BATCHED = ("dynamics-diffusion", "inject-sweep", "invert-run", "invert-trajectory", "noise-map-run", "probe-layers")
"""Those with a --batch-size."""
RESULTS = "out/results.parquet"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_same_command_gives_the_same_bytes_and_what_else_it_depends_on_is_measured(
    name: str, place: Path, warmed: Warmed, tmp_path: Path
) -> None:
    command = COMMANDS[name]
    first = done(warmed, command, room(place, tmp_path / "first"))
    assert done(warmed, command, room(place, tmp_path / "again" / "and further down")) == first
    elsewhere = room(place, tmp_path / "elsewhere")
    assert renamed(done(warmed, [*command[:-1], "of that/other name"], elsewhere), "of that/other name") == first
    told = [name, "the same bytes"]
    if name in BATCHED:
        told.append(apart(done(warmed, [*command, "--batch-size", "7"], room(place, tmp_path / "batch")), first))
    else:
        told.append("-")
    told.append(apart(done(warmed, command, room(place, tmp_path / "threads"), threads=2), first))
    table = Path("build/hardening")
    table.mkdir(parents=True, exist_ok=True)
    (table / f"{name}.md").write_text(f"| {' | '.join(told)} |\n")


def done(warmed: Warmed, command: list[str], here: Path, *, threads: int = 1) -> dict[str, bytes]:
    ended = warmed.run(command, here, threads=threads)
    assert ended.code == 0, ended.said
    folder = command[command.index("--out") + 1]
    files = {str(path.relative_to(here)): path.read_bytes() for path in (here / folder).rglob("*") if path.is_file()}
    return made(here) | files


def renamed(files: Mapping[str, bytes], folder: str) -> dict[str, bytes]:
    return {file.replace(folder, "out", 1): content for file, content in files.items()}


def apart(files: Mapping[str, bytes], first: Mapping[str, bytes]) -> str:
    """What differs, in words; of the results, by how much of the largest number in their column."""
    assert files.keys() == first.keys()
    others = [file for file in files if files[file] != first[file]]
    if not others:
        return "the same bytes"
    one, other = (pd.read_parquet(io.BytesIO(content[RESULTS])) for content in (first, files))
    assert one.select_dtypes(exclude="number").equals(other.select_dtypes(exclude="number"))
    farthest = 0.0
    for column in one.select_dtypes("number"):
        a, b = (frame[column].to_numpy(np.float64) for frame in (one, other))
        there = np.isfinite(a)
        assert np.array_equal(there, np.isfinite(b)), column
        if error := np.abs(a - b)[there].max(initial=0):
            farthest = max(farthest, error / np.abs(a[there]).max())
    units = [file for file in files if file.startswith("out/units")]
    return f"{len(set(units) & set(others))} of {len(units)} units, {farthest:.0e}" if farthest else "the same results"

"""Killed 200 times, at random moments, while writing, at the end and again and again: nothing is lost, doubled or different."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hardening.conftest import COMMANDS, made, room
from tests.hardening.warmed import Ended, Warmed

SEED = int(os.environ.get("HARDEN_SEED", "0"))


@dataclass(frozen=True)
class Kill:
    """When: after a share of the time that the command takes, or before a share of its changes of what lies on the disk."""

    by: str
    share: float


def plan(name: str) -> list[list[Kill]]:
    """How a command is killed: each list is one run, killed so often before it may come to its end."""
    draw = random.Random(f"{SEED} {name}")
    moment, writing = (lambda: Kill("time", draw.uniform(0, 0.95))), (lambda: Kill("change", draw.uniform(0, 1)))
    first, last = Kill("change", draw.uniform(0, 0.06)), Kill("change", draw.uniform(0.94, 1))
    if name.startswith("train-"):
        return [[moment()], [writing()], [last], [writing(), moment()]]
    return [[moment()], [moment()], [first], [writing()], [last], [moment(), writing(), writing(), moment()]]


def test_there_are_200_of_them() -> None:
    assert sum(len(kills) for name in COMMANDS for kills in plan(name)) >= 200


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_lost_doubled_or_different(name: str, place: Path, warmed: Warmed, tmp_path: Path) -> None:
    whole = room(place, tmp_path / "whole")
    uninterrupted = warmed.run(COMMANDS[name], whole)
    assert uninterrupted.code == 0, uninterrupted.said
    expected = made(whole)
    for number, kills in enumerate(plan(name)):
        here = room(place, tmp_path / f"killed-{number}")
        kept: dict[Path, int] = {}
        for kill in kills:
            struck(warmed, name, here, kill, uninterrupted)
            check(kept)
            kept = finished(here)
        again = warmed.run(COMMANDS[name], here)
        told = f"{name}, killed at {kills}: {again.said}"
        assert again.code == 0, told
        check(kept)
        assert made(here).keys() == expected.keys(), told
        assert [file for file, content in made(here).items() if content != expected[file]] == [], told
        assert not list((here / "out").rglob("*.partial")) and not list((here / "runs").rglob("*.partial")), told


def struck(warmed: Warmed, name: str, here: Path, kill: Kill, whole: Ended) -> None:
    """Kill a command. One that has come to its end before is started again, and killed as it begins."""
    if kill.by == "time":
        ended = warmed.run(COMMANDS[name], here, seconds=kill.share * whole.seconds)
    else:
        ended = warmed.run(COMMANDS[name], here, change=1 + round(kill.share * (whole.changes - 1)))
    if ended.code == 0:
        ended = warmed.run(COMMANDS[name], here, change=1)
    assert ended.code == -9, f"{name}, {kill}: {ended}"


def finished(here: Path) -> dict[Path, int]:
    """The marks of what is finished, and when it was."""
    marks = [*(here / "out" / "units").glob("*.parquet"), *here.glob("**/labels/*.parquet")]
    return {mark: mark.stat().st_mtime_ns for mark in marks}


def check(kept: dict[Path, int]) -> None:
    """What was finished has not been done again."""
    assert {mark: mark.stat().st_mtime_ns for mark in kept} == kept

"""Files of runs, stores and trainings damaged in more than 100 ways: each is made again and said, or refused in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from probekit.checksums import sealed, unsealed
from tests.hardening.conftest import COMMANDS, made, room
from tests.hardening.warmed import Ended, Warmed

SEED = int(os.environ.get("HARDEN_SEED", "0"))
Damage = Callable[[bytes, random.Random], bytes]


def flip(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def options(value: object) -> Damage:
    """A config whose options are something else, and whose checksum is right."""
    return lambda content, _: sealed(unsealed(content) | {"options": value})


ANY: dict[str, Damage] = {
    "a flipped bit": flip,
    "another flipped bit": flip,
    "emptied": lambda content, _: b"",
    "cut short": lambda content, draw: content[: draw.randrange(1, len(content))],
    "zeroed": lambda content, _: bytes(len(content)),
    "noise": lambda content, draw: draw.randbytes(len(content)),
    "grown": lambda content, draw: content + draw.randbytes(64),
}
DEEP: dict[str, Damage] = {
    "nested 100,000 deep": lambda content, _: b"[" * 100_000,
    "a list": lambda content, _: b"[]",
    "nothing in it": lambda content, _: b"{}",
}
OPTIONS: dict[str, Damage] = {
    "options a list": options([1, 2]),
    "options null": options(None),
    "options text": options("n = 2"),
    "options of other kinds": options({"model": ["x"], "n": {}, "seed": "zero"}),
}
# what is damaged, of which command, and how
CASES: dict[str, tuple[str, str, dict[str, Damage]]] = {
    "a config": ("inject-sweep", "out/config.json", ANY | DEEP | OPTIONS),
    "a unit": ("inject-sweep", "out/units/*.parquet", ANY),
    "a picture": ("inject-sweep", "out/images/*/O.png", ANY),
    "the checksums of a unit": ("inject-sweep", "out/checksums/unit-*.json", ANY | DEEP),
    "results": ("inject-sweep", "out/results.parquet", ANY),
    "the checksum of results": ("inject-sweep", "out/checksums/results.json", ANY | DEEP),
    "a figure": ("inject-sweep", "out/figures/*.svg", ANY),
    "a report": ("inject-sweep", "out/report.html", ANY),
    "a state": ("noise-map-run", "out/states/*/states.npy", ANY),
    "a state's header": (
        "noise-map-run",
        "out/states/*/noise.npy",
        {"a garbled header": lambda c, _: c[:20] + b"?" * 60 + c[80:]},
    ),
    "labels": ("latents-encode", "out/labels/*.parquet", ANY),
    "latents": ("latents-encode", "out/latents/c/1/0/0/0", ANY),
    "the array's header": ("latents-encode", "out/latents/zarr.json", ANY | DEEP),
    "where latents come from": ("latents-encode", "out/provenance.json", ANY | DEEP),
    "the checksums of a block": ("latents-encode", "out/checksums/*.json", ANY | DEEP),
    "a training": ("train-avatar-vae", "training/avatar-vae.pt", ANY),
}
GONE = ("missing", "a folder")


def test_there_are_100_of_them() -> None:
    assert sum(len(damages) + len(GONE) for _, _, damages in CASES.values()) >= 100


@pytest.fixture(scope="session")
def whole(place: Path, warmed: Warmed, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a command has been run to its end."""
    rooms: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in rooms:
            rooms[name] = room(place, tmp_path_factory.mktemp("whole") / name)
            ended = warmed.run(COMMANDS[name], rooms[name])
            assert ended.code == 0, ended.said
        return rooms[name]

    return of


@pytest.mark.parametrize("what", CASES)
def test_what_is_damaged_is_made_again_or_refused(
    what: str, place: Path, warmed: Warmed, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    name, pattern, damages = CASES[what]
    original = whole(name)
    before, draw = made(original), random.Random(f"{SEED} {what}")
    said = warmed.run(["describe", "out"], original).said if (original / "out" / "results.parquet").exists() else ""
    for number, how in enumerate([*damages, *GONE]):
        here = room(place, tmp_path / str(number))
        for part in ("out", "runs", "training"):
            if (original / part).exists():
                shutil.copytree(original / part, here / part)
        file = sorted(here.glob(pattern))[-1]
        content = file.read_bytes()
        if how in damages:
            file.write_bytes(damages[how](content, draw))
        else:
            file.unlink()
            if how == "a folder":
                (file / "inside").mkdir(parents=True)
        damaged, told = made(here), f"{what}, {how}"
        if said:  # reading alone changes nothing but the page
            shown = warmed.run(["describe", "out"], here)
            assert refused(shown) or (shown.code == 0 and shown.said == said), f"{told}: {shown}"
        again = warmed.run(COMMANDS[name], here)
        if refused(again):
            kept = made(here)
            assert all(kept[place] == damaged[place] for place in damaged if "units" in place or "states" in place), told
        else:
            assert again.code == 0, f"{told}: {again}"
            assert {place: content for place, content in made(here).items() if before.get(place) != content} == {}, told
            assert made(here).keys() == before.keys(), told
        shutil.rmtree(here)


def refused(ended: Ended) -> bool:
    lines = [line for line in ended.said.splitlines() if line.strip()]
    return ended.code == 2 and len(lines) == 1 and lines[0].startswith("probekit: ")


def test_what_json_says_is_what_was_sealed() -> None:
    content = {"a": [1, 2.5, None], "b": {"c": "é\n"}}
    assert unsealed(sealed(content)) == json.loads(json.dumps(content))

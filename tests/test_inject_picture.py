"""Custom injections: what is asked, what came over in words, and a run that goes on, in shards, and is shown again."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from probekit import ProbekitError
from probekit.data.scenes import FACTORS, VALUES, Scene
from probekit.experiments import InjectImage
from probekit.experiments.inject_picture import read_mask
from probekit.images import load_png
from probekit.report import picture as report
from tests.conftest import killed_once, probekit, refused

MOON = "a small white moon at the right on a dotted green ground"
FISH = "a large red fish at the top left on a striped purple ground"
CAPTIONS = ["--prompt-original", MOON, "--prompt-edit", FISH, "--num-steps", 2]


def read(original: Scene, edit: Scene, seen: Scene) -> pd.DataFrame:
    """The rows of a picture that the reader reads so."""
    rows = []
    for attribute in VALUES:
        values = {"original": getattr(original, attribute), "edit": getattr(edit, attribute), "seen": getattr(seen, attribute)}
        rows.append({"descriptor": "reader", "attribute": attribute, "transfer": math.nan, "damage": math.nan} | values)
    whole = {"descriptor": "lpips", "attribute": "", "transfer": 0.25, "damage": 0.1} | dict.fromkeys(
        ("original", "edit", "seen"), ""
    )
    return pd.DataFrame([*rows, whole])


# --- words -------------------------------------------------------------------------------------------------------------


def test_what_came_over_is_said_of_each_attribute() -> None:
    moon, fish = Scene.parse(MOON), Scene.parse(FISH)
    mixed = Scene(fish.place, moon.size, moon.kind, moon.colour, moon.ground, "plain")
    said = report.says(read(moon, fish, mixed))
    assert said == "The place is E's; the size, the kind, the colour and the ground are O's; the texture is neither's: plain."
    larger = Scene(moon.place, "large", moon.kind, moon.colour, moon.ground, moon.texture)
    assert report.says(read(moon, moon, larger)) == "The size, small in both, has become large."
    assert report.says(read(moon, moon, moon)) == "O and E show the same, and so does the picture."


def test_a_factor_came_over_where_all_of_it_and_nothing_else_did() -> None:
    moon, fish = Scene.parse(MOON), Scene.parse(FISH)
    names = list(VALUES)
    for taken in itertools.product([False, True], repeat=len(names)):
        values = [getattr(fish if whether else moon, name) for name, whether in zip(names, taken, strict=True)]
        if values[names.index("colour")] == values[names.index("ground")]:
            continue
        came = {name for name, whether in zip(names, taken, strict=True) if whether}
        whole = [factor for factor, attributes in FACTORS.items() if set(attributes) == came]
        expected = "everything" if came == set(names) else "nothing" if not came else whole[0] if whole else "mixed"
        rows = read(moon, fish, Scene(*values))
        assert report.came(rows) == expected, came
        assert report.shade(rows) == report.CAME[expected]
        shares = {factor: sum(a in came for a in attributes) / len(attributes) for factor, attributes in FACTORS.items()}
        assert report.by_factor(rows) == pytest.approx(shares)
    assert report.came(read(moon, moon, moon)) is None  # nothing could come over


def test_without_a_reader_lpips_says_it() -> None:
    rows = read(Scene.parse(MOON), Scene.parse(FISH), Scene.parse(FISH)).iloc[-1:]
    assert report.says(rows) == "By LPIPS the picture is nearer to O: transfer 0.25, damage 0.10."
    assert report.came(rows) is None
    shades = [report.shade(rows.assign(transfer=value)) for value in (0.0, 1.0)]
    assert shades[0] == "#d5d4cf" and shades[1] == "#4b4b52"


# --- masks -------------------------------------------------------------------------------------------------------------


def test_a_mask_is_read_bit_by_bit_from_the_top() -> None:
    assert read_mask("2x2:8").tolist() == [[1, 0], [0, 0]]
    whole = torch.zeros(16, 16)
    whole[2, 5:9] = 1
    bits = "".join(str(int(bit)) for bit in whole.flatten())
    assert torch.equal(read_mask(f"16x16:{int(bits, 2):064x}"), whole)
    for odd in ("", "2x2", "2x2:", "2x2:88", "2x2:g", "0x2:8", "2x2:0", "2X2:8", "9999x9999:8"):
        with pytest.raises(ProbekitError, match="--mask"):
            read_mask(odd)


# --- runs --------------------------------------------------------------------------------------------------------------


def image(folder: Path, name: str, unit: str = "together") -> torch.Tensor:
    return load_png(folder / "images" / unit / f"{name}.png")


def test_a_picture_with_its_report_is_shown_again(tmp_path: Path) -> None:
    asked = ["inject", "image", *CAPTIONS, "--layers", "up_blocks.2.*.attn2", "--operation", "bypass", "--steps", "1"]
    done = probekit(*asked, "--out", tmp_path / "run")
    assert done.returncode == 0 and "what the scene reader reads" in done.stdout, done.stderr
    page = (tmp_path / "run" / "report.html").read_text()
    assert MOON in page and "left out" in page and (tmp_path / "run" / "figures" / "picture.svg").exists()
    assert (image(tmp_path / "run", "result") - image(tmp_path / "run", "O")).abs().max() > 0.02
    again = probekit("describe", tmp_path / "run")
    assert again.returncode == 0 and again.stdout.strip() == done.stdout.strip()
    assert (tmp_path / "run" / "report.html").read_text() == page


@pytest.mark.slow
def test_noise_words_and_mask_are_what_they_say(tmp_path: Path) -> None:
    layer = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    options: dict[str, Any] = {"prompt_original": MOON, "prompt_edit": FISH, "layers": [layer], "num_steps": 2}
    made: dict[str, torch.Tensor] = {}
    for name, more in {
        "whole": {"stream": "text"},
        "two words": {"stream": "text", "words": "red fish"},
        "no other word": {"stream": "text", "words": " ".join(FISH.split())},
        "half": {"stream": "main", "mask": "2x2:c"},
        "main": {"stream": "main"},
        "another noise": {"stream": "main", "noise_edit": 7},
    }.items():
        findings = InjectImage(**options, **more).run(out=tmp_path / name)
        made[name] = image(findings.folder, "result")
        made[f"{name}, E"] = image(findings.folder, "E")
    assert len({made[name].numpy().tobytes() for name in ("whole", "two words", "half", "main", "another noise")}) == 5
    assert not torch.equal(made["another noise, E"], made["main, E"])
    # all words are the whole text but for its start and its end
    assert (made["whole"] - made["no other word"]).abs().mean() < (made["whole"] - made["two words"]).abs().mean()


@pytest.mark.slow
def test_layers_apart_give_a_map_and_in_shards_the_same(tmp_path: Path) -> None:
    asked = [
        "inject",
        "image",
        *CAPTIONS,
        "--layers",
        "@mid",
        "--layers",
        "up_blocks.2.attentions.1",
        "--apart",
        "--windows",
        2,
    ]
    done = probekit(*asked, "--out", tmp_path / "run")
    assert done.returncode == 0 and "One pair tells no role" in done.stdout, done.stderr
    results = (tmp_path / "run" / "results.parquet").read_bytes()
    rows = pd.read_parquet(tmp_path / "run" / "results.parquet")
    assert list(rows.window.unique()) == ["all", "0%-50%", "50%-100%"] and len(rows.layer.unique()) == 2
    # the last layer at all steps is E, and the data in the page says so
    last = rows[(rows.window == "all") & (rows.layer == "up_blocks.2.attentions.1") & (rows.descriptor == "lpips")]
    assert last.transfer.iloc[0] > 0.99
    for part in ("2/2", "1/2"):
        assert probekit(*asked, "--out", tmp_path / "shards", "--shard", part).returncode == 0
    assert (tmp_path / "shards" / "results.parquet").read_bytes() == results


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    asked = ["inject", "image", *CAPTIONS, "--layers", "@attentions", "--apart"]
    whole = probekit(*asked, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed_once(asked, tmp_path, "killed")
    for file in ("results.parquet", "report.html"):
        written = [(tmp_path / name / file).read_bytes() for name in ("whole", "killed")]
        assert len({content.replace(b"killed", b"whole") for content in written}) == 1, file


def test_bad_questions_are_one_line(tmp_path: Path) -> None:
    asked = ["inject", "image", *CAPTIONS, "--out", tmp_path / "run"]
    for more, said in [
        (["--layers", "mid_block", "--words", "zebra"], "--words 'zebra': --prompt-edit has the words a large red"),
        (["--layers", "mid_block", "--words", " "], "--words ' ': is empty"),
        (["--layers", "mid_block", "--mask", "16x16:ff"], "--mask '16x16:ff'"),
        (["--layers", "mid_block", "--noise", "-1"], "--noise"),
        (["--layers", "mid_block", "--stream", "text"], "stream 'text' of layer mid_block"),
        (["--layers", "nowhere"], "no layer 'nowhere'"),
        (["--layers", "mid_block", "--windows", "3"], "--windows 3: goes with --apart"),
        (["--layers", "mid_block", "--apart", "--windows", "3"], "--windows 3: some hold no step"),
        (["--layers", "mid_block", "--steps", "7"], "steps 7"),
    ]:
        assert said in refused(*asked, *more), more
    assert not (tmp_path / "run").exists()

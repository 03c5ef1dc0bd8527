from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from probekit import ProbekitError
from probekit.data.avatars import Avatars
from probekit.experiments import StitchEdit
from probekit.latents.codes import decode
from probekit.models import load_space
from tests.conftest import killed_once, probekit, refused

OWN = '''
import torch
import torch.nn.functional as F

Q = torch.linalg.qr(torch.randn(768, 768, generator=torch.Generator().manual_seed(0)))[0]


class Half:
    """Half the size."""

    image_size = 32

    def encode(self, images):
        return F.avg_pool2d(images, 2)

    def decode(self, latents):
        return F.interpolate(latents, scale_factor=2, mode="bicubic")


class Rotated(Half):
    """The same, rotated."""

    def encode(self, images):
        return super().encode(images).flatten(1) @ Q

    def decode(self, latents):
        return super().decode((latents @ Q.T).reshape(-1, 3, 16, 16))


class Blind(Half):
    """Cannot decode."""

    decode = None
'''
RUN = ["stitch", "edit", "--train", "1000", "--test", "50", "--attributes", "Eyeglasses,Blue_Background"]


MODELS = "./own.py:Half,./own.py:Rotated"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


@pytest.mark.slow
def test_a_direction_carried_from_a_rotated_copy_does_what_ones_own_does(folder: Path) -> None:
    run = [*RUN, "--models", MODELS, "--alpha", "0", "--out", "run"]
    done = probekit(*run, cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = (
        pd.read_parquet(folder / "run" / "results.parquet")
        .set_index(["target", "source", "attribute", "strength"])
        .sort_index()
    )
    half, rotated = "./own.py:Half", "./own.py:Rotated"
    own, carried = rows.loc[half, half], rows.loc[half, rotated]
    assert (own.success - carried.success).abs().max() < 0.05 and (own.cosine - carried.cosine).abs().max() < 1e-3
    best = rows.groupby(["target", "source", "attribute"]).success.max().unstack("source")
    assert (best[[half, rotated]] > 0.9).all().all() and (best["random direction"] < 0.4).all()
    assert (own.cosine > 0.5).all() and (rows.xs("random direction", level="source").cosine.abs() < 0.2).all()
    assert (own.kept > 0.8).all()
    assert (folder / "run" / "images" / "._own.py_Half" / "plain-Eyeglasses.png").exists()
    # by the best of the strengths nearer to the avatar that really has the attribute than without an edit
    best = rows[(rows.apart.notna()) & (rows.index.get_level_values("source") != "random direction")]
    assert len(best) == 8 and (best.apart < best.apart_unedited).all()
    killed_once(run[:-2], folder, "killed")
    assert (folder / "killed" / "results.parquet").read_bytes() == (folder / "run" / "results.parquet").read_bytes()
    before = (folder / "run" / "report.html").read_text()
    described = probekit("describe", "run", cwd=folder)
    assert described.returncode == 0 and "own.py:Half (its own)" in described.stdout and "random ones in" in described.stdout
    assert (folder / "run" / "report.html").read_text() == before and "own.py:Rotated (custom" in before


@pytest.mark.slow
def test_shards_in_any_order_give_the_bytes_of_one_run_and_python_the_same_findings(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    edit = StitchEdit(models=MODELS, attributes="Eyeglasses", train=200, test=20, alpha="0")
    found = edit.run(out="whole")
    assert list(found.rows.columns) == [
        "source",
        "target",
        "attribute",
        "strength",
        "success",
        "low",
        "high",
        "kept",
        "cosine",
        "apart",
        "apart_unedited",
        "n",
    ]
    page = found._repr_html_()
    assert page.count("<svg") == 3 and "random ones in" in page and "own.py:Half (its own)" in page
    units = {path: path.stat().st_mtime_ns for path in (folder / "whole" / "units").iterdir()}
    pd.testing.assert_frame_equal(edit.run(out="whole").rows, found.rows)
    assert {path: path.stat().st_mtime_ns for path in units} == units and len(units) == 4
    assert edit.run(out="shards", shard="3/3") is None and edit.run(out="shards", shard="1/3") is None
    assert edit.run(out="shards", shard="2/3") is not None
    for name in ("results.parquet", "images/._own.py_Half/random_direction-Eyeglasses.png"):
        assert (folder / "shards" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    # a direction does not depend on what else is asked for
    two = StitchEdit(models=MODELS, attributes="Smiling,Eyeglasses", train=200, test=20, alpha="0").run(out="two").rows
    pd.testing.assert_frame_equal(two[two.attribute == "Eyeglasses"].reset_index(drop=True), found.rows)


@pytest.mark.slow
def test_an_edit_in_h_space_changes_the_activation_and_leaves_the_rest_of_the_picture(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    h, half = "avatar-ddpm:h:steps=10", "./own.py:Half"
    found = StitchEdit(models=f"{h},{half}", attributes="Eyeglasses", train=300, test=8, alpha="100").run(out="run")
    rows = found.rows[found.rows.target == h]
    assert {(r.source, r.strength) for r in rows.itertuples()} == {
        (source, strength) for source in (h, half, "random direction") for strength in (0.5, 1, 1.5, 2)
    }
    # not edited it is nearly the image itself, where noise of one's own would give another face
    images, space = Avatars().images(range(20_000, 20_004)), load_space(h, device="cpu")
    latents = space.encode(images).flatten(1).numpy()
    own, other = decode(space, latents, rest_of=images), decode(space, latents)
    assert (own - images).abs().mean() < 0.5 * (other - images).abs().mean()
    step = np.ones_like(latents)
    assert not torch.equal(decode(space, latents + step, rest_of=images), own)
    assert (folder / "run" / "images" / "avatar-ddpm_h_steps_10" / "._own.py_Half-Eyeglasses.png").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--models", "./own.py:Half,./own.py:Blind"], "Blind cannot decode"),
        (["--models", "./own.py:Half,avatar-ddpm:noise"], "--models: avatar-ddpm:noise cannot encode"),
        (["--models", "./own.py:Half,mini-sd:text-eos"], "mini-sd:text-eos encodes captions"),
        (["--models", "./own.py:Half", "--attributes", "Charm"], "--attributes 'Charm'"),
        (["--models", "./own.py:Half", "--attributes", "Smiling,Smiling"], "--attributes 'Smiling,Smiling'"),
        (["--models", "./own.py:Half", "--data", "folder:."], "avatars only"),
        (["--models", "./own.py:Half", "--attributes", "Eyeglasses", "--test", "2"], "--test 2: no image is without Eyeg"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder: Path, options: list[str], said: str) -> None:
    assert said in refused(*RUN, "--out", "run", *options, cwd=folder)
    assert not (folder / "run" / "results.parquet").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attributes": "Charm"}, "--attributes 'Charm'"),
        ({"data": "scenes"}, "--data 'scenes'"),
        ({"test": 1}, "--test 1"),
        ({"alpha": "x"}, "--alpha 'x'"),
        ({"seed": 0.5}, "--seed 0.5"),
    ],
)
def test_bad_options_are_refused_in_python_as_on_the_command_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ProbekitError, match=said):
        StitchEdit(**options)

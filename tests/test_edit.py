from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


@pytest.mark.slow
def test_a_direction_carried_from_a_rotated_copy_does_what_ones_own_does(folder: Path) -> None:
    run = [*RUN, "--models", "./own.py:Half,./own.py:Rotated", "--alpha", "0", "--out", "run"]
    done = probekit(*run, cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(folder / "run" / "results.parquet").set_index(["target", "source", "attribute", "strength"])
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
    assert probekit("describe", "run", cwd=folder).returncode == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--models", "./own.py:Half,./own.py:Blind"], "Blind cannot decode"),
        (["--models", "./own.py:Half", "--attributes", "Charm"], "--attributes 'Charm'"),
        (["--models", "./own.py:Half", "--data", "folder:."], "avatars only"),
        (["--models", "./own.py:Half", "--attributes", "Eyeglasses", "--test", "2"], "--test 2: no image is without Eyeg"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder: Path, options: list[str], said: str) -> None:
    assert said in refused(*RUN, "--out", "run", *options, cwd=folder)
    assert not (folder / "run" / "results.parquet").exists()

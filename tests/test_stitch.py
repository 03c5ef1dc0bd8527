from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from probekit.report.images import load_png
from tests.conftest import killed_once, probekit, refused

OWN = '''
import torch
import torch.nn.functional as F

Q = torch.linalg.qr(torch.randn(192, 192, generator=torch.Generator().manual_seed(0)))[0]


class Pixels:
    """A picture made small."""

    image_size = 32

    def encode(self, images):
        return F.avg_pool2d(images, 4)

    def decode(self, latents):
        return F.interpolate(latents, scale_factor=4, mode="bilinear")


class Rotated(Pixels):
    """The same, rotated."""

    def encode(self, images):
        return super().encode(images).flatten(1) @ Q

    def decode(self, latents):
        return super().decode((latents @ Q.T).reshape(-1, 3, 8, 8))


class Painter:
    """Draws two colours, cannot encode."""

    image_size = 32

    def sample(self, n, generator):
        return torch.rand(n, 6, generator=generator) * 2 - 1

    def decode(self, latents):
        upper, lower = (part[:, :, None, None].expand(-1, 3, 16, 32) for part in latents.split(3, 1))
        return torch.cat([upper, lower], 2)


class Broken(Pixels):
    """Gives no tensor."""

    def encode(self, images):
        return "nothing"


class Constant:
    """Sees nothing."""

    image_size = 32

    def encode(self, images):
        return torch.full((len(images), 4), 0.1)


class Endless:
    """Divides by nothing."""

    image_size = 32

    def encode(self, images):
        return images[:, 0, 0] / (1 if images.abs().sum() == 0 else 0)


class Doubled(Pixels):
    """Decodes to another size than it says."""

    def decode(self, latents):
        return F.interpolate(latents, scale_factor=8)


class Weighted(Pixels):
    """Has weights in a file."""

    def __init__(self):
        self.weight = torch.load("weight.pt")

    def encode(self, images):
        return super().encode(images) * self.weight


class Larger(Pixels):
    """Of another size."""

    image_size = 64
'''
RUN = ["stitch", "run", "--train", "260", "--test", "20"]
THREE = "./own.py:Pixels,./own.py:Rotated,./own.py:Painter"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


@pytest.mark.slow
def test_models_of_ones_own_from_start_to_report(folder: Path) -> None:
    done = probekit(*RUN, "--models", THREE, "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(folder / "run" / "results.parquet")
    value = rows.set_index(["source", "target", "measure"]).value
    pixels, rotated, painter = THREE.split(",")
    error = "latent error over variance, test"
    # a rotated copy is recovered, whichever way, but for the smallest penalty there is to choose
    assert value[pixels, rotated, error] < 1e-4 and value[rotated, pixels, error] < 1e-4
    assert value[rotated, pixels, "RMSE"] == pytest.approx(value[pixels, pixels, "RMSE"], rel=1e-3)
    # what knows nothing of the picture maps to the mean, or worse
    assert value["random", pixels, error] > 0.9 and value["random", pixels, "RMSE"] > 1.5 * value[pixels, pixels, "RMSE"]
    # the painter takes part by its samples: it decodes its own exactly, and pixels hold all of its two colours
    assert value[painter, painter, "RMSE"] == 0 and value[pixels, painter, error] < 1e-3
    assert set(rows[(rows.source == painter) | (rows.target == painter)].drawn_by) == {painter}
    alike = rows.measure.isin(["CKA", "mutual 10-NN"])
    assert ((rows.low <= rows.value + 1e-12) | (rows.measure == "fd-alexnet") | alike).all()
    assert ((rows.low <= rows.high) | alike).all()
    # a rotated copy is the same space, the random encoder another
    assert value[pixels, rotated, "CKA"] > 0.999 and value[pixels, rotated, "mutual 10-NN"] > 0.99
    assert abs(value["random", pixels, "CKA"]) < 0.1 and value["random", pixels, "mutual 10-NN"] < 0.15
    assert set(rows[rows.measure == "RMSE"].n) == {20} and set(rows[rows.measure == "latent MSE, train"].n) == {260}
    pictures = folder / "run" / "images" / "._own.py_Pixels--._own.py_Rotated"
    truth, stitched = (load_png(pictures / f) for f in ("true-0.png", "0.png"))
    assert 0.02 < (truth - stitched).abs().mean() < 0.3
    assert sorted(p.name for p in (folder / "run" / "figures").glob("*.svg")) == [
        "from-1.svg", "latent-mse.svg", "measures.svg", "more-reconstructions.svg", "reconstructions.svg", "samples-1.svg",
        "similarity.svg",
    ]  # fmt: skip
    page = (folder / "run" / "report.html").read_text()
    assert "Stitched reconstructions of avatars" in page and "Painter" in page

    # encoded latents are kept, and found again by another run
    kept = {p: p.stat().st_mtime_ns for p in (folder / "runs" / "latents").rglob("*") if p.is_file()}
    again = probekit(*RUN, "--models", THREE, "--alpha", "0", "--out", "other", cwd=folder)
    assert again.returncode == 0, again.stderr
    unpenalised = pd.read_parquet(folder / "other" / "results.parquet").set_index(["source", "target", "measure"]).value
    assert unpenalised[pixels, rotated, error] < 1e-10 and unpenalised[rotated, pixels, error] < 1e-10
    assert {p: p.stat().st_mtime_ns for p in (folder / "runs" / "latents").rglob("*") if p.is_file()} == kept
    assert "seed 0 there, 3 here" in refused(*RUN, "--models", THREE, "--seed", "3", "--out", "run", cwd=folder)
    assert probekit("describe", "run", cwd=folder).returncode == 0


@pytest.mark.slow
def test_killed_and_started_again_the_result_is_that_of_an_uninterrupted_run(folder: Path) -> None:
    models = ["--models", "./own.py:Pixels,./own.py:Rotated"]
    whole = probekit(*RUN, *models, "--out", "whole", cwd=folder)
    assert whole.returncode == 0, whole.stderr
    for latents in (folder / "runs").rglob("*.parquet"):
        latents.unlink()  # the killed run encodes anew
    killed_once([*RUN, *models], folder, "killed")
    for name in ("results.parquet", "figures/measures.svg"):
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--models", "./own.py:Nobody"], "no class 'Nobody'"),
        (["--models", "./nowhere.py:Pixels"], "cannot be read"),
        (["--models", "./own.py:Broken"], "must return a tensor"),
        (["--models", "./own.py:Doubled"], "decode must return images (1, 3, 32, 32), not (1, 3, 64, 64)"),
        (["--models", "random,./own.py:Constant"], "none of them can decode"),
        (["--models", "./own.py:Pixels,./own.py:Constant"], "own.py:Constant:latent': gives every image the same latent"),
        (["--models", "./own.py:Pixels,./own.py:Endless"], "own.py:Endless:latent': gives latents that are not finite"),
        (["--models", "./own.py:Pixels,./own.py:Larger"], "different image sizes"),
        (["--models", "./own.py:Pixels,./own.py:Pixels"], "stands there twice"),
        (["--models", "random:w"], "no space 'w'; it has normal"),
        (["--models", "mini-sd"], "mini-sd"),
        (["--models", " , "], "names none"),
        (["--models", "./own.py:Pixels", "--alpha", "-1"], "--alpha '-1'"),
        (["--models", "./own.py:Pixels", "--train", "40000"], "--train 40000"),
        (["--models", "./own.py:Pixels", "--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder: Path, options: list[str], said: str) -> None:
    assert said in refused(*RUN, "--out", "run", *options, cwd=folder)
    assert not (folder / "run" / "results.parquet").exists()


@pytest.mark.slow
def test_more_samples_a_moved_model_and_new_weights_are_told_apart(folder: Path) -> None:
    few = ["stitch", "run", "--train", "120", "--test", "10", "--models", "./own.py:Pixels,./own.py:Painter"]
    assert probekit(*few, "--out", "few", cwd=folder).returncode == 0
    few[3] = "140"  # the painter's samples end elsewhere now
    assert probekit(*few, "--out", "more", cwd=folder).returncode == 0
    few[7] = f"{folder}/own.py:Pixels"  # the same model by another path
    moved = probekit(*few, "--out", "moved", cwd=folder)
    assert moved.returncode == 0, moved.stderr
    digests = []
    for weight in (1.0, 2.0):
        torch.save(torch.tensor(weight), folder / "weight.pt")
        few[7] = "./own.py:Weighted"
        done = probekit(*few, "--out", f"weight-{weight}", cwd=folder)
        assert done.returncode == 0, done.stderr
        digests.append(
            pd.read_json(folder / f"weight-{weight}" / "config.json", typ="series").options["models"]["./own.py:Weighted"]
        )
    assert digests[0] != digests[1]


def test_noise_that_two_models_draw_has_nothing_in_common() -> None:
    from probekit.latents.space import generator

    draws = [torch.randn(1000, generator=generator(name, "sample", 0, 3)) for name in ("one", "two")]
    assert abs(torch.corrcoef(torch.stack(draws))[0, 1]) < 0.15
    assert torch.equal(draws[0], torch.randn(1000, generator=generator("one", "sample", 0, 3)))


def test_a_convolutional_model_takes_the_others_image_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import VQModel
    from probekit.experiments.places import load_places

    torch.manual_seed(0)
    VQModel(sample_size=256, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=16).save_pretrained(tmp_path / "vq")  # fmt: skip
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    vq, _ = load_places("./vq,./own.py:Larger", "cpu")
    assert vq.model.image_size == 64 and vq.space.shape == (3, 32, 32)
    assert vq.space.decode(vq.space.encode(torch.zeros(1, 3, 64, 64))).shape == (1, 3, 64, 64)
    (alone,) = load_places("./vq", "cpu")
    assert alone.model.image_size == 256


def test_a_damaged_latent_is_refused_in_one_line(folder: Path) -> None:
    models = ["--models", "./own.py:Pixels,./own.py:Rotated"]
    assert probekit(*RUN, *models, "--out", "run", cwd=folder).returncode == 0
    file = min(p for p in (folder / "runs" / "latents").rglob("*") if p.is_file() and "/latents/c/" in p.as_posix())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "damaged" in refused(*RUN, *models, "--out", "again", cwd=folder)


def test_the_paper_s_penalties_are_of_its_pairs() -> None:
    from probekit.experiments.stitch import penalty

    from probekit.errors import ProbekitError

    assert penalty("paper", "ddpm", "stylegan2") == 2000 and penalty("paper", "vae", "glow") == 0
    assert penalty("loo", "vae", "glow") == "auto" and penalty("7.5", "vae", "glow") == 7.5
    for wrong in ("x", "-1", "inf", "nan"):
        with pytest.raises(ProbekitError, match="--alpha"):
            penalty(wrong, "vae", "glow")
    assert np.isfinite(penalty("paper", "glow", "ddpm"))  # type: ignore[arg-type]

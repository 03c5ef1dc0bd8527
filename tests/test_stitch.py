from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline

from probekit import ProbekitError
from probekit.data import load_data
from probekit.experiments.stitch_run import StitchRun
from probekit.images import load_png, to_uint8
from probekit.latents import ridge
from probekit.latents.maps import penalty
from probekit.models import load_space, load_spaces
from probekit.runs.folder import Run
from tests.conftest import killed_once, probekit, refused, smooth

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
TWO = "./own.py:Pixels,./own.py:Rotated"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path) -> dict[Path, int]:
    """Every file of a folder, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# --- which latents are taken -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_whose_scheduler_was_edited_does_not_take_the_old_one_s_latents(folder: Path) -> None:
    """Issue 10: its weights are the same, but not what they mean."""
    DDPMPipeline(smooth(), DDIMScheduler()).save_pretrained(folder / "tiny")
    run = ["stitch", "run", "--train", "40", "--test", "4", "--device", "cpu"]
    run += ["--models", "./tiny:inverted:steps=2,./tiny:h:steps=2"]
    assert probekit(*run, "--out", "one").returncode == 0
    before = written(folder / "runs" / "latents")
    scheduler = folder / "tiny" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    said = refused(*run, "--out", "one")
    assert "holds a run of another config (spaces" in said
    assert probekit(*run, "--out", "two").returncode == 0
    after = written(folder / "runs" / "latents")
    assert {path: after[path] for path in before} == before
    new = {path.relative_to(folder / "runs" / "latents").parts[0] for path in after.keys() - before.keys()}
    assert len(new) == 2 and all(name.startswith(("tiny-inverted", "tiny-h")) for name in new)
    one, two = (pd.read_parquet(folder / name / "results.parquet") for name in ("one", "two"))
    assert not np.isclose(one.value, two.value).all()


def test_what_a_space_does_not_hold_is_not_taken_from_the_true_picture(folder: Path) -> None:
    DDPMPipeline(smooth(), DDIMScheduler()).save_pretrained(folder / "tiny")
    run = StitchRun(models="./tiny:h:steps=2", train=40, test=4, device="cpu").run(out="run").run
    space, data = load_space("./tiny:h:steps=2", device="cpu"), load_data("avatars", 8)
    decoded = space.decode(space.encode(data.images(data.split("test")[-4:])))
    unit = "./tiny:h:steps=2--./tiny:h:steps=2"
    for i in range(4):
        assert (to_uint8(load_png(run.picture(unit, f"{i}"))) == to_uint8(decoded[i])).all()


@pytest.mark.slow
def test_captions_are_stitched_to_pictures(folder: Path, tiny_sd: Any) -> None:
    tiny_sd.save_pretrained(folder / "sd")
    models = "./sd:text:steps=2,./own.py:Pixels,./own.py:Painter"
    found = StitchRun(models=models, data="scenes", train=300, test=20, device="cpu").run(out="run")
    text, pixels, painter = models.split(",")
    pairs = found.rows.groupby(["source", "target"]).images.first()
    assert {pairs[source, target] for source in (text, pixels, "random") for target in (text, pixels)} == {"scenes"}
    # the painter's own pictures have no captions
    assert (text, painter) not in pairs and (painter, text) not in pairs and pairs[pixels, painter] == f"samples of {painter}"
    value = found.rows.set_index(["source", "target", "measure"]).value
    for measure in ("latent error over variance, test", "RMSE"):
        assert 0 < value[text, pixels, measure] < 0.9 * value["random", pixels, measure], measure
    assert "./sd:text" in (folder / "run" / "report.html").read_text()


@pytest.mark.slow
def test_more_samples_a_moved_model_and_new_weights_are_told_apart(folder: Path) -> None:
    few = ["stitch", "run", "--train", "120", "--test", "10", "--models", "./own.py:Pixels,./own.py:Painter"]
    assert probekit(*few, "--out", "few").returncode == 0
    few[3] = "140"  # the painter's samples end elsewhere now
    assert probekit(*few, "--out", "more").returncode == 0
    few[7] = f"{folder}/own.py:Pixels"  # the same model by another path
    moved = probekit(*few, "--out", "moved")
    assert moved.returncode == 0, moved.stderr
    digests = []
    for weight in (1.0, 2.0):
        torch.save(torch.tensor(weight), folder / "weight.pt")
        few[7] = "./own.py:Weighted"
        done = probekit(*few, "--out", f"weight-{weight}")
        assert done.returncode == 0, done.stderr
        digests.append(Run.opened(folder / f"weight-{weight}").config["inputs"]["spaces"]["./own.py:Weighted"])
    assert digests[0] != digests[1]


@pytest.mark.slow
def test_a_damaged_latent_is_encoded_again_and_that_is_said(folder: Path) -> None:
    assert probekit(*RUN, "--models", TWO, "--out", "run").returncode == 0
    file = min(p for p in (folder / "runs" / "latents").rglob("*") if p.is_file() and "/latents/c/" in p.as_posix())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = probekit(*RUN, "--models", TWO, "--out", "again")
    assert again.returncode == 0 and "damaged" in again.stdout, again.stderr
    assert (folder / "again" / "results.parquet").read_bytes() == (folder / "run" / "results.parquet").read_bytes()


# --- a run -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_models_of_ones_own_from_start_to_report(folder: Path) -> None:
    done = probekit(*RUN, "--models", THREE, "--out", "run")
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
        "from-1.svg",
        "latent-mse.svg",
        "measures.svg",
        "more-reconstructions.svg",
        "reconstructions.svg",
        "samples-1.svg",
        "similarity.svg",
    ]
    page = (folder / "run" / "report.html").read_text()
    assert "Stitched reconstructions of avatars" in page and "Painter" in page

    # encoded latents are kept, and found again by another run
    kept = written(folder / "runs" / "latents")
    again = probekit(*RUN, "--models", THREE, "--alpha", "0", "--out", "other")
    assert again.returncode == 0, again.stderr
    unpenalised = pd.read_parquet(folder / "other" / "results.parquet").set_index(["source", "target", "measure"]).value
    assert unpenalised[pixels, rotated, error] < 1e-10 and unpenalised[rotated, pixels, error] < 1e-10
    assert written(folder / "runs" / "latents") == kept
    assert "seed 0 there, 3 here" in refused(*RUN, "--models", THREE, "--seed", "3", "--out", "run")
    (folder / "run" / "report.html").unlink()
    assert probekit("describe", "run").returncode == 0 and (folder / "run" / "report.html").exists()


@pytest.mark.slow
def test_killed_and_started_again_the_result_is_that_of_an_uninterrupted_run(folder: Path) -> None:
    models = ["--models", TWO]
    whole = probekit(*RUN, *models, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    for latents in (folder / "runs").rglob("*.parquet"):
        latents.unlink()  # the killed run encodes anew
    killed_once([*RUN, *models], folder, "killed")
    for name in ("results.parquet", "figures/measures.svg"):
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_python_gets_the_findings_and_the_same_again_for_nothing(folder: Path) -> None:
    stitch = StitchRun(models=TWO, train=260, test=20)
    found = stitch.run(out="run")
    assert set(found.rows.measure) >= {"RMSE", "LPIPS", "CKA", "latent error over variance, test"}
    assert "own.py:Rotated" in found._repr_html_() and "<svg" in found._repr_html_() and "A linear map carries" in found.says
    units = written(folder / "run" / "units")
    again = StitchRun(models=TWO, train=260, test=20).run(out="run")
    assert again.rows.equals(found.rows) and written(folder / "run" / "units") == units
    assert (folder / "run" / "results.parquet").exists()
    with pytest.raises(ProbekitError, match="--alpha 'x'"):
        StitchRun(alpha="x")
    with pytest.raises(ProbekitError, match="--train 3: at least 10"):
        StitchRun(train=3)


@pytest.mark.slow
def test_shards_in_any_order_give_the_results_of_one_run(folder: Path) -> None:
    stitch = StitchRun(models=THREE, train=130, test=10)
    stitch.run(out="whole")
    assert stitch.run(out="parts", shard="3/3") is None and stitch.run(out="parts", shard="1/3") is None
    assert stitch.run(out="parts", shard="2/3") is not None
    for name in ("results.parquet", "figures/measures.svg"):
        assert (folder / "parts" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_one_factorization_of_a_source_serves_all_its_targets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(ridge.RidgeSolver):
        def __init__(self, x: Any) -> None:
            made.append(x.shape)
            super().__init__(x)

    monkeypatch.setattr(ridge, "RidgeSolver", Counted)
    stitch = StitchRun(models=THREE, train=130, test=10)
    stitch.run(out="run")
    # pixels, rotated and random of the avatars and of the painter's samples, the painter of its samples
    assert len(made) == 7
    assert [unit.group for unit in stitch.plan() if unit.needs] == sorted(
        (unit.group for unit in stitch.plan() if unit.needs), key=[u.group for u in stitch.plan()].index
    )


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--models", "./own.py:Nobody"], "no class 'Nobody'"),
        (["--models", "./nowhere.py:Pixels"], "cannot be read"),
        (["--models", "./own.py:Broken"], "must return a tensor"),
        (["--models", "./own.py:Doubled"], "decode must return images (1, 3, 32, 32), not (1, 3, 64, 64)"),
        (["--models", "random,./own.py:Constant"], "none of them can decode"),
        (["--models", "./own.py:Pixels,./own.py:Constant"], "own.py:Constant': gives every image the same latent"),
        (["--models", "./own.py:Pixels,./own.py:Endless"], "own.py:Endless': gives latents that are not finite"),
        (["--models", "./own.py:Pixels,./own.py:Larger"], "different image sizes"),
        (["--models", "./own.py:Pixels,./own.py:Pixels"], "stands there twice"),
        (["--models", "random:w"], "no space 'w'; it has normal"),
        (["--models", "mini-sd:h:layr=mid_block"], "no parameter 'layr'; it has layer"),
        (["--models", "mini-sd:text"], "data 'avatars': has no captions"),
        (["--models", " , "], "names none"),
        (["--models", "./own.py:Pixels", "--alpha", "-1"], "--alpha '-1'"),
        (["--models", "./own.py:Pixels", "--train", "40000"], "--train 40000"),
        (["--models", "./own.py:Pixels", "--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder: Path, options: list[str], said: str) -> None:
    assert said in refused(*RUN, "--out", "run", *options)
    assert not (folder / "run" / "results.parquet").exists()


# --- parts -------------------------------------------------------------------------------------------------------------


def test_a_convolutional_model_takes_the_others_image_size(folder: Path) -> None:
    from diffusers import VQModel

    torch.manual_seed(0)
    VQModel(
        sample_size=256,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        num_vq_embeddings=16,
    ).save_pretrained(folder / "vq")
    vq, _ = load_spaces(["./vq", "./own.py:Larger"], device="cpu")
    assert vq.image_size == 64 and vq.shape == (3, 32, 32)
    assert vq.decode(vq.encode(torch.zeros(1, 3, 64, 64))).shape == (1, 3, 64, 64)
    (alone,) = load_spaces(["./vq"], device="cpu")
    assert alone.image_size == 256


def test_the_paper_s_penalties_are_of_its_pairs() -> None:
    assert penalty("paper", "ddpm", "stylegan2") == 2000 and penalty("paper", "vae", "glow") == 0
    assert penalty("loo", "vae", "glow") == "auto" and penalty("7.5", "vae", "glow") == 7.5
    for wrong in ("x", "-1", "inf", "nan"):
        with pytest.raises(ProbekitError, match="--alpha"):
            penalty(wrong, "vae", "glow")
    assert np.isfinite(penalty("paper", "glow", "ddpm"))  # type: ignore[arg-type]

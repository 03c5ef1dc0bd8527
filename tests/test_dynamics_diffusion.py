from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, VQModel
from torch import Tensor

from probekit import ProbekitError, load
from probekit.experiments import DynamicsDiffusion
from probekit.images import load_png
from probekit.metrics.similarity import cka
from probekit.report.dynamics_diffusion import headline, standings
from probekit.runs.folder import Run
from probekit.sampling import sample
from tests.conftest import killed, probekit, refused, smooth, tiny

STEPS, N = 6, 130
RUN = ["dynamics", "diffusion", "--model", "my-ddpm", "--steps", str(STEPS), "--n", str(N), "--batch-size", "16"]
COMPARED = ["CKA", "SVCCA", "k-NN overlap", "SSIM", "PSNR", "L2"]


def save(unet: Any, folder: Path) -> None:
    DDPMPipeline(unet, DDIMScheduler(clip_sample=False)).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`my-ddpm` after 5 steps, and after 40 and 100, which are the same; and a whole run."""
    folder = tmp_path_factory.mktemp("training")
    last = smooth()
    for step, share in ((5, 0.5), (40, 0.0), (100, 0.0)):
        unet, other = smooth(), torch.Generator().manual_seed(1)
        for p, q in zip(unet.parameters(), last.parameters(), strict=True):
            p.data = q.data + share * q.data.std().nan_to_num() * torch.randn(p.shape, generator=other)
        save(unet, folder / "my-ddpm" / f"step-{step:06d}")
    done = probekit(*RUN, "--out", "whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "whole" / "results.parquet")


def states(run: Path, step: int) -> Tensor:
    blocks = sorted((run / "states").glob(f"samples-{step:09d}-*/states.npy"))
    return torch.from_numpy(np.concatenate([np.load(block) for block in blocks]))


@pytest.mark.slow
def test_every_checkpoint_has_every_measure_with_its_interval_and_chance(rows: pd.DataFrame) -> None:
    assert list(rows.columns) == ["step", "measure", "value", "low", "high", "n", "chance"]
    assert rows.step.drop_duplicates().tolist() == [5, 40, 100]
    measures = ["sample to noise", "noise to sample", *COMPARED]
    assert all(group.measure.tolist() == measures for _, group in rows.groupby("step"))
    bounded = rows[~rows.measure.isin(COMPARED[:3]) & rows.value.notna()]
    assert ((bounded.low <= bounded.value + 1e-9) & (bounded.value <= bounded.high + 1e-9)).all()
    assert rows[rows.measure.isin(COMPARED[:3])].low.isna().all()
    chance = rows[rows.step == 5].set_index("measure").chance
    assert chance["sample to noise"] == pytest.approx(100 / N) and chance["CKA"] == 0
    assert chance["k-NN overlap"] == pytest.approx(13 / (N - 1))  # a tenth of the samples
    # far from the last checkpoint, but of the same noise
    early = rows[rows.step == 5].set_index("measure").value
    assert early["SSIM"] < 0.95 and early["L2"] > 0.1 and not np.isinf(rows.value).any()


def test_what_equals_the_last_checkpoint_is_1_beside_it_or_0_and_has_no_psnr(rows: pd.DataFrame) -> None:
    for step in (40, 100):
        own = rows[rows.step == step].set_index("measure")
        for measure in ("CKA", "SVCCA", "k-NN overlap", "SSIM"):
            assert own.value[measure] == pytest.approx(1, abs=1e-6), measure
        assert own.value["L2"] == 0 and math.isnan(own.value["PSNR"]) and own.n["PSNR"] == 0
        assert own.chance["L2"] > 1 and np.isfinite(own.chance["PSNR"])  # another noise gives another picture
    value = rows.set_index(["step", "measure"]).value
    assert all(value[40, way] == value[100, way] for way in ("sample to noise", "noise to sample"))


def test_samples_are_those_of_the_same_noises_and_measures_are_of_the_stored_samples(folder: Path, rows: pd.DataFrame) -> None:
    value = rows.set_index(["step", "measure"]).value
    noise, last = torch.Tensor(), states(folder / "whole", 100)
    for step in (5, 100):
        diffusion = load(folder / "my-ddpm" / f"step-{step:06d}", device="cpu").diffusion
        noise = diffusion.noise(range(N), 0)
        made, kept = sample(diffusion.denoiser(4), noise[62:66], diffusion.schedule(STEPS)).end, states(folder / "whole", step)
        assert kept.shape == noise.shape and torch.allclose(made, kept[62:66], rtol=1e-3, atol=1e-3)
        distance = torch.cdist(kept.flatten(1).double(), noise.flatten(1).double())
        for way, axis in (("sample to noise", 1), ("noise to sample", 0)):
            hits = (distance.argmin(axis) == torch.arange(N)).double().mean()
            assert value[step, way] == pytest.approx(100 * hits.item()), (step, way)
        assert value[step, "CKA"] == pytest.approx(cka(kept.flatten(1), last.flatten(1)), abs=1e-9)
        pictures, final = kept.clamp(-1, 1), last.clamp(-1, 1)
        assert value[step, "L2"] == pytest.approx((pictures - final).flatten(1).norm(dim=1).mean().item(), rel=1e-5)
        shown = load_png(folder / "whole" / "images" / f"step-{step:09d}" / "7.png")
        assert (shown - pictures[7]).abs().max() < 1 / 127


def test_psnr_and_ssim_are_those_of_torchmetrics(folder: Path, rows: pd.DataFrame) -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    from probekit.experiments.dynamics_diffusion import picture_measures

    pictures, final = (states(folder / "whole", step).clamp(-1, 1) for step in (5, 100))
    psnr = peak_signal_noise_ratio(pictures, final, data_range=2.0, reduction="none", dim=(1, 2, 3))
    own = rows[(rows.step == 5) & (rows.measure == "PSNR")].iloc[0]
    finite = psnr[psnr.isfinite()]  # small pictures may be equal where all is black or white
    assert own.value == pytest.approx(finite.mean().item(), abs=1e-3) and own.n == len(finite) > 100
    # of little contrast, where the constants count, and with them the range of [-1, 1]
    large = 0.05 * torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    close = large + 0.03 * torch.randn(large.shape, generator=torch.Generator().manual_seed(1))
    window: dict[str, Any] = {"gaussian_kernel": False, "kernel_size": 7, "reduction": "none"}
    peer: Any = structural_similarity_index_measure(close, large, data_range=2.0, **window)
    narrow: Any = structural_similarity_index_measure(close, large, data_range=1.0, **window)
    ours = torch.from_numpy(picture_measures(close, large)["SSIM"])
    assert ((ours - peer).abs() < 0.01).all() and ((peer - narrow).abs() > 0.03).all()  # they cut the border differently


@pytest.mark.slow
def test_killed_and_started_again_the_result_is_that_of_an_uninterrupted_run(folder: Path) -> None:
    run = folder / "killed"
    first = [run / "units" / f"samples-000000005-{start:07d}.parquet" for start in (0, 64, 128)]
    second = run / "units" / "samples-000000040-0000000.parquet"
    killed(*RUN, "--out", "killed", cwd=folder, when=second.exists)
    assert not (run / "results.parquet").exists(), "it was over before it could be killed"
    assert not (run / "units" / "samples-000000100-0000128.parquet").exists()  # in the middle of the samples
    finished = {p: p.stat().st_mtime_ns for p in [*first, second, run / "states" / "samples-000000005-0000064" / "states.npy"]}
    again = probekit(*RUN, "--out", "killed", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    states = "states/samples-000000040-0000064/states.npy"
    for name in ("results.parquet", "figures/measures.svg", "figures/pictures.svg", states):
        assert (run / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_shards_in_any_order_give_the_bytes_of_one_run_and_python_the_same_findings(
    folder: Path, rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    dynamics = DynamicsDiffusion(model="my-ddpm", steps=STEPS, n=N, batch_size=16)
    shutil.copytree("whole", "again")
    before = {path: path.stat().st_mtime_ns for path in (folder / "again" / "units").iterdir()}
    found = dynamics.run(out="again")  # goes on where the command line stopped: there is nothing left
    pd.testing.assert_frame_equal(found.rows, rows)
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 3 * 3 + 3
    page = found._repr_html_()
    assert page.count("<svg") == 2 and "mapping between noise and sample" in page and "k-NN overlap" in page
    assert dynamics.run(out="shards", shard="3/3") is None and dynamics.run(out="shards", shard="1/3") is None
    of_first = sorted(path.stem for path in (folder / "shards" / "units").glob("*"))
    assert not [name for name in of_first if "000000040" in name]  # a checkpoint's units are one shard's
    assert dynamics.run(out="shards", shard="2/3") is not None
    for name in ("results.parquet", "figures/pictures.svg"):
        assert (folder / "shards" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_checkpoints_are_loaded_once_to_sample_and_never_to_measure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from probekit import models

    monkeypatch.chdir(folder)
    loads: list[Path] = []
    original = models.load
    monkeypatch.setattr(models, "load", lambda path, **options: (loads.append(path), original(path, **options))[1])
    dynamics = DynamicsDiffusion(model="my-ddpm", steps=2, n=70)
    inputs = dynamics.inputs()
    assert len(loads) == 3 and list(inputs["checkpoints"]) == ["5", "40", "100"]
    dynamics.run(out="short")
    assert len(loads) == 3 + 3 + 3  # its own inputs, then the samples


@pytest.mark.slow
def test_latent_diffusion_is_compared_by_its_decoded_pictures(ldm_folder: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        shutil.copytree(ldm_folder, tmp_path / "my-ldm" / f"step-{step}")
    run = DynamicsDiffusion(model=str(tmp_path / "my-ldm"), steps=2, n=16, device="cpu").run(out=tmp_path / "run").run.folder
    kept = states(run, 1)
    decoded = load(ldm_folder, device="cpu").diffusion.decode(kept)
    pictures = np.load(run / "states" / "samples-000000001-0000000" / "pictures.npy")
    assert kept.shape == (16, 3, 8, 8) and np.allclose(pictures, decoded.numpy(), atol=1e-5)
    shown = load_png(run / "images" / "step-000000002" / "3.png")
    assert shown.shape == (3, 16, 16) and (shown - decoded[3]).abs().max() < 1 / 127


@pytest.mark.slow
def test_captions_make_a_series_too_and_another_caption_is_another_run(tmp_path: Path, tiny_sd: Any) -> None:
    for step in (1, 2):
        tiny_sd.save_pretrained(tmp_path / "my-sd" / f"step-{step}")
    run = ["dynamics", "diffusion", "--model", "my-sd", "--steps", 2, "--n", 16, "--device", "cpu", "--out", "run"]
    assert probekit(*run, "--prompt", "a red fish", cwd=tmp_path).returncode == 0
    assert "with the prompt “a red fish”" in (tmp_path / "run" / "report.html").read_text()
    assert "prompt 'a red fish' there, 'a dog' here" in refused(*run, "--prompt", "a dog", cwd=tmp_path)


def test_a_finished_run_is_described_without_its_samples_and_its_report_needs_nothing(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "whole", run)
    shutil.rmtree(run / "states")
    (run / "report.html").unlink()
    done = probekit("describe", run)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "noise to sample" in said and "CKA" in said and "mapping between noise and sample" in said
    page = (run / "report.html").read_text()
    assert page == (folder / "whole" / "report.html").read_text()
    assert "59.0 %" in page and "dynamics diffusion --model my-ddpm" in page and "the training" in page
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL).lower()
    assert not re.search(r'(src|href)="(?!data:|#|\$)|url\((?!#)|@import|fetch\(', page)
    assert sorted(p.name for p in (run / "figures").glob("*.svg")) == ["measures.svg", "pictures.svg"]
    config = json.loads((run / "config.json").read_text())
    assert list(config["inputs"]["checkpoints"]) == ["5", "40", "100"] and "neighbours are 13 of 130" in page
    assert "batch_size" not in config["options"]


def measured(**values: list[float]) -> pd.DataFrame:
    """Rows of three checkpoints; the measures that are not given end at 1 at once."""
    table = []
    for measure in ("sample to noise", "noise to sample", *COMPARED):
        percent = "to" in measure.split()
        own = values.get(measure.replace(" ", "_"), [98.0] * 3 if percent else [1.0] * 3)
        for step, value in zip((10, 100, 1000), own, strict=True):
            table.append(
                {
                    "step": step,
                    "measure": measure,
                    "value": value,
                    "low": value - 2 if percent else math.nan,
                    "high": value + 2 if percent else math.nan,
                    "n": 100,
                    "chance": 1.0 if percent else 0.0,
                }
            )
    return pd.DataFrame(table)


def test_a_measure_stands_from_where_it_no_longer_leaves_its_end() -> None:
    found = {s.measure: s.step for s in standings(measured(CKA=[0.2, 0.96, 1], SSIM=[0.96, 0.9, 1], PSNR=[3, 9, math.nan]))}
    assert found["CKA"] == 100 and found["SSIM"] == 1000 and found["SVCCA"] == 10 and found["PSNR"] is None
    # in the last one's interval, though further than 5 % of the way from chance
    found = {s.measure: s.step for s in standings(measured(noise_to_sample=[2, 11, 10.0]))}
    assert found["noise to sample"] == 100 and found["sample to noise"] == 10
    # a last one that is not clear of chance stands nowhere
    assert {s.measure: s.step for s in standings(measured(noise_to_sample=[1, 2, 2.0]))}["noise to sample"] is None
    # near 1 by chance already: SVCCA of few components
    few = measured(SVCCA=[0.99, 0.99, 1])
    few.loc[(few.measure == "SVCCA") & (few.step < 1000), "chance"] = 0.985
    assert {s.measure: s.step for s in standings(few)}["SVCCA"] == 1000


def test_the_headline_says_when_the_mapping_stands() -> None:
    said = headline(measured(sample_to_noise=[50, 97, 98.0], CKA=[0.2, 0.97, 1], SSIM=[0.1, 0.8, 1]))
    assert said == (
        "The mapping between noise and sample stands after 10 % of the training: L2 finds the noise of 97.0 % of the samples "
        "and the sample of 98.0 % of the noises. At step 100 CKA to the last samples is 0.97, SSIM 0.80; CKA stands after 10 % "
        "of the training; SSIM stands only at the end of the training."
    )
    late = headline(measured(sample_to_noise=[50, 60, 98.0], CKA=[0.2, 0.5, 1]))
    assert "stands only at the end" in late and "At step 100 CKA to the last samples is 0.50" in late
    assert "stands one way, after 1 % of the training: L2 finds the noise of 98.0 %" in headline(
        measured(noise_to_sample=[1, 1, 1.0])
    )
    assert "Whether there is a mapping between noise and sample cannot be told" in headline(
        measured(noise_to_sample=[1, 1, 1.0], sample_to_noise=[1, 1, 1.0])
    )


@pytest.mark.slow
def test_an_untrained_checkpoint_and_a_great_many_of_them_have_a_place_in_the_figures(folder: Path, tmp_path: Path) -> None:
    from probekit.report.dynamics_diffusion import COLUMNS, _columns, findings

    shutil.copytree(folder / "whole" / "images", tmp_path / "images")
    shutil.copyfile(folder / "whole" / "config.json", tmp_path / "config.json")
    rows = measured(CKA=[0.2, 0.5, 1])
    rows["step"] = rows.step.replace({10: 0})
    assert "from step 0" in findings(Run.opened(tmp_path), rows, 10).write().read_text()
    chosen = _columns(list(range(1, 41)))
    assert len(chosen) == COLUMNS and chosen[0] == 1 and chosen[-1] == 40 and chosen == sorted(set(chosen))


def test_bad_input_is_refused_in_one_line_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    first, last = (folder / "my-ddpm" / f"step-{step:06d}" for step in (5, 100))
    for name in ("one", "mixed", "sizes"):
        shutil.copytree(last, tmp_path / name / "step-000100")
    VQModel(block_out_channels=(8,), norm_num_groups=4, sample_size=8).save_pretrained(tmp_path / "mixed" / "step-000005")
    save(tiny(sample_size=16), tmp_path / "sizes" / "step-000005")
    before = sorted(tmp_path.rglob("*"))
    for model, said in {
        first: "0 checkpoints",
        "one": "1 checkpoints",
        "mixed": "step-000005': a vqvae, which makes no images from noise",
        "sizes": "step 5 has states 3x16x16 and images of 16 pixels, step 100 has states 3x8x8",
        "nowhere": "--model 'nowhere'",
    }.items():
        assert said in refused("dynamics", "diffusion", "--model", model, "--out", "run", cwd=tmp_path)
    many = refused("dynamics", "diffusion", "--model", first.parent, "--steps", "1001", "--out", "run", cwd=tmp_path)
    assert "steps 1001: choose 1 to 1000" in many
    assert "--n" in refused("dynamics", "diffusion", "--n", "15", "--out", "run", cwd=tmp_path)
    captioned = refused("dynamics", "diffusion", "--model", first.parent, "--prompt", "a dog", "--out", "run", cwd=tmp_path)
    assert "--prompt 'a dog'" in captioned and "takes none" in captioned
    nowhere = refused("dynamics", "diffusion", "--model", first.parent, "--device", "nowhere", "--out", "run", cwd=tmp_path)
    assert "device 'nowhere'" in nowhere
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [({"n": 15}, "--n 15"), ({"steps": 0}, "--steps 0"), ({"batch_size": 65}, "--batch-size 65"), ({"model": 3}, "--model 3")],
)
def test_bad_options_are_refused_in_python_as_on_the_command_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ProbekitError, match=said):
        DynamicsDiffusion(**options)

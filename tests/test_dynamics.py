from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline

from probekit import ProbekitError, models
from probekit.data.avatars import Avatars
from probekit.experiments import DynamicsFlow
from probekit.experiments.training import checkpoint_paths
from probekit.images import save_png
from probekit.models.families import glow
from probekit.report.dynamics_flow import plateaus
from probekit.zoo.avatar_families import _save_own
from tests.conftest import killed_once, probekit, refused, tiny


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Glow after 1, 10 and 40 steps."""
    folder = tmp_path_factory.mktemp("training") / "my-flow"
    torch.manual_seed(0)
    network = glow.Glow(in_channels=3, flows=2, blocks=2, affine=True, lu=True, width=16)
    images, generator = Avatars().images(range(64)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(1, 41):
        value = glow.nll(network, images[torch.randint(64, (16,), generator=generator)], generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step in (1, 10, 40):
            _save_own("glow")(network, folder / f"step-{step:06d}")
    return folder


@pytest.mark.slow
def test_every_checkpoint_is_probed_in_order(training: Path, tmp_path: Path) -> None:
    run = ["dynamics", "flow", "--model", training, "--train", "400", "--kind", "ridge", "--out", "run"]
    done = probekit(*run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(tmp_path / "run" / "results.parquet")
    assert rows.step.drop_duplicates().tolist() == [1, 10, 40] and rows.groupby("step").attribute.nunique().nunique() == 1
    assert rows.groupby("step").accuracy.mean().min() > 75  # a flow loses nothing: pixels can be read off it from the start
    assert ((rows.low <= rows.accuracy) & (rows.accuracy <= rows.high)).all()
    assert "each of 3 checkpoints, from step 1 to 40" in (tmp_path / "run" / "report.html").read_text()
    killed_once(run[:-2], tmp_path, "killed")
    assert (tmp_path / "killed" / "results.parquet").read_bytes() == (tmp_path / "run" / "results.parquet").read_bytes()


def test_too_few_images_for_any_probe_are_refused_in_one_line(training: Path, tmp_path: Path) -> None:
    said = refused("dynamics", "flow", "--model", training, "--train", "10", "--out", "run", cwd=tmp_path)
    assert "--train 10: too few images" in said


def test_an_attribute_stands_from_where_it_no_longer_leaves_the_last_interval() -> None:
    early = pd.DataFrame({"attribute": "early", "step": [1, 10, 100], "accuracy": [60.0, 88, 90], "low": 85.0, "high": 95.0})
    late = pd.DataFrame({"attribute": "late", "step": [1, 10, 100], "accuracy": [88.0, 60, 90], "low": 85.0, "high": 95.0})
    found = plateaus(pd.concat([early, late])).set_index("attribute").step
    assert found["early"] == 10 and found["late"] == 100


def test_fewer_than_two_checkpoints_and_spaces_that_are_not_there_are_refused(tmp_path: Path, training: Path) -> None:
    with pytest.raises(ProbekitError, match="0 checkpoints"):
        DynamicsFlow(model=str(tmp_path)).inputs()
    told = DynamicsFlow(model=str(training), space="eps", train=10, device="cpu").inputs()
    assert list(told["checkpoints"]) == ["1", "10", "40"] and len(set(told["checkpoints"].values())) == 3
    assert told["space"] == "eps"
    with pytest.raises(ProbekitError, match="no space 'w'"):
        DynamicsFlow(model=str(training), space="w", device="cpu").inputs()
    assert list(checkpoint_paths("avatar-flow")) == [100, 700, 1500, 3500, 5000]  # the finished model is the last


@pytest.mark.slow
def test_any_space_of_any_model_is_probed_one_checkpoint_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (5, 9):
        unet = tiny(sample_size=16)
        unet.conv_in.weight.data *= step
        DDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "my-ddpm" / f"step-{step}")
    monkeypatch.chdir(tmp_path)
    alive: list[weakref.ref[Any]] = []
    load = models.load

    def watched(*given: Any, **options: Any) -> Any:
        gc.collect()
        assert not any(network() is not None for network in alive)
        model = load(*given, **options)
        alive.append(weakref.ref(model.network))
        return model

    monkeypatch.setattr(models, "load", watched)
    h = "h:layer=down_blocks.1:t=200:steps=10"
    found = DynamicsFlow(model="my-ddpm", space=h, train=100, kind="ridge", device="cpu").run(out="run")
    assert found.rows.step.drop_duplicates().tolist() == [5, 9] and len(alive) >= 3
    assert f"latents ({h})" in (tmp_path / "run" / "report.html").read_text()
    # another layer is another space
    said = refused(
        "dynamics",
        "flow",
        "--model",
        "my-ddpm",
        "--space",
        "h:steps=10",
        "--train",
        100,
        "--kind",
        "ridge",
        "--device",
        "cpu",
        "--out",
        "run",
        cwd=tmp_path,
    )
    assert "holds a run of another config" in said and "space" in said
    said = refused("dynamics", "flow", "--model", "my-ddpm", "--space", "noise", "--out", "other", cwd=tmp_path)
    assert "--space 'noise': cannot encode" in said and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_shards_in_any_order_give_the_bytes_of_one_run_and_python_the_same_findings(
    training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    probes = DynamicsFlow(model=str(training), train=200, kind="ridge", device="cpu")
    found = probes.run(out="whole")
    assert list(found.rows.columns) == ["step", "attribute", "accuracy", "low", "high", "n"]
    page = found._repr_html_()
    assert page.count("<svg") == 1 and "Half of the attributes stand from step" in page and "Eyeglasses" in page
    units = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole" / "units").iterdir()}
    pd.testing.assert_frame_equal(probes.run(out="whole").rows, found.rows)
    assert {path: path.stat().st_mtime_ns for path in units} == units and len(units) == 3
    assert probes.run(out="shards", shard="3/3") is None and probes.run(out="shards", shard="1/3") is None
    assert probes.run(out="shards", shard="2/3") is not None
    for name in ("results.parquet", "figures/accuracy.svg"):
        assert (tmp_path / "shards" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    done = probekit("describe", "whole")
    assert done.returncode == 0 and "stands from step" in done.stdout and "Half of the attributes" in done.stdout


def test_checkpoints_of_other_sizes_and_images_without_labels_are_refused(tmp_path: Path) -> None:
    for step, size in ((5, 16), (9, 8)):
        DDPMPipeline(tiny(sample_size=size), DDIMScheduler()).save_pretrained(tmp_path / "my-ddpm" / f"step-{step}")
    options = ["--space", "noised:steps=4", "--train", 10, "--out", "run"]
    said = refused("dynamics", "flow", "--model", "my-ddpm", *options, cwd=tmp_path)
    assert "make no series (step 5 has images of 16 pixels, step 9 has images of 8 pixels)" in said
    shutil.rmtree(tmp_path / "my-ddpm" / "step-9")
    shutil.copytree(tmp_path / "my-ddpm" / "step-5", tmp_path / "my-ddpm" / "step-9")
    (tmp_path / "pictures").mkdir()
    for i in range(20):
        save_png(torch.zeros(3, 8, 8) + i / 20, tmp_path / "pictures" / f"{i}.png")
    said = refused("dynamics", "flow", "--model", "my-ddpm", "--data", "folder:pictures", *options, cwd=tmp_path)
    assert "--data 'folder:pictures': has no binary labels" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "forest"}, "--kind 'forest': choose lasso"),
        ({"train": 9}, "--train 9"),
        ({"space": 3}, "--space 3"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_bad_options_are_refused_in_python_as_on_the_command_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ProbekitError, match=said):
        DynamicsFlow(**options)

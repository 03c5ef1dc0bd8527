from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from probekit.experiments.dynamics import checkpoints

from probekit.data.avatars import Avatars
from probekit.errors import ProbekitError
from probekit.models import glow
from probekit.report.dynamics import plateaus
from probekit.zoo.avatar_families import _save_own
from tests.conftest import killed_once, probekit, refused


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


def test_fewer_than_two_checkpoints_are_refused(tmp_path: Path, training: Path) -> None:
    with pytest.raises(ProbekitError, match="0 checkpoints"):
        checkpoints(str(tmp_path), None, "cpu")
    assert list(checkpoints(str(training), "eps", "cpu")) == [1, 10, 40]
    with pytest.raises(ProbekitError, match="no space 'w'"):
        checkpoints(str(training), "w", "cpu")

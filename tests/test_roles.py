"""Sweeps of mini-sd, the bundled model: what roles they find, and that they find it again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probekit.metrics.roles import NO_ROLE, roles, summarise
from tests.conftest import probekit, process


@pytest.mark.slow
def test_roles_of_mini_sd_agree_between_two_halves_of_the_pairs(tmp_path: Path) -> None:
    done = probekit("inject", "sweep", "--pairs", "4", "--num-steps", "2", "--out", tmp_path / "swept")
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(tmp_path / "swept" / "results.parquet")
    rows = rows[rows.descriptor == "reader"]
    number = rows.pair.str[-2:].astype(int)
    halves = [summarise(rows[number % 2 == k]).set_index(["layer", "factor"]).transfer for k in (0, 1)]
    a, b = (half.sort_index().to_numpy() for half in halves)
    assert len(a) == 18 * 3
    assert np.corrcoef(a, b)[0, 1] > 0.7
    # no layer that has a role on all pairs leads in another factor on either half
    found = roles(summarise(rows))
    specialised = found[~found.role.isin([NO_ROLE, "everything"])]
    assert len(specialised) >= 1
    for layer in specialised.itertuples():
        assert all(half[layer.layer].idxmax() == layer.role for half in halves), layer.layer


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    layers = ["--layers", "mid_block.*", "--layers", "up_blocks.1.resnets.*"]
    sweep = ["inject", "sweep", "--pairs", "1", "--factors", "structure", "--num-steps", "5", *layers, "--out"]
    done = probekit(*sweep, "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with process(*sweep, "there", cwd=tmp_path) as run:
        _, said = run.communicate()
    assert run.returncode == 0, said
    for name in ("results.parquet", "figures/roles.png", "figures/roles.svg"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name

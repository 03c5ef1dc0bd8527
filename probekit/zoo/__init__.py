"""The zoo: small models trained by recipes of this package, and where their weights lie."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

PIPELINES = ("mini-sd",)
"""Bundled text-to-image pipelines."""

MODELS = ("avatar-vae", "avatar-vqvae", "avatar-gan", "avatar-flow", "avatar-ddpm", "mini-flow", "avatar-ldm")
"""Bundled models with latent spaces."""

WEIGHTS = Path(__file__).parent / "weights"


def weights(name: str) -> Path:
    """The folder of a bundled model's weights."""
    return WEIGHTS / name


def trained(name: str) -> bool:
    """Whether a bundled model's weights are there; while it trains, its folder holds snapshots only."""
    return any(path.is_file() for path in weights(name).glob("*"))


class Measured(NamedTuple):
    """One line of a model's measurement: what, its value, the bar it should reach if any, and the unit.

    The unit `share` is of [0, 1], shown in percent. The value is NaN where the model cannot do it.
    """

    what: str
    value: float
    bar: float | None = None
    unit: str = "share"


GUIDANCE = {"mini-sd": 3.0}
"""The guidance scale at which a bundled pipeline was measured."""

"""The zoo: small models trained by recipes of this package, and where their weights lie."""

from __future__ import annotations

from pathlib import Path

PIPELINES = ("mini-sd",)
"""Bundled text-to-image pipelines."""

MODELS = ("avatar-vae", "avatar-vqvae", "avatar-gan", "avatar-flow", "avatar-ddpm")
"""Bundled models with latent spaces."""

WEIGHTS = Path(__file__).parent / "weights"


def weights(name: str) -> Path:
    """The folder of a bundled model's weights."""
    return WEIGHTS / name


GUIDANCE = {"mini-sd": 3.0}
"""The guidance scale at which a bundled pipeline was measured."""

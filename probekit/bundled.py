"""Which models ship with probekit, and where their files are."""

from __future__ import annotations

from pathlib import Path

PIPELINES = ("mini-sd",)
"""Bundled text-to-image pipelines."""

MODELS = ("avatar-vae", "avatar-vqvae", "avatar-gan", "avatar-flow", "avatar-ddpm", "photo-ddpm", "mini-flow", "avatar-ldm")
"""Bundled models with latent spaces: of avatars, and one of photographs."""

GUIDANCE = {"mini-sd": 3.0}
"""The guidance scale at which a bundled pipeline was measured."""

WEIGHTS = Path(__file__).parent / "zoo" / "weights"


def weights(name: str) -> Path:
    """The folder of a bundled model's weights."""
    return WEIGHTS / name


def trained(name: str) -> bool:
    """Whether a bundled model's weights are there; while it trains, its folder holds snapshots only."""
    return any(path.is_file() for path in weights(name).glob("*"))

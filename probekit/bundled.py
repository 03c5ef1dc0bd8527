"""Which models ship with probekit, and where their files are."""

from __future__ import annotations

import json
from pathlib import Path

PIPELINES = ("mini-sd", "mini-sd3", "mini-dit", "planted-sd")
"""Bundled text-to-image pipelines."""

MODELS = ("avatar-vae", "avatar-vqvae", "avatar-gan", "avatar-flow", "avatar-ddpm", "photo-ddpm", "mini-flow", "avatar-ldm")
"""Bundled models with latent spaces: of avatars, and one of photographs."""

DATA = {**dict.fromkeys(PIPELINES, "scenes"), **dict.fromkeys(MODELS, "avatars"), "photo-ddpm": "photos"}
"""The data set that a bundled model was trained on."""

GUIDANCE = {"mini-sd": 3.0, "planted-sd": 3.0, "mini-sd3": 3.0, "mini-dit": 3.0}
"""The guidance scale at which a bundled pipeline was measured."""

WEIGHTS = Path(__file__).parent / "zoo" / "weights"

BORROWED = "borrowed.json"
"""A file in a pipeline's folder: components that it has from bundled models, and where theirs lie (`mini-sd/vae`)."""


def weights(name: str) -> Path:
    """The folder of a bundled model's weights."""
    return WEIGHTS / name


def trained(name: str) -> bool:
    """Whether a bundled model's weights are there; while it trains, its folder holds snapshots only."""
    return any(path.is_file() for path in weights(name).glob("*"))


def borrowed(folder: Path) -> dict[str, Path]:
    """Components that the pipeline in this folder has from bundled models, and the folders where they lie."""
    file = folder / BORROWED
    return {part: weights(place) for part, place in json.loads(file.read_bytes()).items()} if file.is_file() else {}

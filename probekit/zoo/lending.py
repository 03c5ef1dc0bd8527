"""How a pipeline of the zoo is saved that borrows components of other models: without them, with where they lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probekit.bundled import BORROWED
from probekit.files import write_whole


def save(pipeline: Any, folder: Path, lenders: Mapping[str, str]) -> None:
    """Save a diffusers pipeline without the components that others lend, by the places of theirs (`mini-sd/vae`)."""
    pipeline.save_pretrained(folder)
    for part in lenders:
        shutil.rmtree(folder / part)
    write_whole(folder / BORROWED, (json.dumps(dict(lenders), indent=2) + "\n").encode())

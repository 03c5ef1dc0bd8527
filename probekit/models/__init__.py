"""Models and how to load them: a bundled name, a local folder, a hub id."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from probekit.errors import ProbekitError
from probekit.models.text_to_image import TextToImage
from probekit.zoo import PIPELINES, weights

__all__ = ["TextToImage", "load"]


def load(name_or_path: str | Path, *, device: str = "auto", dtype: str = "auto") -> TextToImage:
    """Load a text-to-image pipeline.

    name_or_path: a bundled model (`mini-sd`), a folder that `save_pretrained` wrote, or a hub id such as
    `stabilityai/stable-diffusion-2`. device: `auto` (cuda, then mps, then cpu) or a torch device. dtype: `auto` (float32 on
    the CPU, elsewhere bfloat16 for transformers and float16 for U-Nets), or `float32`, `float16`, `bfloat16`.

    Raises ProbekitError, in one line, for what is none of these and for a folder or file that cannot be read.
    """
    name = str(name_or_path)
    if name in PIPELINES:
        return TextToImage.from_pretrained(weights(name), name=name, device=device, dtype=dtype)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ProbekitError(f"model {name!r}: the folder is no diffusers pipeline, it has no model_index.json")
        return TextToImage.from_pretrained(path, name=name, device=device, dtype=dtype)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        near = difflib.get_close_matches(name, PIPELINES, n=1) or list(PIPELINES)
        raise ProbekitError(
            f"model {name!r}: neither a bundled model ({', '.join(near)}) nor a folder nor a hub id (owner/name)"
        )
    return TextToImage.from_pretrained(name, name=name, device=device, dtype=dtype)

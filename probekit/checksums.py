"""Checksums: whether what lies on the disk is what was written there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from probekit.files import write_whole


def sealed(content: Mapping[str, Any]) -> bytes:
    """The content, which JSON can hold, as JSON with a checksum over all of it."""
    return json.dumps({**content, "sha256": _checksum(content)}, indent=2).encode()


def unsealed(stored: bytes) -> dict[str, Any]:
    """What `sealed` was given. Raises ValueError for anything else."""
    try:
        content = json.loads(stored)
        if isinstance(content, dict) and content.pop("sha256", None) == _checksum(content):
            return content
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    raise ValueError("not what was written")


def write_manifest(manifest: Path, files: Mapping[str, str]) -> None:
    """Write down what files hold. files: their `digest` by their place, as `broken` is told it."""
    manifest.parent.mkdir(exist_ok=True)
    write_whole(manifest, sealed({"files": dict(files)}))


def broken(manifest: Path, folder: Path, only: Callable[[str], bool] = lambda place: True) -> str:
    """Which file of a manifest, by its place in the folder, does not hold what it held; '' where all do.

    only: which of them to look into.
    """
    try:
        files = unsealed(manifest.read_bytes())["files"]
    except (OSError, ValueError, KeyError):
        return str(manifest.relative_to(folder))
    for place, expected in ((place, files[place]) for place in files if only(place)):
        try:
            if digest(folder / place) != expected:
                return place
        except OSError:  # it is missing, or a folder
            return place
    return ""


def digest(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(content: bytes) -> str:
    """The checksum of a file with that content."""
    return hashlib.sha256(content).hexdigest()


def _checksum(content: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(content, sort_keys=True).encode())

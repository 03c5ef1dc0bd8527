"""Files and folders that are written whole or not at all, and what they are called."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from probekit.hooks.errors import ProbekitError

_NUMBERED = re.compile(r"\.[0-9a-f]{12,32}\.partial$")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or not at all: temporary file, fsync, rename. Several processes may write the same file."""
    with whole_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at once, with all that is written into it meanwhile; one that is there gives way."""
    partial = _partial(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at once, with all that is written into it meanwhile; one that is there gives way."""
    partial = _partial(path)
    try:
        partial.mkdir(parents=True)
        yield partial
        remove(path)
        partial.rename(path)
    finally:
        remove(partial)


def _partial(path: Path) -> Path:
    # a number of its own: processes of two machines may have the same id
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")


def sweep(folder: Path) -> None:
    """Remove what was being written in a folder, by this house or by zarr, by processes that were killed meanwhile."""
    for left in list(folder.rglob("*.partial")):
        if _NUMBERED.search(left.name):
            remove(left)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def file_name(label: str) -> str:
    """The label with everything but letters, digits, `-` and `.` made `_`: what units and folders are called on the disk.

    A long one is cut, with a hash of the whole at its end: a file's name has at most 255 bytes, and endings are added.
    """
    name = "".join(c if c.isalnum() or c in "-." else "_" for c in label)
    if len(name.encode()) <= _LONGEST:
        return name
    whole = hashlib.sha256(label.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{name.encode()[: _LONGEST - 13].decode(errors='ignore')}-{whole}"


_LONGEST = 160
"""Bytes of a name that something is added to."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an OSError inside into the ProbekitError that says that the folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise ProbekitError(f"--out {str(folder)!r}: cannot be written ({error.strerror or error})") from error

"""Files that are written whole or not at all, and what they are called."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from probekit.hooks.errors import ProbekitError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or not at all: temporary file, fsync, rename. Several processes may write the same file."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


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

"""What comes from outside, looked at before anything is made of it: texts, files, JSON, YAML, places to write to.

Whatever is read by probekit because somebody named it is read through here. `said` is how an error begins: the option or
thing and its value, as `--pairs-file 'mine.yaml'`.
"""

from __future__ import annotations

import json
import os
import stat
import unicodedata
from pathlib import Path
from typing import Any

from probekit.hooks.errors import ProbekitError

TEXT = 10_000
"""Characters of a text, at most."""
NAME = 100
"""Characters of a name, at most: of a factor, a label, whatever becomes a heading or a file's name."""
_DEPTH = 20
"""How deep lists and mappings may be nested in a file that somebody writes."""


# --- texts -------------------------------------------------------------------------------------------------------------


def shown(value: object) -> str:
    """The value as an error says it: escaped, on one line, and cut where it is long."""
    said = repr(value)
    return said if len(said) <= 160 else f"{said[:120]}… ({len(said):,} characters)"


def text(said: str, value: str) -> str:
    """The text. Raises ProbekitError for one that is empty or too long, and for what no file, page or terminal can show."""
    if not value.strip():
        raise ProbekitError(f"{said}: is empty")
    if len(value) > TEXT:
        raise ProbekitError(f"{said}: has {len(value):,} characters, {TEXT:,} will do")
    if odd := next((c for c in value if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n"), None):
        what = "half a character" if unicodedata.category(odd) == "Cs" else "a control character"
        raise ProbekitError(f"{said}: has {what} in it ({odd!r})")
    return value


def name(said: str, value: str) -> str:
    """The same for a name, which is one line of at most `NAME` characters."""
    text(said, value)
    if len(value) > NAME or "\n" in value or "\t" in value:
        raise ProbekitError(f"{said}: a name of one line and at most {NAME} characters is needed")
    return value


# --- files -------------------------------------------------------------------------------------------------------------


def path(said: str, named: str | Path) -> Path:
    """The path with `~` made whole. Raises ProbekitError for one that cannot be looked at.

    Such as too long a name, a folder that may not be read, nobody's home, a zero byte; not for one that leads nowhere.
    """
    try:
        found = Path(named).expanduser()
        found.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ProbekitError(f"{said}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    return found


def file(said: str, path: Path, most: int) -> Path:
    """The path of a plain file of at most `most` bytes.

    Raises ProbekitError where there is none, for what is no plain file (a folder, or a pipe, which one would wait for
    for ever), for a larger one, and for a path that leads nowhere, such as a link to itself.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # the latter for a zero byte in the name
        raise ProbekitError(f"{said}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise ProbekitError(f"{said}: cannot be read (it is {kind}, no file)")
    if found.st_size > most:
        raise ProbekitError(f"{said}: has {found.st_size:,} bytes; at most {most:,} are read")
    return path


def content(said: str, path: Path, most: int) -> bytes:
    """All bytes of a file. Raises ProbekitError as `file`."""
    try:
        return file(said, path, most).read_bytes()
    except OSError as error:
        raise ProbekitError(f"{said}: cannot be read ({error.strerror or error})") from error


def is_folder(path: Path) -> bool:
    """Whether a folder is there; False too for a path that cannot be looked at."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def json_object(said: str, path: Path, most: int = 2**24) -> dict[str, Any]:
    """The object in a JSON file. Raises ProbekitError for a file that holds none, and as `file`."""
    raw = content(said, path, most)
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ProbekitError(f"{said}: is no JSON ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(found, dict):
        raise ProbekitError(f"{said}: holds no JSON object")
    return found


def yaml_value(said: str, path: Path, most: int = 2**20) -> Any:
    """What a YAML file holds, of plain values alone. Raises ProbekitError for what is no YAML, and as `file`.

    Refused before anything is built: aliases, with which a few lines stand for billions, and deep nesting.
    """
    import yaml

    raw = content(said, path, most)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        depth = 0
        for event in yaml.parse(raw, Loader=loader):
            line = event.start_mark.line + 1 if event.start_mark else 1
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ProbekitError(f"{said}: has an alias (*{event.anchor}) in line {line}; write it out")
            if depth > _DEPTH:
                raise ProbekitError(f"{said}: is nested more than {_DEPTH} deep in line {line}")
        return yaml.load(raw, Loader=loader)
    except ProbekitError:
        raise
    # beside its own errors, those of Python's numbers and dates, and of bytes that are no text
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, TypeError) as error:
        raise ProbekitError(f"{said}: is no YAML ({' '.join(str(error).split())[:120]})") from error


# --- places to write to ------------------------------------------------------------------------------------------------


def folder_to_write(said: str, folder: Path) -> Path:
    """The path of a folder that is there, or can be made. Raises ProbekitError, before any work, where neither is so.

    Of the folders above it the nearest that is there must be one, and writable; nothing is made.
    """
    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
        if not there.is_dir():
            raise ProbekitError(f"{said}: cannot be written ({str(there)!r} is no folder)")
        if any(len(os.fsencode(part)) > 255 for part in folder.parts):
            raise ProbekitError(f"{said}: cannot be written (File name too long)")
    except (OSError, ValueError) as error:
        raise ProbekitError(f"{said}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    if not os.access(there, os.W_OK | os.X_OK):
        raise ProbekitError(f"{said}: cannot be written (Permission denied)")
    return folder


def file_to_write(said: str, path: Path) -> Path:
    """The path of a file that is there, or can be made. Raises ProbekitError as `folder_to_write`."""
    folder_to_write(said, path.parent)
    if len(os.fsencode(path.name)) > 255 or (os.path.lexists(path) and not path.is_file()):
        raise ProbekitError(f"{said}: cannot be written (it is no file)")
    return path

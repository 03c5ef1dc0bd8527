"""Code of the user's own: a Python file that is run, and what is called of it; whatever it raises is said in one line."""

from __future__ import annotations

import contextlib
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from probekit import checked
from probekit.hooks.errors import ProbekitError


def run(said: str, file: Path) -> dict[str, Any]:
    """What a Python file defines. Raises ProbekitError where it cannot be read, and as `called`."""
    checked.file(said, file, 2**24)
    with called(said):
        return runpy.run_path(str(file))


@contextlib.contextmanager
def called(said: str) -> Iterator[None]:
    """Turn whatever code of the user's raises inside, an attempt to end the process too, into a ProbekitError.

    An interruption from the keyboard stays one, and so does a ProbekitError.
    """
    try:
        yield
    except (ProbekitError, KeyboardInterrupt):
        raise
    except BaseException as error:
        try:
            told = " ".join(str(error).split())[:300]
        except Exception:  # an error of the user's own, too
            told = "which cannot be told"
        raise ProbekitError(f"{said}: {type(error).__name__}: {told}") from error

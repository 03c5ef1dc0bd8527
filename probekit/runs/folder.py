"""A run's folder: its config, its finished units, its results; and how a run goes on where it stopped.

config.json      every option, the seed, the package's version, the model's fingerprint
units/*.parquet  the rows of each finished unit, written whole or not at all
states/*.npy     tensors with a row a picture, filled block by block
images/UNIT/     the pictures of a unit, in place before its rows are
results.parquet  all rows of all units, once every unit is finished
figures/, report.html
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.hooks.errors import ProbekitError

from probekit import __version__

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

BLOCK = 64
"""Rows of an array of states that are made and written at a time."""


class Run:
    """One run's folder. Raises ProbekitError, before anything is written, when it belongs to another config."""

    def __init__(self, folder: Path, experiment: str, options: Mapping[str, Any], command: Sequence[str]) -> None:
        self.folder = folder
        self.config: dict[str, Any] = {"experiment": experiment, "probekit": __version__, "options": dict(options)}
        stored = folder / "config.json"
        with writing(folder):
            if stored.exists():
                self._refuse_another(_read_config(folder))
            elif folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
                raise ProbekitError(f"--out {str(folder)!r}: exists and is no run folder; name a new or an empty one")
            else:
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(stored, json.dumps(self.config | {"command": list(command)}, indent=2).encode())
            (folder / "units").mkdir(exist_ok=True)
            (folder / "images").mkdir(exist_ok=True)

    def _refuse_another(self, stored: Mapping[str, Any]) -> None:
        ours = {**self.config["options"], "experiment": self.config["experiment"], "probekit": self.config["probekit"]}
        theirs = {**stored["options"], "experiment": stored["experiment"], "probekit": stored["probekit"]}
        # through JSON, so that a tuple and a list count as the same
        ours = json.loads(json.dumps(ours))
        differ = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
        if differ:
            said = ", ".join(
                f"{k} {theirs.get(k)!r} there, {ours.get(k)!r} here" if len(repr(ours.get(k))) < 80 else k for k in differ
            )
            raise ProbekitError(f"--out {str(self.folder)!r}: holds a run of another config ({said}); name another folder")

    def finished(self, unit: str) -> bool:
        """Whether the unit's rows are there."""
        return (self.folder / "units" / f"{unit}.parquet").exists()

    def write(self, unit: str, rows: pd.DataFrame, images: Mapping[str, Tensor]) -> None:
        """Keep a finished unit: its pictures, (3, h, w) in [-1, 1] by name, then its rows."""
        from probekit.images import save_png

        with writing(self.folder):
            final, partial = self.folder / "images" / unit, self.folder / "images" / f"{unit}.partial"
            for leftover in (final, partial):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, image in images.items():
                save_png(image, partial / f"{name}.png")
            partial.rename(final)
            write_whole(self.folder / "units" / f"{unit}.parquet", rows.to_parquet(index=False))

    def states(
        self, name: str, n: int, shape: Sequence[int], make: Callable[[range], Tensor], on_block: Callable[[int], None]
    ) -> np.ndarray:
        """A float32 array (n, *shape) in states/NAME.npy, not held in memory; writing to it does not reach the file.

        make: gives the rows of a block of `BLOCK`; blocks that an earlier run has finished are not made again.
        on_block: told how many rows each block has, finished ones included.
        """
        import numpy as np

        file, mark = self.folder / "states" / f"{name}.npy", self.folder / "states" / f"{name}.done"
        with writing(self.folder):
            file.parent.mkdir(exist_ok=True)
            told = mark.read_text().split() if mark.exists() and file.exists() else []
            # a file of another size was cut short, and would be filled with zeros
            done = int(told[0]) if len(told) == 2 and int(told[1]) == file.stat().st_size else 0
            if not done:
                np.lib.format.open_memmap(file, "w+", np.float32, (n, *shape))
            on_block(done)
            for start in range(done, n, BLOCK):
                rows = range(start, min(start + BLOCK, n))
                made = make(rows).numpy()
                # opened anew for each block: what was written through a map counts as the process's memory
                array = np.lib.format.open_memmap(file, "r+")
                array[rows.start : rows.stop] = made
                array.flush()
                write_whole(mark, f"{rows.stop} {file.stat().st_size}".encode())
                on_block(len(rows))
            return np.load(file, mmap_mode="c")

    def collect(self, units: Sequence[str]) -> pd.DataFrame:
        """All rows in the order of `units`; also written to results.parquet, unless there are none."""
        import pandas as pd

        rows = pd.concat([pd.read_parquet(self.folder / "units" / f"{u}.parquet") for u in units], ignore_index=True)
        if not rows.empty:
            with writing(self.folder):
                write_whole(self.folder / "results.parquet", rows.to_parquet(index=False))
        return rows


def open_run(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """The config and results of a finished run. Raises ProbekitError where there is none, or it has not finished."""
    import pandas as pd

    config = _read_config(folder)
    results = folder / "results.parquet"
    if not results.exists():
        done = len(list((folder / "units").glob("*.parquet")))
        raise ProbekitError(f"run {str(folder)!r}: not finished ({done} units are); start it again with the same options")
    try:
        return config, pd.read_parquet(results)
    except (OSError, ValueError) as error:
        raise ProbekitError(
            f"run {str(folder)!r}: its results.parquet is damaged; delete it and start the run again"
        ) from error


def default_folder(experiment: str, label: str, options: Mapping[str, Any]) -> Path:
    """runs/<experiment>/<label>-<hash of the options>: the same options find the same folder again."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / experiment / f"{label}-{digest}"


def file_name(label: str) -> str:
    """The label with everything but letters, digits, `-` and `.` made `_`: what units and folders are called on the disk."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in label)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or not at all: temporary file, fsync, rename."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return {key: config[key] for key in ("experiment", "probekit", "options", "command")}
    except OSError as error:
        raise ProbekitError(f"run {str(folder)!r}: no run folder, it has no config.json") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ProbekitError(f"run {str(folder)!r}: its config.json is damaged") from error


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an OSError inside into the ProbekitError that says that the folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise ProbekitError(f"--out {str(folder)!r}: cannot be written ({error.strerror or error})") from error

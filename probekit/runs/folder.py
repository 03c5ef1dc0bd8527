"""A run's folder: its config, its finished units, its results; and how a run goes on where it stopped.

config.json        the experiment, its options, the fingerprints of what they name, the package's version
units/NAME.parquet the rows of each finished unit, written whole or not at all, and after all else of the unit
states/NAME/*.npy  the arrays of a unit that other units need
images/NAME/*.png  the pictures of a unit
results.parquet    all rows of all units, once every unit is finished
figures/, report.html
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit import __version__
from probekit.files import file_name, write_whole, writing
from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from probekit.runs.experiment import Work

FORM = 2
"""Of the folder and its config; those of another form are refused."""


class Run:
    """One run's folder. Raises ProbekitError, before anything is written, when it belongs to another config.

    Several processes may fill one folder: a unit appears at once and whole, and is the same whoever did it.
    """

    def __init__(
        self,
        folder: Path,
        experiment: str,
        options: Mapping[str, Any],
        inputs: Mapping[str, Any] | None = None,
        command: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        told = {"experiment": experiment, "form": FORM, "probekit": __version__, "options": options, "inputs": inputs or {}}
        # through JSON, so that a tuple and a list count as the same
        self.config: dict[str, Any] = json.loads(json.dumps(told, default=str)) | {"command": list(command)}
        stored = folder / "config.json"
        with writing(folder):
            if stored.exists():
                self._refuse_another(_read_config(folder))
            elif folder.exists() and any(_there(folder)):
                raise ProbekitError(f"--out {str(folder)!r}: exists and is no run folder; name a new or an empty one")
            else:
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(stored, json.dumps(self.config, indent=2).encode())
            for part in ("units", "images", "states"):
                (folder / part).mkdir(exist_ok=True)

    @classmethod
    def opened(cls, folder: Path) -> Run:
        """The run in a folder that is one. Raises ProbekitError where it is none, or one of another form."""
        run = cls.__new__(cls)
        run.folder, run.config = folder, _read_config(folder)
        return run

    def _refuse_another(self, stored: Mapping[str, Any]) -> None:
        ours, theirs = (_flat(config) for config in (self.config, stored))
        differ = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        if differ:
            said = ", ".join(
                f"{k[1]} {theirs.get(k)!r} there, {ours.get(k)!r} here" if len(repr(ours.get(k))) < 80 else k[1] for k in differ
            )
            raise ProbekitError(f"--out {str(self.folder)!r}: holds a run of another config ({said}); name another folder")

    def finished(self, unit: str) -> bool:
        """Whether the unit is done."""
        return (self.folder / "units" / f"{file_name(unit)}.parquet").exists()

    def write(self, unit: str, work: Work) -> None:
        """Keep a finished unit: its arrays and pictures, then its rows. A unit that is there already is left as it is."""
        import pandas as pd

        from probekit.images import save_png

        name = file_name(unit)
        rows = work.rows if isinstance(work.rows, pd.DataFrame) else pd.DataFrame(list(work.rows))
        with writing(self.folder):
            if work.arrays:
                with _whole_folder(self.folder / "states" / name) as partial:
                    for key, array in work.arrays.items():
                        _save_array(array, partial / f"{key}.npy")
            if work.pictures:
                with _whole_folder(self.folder / "images" / name) as partial:
                    for key, image in work.pictures.items():
                        save_png(image, partial / f"{key}.png")
            if not self.finished(unit):
                write_whole(self.folder / "units" / f"{name}.parquet", rows.to_parquet(index=False))

    def arrays(self, unit: str) -> dict[str, np.ndarray]:
        """The arrays of a finished unit by name; read from the disk as they are used, and not written to."""
        import numpy as np

        found = sorted((self.folder / "states" / file_name(unit)).glob("*.npy"))
        try:
            return {path.stem: np.load(path, mmap_mode="c") for path in found}
        except (OSError, ValueError) as error:
            raise ProbekitError(
                f"run {str(self.folder)!r}: the arrays of {unit!r} are damaged; delete them and its unit"
            ) from error

    def array(self, unit: str, key: str) -> Path:
        """Where a unit's array lies."""
        return self.folder / "states" / file_name(unit) / f"{key}.npy"

    def picture(self, unit: str, name: str) -> Path:
        """Where a unit's picture lies."""
        return self.folder / "images" / file_name(unit) / f"{name}.png"

    def rows(self, units: Sequence[str]) -> pd.DataFrame:
        """All rows of finished units, in the order of `units`."""
        import pandas as pd

        parts = [pd.read_parquet(self.folder / "units" / f"{file_name(u)}.parquet") for u in units]
        some = [part for part in parts if not part.empty]
        return pd.concat(some, ignore_index=True) if some else pd.DataFrame()

    def collect(self, units: Sequence[str]) -> pd.DataFrame:
        """`rows`, also written to results.parquet, unless there are none."""
        rows = self.rows(units)
        if not rows.empty:
            with writing(self.folder):
                write_whole(self.folder / "results.parquet", rows.to_parquet(index=False))
        return rows

    def results(self) -> pd.DataFrame:
        """The rows of a finished run. Raises ProbekitError where it has not finished, or they are damaged."""
        import pandas as pd

        results = self.folder / "results.parquet"
        if not results.exists():
            done = len(list((self.folder / "units").glob("*.parquet")))
            raise ProbekitError(
                f"run {str(self.folder)!r}: not finished ({done} units are); start it again with the same options"
            )
        try:
            return pd.read_parquet(results)
        except (OSError, ValueError) as error:
            raise ProbekitError(
                f"run {str(self.folder)!r}: its results.parquet is damaged; delete it and start the run again"
            ) from error


class Stacked:
    """The rows of several files' arrays as one array (n, *shape), of which only the slices asked for are in memory.

    Raises ProbekitError for a file that is damaged, and for arrays whose rows differ in shape.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        first = self._open(self._files[0])
        self._starts = [0]
        for file in self._files:
            here = self._open(file)
            if (here.shape[1:], here.dtype) != (first.shape[1:], first.dtype):
                raise ProbekitError(
                    f"{str(file)!r}: rows {here.shape[1:]} of {here.dtype}, not {first.shape[1:]} of {first.dtype}"
                )
            self._starts.append(self._starts[-1] + len(here))
        self.shape, self.dtype, self.ndim = (self._starts[-1], *first.shape[1:]), first.dtype, first.ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice) -> np.ndarray:
        """A copy of one row, or of those from start to stop."""
        import numpy as np

        start, stop, _ = (rows, rows + 1, 1) if isinstance(rows, int) else rows.indices(len(self))
        out = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        for file, first, last in zip(self._files, self._starts, self._starts[1:], strict=False):
            low, high = max(start, first), min(stop, last)
            if low < high:
                out[low - start : high - start] = self._open(file)[low - first : high - first]
        return out[0] if isinstance(rows, int) else out

    @staticmethod
    def _open(file: Path) -> np.ndarray:
        import numpy as np

        try:
            return np.load(file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ProbekitError(
                f"{str(file)!r}: is damaged or missing; delete its unit, the same command makes it again"
            ) from error


def _save_array(array: np.ndarray, path: Path) -> None:
    import numpy as np

    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


class _whole_folder:
    """A folder that appears at once, with all that was written into it; one that is there gives way."""

    def __init__(self, final: Path) -> None:
        self.final, self.partial = final, final.with_name(f"{final.name}.{os.getpid()}.partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            shutil.rmtree(self.final, ignore_errors=True)
            try:
                self.partial.rename(self.final)
            except OSError:  # another process was quicker, with the same content
                if not self.final.is_dir():
                    raise
        shutil.rmtree(self.partial, ignore_errors=True)


def _there(folder: Path) -> Iterator[Path]:
    """What lies in a folder, but for what another process is writing, or was when it was killed; a file is all there is."""
    yield from (path for path in (folder.iterdir() if folder.is_dir() else [folder]) if path.suffix != ".partial")


def _flat(config: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """What must agree, by where it stands and its name: an option and an input may share a name."""
    parts = {"options": config["options"], "inputs": config["inputs"]}
    found = {(part, key): value for part, values in parts.items() for key, value in values.items()}
    return found | {("", key): config[key] for key in ("experiment", "probekit")}


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
        if not isinstance(config, dict):
            raise TypeError
        form = config.get("form", 1)
        if form == FORM:
            checked = {key: config[key] for key in ("experiment", "form", "probekit", "options", "inputs", "command")}
            if not (isinstance(checked["options"], dict) and isinstance(checked["inputs"], dict)):
                raise TypeError
            return checked
        version = config["probekit"]
    except OSError as error:
        raise ProbekitError(f"run {str(folder)!r}: no run folder, it has no config.json") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProbekitError(f"run {str(folder)!r}: its config.json is damaged") from error
    raise ProbekitError(
        f"run {str(folder)!r}: written by probekit {version} in form {form}, this one reads form {FORM}; run it again elsewhere"
    )

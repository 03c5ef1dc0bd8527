"""A run's folder: its config, its finished units, its results; and how a run goes on where it stopped.

config.json        the experiment, its options, the fingerprints of what they name, the package's version
units/NAME.parquet the rows of each finished unit, written whole or not at all, and after all else of the unit
states/NAME/*.npy  the arrays of a unit that other units need
images/NAME/*.png  the pictures of a unit
checksums/         what the files of each unit hold, and results.parquet
results.parquet    all rows of all units, once every unit is finished
figures/, report.html
locks/             while processes are at work: who they are
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit import __version__
from probekit.checksums import broken, digest, digest_of, sealed, unsealed, write_manifest
from probekit.files import file_name, remove, sweep, whole_folder, write_whole, writing
from probekit.hooks.errors import ProbekitError
from probekit.locks import Lock, clear

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from probekit.runs.experiment import Work

FORM = 3
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
        self._sound: set[str] = set()
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
                with Lock(folder / "locks" / "config") as lock:
                    lock.wait()
                    if stored.exists():  # another process was quicker
                        self._refuse_another(_read_config(folder))
                    else:
                        write_whole(stored, sealed(self.config))
            for part in ("units", "images", "states", "checksums"):
                (folder / part).mkdir(exist_ok=True)

    @classmethod
    def opened(cls, folder: Path) -> Run:
        """The run in a folder that is one. Raises ProbekitError where it is none, or one of another form."""
        run = cls.__new__(cls)
        run.folder, run.config, run._sound = folder, _read_config(folder), set()
        return run

    def _repr_html_(self) -> str:
        """Its command, and its figures where it is finished, for a notebook."""
        figures = [file.read_text() for file in sorted((self.folder / "figures").glob("*.svg"))]
        command = html.escape(shlex.join(self.config["command"]))
        return "\n".join([f"<p><code>{command}</code></p>", *(svg[svg.index("<svg") :] for svg in figures)])

    def _refuse_another(self, stored: Mapping[str, Any]) -> None:
        ours, theirs = (_flat(config) for config in (self.config, stored))
        differ = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        if differ:
            said = ", ".join(
                f"{k[1]} {theirs.get(k)!r} there, {ours.get(k)!r} here" if len(repr(ours.get(k))) < 80 else k[1] for k in differ
            )
            raise ProbekitError(f"--out {str(self.folder)!r}: holds a run of another config ({said}); name another folder")

    # --- who is at work ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def held(self, *, shared: bool) -> Iterator[None]:
        """Hold the folder while units are done, alone or beside others who share it.

        What killed processes had begun to write is removed. Raises ProbekitError, naming who is, where another is at work.
        """
        with Lock(self.folder / "locks" / "run") as lock:
            with writing(self.folder):
                if lock.take():
                    sweep(self.folder)
                    clear(self.folder / "locks")
                    if shared:
                        lock.share()
                elif not (shared and lock.take(shared=True)):
                    who = lock.holder or "another process"
                    raise ProbekitError(f"--out {str(self.folder)!r}: {who}; wait until it has ended, or name another folder")
            yield

    @contextlib.contextmanager
    def claimed(self, unit: str, *, wait: bool) -> Iterator[bool]:
        """Hold a unit, or what has its name; False where another process does. wait: until it has let go."""
        with Lock(self.folder / "locks" / f"unit-{file_name(unit)}") as lock:
            if wait:
                lock.wait()
                yield True
            else:
                yield lock.take()

    # --- units ------------------------------------------------------------------------------------------------------------

    def finished(self, unit: str) -> bool:
        """Whether the unit is done, and all of it as it was written; looked into once."""
        if unit not in self._sound and self._mark(unit).exists() and not self.damaged(unit):
            self._sound.add(unit)
        return unit in self._sound

    def damaged(self, unit: str) -> str:
        """Which file of a unit that was finished is not as it was written; '' where all are, or it never was finished."""
        return broken(self._manifest(unit), self.folder) if self._mark(unit).exists() else ""

    def discard(self, unit: str) -> None:
        """Remove what there is of a unit, so that it is done again."""
        name = file_name(unit)
        self._sound.discard(unit)
        with writing(self.folder):
            # the mark first: what is killed in between is no finished unit
            for path in (self._mark(unit), self._manifest(unit), self.folder / "states" / name, self.folder / "images" / name):
                remove(path)

    def write(self, unit: str, work: Work) -> None:
        """Keep a finished unit: its arrays and pictures, then its rows. A unit that is there already is left as it is."""
        import pandas as pd

        from probekit.images import save_png

        if self.finished(unit):
            return
        name = file_name(unit)
        rows = (work.rows if isinstance(work.rows, pd.DataFrame) else pd.DataFrame(list(work.rows))).to_parquet(index=False)
        held = {f"units/{name}.parquet": digest_of(rows)}
        self.discard(unit)
        with writing(self.folder):
            if work.arrays:
                with whole_folder(self.folder / "states" / name) as partial:
                    for key, array in work.arrays.items():
                        held[f"states/{name}/{key}.npy"] = _save_array(array, partial / f"{key}.npy")
            if work.pictures:
                with whole_folder(self.folder / "images" / name) as partial:
                    for key, image in work.pictures.items():
                        save_png(image, partial / f"{key}.png")
                        held[f"images/{name}/{key}.png"] = digest(partial / f"{key}.png")
            write_manifest(self._manifest(unit), held)
            write_whole(self._mark(unit), rows)
        self._sound.add(unit)

    def _mark(self, unit: str) -> Path:
        """The file that is written last: once it is there, the unit is finished."""
        return self.folder / "units" / f"{file_name(unit)}.parquet"

    def _manifest(self, unit: str) -> Path:
        return self.folder / "checksums" / f"unit-{file_name(unit)}.json"

    def arrays(self, unit: str) -> dict[str, np.ndarray]:
        """The arrays of a finished unit by name; read from the disk as they are used, and not written to."""
        import numpy as np

        found = sorted((self.folder / "states" / file_name(unit)).glob("*.npy"))
        try:
            return {path.stem: np.load(path, mmap_mode="c") for path in found}
        except (OSError, ValueError) as error:
            raise ProbekitError(
                f"run {str(self.folder)!r}: the arrays of {unit!r} are damaged; the same command makes them again"
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

        parts = [pd.read_parquet(self._mark(unit)) for unit in units]
        some = [part for part in parts if not part.empty]
        return pd.concat(some, ignore_index=True) if some else pd.DataFrame()

    def collect(self, units: Sequence[str]) -> pd.DataFrame:
        """`rows`, also written to results.parquet, unless there are none."""
        rows = self.rows(units)
        if not rows.empty:
            content = rows.to_parquet(index=False)
            with writing(self.folder):
                remove(self.folder / "results.parquet")
                write_manifest(self.folder / "checksums" / "results.json", {"results.parquet": digest_of(content)})
                write_whole(self.folder / "results.parquet", content)
        return rows

    def results(self) -> pd.DataFrame:
        """The rows of a finished run. Raises ProbekitError where it has not finished, or they or its pictures are damaged."""
        import pandas as pd

        results = self.folder / "results.parquet"
        if not results.exists():
            done = len(list((self.folder / "units").glob("*.parquet")))
            raise ProbekitError(
                f"run {str(self.folder)!r}: not finished ({done} units are); start it again with the same options"
            )
        if damaged := broken(self.folder / "checksums" / "results.json", self.folder) or self._damaged_picture():
            raise ProbekitError(f"run {str(self.folder)!r}: {damaged} is damaged; the same command makes it again")
        return pd.read_parquet(results)

    def _damaged_picture(self) -> str:
        """A picture that is not as it was written; those that are missing count not, a run may be kept without."""

        def kept(place: str) -> bool:
            return place.startswith("images/") and (self.folder / place).exists()

        manifests = sorted((self.folder / "checksums").glob("unit-*.json"))
        return next((damaged for manifest in manifests if (damaged := broken(manifest, self.folder, kept))), "")


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
            raise ProbekitError(f"{str(file)!r}: is damaged or missing; the same command makes it again") from error


def _save_array(array: np.ndarray, path: Path) -> str:
    """Write an array; returns its file's digest."""
    import numpy as np

    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    return digest(path)


def _there(folder: Path) -> Iterator[Path]:
    """What lies in a folder, but for what another process is writing, or was when it was killed; a file is all there is."""
    for path in folder.iterdir() if folder.is_dir() else [folder]:
        if path.suffix != ".partial" and path.name != "locks":
            yield path


def _flat(config: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """What must agree, by where it stands and its name: an option and an input may share a name."""
    parts = {"options": config["options"], "inputs": config["inputs"]}
    found = {(part, key): value for part, values in parts.items() for key, value in values.items()}
    return found | {("", key): config[key] for key in ("experiment", "probekit")}


_CONFIG = {"experiment": str, "probekit": str, "options": dict, "inputs": dict, "command": list}


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        stored = (folder / "config.json").read_bytes()
        config = json.loads(stored)
        form, version = config.get("form", 1), config.get("probekit")
        if form == FORM:
            told = unsealed(stored)
            if not all(isinstance(told.get(key), kind) for key, kind in _CONFIG.items()):
                raise ValueError("no config")
            return told
        if not (isinstance(form, int) and isinstance(version, str)):
            raise ValueError("no config")
    except OSError as error:
        raise ProbekitError(f"run {str(folder)!r}: no run folder, it has no config.json") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise ProbekitError(
            f"run {str(folder)!r}: its config.json is damaged, nothing else tells whose results these are; name another folder"
        ) from error
    raise ProbekitError(
        f"run {str(folder)!r}: written by probekit {version} in form {form}, this one reads form {FORM}; run it again elsewhere"
    )

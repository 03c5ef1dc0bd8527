"""An experiment is a value: a frozen dataclass of options, which plans its units of work, does one, and tells what came out.

The dataclass is the only list of its options: the command line is made from it, a run's config.json is it, Python calls it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import re
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, Self

import typer

from probekit import checked
from probekit.files import file_name
from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

    from probekit.runs.folder import Run, Stacked


@dataclass(frozen=True)
class Unit:
    """A part of an experiment that is done in one go, and finished or not.

    name: what it is called, on the disk too. size: how far it takes the progress bar. needs: the units whose arrays it reads.
    group: units of one group share something costly, and are done by the same shard or worker where that can be had.
    """

    name: str
    size: int = 1
    needs: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True, eq=False)
class Work:
    """What a unit gives. rows: of the results' table; pictures: (3, h, w) in [-1, 1] by name; arrays: for other units."""

    rows: pd.DataFrame | Sequence[Mapping[str, Any]] = ()
    pictures: Mapping[str, Tensor] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


class Bench(Protocol):
    """What a unit has at hand while it is done."""

    def arrays(self, unit: str) -> Mapping[str, np.ndarray]:
        """The arrays of a unit that this one needs, not held in memory."""

    def stacked(self, units: Sequence[str], key: str) -> Stacked:
        """The arrays of that name of several units as one, row after row."""

    def advance(self, count: int) -> None:
        """Move the progress bar, up to the unit's size in all; what is left of it is moved when the unit is done."""


class Findings(Protocol):
    """What an experiment found, told by page, terminal and notebook alike."""

    @property
    def rows(self) -> pd.DataFrame:
        """The tidy results."""

    def write(self) -> Path:
        """Write figures and the page into the run's folder; returns the page's path."""

    def show(self) -> None:
        """Print it."""

    def _repr_html_(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Options:
    """A frozen dataclass whose fields are a command's options: their annotations, typer's, say what it takes and refuses.

    Raises ProbekitError, naming the option, for a value that it cannot have; see `Option.parse`.
    """

    def __post_init__(self) -> None:
        for option in options_of(type(self)):
            object.__setattr__(self, option.field, option.parse(getattr(self, option.field)))


@dataclass(frozen=True, kw_only=True)
class Experiment(Options, ABC):
    """Options that determine a result, and how it is come by. Options with `compare=False` change how fast, not what."""

    name: ClassVar[str]
    """`inject-sweep`: the command, and the folder of its runs."""

    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = field(default="auto", compare=False)

    # --- what an experiment says of itself --------------------------------------------------------------------------------

    @property
    @abstractmethod
    def subject(self) -> str:
        """What its run is about, in the folder's name: the model's or the data set's name."""

    @abstractmethod
    def inputs(self) -> dict[str, Any]:
        """Fingerprints of what the options name (models, data, files), as JSON. Raises ProbekitError where there are none."""

    @abstractmethod
    def plan(self) -> list[Unit]:
        """The units, in the order of their rows in the results."""

    @abstractmethod
    def work(self, unit: Unit, bench: Bench) -> Work:
        """One unit; it depends on the options and the unit alone."""

    def costs(self) -> str:
        """One line on what the units will take, said before the first; nothing where that is not known."""
        return ""

    @abstractmethod
    def findings(self, run: Run, rows: pd.DataFrame) -> Findings:
        """What the rows of all units come to. Raises ProbekitError where they come to nothing."""

    # --- what every experiment can --------------------------------------------------------------------------------------

    @property
    def options(self) -> dict[str, Any]:
        """What determines the result, as JSON."""
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}
        return json.loads(json.dumps(kept, default=str))

    @property
    def command(self) -> list[str]:
        """The command that is this experiment, with the options that are not as they are by default."""
        words = ["probekit", *self.name.rsplit("-", 1)]
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.compare}
        for option in options_of(type(self)):
            value = getattr(self, option.field)
            if option.field not in defaults or value == defaults[option.field]:
                continue
            if isinstance(value, bool):
                words.append(option.flag)
            else:
                each = value if isinstance(value, list | tuple) else [value]
                for item in each:  # an argument has no flag
                    words += [option.flag, str(item)] if option.flag.startswith("--") else [str(item)]
        return words

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """The experiment of a run's options; one that is younger than the run is as it is by default.

        Raises ProbekitError for options that it does not have.
        """
        known = {f.name for f in dataclasses.fields(cls) if f.compare}
        if odd := sorted(set(options) - known):
            raise ProbekitError(f"config.json: option {odd[0]!r} is unknown for {cls.name}")
        return cls(**options)

    def run(
        self, *, out: Path | str | None = None, engine: str = "local", workers: int | None = None, shard: str | None = None
    ) -> Any:
        """Do every unit that is not done yet; returns the findings, once all are.

        out: the run's folder, by default one that the options name; what it holds is gone on with. engine: `local`, `ray`, or
        `ray:ADDRESS` of a cluster, with that many workers. shard: `i/n`, do the i-th of n parts of the units only; None is
        returned where units of other shards are missing. Raises ProbekitError for a folder of another config.
        """
        from probekit.runs.engines import run

        return run(self, Path(out) if out is not None else None, engine, workers, shard)

    def default_folder(self, inputs: Mapping[str, Any]) -> Path:
        """runs/<experiment>/<label>-<hash>: the same options and inputs find the same folder again."""
        digest = hashlib.sha256(json.dumps([self.options, inputs], sort_keys=True, default=str).encode()).hexdigest()[:8]
        return Path("runs") / self.name / f"{file_name(self.subject)}-{digest}"

    def __getstate__(self) -> dict[str, Any]:
        # without what was loaded on the way: a worker loads its own
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


# --- options -----------------------------------------------------------------------------------------------------------


MOST = {int: 1_000_000, float: 1000.0}
"""The largest number of an option that names no bound of its own, and of a negative one the smallest."""


@dataclass(frozen=True)
class Option:
    """A field of an experiment as an option: its flag, and what it takes."""

    field: str
    flag: str
    kinds: tuple[type, ...]
    least: float
    most: float

    def parse(self, value: Any) -> Any:
        """The value as the field has it: a number of its kind, a path where one is named, texts that say something.

        Raises ProbekitError, naming the option, for a value of another kind or outside its range, for a number that is not
        finite, and for a text that is empty or cannot be shown (`checked.text`).
        """
        if type(value) is int and float in self.kinds:
            value = float(value) if abs(value) <= 2**53 else float("inf")
        if not any(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for kind in self.kinds):
            wanted = " or ".join(dict.fromkeys(_WORDS.get(kind, kind.__name__) for kind in self.kinds))
            raise ProbekitError(f"{self.flag} {checked.shown(value)}: {wanted} is needed")
        for item in value if isinstance(value, list | tuple) else [value] if isinstance(value, str | Path) else []:
            if not isinstance(item, str | Path):
                raise ProbekitError(f"{self.flag} {checked.shown(item)}: text is needed")
            checked.text(f"{self.flag} {checked.shown(str(item))}", str(item))
        if isinstance(value, int | float) and not isinstance(value, bool):
            if isinstance(value, float) and not math.isfinite(value):
                raise ProbekitError(f"{self.flag} {value}: a finite number is needed")
            if value < self.least:
                raise ProbekitError(f"{self.flag} {checked.shown(value)}: at least {self.least:.12g} is needed")
            if value > self.most:
                raise ProbekitError(f"{self.flag} {checked.shown(value)}: at most {self.most:.12g} will do")
        return Path(value) if Path in self.kinds and isinstance(value, str) else value


_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "True or False",
    list: "a list",
    tuple: "a list",
    type(None): "None",
    Path: "a path",
}


@functools.cache
def options_of(made: Any) -> tuple[Option, ...]:
    """The options of an experiment, from its fields' annotations, or those of a command's function, from its parameters'."""
    made = inspect.unwrap(made)
    hints = typing.get_type_hints(made, include_extras=True)
    found = []
    for name in _defaults(made):
        kind, *extras = typing.get_args(hints[name]) if typing.get_origin(hints[name]) is Annotated else (hints[name],)
        info = next((e for e in extras if isinstance(e, typer.models.ParameterInfo)), typer.Option())
        flags = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str) and text.startswith("--")]
        named = name if isinstance(info, typer.models.ArgumentInfo) else f"--{name.replace('_', '-')}"
        kinds = _kinds(kind)
        most = MOST[float if float in kinds else int] if info.max is None else info.max
        found.append(Option(name, flags[0] if flags else named, kinds, -most if info.min is None else info.min, most))
    return tuple(found)


def _defaults(made: Any) -> dict[str, Any]:
    """The names and defaults of an experiment's fields, those that do not change the result last, or of parameters."""
    missing = inspect.Parameter.empty
    if not dataclasses.is_dataclass(made):
        return {name: parameter.default for name, parameter in inspect.signature(made).parameters.items()}
    found: dict[str, Any] = {}
    for f in sorted(dataclasses.fields(made), key=lambda f: not f.compare):
        found[f.name] = f.default if f.default is not dataclasses.MISSING else missing
        if f.default_factory is not dataclasses.MISSING:
            found[f.name] = f.default_factory()
    return found


def signature(made: Any, *more: inspect.Parameter) -> inspect.Signature:
    """What typer makes a command from: the fields of an experiment, or the parameters of a function, and more."""
    hints = typing.get_type_hints(made, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    own = [
        inspect.Parameter(name, kind, default=default, annotation=_shown(hints[name]))
        for name, default in _defaults(made).items()
    ]
    return inspect.Signature([*own, *more])


def _shown(hint: Any) -> Any:
    """The annotation with brackets in its help kept: typer takes `[default: 8]` for markup.

    And paths as text, which `Option.parse` makes paths of: typer would make the folder that one is in of "".
    """
    if typing.get_origin(hint) is not Annotated:
        return hint
    kind, *extras = typing.get_args(hint)
    for number, info in enumerate(extras):
        if isinstance(info, typer.models.ParameterInfo):
            extras[number] = info = copy.copy(info)
            info.help = info.help and info.help.replace("[", "\\[")
            if Path in _kinds(kind) and isinstance(info, typer.models.OptionInfo):
                info.metavar = info.metavar or "PATH"
    if Path in _kinds(kind):
        kind = str | None if type(None) in _kinds(kind) else str
    return Annotated[kind, *extras]


def _kinds(hint: Any) -> tuple[type, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(kind for part in typing.get_args(hint) for kind in _kinds(part))
    plain = typing.get_origin(hint) or hint
    if plain is Path:
        return (Path, str)
    return (list, tuple) if plain is list else (plain,)


def names(text: str, flag: str) -> list[str]:
    """`a,b` as names. Raises ProbekitError, naming the option, where there are none or one stands there twice."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise ProbekitError(f"{flag} {text!r}: names none")
    if twice := [name for name in found if found.count(name) > 1]:
        raise ProbekitError(f"{flag} {text!r}: {twice[0]!r} stands there twice")
    return found


def whole_numbers(text: str, flag: str, meant: str) -> list[int]:
    """`10,100` as numbers, in their order. Raises ProbekitError, saying what is meant, for others, and beyond 10**7."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 8 for part in parts):
        raise ProbekitError(f"{flag} {checked.shown(text)}: write {meant}")
    return [int(part) for part in parts]


_SHARD = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")


def read_shard(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8). Raises ProbekitError for what is no part of a whole."""
    match = _SHARD.fullmatch(text)
    part, whole = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= whole:
        raise ProbekitError(f"--shard {text!r}: write i/n, as 1/8 to 8/8")
    return part, whole


Advance = Callable[[int], None]

"""An experiment is a value: a frozen dataclass of options, which plans its units of work, does one, and tells what came out.

The dataclass is the only list of its options: the command line is made from it, a run's config.json is it, Python calls it.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import json
import re
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, Self

import typer

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

    Raises ProbekitError, naming the option, for a value that it cannot have.
    """

    def __post_init__(self) -> None:
        for option in options_of(type(self)):
            option.check(getattr(self, option.field))


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
        hints = typing.get_type_hints(cls)
        given = {n: Path(v) if isinstance(v, str) and _names(hints[n], Path) else v for n, v in options.items()}
        return cls(**given)

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
        return Path("runs") / self.name / f"{self.subject}-{digest}"

    def __getstate__(self) -> dict[str, Any]:
        # without what was loaded on the way: a worker loads its own
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


# --- options -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """A field of an experiment as an option: its flag, and what it takes."""

    field: str
    flag: str
    kinds: tuple[type, ...]
    least: float | None
    most: float | None

    def check(self, value: Any) -> None:
        """Raises ProbekitError, naming the option, for a value of another kind or outside its range."""
        if type(value) is int and float in self.kinds:
            value = float(value)
        if not any(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for kind in self.kinds):
            wanted = " or ".join(dict.fromkeys(_WORDS.get(kind, kind.__name__) for kind in self.kinds))
            raise ProbekitError(f"{self.flag} {value!r}: {wanted} is needed")
        if isinstance(value, list | tuple) and (odd := [item for item in value if not isinstance(item, str)]):
            raise ProbekitError(f"{self.flag} {odd[0]!r}: text is needed")
        if isinstance(value, int | float) and not isinstance(value, bool):
            if self.least is not None and not value >= self.least:
                raise ProbekitError(f"{self.flag} {value}: at least {self.least:g} is needed")
            if self.most is not None and not value <= self.most:
                raise ProbekitError(f"{self.flag} {value}: at most {self.most:g} will do")


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


def options_of(experiment: type[Options]) -> tuple[Option, ...]:
    """The options of an experiment, from its fields' annotations."""
    hints = typing.get_type_hints(experiment, include_extras=True)
    found = []
    for f in dataclasses.fields(experiment):
        kind, *extras = typing.get_args(hints[f.name]) if typing.get_origin(hints[f.name]) is Annotated else (hints[f.name],)
        info = next((e for e in extras if isinstance(e, typer.models.ParameterInfo)), typer.Option())
        flags = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str) and text.startswith("--")]
        named = f.name if isinstance(info, typer.models.ArgumentInfo) else f"--{f.name.replace('_', '-')}"
        flag = flags[0] if flags else named
        found.append(Option(f.name, flag, _kinds(kind), info.min, info.max))
    return tuple(found)


def signature(experiment: type[Options], *more: inspect.Parameter) -> inspect.Signature:
    """What typer makes a command from: the experiment's fields, those that do not change the result last, and more."""
    hints = typing.get_type_hints(experiment, include_extras=True)
    fields = sorted(dataclasses.fields(experiment), key=lambda f: not f.compare)
    made = []
    for f in fields:
        default = f.default if f.default is not dataclasses.MISSING else inspect.Parameter.empty
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        kind = inspect.Parameter.KEYWORD_ONLY
        made.append(inspect.Parameter(f.name, kind, default=default, annotation=_shown(hints[f.name])))
    return inspect.Signature([*made, *more])


def _shown(hint: Any) -> Any:
    """The annotation with brackets in its help kept: typer takes `[default: 8]` for markup."""
    if typing.get_origin(hint) is not Annotated:
        return hint
    kind, *extras = typing.get_args(hint)
    for number, info in enumerate(extras):
        if isinstance(info, typer.models.ParameterInfo) and info.help:
            extras[number] = copy.copy(info)
            extras[number].help = info.help.replace("[", "\\[")
    return Annotated[kind, *extras]


def _kinds(hint: Any) -> tuple[type, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(kind for part in typing.get_args(hint) for kind in _kinds(part))
    plain = typing.get_origin(hint) or hint
    if plain is Path:
        return (Path, str)
    return (list, tuple) if plain is list else (plain,)


def _names(hint: Any, kind: type) -> bool:
    return kind in (hint, *typing.get_args(hint))


def names(text: str, flag: str) -> list[str]:
    """`a,b` as names. Raises ProbekitError, naming the option, where there are none or one stands there twice."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise ProbekitError(f"{flag} {text!r}: names none")
    if twice := [name for name in found if found.count(name) > 1]:
        raise ProbekitError(f"{flag} {text!r}: {twice[0]!r} stands there twice")
    return found


_SHARD = re.compile(r"(\d{1,6})/(\d{1,6})")


def read_shard(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8). Raises ProbekitError for what is no part of a whole."""
    match = _SHARD.fullmatch(text)
    part, whole = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= whole:
        raise ProbekitError(f"--shard {text!r}: write i/n, as 1/8 to 8/8")
    return part, whole


Advance = Callable[[int], None]

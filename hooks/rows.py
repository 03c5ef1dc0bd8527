"""Only the rows that matter: what of a batch each unit of a denoiser must compute.

A row is left out of a unit whose output is overwritten for it, or read by nobody; rows whose inputs are the same are computed
once. What is left out is filled with what was computed for others, so that every other hook sees the whole batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import ROWS, Flow, Unit, flow, layers
from .injections import Injection, Mean, Nothing, Row, Rules, find, replace
from .sites import bind
from .steps import Clock


@contextlib.contextmanager
def needed(model: nn.Module, rules: Rules, clock: Clock) -> Iterator[None]:
    """Inside `inject(model, rules, …) as clock`: compute no row twice, and none for nothing.

    The rows of every picture stay what they are in a batch that is computed whole, but for the rounding of other batch shapes.
    Where the flow of a denoiser is not known, a ControlNet or T2I-Adapter adds to it, or other hooks watch its modules,
    everything is computed.
    """
    known = flow(model)
    if known is None or _watched(model, rules):
        yield
        return
    planner = _Planner(known, model, rules, clock)
    with contextlib.ExitStack() as hooked:
        hooked.callback(model.register_forward_pre_hook(planner.begin, with_kwargs=True).remove)
        for number, unit in enumerate(known.units):
            module = model.get_submodule(unit.module)
            # rows are taken after every other hook has seen the input, and put back before any sees the output
            hooked.callback(module.register_forward_pre_hook(planner.take(number), with_kwargs=True).remove)
            hooked.callback(module.register_forward_hook(planner.put(number), prepend=True).remove)
        yield


def _watched(model: nn.Module, rules: Rules) -> bool:
    """Whether hooks beside those of these rules see parts of the batch: then each must see all of it."""
    known = layers(model)
    ours: set[str] = set()
    for injections in rules.values():
        for injection in injections:
            stream = find(known, injection.layer).stream(injection.stream)
            ours |= {site.module for site in (*stream.writes, *stream.keeps, *(stream.bypass or ())) if site is not None}
    return any(
        (module._forward_hooks or module._forward_pre_hooks) and name and name not in ours
        for name, module in model.named_modules()
    )


def _by_rows(model: nn.Module) -> bool:
    """Whether attentions treat every row by itself: perturbed-attention guidance counts on where it stands, others may."""
    processors = (getattr(module, "processor", None) for module in model.modules())
    kinds = {type(processor) for processor in processors if processor is not None}
    return all(kind.__module__.startswith("diffusers.models.") and "PAG" not in kind.__name__ for kind in kinds)


@dataclass(frozen=True)
class _Event:
    """A write of a row after a unit. whole: nothing of its own stays. sources: rows it reads. bypass: it hands on its input."""

    row: int
    values: tuple[str, ...]
    whole: bool
    sources: tuple[int, ...]
    bypass: bool


class _Planner:
    """Which rows each unit computes in the call under way."""

    def __init__(self, known: Flow, model: nn.Module, rules: Rules, clock: Clock) -> None:
        self.flow, self.clock, self.rules = known, clock, rules
        available = layers(model)
        self.found = {i.layer: find(available, i.layer) for injections in rules.values() for i in injections}
        self.batch = 0
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}
        self.taken: set[int] = set()

    # --- what is due ------------------------------------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the denoiser, after the clock's: plans this call."""
        bound = bind(module, args, kwargs)
        assert self.clock.known is not None
        name = self.clock.known.state
        state = bound.arguments[name]
        self.rows, self.batch = {}, len(state)
        # looked at now: a pipeline with perturbed-attention guidance sets its processors when it is called
        if not isinstance(state, Tensor) or self.clock.added or not _by_rows(module):
            return
        rest = [value for key, value in bound.arguments.items() if key != name]
        conditions = _classes(_tensors(rest, self.batch), self.batch)
        events, inside = self._due()
        keys = self._keys(_classes([state], self.batch), conditions, events, inside)
        for number, wanted in enumerate(self._wanted(events, inside)):
            if number in inside:
                continue
            one: dict[int, int] = {}
            for row in sorted(wanted):
                one.setdefault(keys[number][row], row)
            chosen = sorted(one.values())
            if len(chosen) < self.batch and chosen:
                place = {row: i for i, row in enumerate(chosen)}
                back = [place[one[keys[number][row]]] if keys[number][row] in one else 0 for row in range(self.batch)]
                self.rows[number] = (torch.tensor(chosen, device=state.device), torch.tensor(back, device=state.device))

    def _due(self) -> tuple[dict[int, list[_Event]], dict[int, dict[int, set[int]]]]:
        """What is written after each unit in this step; and inside a unit: by its rows, the rows whose values these take."""
        after: dict[int, list[_Event]] = {}
        inside: dict[int, dict[int, set[int]]] = {}
        for row, injections in self.rules.items():
            for injection in injections:
                if self.clock.step not in injection.steps.resolve(self.clock.timesteps):
                    continue
                layer = self.found[injection.layer]
                stream = layer.stream(injection.stream)
                source = injection.source
                others = (source.index,) if isinstance(source, Row) else source.rows if isinstance(source, Mean) else ()
                if layer.inside is not None or ":" in layer.name:
                    number = next(
                        i for i, u in enumerate(self.flow.units) if u.module == (layer.inside or layer.name.split(":")[0])
                    )
                    for branch in range(self.clock.branches):
                        shift = branch * self.clock.rows
                        inside.setdefault(number, {}).setdefault(row + shift, set()).update(o + shift for o in others)
                    continue
                kept = {value for site in stream.keeps for value in self.flow.sites[site][1]}
                for site in stream.writes:
                    number, values = self.flow.sites[site]
                    for branch in range(self.clock.branches):
                        shift = branch * self.clock.rows
                        after.setdefault(number, []).append(
                            _Event(
                                row + shift,
                                tuple(value for value in values if value not in kept),
                                _is_whole(injection),
                                tuple(other + shift for other in others),
                                isinstance(source, Nothing),
                            )
                        )
        return after, inside

    # --- which rows are the same ------------------------------------------------------------------------------------------

    def _keys(
        self,
        state: Sequence[int],
        conditions: Sequence[int],
        events: Mapping[int, list[_Event]],
        inside: Mapping[int, Mapping[int, set[int]]],
    ) -> list[list[int]]:
        """For each unit and row a number; rows of one number have the same inputs, and so the same output."""
        numbers: dict[Any, int] = {}

        def number(of: Any) -> int:
            return numbers.setdefault(of, len(numbers))

        rows = range(self.batch)
        held = {"state": [number(("state", s)) for s in state], "text": [number(("text", c)) for c in conditions]}
        keys = []
        for i, unit in enumerate(self.flow.units):
            own = inside.get(i, {})
            made = [
                number((i, *(held[value][row] for value in unit.reads), conditions[row], row if row in own else None))
                for row in rows
            ]
            keys.append(made)
            given = dict(held)
            for value in unit.writes:
                held[value] = list(made)
            written = {value: list(of) for value, of in held.items()}
            for event in events.get(i, []):
                for value in event.values:
                    if event.bypass and event.whole:
                        written[value][event.row] = given[_enters(unit, value)][event.row]
                    elif event.whole and len(event.sources) == 1:
                        written[value][event.row] = held[value][event.sources[0]]
                    else:
                        written[value][event.row] = number((i, value, "own", event.row))
            held = written
        return keys

    # --- which rows are read ----------------------------------------------------------------------------------------------

    def _wanted(self, events: Mapping[int, list[_Event]], inside: Mapping[int, Mapping[int, set[int]]]) -> list[set[int]]:
        """For each unit the rows whose output somebody reads."""
        everyone = set(range(self.batch))
        read: dict[str, set[int]] = {value: set(everyone) for value in self.flow.units[-1].writes}
        wanted: list[set[int]] = [set() for _ in self.flow.units]
        for i in reversed(range(len(self.flow.units))):
            unit, before = self.flow.units[i], {value: set(rows) for value, rows in read.items()}
            passed: list[tuple[str, int]] = []
            due = [(event, value) for event in events.get(i, []) for value in event.values if event.row in read.get(value, ())]
            for event, value in due:
                if event.whole:
                    before[value].discard(event.row)
            for event, value in due:
                before.setdefault(value, set()).update(event.sources)
                if event.bypass:
                    passed.append((_enters(unit, value), event.row))
            wanted[i] = set().union(*(before.get(value, set()) for value in unit.writes))
            for row, others in inside.get(i, {}).items():
                wanted[i] |= others if row in wanted[i] else set()
            for value in unit.writes:
                before[value] = set()
            for value in unit.reads:
                before.setdefault(value, set()).update(wanted[i])
            for value, row in passed:
                before.setdefault(value, set()).add(row)
            read = before
        return wanted

    # --- hooks ------------------------------------------------------------------------------------------------------------

    def take(self, number: int) -> Any:
        """The pre-hook of a unit, which hands it the rows it must compute."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.taken.discard(number)
            if number not in self.rows:
                return None
            bound = bind(module, args, kwargs)
            rest = [value for key, value in bound.arguments.items() if key not in ROWS and value is not module]
            if _tensors(rest, self.batch):  # told something by the row that is not known here
                return None
            chosen = self.rows[number][0]
            for key in ROWS:
                if key in bound.arguments:
                    bound.arguments[key] = _each(bound.arguments[key], self.batch, chosen)
            self.taken.add(number)
            return bound.args[1:], bound.kwargs

        return hook

    def put(self, number: int) -> Any:
        """The forward hook of a unit, which fills its output up to the whole batch."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if number not in self.taken:
                return None
            chosen, back = self.rows[number]
            return _each(output, len(chosen), back)

        return hook


def _is_whole(injection: Injection) -> bool:
    """Whether nothing of the target stays."""
    return injection.operation is replace and injection.mask is None and injection.tokens is None


def _enters(unit: Unit, value: str) -> str:
    """What a unit is given in the place of a value that it returns."""
    return value if value in unit.reads else unit.reads[0]


def _classes(tensors: Sequence[Tensor], batch: int) -> list[int]:
    """For each row a number; rows of one number are equal in all of the tensors."""
    told: list[list[int]] = []
    for tensor in tensors:
        flat = tensor.detach().reshape(batch, -1)
        exact = torch.float64 if flat.dtype == torch.float64 else torch.float32 if flat.is_floating_point() else torch.int64
        flat = flat.to("cpu", exact)
        told.append(torch.unique(flat, dim=0, return_inverse=True)[1].tolist())
    numbers: dict[tuple[int, ...], int] = {}
    return [numbers.setdefault(row, len(numbers)) for row in zip(*told, strict=True)] if told else [0] * batch


def _tensors(value: Any, batch: int) -> list[Tensor]:
    """Every tensor with an entry a row in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value] if value.ndim and value.shape[0] == batch else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item, batch)] if isinstance(value, list | tuple) else []


def _each(value: Any, batch: int, rows: Tensor) -> Any:
    """Chosen rows of every tensor with an entry a row, in the same nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        changed = {key: _each(item, batch, rows) for key, item in value.items()}
        return type(value)(**changed) if type(value) is not dict else changed
    if isinstance(value, list | tuple):
        return type(value)(_each(item, batch, rows) for item in value)
    return value

"""Injections: where, when, from whom, how; and the engine that runs them inside an unmodified pipeline."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architectures import Layer, layers, select
from .captures import Captured
from .errors import ProbekitError
from .sites import Site, View, bind, hook_sites, read, write
from .steps import ALL, Clock, Steps


@dataclass(frozen=True)
class Context:
    """What an operation may want to know about the place it runs at."""

    layer: str
    stream: str | None
    step: int
    steps: int
    timestep: float


Operation = Callable[[Tensor, Tensor, Context], Tensor]
"""`f(target, source, context) -> tensor`, each tensor of shape (guidance branches, *the layer's shape)."""


def replace(target: Tensor, source: Tensor, context: Context) -> Tensor:
    """The source, in the target's place."""
    return source


def blend(weight: float) -> Operation:
    """(1 - weight) * target + weight * source."""
    return functools.partial(_blend, weight)


def add(scale: float) -> Operation:
    """target + scale * source."""
    return functools.partial(_add, scale)


def _blend(weight: float, target: Tensor, source: Tensor, context: Context) -> Tensor:
    return torch.lerp(target, source, weight)


def _add(scale: float, target: Tensor, source: Tensor, context: Context) -> Tensor:
    return target + scale * source


@dataclass(frozen=True)
class Row:
    """Take the activation from another row of the same batch, as it was before anything was written."""

    index: int = 0


@dataclass(frozen=True)
class Mean:
    """Take the mean of the activations of several rows of the same batch, as they were before anything was written."""

    rows: tuple[int, ...]


@dataclass(frozen=True)
class Nothing:
    """Leave the layer out: a block hands on what it was given, an attention or a feed-forward adds nothing.

    The same as `diffusers.LayerSkipConfig`, for chosen rows and steps.
    """


@dataclass(frozen=True)
class Stored:
    """Take the activation that `capture` kept of a row at the same layer, step and call."""

    captured: Captured
    row: int = 0


Source = Row | Mean | Nothing | Stored | Tensor


@dataclass(frozen=True, eq=False)
class Injection:
    """One intervention, as a value.

    layer, stream: where (`stream=None` is the layer's default stream); a layer's name as `layers` lists it, with
        `:heads=3,5` only these heads.
    source: from whom: a `Row`, the `Mean` of several, a `Stored` capture, a tensor of the layer's shape, with or without a
        leading dimension of guidance branches; or `Nothing`, which leaves the layer out.
    steps: when.
    operation: how: `replace`, `blend(weight)`, `add(scale)` or a function of the user's (see `Operation`).
    mask: (h, w) weights in [0, 1], resized to the layer's resolution: how much of the new value counts where.
    tokens: indices of the tokens to write, for streams of tokens.
    """

    layer: str
    source: Source = Row(0)
    steps: Steps = ALL
    operation: Operation = replace
    stream: str | None = None
    mask: Tensor | None = None
    tokens: tuple[int, ...] | None = None

    def to_json(self) -> str:
        """This injection as JSON, which `from_json` reads. Raises ProbekitError for a tensor and a function of the user's."""
        told: dict[str, Any] = {"layer": self.layer, "stream": self.stream, "steps": str(self.steps)}
        told["source"] = _source_told(self.layer, self.source)
        if self.operation is replace:
            told["operation"] = "replace"
        elif isinstance(self.operation, functools.partial) and self.operation.func in (_blend, _add):
            told["operation"] = {self.operation.func.__name__.removeprefix("_"): self.operation.args[0]}
        else:
            raise ProbekitError(
                f"injection at {self.layer}: its operation is a function; only replace, blend and add are written"
            )
        if self.mask is not None:
            told["mask"] = self.mask.tolist()
        if self.tokens is not None:
            told["tokens"] = list(self.tokens)
        return json.dumps({key: value for key, value in told.items() if value is not None})

    @classmethod
    def from_json(cls, text: str) -> Injection:
        """The injection that `to_json` wrote. Raises ProbekitError, naming the key, for anything else."""
        try:
            told = json.loads(text)
        except json.JSONDecodeError as error:
            raise ProbekitError(f"injection {text[:60]!r}: is no JSON ({error.msg})") from error
        known = ("layer", "stream", "steps", "source", "operation", "mask", "tokens")
        if not isinstance(told, dict) or "layer" not in told:
            raise ProbekitError(f"injection {text[:60]!r}: names no layer")
        if odd := [key for key in told if key not in known]:
            raise ProbekitError(f"injection at {told['layer']}: unknown key {odd[0]!r}; known: {', '.join(known)}")
        operation = _operation_read(told["layer"], told.get("operation", "replace"))
        return cls(
            told["layer"],
            _source_read(told["layer"], told.get("source", {"row": 0})),
            Steps.parse(told.get("steps", "all")),
            operation,
            told.get("stream"),
            torch.tensor(told["mask"]) if "mask" in told else None,
            tuple(told["tokens"]) if "tokens" in told else None,
        )


def _source_told(layer: str, source: Source) -> Any:
    if isinstance(source, Row):
        return {"row": source.index}
    if isinstance(source, Mean):
        return {"mean": list(source.rows)}
    if isinstance(source, Nothing):
        return "nothing"
    if isinstance(source, Stored) and source.captured.folder is not None:
        return {"stored": str(source.captured.folder), "row": source.row}
    raise ProbekitError(f"injection at {layer}: its source is in memory; capture into a folder to write it down")


def _source_read(layer: str, told: Any) -> Source:
    match told:
        case "nothing":
            return Nothing()
        case {"stored": str(folder), "row": int(row)}:
            return Stored(Captured.opened(Path(folder)), row)
        case {"row": int(row)}:
            return Row(row)
        case {"mean": list(rows)} if rows and all(isinstance(row, int) for row in rows):
            return Mean(tuple(rows))
    forms = '"nothing", {"row": 0}, {"mean": [0, 1]}, {"stored": FOLDER, "row": 0}'
    raise ProbekitError(f"injection at {layer}: source {told!r} is none of {forms}")


def _operation_read(layer: str, told: Any) -> Operation:
    match told:
        case "replace":
            return replace
        case {"blend": float() | int() as weight}:
            return blend(weight)
        case {"add": float() | int() as scale}:
            return add(scale)
    raise ProbekitError(f'injection at {layer}: operation {told!r} is none of "replace", {{"blend": 0.5}}, {{"add": 1}}')


Rules = Mapping[int, Sequence[Injection]]
"""For each row of the batch that is written, its injections, applied in order."""


@contextlib.contextmanager
def inject(model: nn.Module, rules: Rules, *, schedule: Any = None, rows: int) -> Iterator[Clock]:
    """Run `rules` in every call of a denoiser, or of a text encoder, made inside the context.

    schedule: the pipeline's scheduler, or the distinct timesteps in order; a text encoder has none. rows: how many images the
    pipeline makes at once. All hooks are removed on leaving, also after an exception. Raises ProbekitError for unknown layers
    and streams at once, for steps outside the schedule and for shapes that do not fit at the first call.
    """
    clock = Clock(model, schedule, rows)
    engine = _Engine(clock, _plan(layers(model), rules, rows))
    with contextlib.ExitStack() as hooked:
        hooked.callback(clock.attach().remove)
        hooked.callback(model.register_forward_pre_hook(engine.begin).remove)
        for handle in hook_sites(model, engine.plan, engine.on_output, engine.on_input):
            hooked.callback(handle.remove)
        yield clock


def find(available: Sequence[Layer], name: str) -> Layer:
    """The layer of that name, no glob. Raises ProbekitError for one that the model does not have."""
    if any(sign in name for sign in "*?["):
        raise ProbekitError(f"layer {name!r}: an injection is into one layer; select takes globs")
    if name.startswith("@"):
        raise ProbekitError(f"layer {name!r}: an injection is into one layer; select takes groups")
    (found,) = select(available, [name])
    return found


@dataclass(frozen=True, eq=False)
class _Write:
    row: int
    injection: Injection
    keeps: tuple[Site, ...]
    bypass: Site | None


def _plan(available: Sequence[Layer], rules: Rules, rows: int) -> dict[Site, list[_Write]]:
    """For each site, what is written there, and for each that is only looked at, nothing."""
    plan: dict[Site, list[_Write]] = {}
    known: dict[str, Layer] = {}
    for row, injections in rules.items():
        for injection in injections:
            layer = known.setdefault(injection.layer, find(available, injection.layer))
            source = injection.source
            others = (source.index,) if isinstance(source, Row) else source.rows if isinstance(source, Mean) else ()
            for number in (row, *others):
                if not 0 <= number < rows:
                    raise ProbekitError(f"row {number}: the batch has rows 0 to {rows - 1}")
            stream = layer.stream(injection.stream)
            if isinstance(source, Nothing) and stream.bypass is None:
                raise ProbekitError(f"layer {layer.name}: what it returns is not what it was given, it cannot be left out")
            for number, site in enumerate(stream.writes):
                bypass = stream.bypass[number] if isinstance(source, Nothing) and stream.bypass is not None else None
                plan.setdefault(site, []).append(_Write(row, injection, stream.keeps, bypass))
                if bypass is not None:
                    plan.setdefault(bypass, [])
            for site in stream.keeps:
                plan.setdefault(site, [])
    return plan


class _Engine:
    """The hooks' state during one `inject`: nothing of it is stored on the model."""

    def __init__(self, clock: Clock, plan: dict[Site, list[_Write]]) -> None:
        self.clock, self.plan = clock, plan
        self.kept: dict[Site, dict[int, tuple[Tensor, Tensor]]] = {}
        self.given: dict[Site, View] = {}
        self.looked_at = {write.bypass for writes in plan.values() for write in writes} - {None}
        self.active: dict[Steps, frozenset[int]] = {}
        self.schedule: tuple[float, ...] = ()

    def begin(self, module: nn.Module, args: Any) -> None:
        self.kept.clear()
        self.given.clear()
        if "down_intrablock_additional_residuals" in self.clock.added:
            # it is added in place to the output and to the last skip at once, while they are one tensor
            for site in self.plan:
                if site.module.startswith("down_blocks.") and site.path and site.border == "output":
                    raise ProbekitError(
                        f"layer {site.module}: a T2I-Adapter adds to it in place; take its last resnet, attention or sampler"
                    )
        if self.clock.timesteps != self.schedule:
            self.schedule = self.clock.timesteps
            writes = (write.injection.steps for writes in self.plan.values() for write in writes)
            self.active = {steps: steps.resolve(self.schedule) for steps in writes}

    def on_output(self, sites: list[Site]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            changed = output
            for site in sites:
                if writes := self.due(site):
                    tensor = self.apply(site, read(output, site.path), read(changed, site.path), writes)
                    changed = write(changed, site.path, tensor)
            return None if changed is output else changed

        return hook

    def on_input(self, sites: list[Site]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bound = bind(module, args, kwargs)
            original, changed = dict(bound.arguments), False
            for site in sites:
                writes, kept = self.due(site), self.kept.get(site)
                if site in self.looked_at:
                    self.given[site] = View(site, read(original, site.path), self.clock.tokens, self.clock.batch)
                if not (writes or kept):
                    continue
                tensor = read(bound.arguments, site.path)
                if kept:
                    tensor = tensor.clone()
                    for index, (own, new) in kept.items():
                        # what a ControlNet has added since stays added
                        tensor[index] = own + (tensor[index] - new) if self.clock.added else own
                if writes:
                    tensor = self.apply(site, read(original, site.path), tensor, writes)
                argument, path = str(site.path[0]), site.path[1:]
                bound.arguments[argument] = write(bound.arguments[argument], path, tensor)
                changed = True
            return (bound.args[1:], bound.kwargs) if changed else None

        return hook

    def due(self, site: Site) -> list[_Write]:
        return [write for write in self.plan[site] if self.clock.step in self.active[write.injection.steps]]

    def apply(self, site: Site, tensor: Tensor, changed: Tensor, writes: Sequence[_Write]) -> Tensor:
        """A copy of `changed` with every write done, whose sources are read from `tensor`, in which nothing was written."""
        clock, view = self.clock, View(site, tensor, self.clock.tokens, self.clock.batch)
        result = changed.clone()
        if sources := _plain_sources(writes):
            # the common case, one gather: every target row points at its source row
            targets = [index for write_ in writes for index in clock.indices(write_.row)]
            view.write(result, targets, view.read([index for row in sources for index in clock.indices(row)]))
        else:
            for write_ in writes:
                where = clock.indices(write_.row)
                target = View(site, result, clock.tokens, clock.batch).read(where)
                view.write(result, where, self.value(write_, view, target))
        for write_ in writes:
            for keep in write_.keeps:
                kept = self.kept.setdefault(keep, {})
                for index in clock.indices(write_.row):
                    kept.setdefault(index, (tensor[index].clone(), result[index].clone()))
        return result

    def value(self, write_: _Write, view: View, target: Tensor) -> Tensor:
        clock, injection = self.clock, write_.injection
        source = self.source(write_, view, target)
        context = Context(injection.layer, injection.stream, clock.step, len(clock.timesteps), clock.timestep)
        new = injection.operation(target, source, context)
        if not isinstance(new, Tensor) or new.shape != target.shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ProbekitError(f"operation at {injection.layer}: it returned {got}, the layer needs {tuple(target.shape)}")
        weight = None
        if injection.mask is not None:
            weight = _spatial(injection.mask, target, injection.layer)
        if injection.tokens is not None:
            weight = _token_weight(injection.tokens, target, injection.layer, weight)
        new = new.to(target.dtype)
        return new if weight is None else torch.lerp(target, new, weight)

    def source(self, write_: _Write, view: View, target: Tensor) -> Tensor:
        clock, injection, source = self.clock, write_.injection, write_.injection.source
        if isinstance(source, Row):
            return view.read(clock.indices(source.index))
        if isinstance(source, Mean):
            return torch.stack([view.read(clock.indices(row)) for row in source.rows]).mean(0)
        if isinstance(source, Nothing):
            if write_.bypass is None:
                return torch.zeros_like(target)
            source = self.given[write_.bypass].read(clock.indices(write_.row))
            if source.shape != target.shape:
                shapes = f"{tuple(source.shape[1:])} into {tuple(target.shape[1:])}"
                raise ProbekitError(f"layer {injection.layer}: turns {shapes}, it cannot be left out")
        if isinstance(source, Stored):
            source = source.captured.read(view.site, clock.step, clock.call, source.row)
        if source.ndim == target.ndim - 1:
            source = source[None]
        if source.shape[1:] != target.shape[1:] or source.shape[0] not in (1, target.shape[0]):
            raise ProbekitError(
                f"source of shape {tuple(source.shape)} does not fit layer {injection.layer} of shape {tuple(target.shape)}"
            )
        return source.to(target.device, target.dtype).expand_as(target)


def _plain_sources(writes: Sequence[_Write]) -> list[int]:
    """The row that each takes its value from, where no row is written twice and every one whole; else nothing."""
    sources = [
        write_.injection.source.index
        for write_ in writes
        if isinstance(write_.injection.source, Row)
        and write_.injection.operation is replace
        and write_.injection.mask is None
        and write_.injection.tokens is None
    ]
    once = len({write_.row for write_ in writes}) == len(writes)
    return sources if once and len(sources) == len(writes) else []


def _spatial(mask: Tensor, target: Tensor, layer: str) -> Tensor:
    """The mask at the target's resolution, shaped to broadcast over it; tokens are a grid of the mask's proportions."""
    if mask.ndim != 2:
        raise ProbekitError(f"mask of shape {tuple(mask.shape)} at {layer}: it must be (height, width)")
    if target.ndim == 4:
        height, width = target.shape[-2:]
    else:
        tokens = target.shape[1]
        height = round(math.sqrt(tokens * mask.shape[0] / mask.shape[1]))
        width = tokens // max(height, 1)
        if height * width != tokens:
            raise ProbekitError(
                f"mask of shape {tuple(mask.shape)} does not fit layer {layer} of shape {tuple(target.shape)}: "
                f"its {tokens} tokens are no grid of those proportions"
            )
    resized = F.interpolate(mask[None, None].to(target.device, torch.float32), (height, width), mode="area")
    resized = resized.to(target.dtype)
    return resized if target.ndim == 4 else resized.reshape(1, -1, 1)


def _token_weight(tokens: Sequence[int], target: Tensor, layer: str, weight: Tensor | None) -> Tensor:
    if target.ndim != 3:
        raise ProbekitError(f"tokens at {layer} of shape {tuple(target.shape)}: it has no tokens, use a mask")
    if outside := [t for t in tokens if not 0 <= t < target.shape[1]]:
        raise ProbekitError(f"token {outside[0]} at {layer}: it has tokens 0 to {target.shape[1] - 1}")
    chosen = torch.zeros(1, target.shape[1], 1, device=target.device, dtype=target.dtype)
    chosen[:, list(tokens)] = 1
    return chosen if weight is None else chosen * weight

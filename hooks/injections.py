"""Injections: where, when, from whom, how; and the engine that runs them inside an unmodified pipeline."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architectures import Layer, Site, bind, hook_sites, layers, read, write
from .captures import Captured
from .errors import ProbekitError
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

    def operation(target: Tensor, source: Tensor, context: Context) -> Tensor:
        return torch.lerp(target, source, weight)

    return operation


def add(scale: float) -> Operation:
    """target + scale * source."""

    def operation(target: Tensor, source: Tensor, context: Context) -> Tensor:
        return target + scale * source

    return operation


@dataclass(frozen=True)
class Row:
    """Take the activation from another row of the same batch, as it was before anything was written."""

    index: int = 0


@dataclass(frozen=True)
class Stored:
    """Take the activation that `capture` kept of a row at the same layer, step and call."""

    captured: Captured
    row: int = 0


@dataclass(frozen=True, eq=False)
class Injection:
    """One intervention, as a value.

    layer, stream: where (`stream=None` is the layer's default stream).
    source: from whom: a `Row`, a `Stored` capture, or a tensor of the layer's shape, with or without a leading dimension
        of guidance branches.
    steps: when.
    operation: how: `replace`, `blend(weight)`, `add(scale)` or a function of the user's (see `Operation`).
    mask: (h, w) weights in [0, 1], resized to the layer's resolution: how much of the new value counts where.
    tokens: indices of the tokens to write, for streams of tokens.
    """

    layer: str
    source: Row | Stored | Tensor = Row(0)
    steps: Steps = ALL
    operation: Operation = replace
    stream: str | None = None
    mask: Tensor | None = None
    tokens: tuple[int, ...] | None = None


Rules = Mapping[int, Sequence[Injection]]
"""For each row of the batch that is written, its injections, applied in order."""


@contextlib.contextmanager
def inject(denoiser: nn.Module, rules: Rules, *, schedule: Any, rows: int) -> Iterator[Clock]:
    """Run `rules` in every denoiser call made inside the context.

    schedule: the pipeline's scheduler, or the distinct timesteps in order. rows: how many images the pipeline makes at
    once. All hooks are removed on leaving, also after an exception. Raises ProbekitError for unknown layers and streams at
    once, for steps outside the schedule and for shapes that do not fit at the first call.
    """
    known = {layer.name: layer for layer in layers(denoiser)}
    clock = Clock(denoiser, schedule, rows)
    engine = _Engine(clock, _plan(known, rules, rows))
    handles = [clock.attach(), denoiser.register_forward_pre_hook(engine.begin)]
    try:
        handles += hook_sites(denoiser, engine.plan, engine.on_output, engine.on_input)
        yield clock
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class _Write:
    row: int
    injection: Injection
    keeps: tuple[Site, ...]


def _plan(known: Mapping[str, Layer], rules: Rules, rows: int) -> dict[Site, list[_Write]]:
    """For each site, what is written there."""
    plan: dict[Site, list[_Write]] = {}
    for row, injections in rules.items():
        for injection in injections:
            if injection.layer not in known:
                raise ProbekitError(f"no layer {injection.layer!r} in this model")
            source = injection.source
            for number in (row, source.index if isinstance(source, Row) else row):
                if not 0 <= number < rows:
                    raise ProbekitError(f"row {number}: the batch has rows 0 to {rows - 1}")
            stream = known[injection.layer].stream(injection.stream)
            for site in stream.writes:
                plan.setdefault(site, []).append(_Write(row, injection, stream.keeps))
            for site in stream.keeps:
                plan.setdefault(site, [])
    return plan


class _Engine:
    """The hooks' state during one `inject`: nothing of it is stored on the model."""

    def __init__(self, clock: Clock, plan: dict[Site, list[_Write]]) -> None:
        self.clock, self.plan = clock, plan
        self.kept: dict[Site, dict[int, Tensor]] = {}
        self.active: dict[Steps, frozenset[int]] = {}
        self.schedule: tuple[float, ...] = ()

    def begin(self, module: nn.Module, args: Any) -> None:
        self.kept.clear()
        if self.clock.timesteps != self.schedule:
            self.schedule = self.clock.timesteps
            writes = (write.injection.steps for writes in self.plan.values() for write in writes)
            self.active = {steps: steps.resolve(self.schedule) for steps in writes}

    def on_output(self, sites: list[Site]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            changed = output
            for site in sites:
                if writes := self.due(site):
                    changed = write(changed, site.path, self.apply(site, read(output, site.path), writes))
            return None if changed is output else changed

        return hook

    def on_input(self, sites: list[Site]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bound = bind(module, args, kwargs)
            changed = False
            for site in sites:
                writes, kept = self.due(site), self.kept.get(site)
                if not (writes or kept):
                    continue
                argument, path = str(site.path[0]), site.path[1:]
                tensor = read(bound.arguments[argument], path)
                if kept:
                    tensor = tensor.clone()
                    for index, value in kept.items():
                        tensor[index] = value
                if writes:
                    tensor = self.apply(site, tensor, writes)
                bound.arguments[argument] = write(bound.arguments[argument], path, tensor)
                changed = True
            return (bound.args[1:], bound.kwargs) if changed else None

        return hook

    def due(self, site: Site) -> list[_Write]:
        return [write for write in self.plan[site] if self.clock.step in self.active[write.injection.steps]]

    def apply(self, site: Site, tensor: Tensor, writes: Sequence[_Write]) -> Tensor:
        """A copy of the tensor with every write done; sources are read before anything is written."""
        for write_ in writes:
            for keep in write_.keeps:
                kept = self.kept.setdefault(keep, {})
                for index in self.clock.indices(write_.row):
                    kept.setdefault(index, tensor[index].clone())
        if all(_is_plain(write_.injection) for write_ in writes):
            # the common case, one gather: every target row points at its source row
            origins = list(range(tensor.shape[0]))
            for write_ in writes:
                source = write_.injection.source
                assert isinstance(source, Row)
                for target, origin in zip(self.clock.indices(write_.row), self.clock.indices(source.index), strict=True):
                    origins[target] = origin
            return tensor[torch.tensor(origins, device=tensor.device)]
        result = tensor.clone()
        for write_ in writes:
            where = self.clock.indices(write_.row)
            result[where] = self.value(site, write_.injection, result[where], tensor)
        return result

    def value(self, site: Site, injection: Injection, target: Tensor, tensor: Tensor) -> Tensor:
        clock = self.clock
        source = self.source(site, injection, target, tensor)
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

    def source(self, site: Site, injection: Injection, target: Tensor, tensor: Tensor) -> Tensor:
        source = injection.source
        if isinstance(source, Row):
            return tensor[self.clock.indices(source.index)]
        if isinstance(source, Stored):
            source = source.captured.read(site, self.clock.step, self.clock.call, source.row)
        if source.ndim == target.ndim - 1:
            source = source[None]
        if source.shape[1:] != target.shape[1:] or source.shape[0] not in (1, target.shape[0]):
            raise ProbekitError(
                f"source of shape {tuple(source.shape)} does not fit layer {injection.layer} of shape {tuple(target.shape)}"
            )
        return source.to(target.device, target.dtype).expand_as(target)


def _is_plain(injection: Injection) -> bool:
    bare = injection.mask is None and injection.tokens is None
    return bare and injection.operation is replace and isinstance(injection.source, Row)


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

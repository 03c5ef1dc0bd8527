"""Which denoising steps: `Steps` says it, `Clock` knows which one a denoiser is at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import denoiser_of
from .errors import ProbekitError
from .sites import Tokens, bind


@dataclass(frozen=True)
class Steps:
    """A set of denoising steps; with nothing given, all of them. At most one of the fields may be given.

    indices: step numbers from 0, the noisiest, in the order of generation.
    fraction: (start, stop) of the schedule in [0, 1]; step i of n is in it when start <= i/n < stop.
    timesteps: (high, low), both included, in the scheduler's own units (1000 is noise for most).
    """

    indices: tuple[int, ...] | None = None
    fraction: tuple[float, float] | None = None
    timesteps: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.indices, self.fraction, self.timesteps)) > 1:
            raise ProbekitError("steps: give indices, a fraction or timesteps, not two of them")
        if self.fraction is not None and not 0 <= self.fraction[0] < self.fraction[1] <= 1:
            raise ProbekitError(f"steps {self.fraction}: a fraction needs 0 <= start < stop <= 1")
        if self.timesteps is not None and self.timesteps[0] < self.timesteps[1]:
            raise ProbekitError(f"steps {self.timesteps}: timesteps fall, write the higher one first")

    @classmethod
    def parse(cls, text: str) -> Steps:
        """Read `all`, `0-9`, `0,3,5-7`, `0%-50%` or `t1000-200`. Raises ProbekitError for anything else."""
        text = text.strip()
        if text == "all":
            return cls()
        number = r"([0-9]+(?:\.[0-9]+)?)"
        if match := re.fullmatch(rf"{number}%-{number}%", text):
            return cls(fraction=(float(match[1]) / 100, float(match[2]) / 100))
        if match := re.fullmatch(rf"t{number}-{number}", text):
            return cls(timesteps=(float(match[1]), float(match[2])))
        if re.fullmatch(r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*", text):
            indices: list[int] = []
            for part in text.split(","):
                first, _, last = part.partition("-")
                indices += range(int(first), int(last or first) + 1)
            if indices:
                return cls(indices=tuple(sorted(set(indices))))
        raise ProbekitError(f"steps {text!r}: write all, 0-9, 0,3,5-7, 0%-50% or t1000-200")

    def __str__(self) -> str:
        """As `parse` reads it."""
        if self.indices is not None:
            return ",".join(map(str, self.indices))
        if self.fraction is not None:
            return "-".join(f"{100 * part:.12g}%" for part in self.fraction)
        return "all" if self.timesteps is None else "t" + "-".join(f"{t:.12g}" for t in self.timesteps)

    def resolve(self, schedule: Sequence[float]) -> frozenset[int]:
        """The step numbers meant, for a schedule of distinct timesteps. Raises ProbekitError when they lie outside it."""
        n = len(schedule)
        if self.indices is not None:
            if outside := [i for i in self.indices if not 0 <= i < n]:
                raise ProbekitError(f"steps {outside[0]}: the schedule has steps 0 to {n - 1}")
            return frozenset(self.indices)
        if self.fraction is not None:
            start, stop = self.fraction
            chosen = frozenset(i for i in range(n) if start <= i / n < stop)
        elif self.timesteps is not None:
            high, low = self.timesteps
            chosen = frozenset(i for i, t in enumerate(schedule) if low <= t <= high)
        else:
            chosen = frozenset(range(n))
        if not chosen:
            raise ProbekitError(
                f"{self}: none of the schedule's {n} steps ({schedule[0]:g} down to {schedule[-1]:g}) lies in it"
            )
        return chosen


ALL = Steps()
"""Every step."""


def distinct_timesteps(schedule: Any) -> tuple[float, ...]:
    """A scheduler's timesteps, or a sequence of them, each once and in order.

    PNDM and Heun list a timestep twice where they call the denoiser twice in one step.
    """
    timesteps = getattr(schedule, "timesteps", schedule)
    return tuple(dict.fromkeys(float(t) for t in timesteps))


ADDED = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "block_controlnet_hidden_states",
)
"""The arguments of denoisers that are added to what passes between their layers, by ControlNets and T2I-Adapters."""


class Clock:
    """Follows a denoiser's calls: the step, which call in it, how the batch is laid out, and where the image's tokens stand.

    A step is known by the timestep the denoiser is given, never by counting calls. `rows` is the number of images made at
    once; under guidance the denoiser sees each row once per branch, at `row + branch * rows`. A text encoder, which is told no
    time, is at step 0.
    """

    def __init__(self, model: nn.Module, schedule: Any, rows: int) -> None:
        self.model, self.schedule, self.rows = model, schedule, rows
        self.known, self.config = denoiser_of(model), getattr(model, "config", None)
        self.step, self.call, self.branches, self.batch = -1, 0, 1, rows
        self.timestep = float("nan")
        self.tokens: Tokens | None = None
        self.added: frozenset[str] = frozenset()
        self._timesteps: tuple[float, ...] = ()

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The distinct timesteps of the run under way."""
        return self._timesteps

    def tick(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook (with kwargs) of the denoiser."""
        bound = bind(module, args, kwargs)
        if self.known is None:
            step, self._timesteps = 0, (0.0,)
            batch = next(len(v) for v in bound.arguments.values() if isinstance(v, Tensor) and v.ndim > 1)
        else:
            bound.apply_defaults()
            given = bound.arguments[self.known.timestep]
            step = self._step(float(given.flatten()[0]) if isinstance(given, Tensor) else float(given))
            batch = len(bound.arguments[self.known.state])
            self.added = frozenset(name for name in ADDED if bound.arguments.get(name) is not None)
            self.tokens = self.known.tokens and self.known.tokens(bound.arguments, self.config)
        self.call = self.call + 1 if step == self.step else 0
        self.step, self.timestep = step, self._timesteps[step]
        if batch % self.rows:
            raise ProbekitError(f"rows {self.rows}: the denoiser is given a batch of {batch}, which that does not divide")
        self.branches, self.batch = batch // self.rows, batch

    def _step(self, told: float) -> int:
        assert self.known is not None
        # read anew at every call: the pipeline sets the scheduler's timesteps after the hooks are in place
        self._timesteps = timesteps = distinct_timesteps(self.schedule)
        config = self.config
        timestep = self.known.in_schedule(told, config, self.schedule)
        nearest = min(range(len(timesteps)), key=lambda i: abs(timesteps[i] - timestep))
        # half precision rounds what the denoiser is told
        rounded = abs(self.known.in_schedule(told * 1.004, config, self.schedule) - timestep)
        if abs(timesteps[nearest] - timestep) <= max(rounded, 0.004 * abs(timesteps[nearest])) + 1e-4:
            return nearest
        raise ProbekitError(
            f"timestep {timestep:g} is not in the schedule ({timesteps[0]:g} to {timesteps[-1]:g}, {len(timesteps)} steps)"
        )

    def indices(self, row: int) -> list[int]:
        """Where a row stands in the denoiser's batch, once for each guidance branch."""
        return [row + branch * self.rows for branch in range(self.branches)]

    def attach(self) -> torch.utils.hooks.RemovableHandle:
        """Start following the denoiser."""
        return self.model.register_forward_pre_hook(self.tick, with_kwargs=True)

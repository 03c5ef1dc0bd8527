"""Two pictures of a text-to-image model, O and E, each made once, and O with layers of E, one question after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from probekit import hooks
from probekit.hooks.errors import ProbekitError
from probekit.models import memory
from probekit.models.painter import Painter

OnStep = Callable[[int, Tensor | None], None]
"""Called after every step with its number, from 0, and the state (1, *shape), where the pipeline hands it on."""

_CALLBACK = "callback_on_step_end"


class Swap:
    """O and E of a text-to-image model, and O with layers of E: `swap(rule)` is the picture.

    What is taken of E is captured while E is made alone, and kept; O is then made alone, too. So a picture depends on the
    question only, to the byte, not on what was asked before or beside it; `Painter.sweep` gives the same but for the rounding
    of its larger batches.

    original, edit: (prompt, noise as of `Painter.row`). seed: of numbered noise. options: the pipeline's
    (`num_inference_steps`, …).
    """

    def __init__(
        self,
        painter: Painter,
        original: tuple[str, int | Tensor],
        edit: tuple[str, int | Tensor],
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.painter, self._pairs, self._seed, self._options = painter, (original, edit), seed, options
        self._held: dict[tuple[str, str | None], hooks.Captured] = {}
        self._known = {layer.name: layer for layer in _all_layers(painter.pipeline)}
        self._made: dict[bool, Tensor] = {}

    @property
    def original(self) -> Float[Tensor, "3 h w"]:
        """O, in [-1, 1]."""
        return self.make_original()

    @property
    def edit(self) -> Float[Tensor, "3 h w"]:
        """E, in [-1, 1]."""
        return self.make_edit()

    def make_original(self, on_step: OnStep | None = None) -> Float[Tensor, "3 h w"]:
        """O, which is made on the first call."""
        if False not in self._made:
            self._made[False] = self._paint(0, (), (), on_step)
        return self._made[False]

    def make_edit(self, on_step: OnStep | None = None) -> Float[Tensor, "3 h w"]:
        """E, which is made on the first call."""
        if True not in self._made:
            self._made[True] = self._paint(1, (), (), on_step)
        return self._made[True]

    def __call__(self, rule: Sequence[hooks.Injection], on_step: OnStep | None = None) -> Float[Tensor, "3 h w"]:
        """O with what the rule injects, in [-1, 1]. A source `Row(0)` is E; any other row is refused.

        on_step: called after every step, with -1 while E is captured; what it raises ends the making. Raises ProbekitError as
        `hooks.inject`.
        """
        if odd := [
            i.source for i in rule if isinstance(i.source, hooks.Mean) or i.source not in (hooks.Row(0), hooks.Nothing())
        ]:
            raise ProbekitError(f"source {odd[0]}: a swap takes layers of E, Row(0), or leaves them out")
        taken = [(i.layer, i.stream) for i in rule if isinstance(i.source, hooks.Row)]
        self.take(taken, None if on_step is None else lambda step, state: on_step(-1, None))
        stored = [
            dataclasses.replace(i, source=hooks.Stored(self._held[i.layer, i.stream])) if isinstance(i.source, hooks.Row) else i
            for i in rule
        ]
        return self._paint(0, stored, [i.layer for i in rule], on_step)

    def take(self, places: Iterable[tuple[str, str | None]], on_step: OnStep | None = None) -> None:
        """Capture (layer, stream) of E where that was not done yet, in as few runs as memory allows.

        on_step: of these runs, as of `__call__`. Raises ProbekitError for layers and streams that are not
        there, and where a single layer does not fit.
        """
        missing = [place for place in dict.fromkeys(places) if place not in self._held]
        while missing:
            part, size, room = list[tuple[str, str | None]](), 0, self._room
            for place in missing:
                size += self.size_of(place[0])
                if part and size > room:
                    break
                part.append(place)
            self._capture(part, on_step)
            missing = missing[len(part) :]
            while self._taken > room and len(self._held) > len(part):
                del self._held[next(iter(self._held))]  # what was taken first

    @property
    def _taken(self) -> int:
        """Bytes that captured activations take; those of one run are held together."""
        return sum({id(captured): captured.bytes for captured in self._held.values()}.values())

    @property
    def _room(self) -> int:
        """Bytes that captured activations may take."""
        return int(memory.SHARE * memory.free(self.painter.pipeline._execution_device) / 2)

    @functools.cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        own = [layer for name, layer in self._known.items() if name.split(".")[0] not in hooks.TEXT_ENCODERS]
        return hooks.output_shapes(self._denoiser, own, self.painter.denoise_once)

    def size_of(self, layer: str) -> int:
        """About how many bytes a layer takes of E, captured at every step, of both branches of guidance."""
        steps = int(self._options.get("num_inference_steps", 50))
        width = next(self._denoiser.parameters()).element_size()
        return 2 * steps * width * math.prod(self._shapes.get(layer.partition(":")[0], (1,))[1:])

    @property
    def _denoiser(self) -> Any:
        return hooks.denoiser(self.painter.pipeline)

    def _capture(self, places: Sequence[tuple[str, str | None]], on_step: OnStep | None) -> None:
        """One run of E, with everything of `places` kept."""
        pipeline = self.painter.pipeline
        taken: dict[tuple[str, str | None], hooks.Captured] = {}
        groups: dict[tuple[str, str | None], list[str]] = {}
        for name, stream in places:
            component, _, rest = name.partition(".")
            inside = component in hooks.TEXT_ENCODERS
            groups.setdefault((component if inside else "", stream), []).append(rest if inside else name)
        with contextlib.ExitStack() as stack:
            for (component, stream), names in groups.items():
                module = getattr(pipeline, component) if component else self._denoiser
                schedule = None if component else pipeline.scheduler
                captured = stack.enter_context(hooks.capture(module, names, schedule=schedule, rows=1, stream=stream))
                for name in names:
                    taken[f"{component}.{name}" if component else name, stream] = captured
            painted = self._paint(1, (), [name for name, _ in places], on_step)
        self._held |= taken
        if not any(component for component, _ in groups):  # captions read anew are the same only to rounding
            self._made.setdefault(True, painted)

    def _paint(
        self, which: int, rule: Sequence[hooks.Injection], layers: Sequence[str], on_step: OnStep | None
    ) -> Float[Tensor, "3 h w"]:
        """The picture of O (0) or E (1) alone, injected by a rule."""
        rows, shared = self.painter.rows([self._pairs[which]], layers, self._seed, **self._options)
        if on_step is not None:
            shared = shared | self._told(on_step)
        return hooks.injected(self.painter.pipeline, rows, [rule], **shared)[0] * 2 - 1

    def _told(self, on_step: OnStep) -> dict[str, Any]:
        """The pipeline's options that make it tell of its steps; nothing where it tells of none."""
        pipeline = self.painter.pipeline
        if _CALLBACK not in self.painter.parameters:
            return {}
        handed = "latents" in getattr(pipeline, "_callback_tensor_inputs", ())

        def told(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step, tensors.get("latents"))
            return tensors

        return {_CALLBACK: told} | ({f"{_CALLBACK}_tensor_inputs": ["latents"]} if handed else {})


def _all_layers(pipeline: Any) -> list[hooks.Layer]:
    return [*hooks.text_layers(pipeline), *hooks.layers(hooks.denoiser(pipeline))]

"""Capturing: keep the activations of chosen layers over chosen steps, in memory, in half precision or on disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .architectures import Layer, layers, select
from .errors import ProbekitError
from .sites import Site, View, bind, hook_sites, read
from .steps import ALL, Clock, Steps

Keep = Literal["device", "half"]
_INDEX = "captured.json"


class Captured:
    """What a capture kept: activations by layer, stream, step and call.

    Every tensor has shape (guidance branches, rows kept, *the layer's shape).
    """

    def __init__(
        self, known: Sequence[Layer], streams: dict[str, str | None], rows: Sequence[int], folder: Path | None
    ) -> None:
        self.layers, self.rows, self.folder = list(known), tuple(rows), folder
        self._known, self._streams = {layer.name: layer for layer in known}, streams
        self._memory: dict[str, Tensor] = {}
        self.steps: set[int] = set()

    @classmethod
    def opened(cls, folder: Path) -> Captured:
        """What was captured into a folder, to be read as a source. Raises ProbekitError where there is nothing."""
        index = folder / _INDEX
        try:
            told = json.loads(index.read_text())
            opened = cls([], {}, told["rows"], folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ProbekitError(f"folder {str(folder)!r}: holds no capture") from error
        opened.steps = {int(file.stem.removeprefix("step").split("-")[0]) for file in folder.glob("step*.safetensors")}
        return opened

    def __getitem__(self, key: tuple[str, int]) -> Tensor:
        """The activation of (layer, step): its default or chosen stream's first tensor, at the step's first call."""
        layer, step = key
        if layer not in self._streams:
            raise ProbekitError(f"layer {layer!r} was not captured: {', '.join(self._streams)}")
        site = self._known[layer].stream(self._streams[layer]).writes[0]
        return self._load(_key(site, step, 0))

    def read(self, site: Site, step: int, call: int, row: int) -> Tensor:
        """One row at a site, shape (guidance branches, *the layer's shape). Raises ProbekitError where nothing was kept."""
        if row not in self.rows:
            raise ProbekitError(f"row {row} was not captured: rows {', '.join(map(str, self.rows))} were")
        return self._load(_key(site, step, call))[:, self.rows.index(row)]

    @property
    def bytes(self) -> int:
        """Memory held, in bytes; 0 for a capture on disk."""
        return sum(t.numel() * t.element_size() for t in self._memory.values())

    def _keep(self, step: int, call: int, tensors: dict[str, Tensor]) -> None:
        self.steps.add(step)
        if self.folder is None:
            self._memory |= tensors
        else:
            save_file(tensors, self.folder / f"step{step:04d}-{call}.safetensors")

    def _load(self, key: str) -> Tensor:
        if self.folder is None and key in self._memory:
            return self._memory[key]
        _, step, call = key.rsplit("@", 2)
        if self.folder is not None:
            file = self.folder / f"step{int(step):04d}-{call}.safetensors"
            if file.exists():
                with safe_open(file, "pt") as store:
                    if key in store.keys():  # noqa: SIM118 (safe_open is no mapping)
                        return store.get_tensor(key)
        raise ProbekitError(f"nothing was captured at {key.split('@')[0]}, step {step}, call {call}")


def _key(site: Site, step: int, call: int) -> str:
    part = f"{site.tokens or ''}{json.dumps(site.features) if site.features else ''}"
    return f"{site.module}{json.dumps(site.path)}{site.border}{part}@{step}@{call}"


@contextlib.contextmanager
def capture(
    denoiser: nn.Module,
    patterns: Sequence[str],
    *,
    schedule: Any,
    rows: int = 1,
    keep_rows: Sequence[int] | None = None,
    steps: Steps = ALL,
    stream: str | None = None,
    to: Keep | Path = "device",
) -> Iterator[Captured]:
    """Keep activations of the denoiser calls made inside the context.

    patterns: layer names, globs or groups. rows: how many images the pipeline makes at once; keep_rows: which of them
    (all). to: `device` (as they are, where they are), `half` (float16, on the CPU) or a folder, into which one file a
    denoiser call is streamed: memory then never holds more than one call's activations. Hooks are removed on leaving,
    also after an exception. Raises ProbekitError for unknown layers, streams, rows and steps.
    """
    chosen = select(layers(denoiser), patterns)
    kept = range(rows) if keep_rows is None else keep_rows
    if outside := [r for r in kept if not 0 <= r < rows]:
        raise ProbekitError(f"row {outside[0]}: the batch has rows 0 to {rows - 1}")
    folder = to if isinstance(to, Path) else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ProbekitError(f"folder {str(folder)!r} is not empty: a capture needs one of its own")
    if folder is not None:
        (folder / _INDEX).write_text(json.dumps({"rows": list(kept)}))
    captured = Captured(chosen, {layer.name: stream for layer in chosen}, list(kept), folder)
    sites = {site for layer in chosen for site in layer.stream(stream).writes}
    clock = Clock(denoiser, schedule, rows)
    taken: dict[str, Tensor] = {}

    def take(site: Site, value: Any, path: Sequence[int | str]) -> None:
        if clock.step in steps.resolve(clock.timesteps):
            view = View(site, read(value, path).detach(), clock.tokens, clock.batch)
            tensor = view.read([index for branch in range(clock.branches) for index in (branch * rows + row for row in kept)])
            tensor = tensor.reshape(clock.branches, len(kept), *tensor.shape[1:])
            tensor = tensor if to == "device" else tensor.half().cpu() if to == "half" else tensor.cpu()
            taken[_key(site, clock.step, clock.call)] = tensor.contiguous()

    def on_output(sites: list[Site]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for site in sites:
                take(site, output, site.path)

        return hook

    def on_input(sites: list[Site]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = bind(module, args, kwargs).arguments
            for site in sites:
                take(site, arguments, site.path)

        return hook

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if taken:
            captured._keep(clock.step, clock.call, dict(taken))
            taken.clear()

    with contextlib.ExitStack() as hooked:
        hooked.callback(clock.attach().remove)
        for handle in hook_sites(denoiser, sites, on_output, on_input):
            hooked.callback(handle.remove)
        hooked.callback(denoiser.register_forward_hook(end).remove)
        yield captured

"""How much memory a text-to-image model takes: its weights, each row of a batch, and what is left of the device's."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from probekit.models.painter import Painter

SHARE = 0.8
"""Of the free memory, what a batch may take: kernels need room of their own."""


def of_weights(painter: Painter) -> int:
    """Bytes of the weights of all components, wherever they are."""
    return sum(p.numel() * p.element_size() for p in _weights(painter))


def _weights(painter: Painter) -> list[Tensor]:
    parts = (part for part in painter.pipeline.components.values() if isinstance(part, torch.nn.Module))
    return [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]


def of_a_row(painter: Painter, **options: Any) -> int:
    """Bytes that one picture takes while it is made, at the most, above the weights: measured on one picture in one step.

    options: the pipeline's. On CUDA it is what torch allocates, elsewhere the tensors that are alive at a time, in which
    the kernels' own room does not count.
    """
    # embeddings are made once and kept: they are no part of what a row takes
    painter.embedded("")
    device = painter.pipeline._execution_device
    once = options | {"num_inference_steps": 1}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        painter.generate([""], [0], **once)
        return torch.cuda.max_memory_allocated(device) - before
    with _Alive(_weights(painter)) as alive:
        painter.generate([""], [0], **once)
    return alive.most


def free(device: torch.device) -> int:
    """Bytes that are free: of a CUDA device's memory, else of this machine's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def human(size: int) -> str:
    """Bytes as `3.2 MiB` or `1.7 GiB`."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside it, `most` is the largest number of bytes, of tensors made inside, that were alive at a time.

    there: tensors that were made before, of which there will be views.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, made)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, of: int, size: int) -> None:
        self._known.discard(of)
        self.now -= size

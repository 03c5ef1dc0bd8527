"""Reads the files that PyTorch training scripts leave behind, and runs none of the code that a pickle can carry.

torch.load(weights_only=True) refuses most of the papers' files, since beside tensors they hold a few objects of their
trainers. Here such objects become `Foreign`: a name, arguments and a state, inert. Everything that is neither a tensor, a
plain container nor a known trainer's object is refused, and with it the file.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from probekit.errors import ProbekitError


class Foreign:
    """An object of another program's class, of which only the data is kept: its arguments, state and items."""

    name = ""

    def __init__(self, *arguments: Any, **_: Any) -> None:
        self.arguments, self.state = arguments, None
        self.items: dict[Any, Any] = {}

    def __new__(cls, *arguments: Any, **_: Any) -> Foreign:
        """Pickle makes objects by this alone."""
        made = super().__new__(cls)
        made.__init__(*arguments)  # type: ignore[misc]
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value


# what trainers put beside their tensors: Lightning's hyper-parameters and callbacks, StyleGAN's persistent modules
_FOREIGN = (
    "argparse", "dnnlib", "lightning", "lightning_fabric", "omegaconf", "pathlib", "pytorch_lightning",
    "torch_utils.persistence",
)  # fmt: skip
_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")


def _inert(cls: Any, *_: Any) -> Foreign:
    """What copyreg does for old pickles, for foreign classes only."""
    if not (isinstance(cls, type) and issubclass(cls, Foreign)):
        raise pickle.UnpicklingError(f"builds {cls!r}")
    return cls()


_PLAIN: dict[tuple[str, str], Any] = {
    ("builtins", "set"): set,
    ("builtins", "slice"): slice,
    ("builtins", "complex"): complex,
    ("_codecs", "encode"): lambda text, coding: text.encode("latin1"),  # bytes of protocol 2
    ("collections", "OrderedDict"): OrderedDict,
    ("copyreg", "_reconstructor"): _inert,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    **{(core, "_reconstruct"): np._core.multiarray._reconstruct for core in _CORES},  # type: ignore[attr-defined]
    **{(core, "scalar"): np._core.multiarray.scalar for core in _CORES},  # type: ignore[attr-defined]
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
    ("torch.storage", "_load_from_bytes"): lambda content: _torch_load(io.BytesIO(content)),
}


class _Unpickler(pickle.Unpickler):
    """Builds tensors, arrays and plain containers, and `Foreign` for trainers' objects; refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if any(module == known or module.startswith(f"{known}.") for known in _FOREIGN):
            return type(name, (Foreign,), {"name": f"{module}.{name}"})
        raise pickle.UnpicklingError(f"it calls {module}.{name}, which has no place in a file of weights")


# what torch.load wants as its `pickle_module`
_PICKLE = SimpleNamespace(
    __name__="pickle",
    Unpickler=_Unpickler,
    load=lambda file, **_: _Unpickler(file).load(),
    UnpicklingError=pickle.UnpicklingError,
)


def _torch_load(file: BinaryIO) -> Any:
    return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_PICKLE)


def read(path: Path) -> Any:
    """What a .safetensors, .pt, .pth, .ckpt or .pkl file holds: tensors on the CPU, plain containers, `Foreign` objects.

    Raises ProbekitError, in one line, for a file that cannot be read, is cut short, or asks to run code.
    """
    try:
        with path.open("rb") as file:
            start = file.read(10)
            file.seek(0)
            if path.suffix == ".safetensors":
                return load_file(path)
            # torch writes a zip archive, or in its older format a pickle that begins with a number of its own
            if start[:2] == b"PK" or _LEGACY in start + file.read(20):
                file.seek(0)
                return _torch_load(file)
            file.seek(0)
            return _Unpickler(file, encoding="latin1").load()
    except OSError as error:
        raise ProbekitError(f"file {str(path)!r}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ProbekitError(f"file {str(path)!r}: is no checkpoint, or damaged ({reason})") from error


_LEGACY = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, without the `module.` that DataParallel puts before every name."""
    found = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if found and all(key.startswith("module.") for key in found):
        return {key.removeprefix("module."): value for key, value in found.items()}
    return found

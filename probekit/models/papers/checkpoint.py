"""Reads the files that PyTorch training scripts leave behind, and runs none of the code that a pickle can carry.

torch.load(weights_only=True) refuses most of the papers' files, since beside tensors they hold a few objects of their
trainers. Here such objects become `Foreign`: a name, arguments and a state, inert. Everything that is neither a tensor, a
plain container nor a known trainer's object is refused, and with it the file.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from probekit.hooks.errors import ProbekitError


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


# what trainers put beside their tensors: Lightning's hyper-parameters and callbacks, StyleGAN's persistent modules, and
# numpy's numbers, whose own constructors take addresses in memory from whoever calls them
_FOREIGN = (
    "argparse",
    "dnnlib",
    "lightning",
    "lightning_fabric",
    "numpy",
    "omegaconf",
    "pathlib",
    "pytorch_lightning",
    "torch_utils.persistence",
)


def _inert(cls: Any, *_: Any) -> Foreign:
    """What copyreg does for old pickles, for foreign classes only."""
    if not (isinstance(cls, type) and issubclass(cls, Foreign)):
        raise pickle.UnpicklingError(f"builds a {type(cls).__name__}")
    return cls()


def _of_list(make: Callable[[Any], Any]) -> Callable[..., Any]:
    """`make`, of a list or a tuple only: a tensor's items, one by one, take far more memory than its file."""

    def made(items: Any = ()) -> Any:
        if not isinstance(items, list | tuple):
            raise pickle.UnpicklingError(f"makes a container of a {type(items).__name__}")
        return make(items)

    return made


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """torch._utils._rebuild_tensor, for what lies in the storage and holds no value twice."""
    kept = storage._untyped_storage
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if all(size) else 0
    if max(last, math.prod(size)) * storage.dtype.itemsize > kept.nbytes():
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} is larger than its storage")
    return torch.empty(0, dtype=storage.dtype).set_(kept, offset, tuple(size), tuple(stride))


_PLAIN: dict[tuple[str, str], Any] = {
    ("builtins", "set"): _of_list(set),
    ("builtins", "slice"): slice,
    ("builtins", "complex"): complex,
    ("_codecs", "encode"): lambda text, coding: text.encode("latin1"),  # bytes of protocol 2
    ("collections", "OrderedDict"): _of_list(OrderedDict),
    ("copyreg", "_reconstructor"): _inert,
    ("torch", "Size"): _of_list(torch.Size),
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
    ("torch.storage", "_load_from_bytes"): lambda content: _torch_load(io.BytesIO(content)),
}


_PYTHONS: dict[int, Any] = pickle._Unpickler.dispatch


class _Unpickler(pickle._Unpickler):
    """Builds tensors and plain containers, and `Foreign` for trainers' objects; refuses everything else.

    Python's own: C's makes room in its memo for whatever number a file names.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(_PYTHONS)
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    records: Mapping[str, int] | None = None  # of an archive: the sizes of its storages, in bytes
    room = 0  # elsewhere: the bytes that all storages may have together
    claimed: dict[str, int]

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)  # Python 2's, in protocols up to 2
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if any(module == known or module.startswith(f"{known}.") for known in _FOREIGN):
            return type(name, (Foreign,), {"name": f"{module}.{name}"})
        raise pickle.UnpicklingError(f"it calls {module}.{name}, which has no place in a file of weights")

    def _onto(self, *kinds: type) -> None:
        """Refuse to call on an object the methods that pickle has for `kinds`."""
        if not isinstance(self.stack[-1], kinds):
            raise pickle.UnpicklingError(f"changes a {type(self.stack[-1]).__name__}")

    def load_build(self) -> None:
        state = self.stack.pop()
        self._onto(Foreign, OrderedDict)
        if isinstance(self.stack[-1], Foreign):  # of an OrderedDict it is torch's `_metadata`, which nobody needs
            self.stack[-1].state = state

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._onto(dict, Foreign)
        self.stack[-1][key] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._onto(dict, Foreign)
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][key] = value

    def load_append(self) -> None:
        value = self.stack.pop()
        self._onto(list)
        self.stack[-1].append(value)

    def load_appends(self) -> None:
        values = self.pop_mark()
        self._onto(list)
        self.stack[-1].extend(values)

    def load_additems(self) -> None:
        values = self.pop_mark()
        self._onto(set)
        self.stack[-1].update(values)

    def load_binpersid(self) -> None:
        kind, storage, key, _, count = self.stack[-1][:5]
        if kind != "storage" or not isinstance(key, str) or not isinstance(count, int):
            raise pickle.UnpicklingError("refers to what is no storage")
        size = count * storage.dtype.itemsize
        if self.records is not None and self.records.get(f"data/{key}") != size:
            raise pickle.UnpicklingError(f"storage {key} is said to have {size} bytes")
        self.claimed[key] = size
        if self.records is None and (size < 0 or sum(self.claimed.values()) > self.room):
            raise pickle.UnpicklingError(f"its storages are larger than the file, with {size} bytes for {key}")
        _PYTHONS[pickle.BINPERSID[0]](self)

    for _code, _load in (
        (pickle.BUILD, load_build),
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.APPEND, load_append),
        (pickle.APPENDS, load_appends),
        (pickle.ADDITEMS, load_additems),
        (pickle.BINPERSID, load_binpersid),
    ):
        dispatch[_code[0]] = _load
    for _code in (pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        del dispatch[_code[0]]


def _records(file: BinaryIO) -> dict[str, int] | None:
    """The sizes in bytes of what an archive of torch's holds, None of torch's older format.

    Raises UnpicklingError for what torch.load has other readers for, which run TorchScript, unpack tar archives or inflate.
    """
    size = file.seek(0, io.SEEK_END)
    if tarfile.is_tarfile(_again(file)):
        raise pickle.UnpicklingError("it is a tar archive")
    if _again(file).read(4) != b"PK\x03\x04":
        return None
    if any(name.split("/")[-1] == "constants.pkl" for name in torch._C.PyTorchFileReader(_again(file)).get_all_records()):
        raise pickle.UnpicklingError("it holds TorchScript, a program")
    with zipfile.ZipFile(_again(file)) as archive:
        records = {info.filename.partition("/")[2]: info.file_size for info in archive.infolist()}
    if sum(records.values()) > size:
        raise pickle.UnpicklingError(f"it unpacks to {sum(records.values())} bytes, {size} would do")
    return records


def check_archive(path: Path) -> None:
    """Raises ProbekitError for a file of pickled weights that torch.load would do more with than read."""
    with _refusing(path), path.open("rb") as file:
        _records(file)


def _torch_load(file: BinaryIO) -> Any:
    """torch.load of what `_records` lets through."""
    records = _records(file)
    size = file.seek(0, io.SEEK_END)
    unpickler = type("Unpickler", (_Unpickler,), {"records": records, "room": size, "claimed": {}})
    # what torch.load wants as its `pickle_module`
    module = SimpleNamespace(
        __name__="pickle",
        Unpickler=unpickler,
        load=lambda file, **_: unpickler(file).load(),
        UnpicklingError=pickle.UnpicklingError,
    )
    return torch.load(_again(file), map_location="cpu", weights_only=False, pickle_module=module)


def _again(file: BinaryIO) -> BinaryIO:
    file.seek(0)
    return file


def read(path: Path) -> Any:
    """What a .safetensors, .pt, .pth, .ckpt or .pkl file holds: tensors on the CPU, plain containers, `Foreign` objects.

    Raises ProbekitError, in one line, for a file that cannot be read, is cut short, or asks to run code.
    """
    with _refusing(path), path.open("rb") as file:
        start = file.read(40)
        if path.suffix == ".safetensors":
            return load_file(path)
        # torch writes a zip archive, or in its older format a pickle that begins with a number of its own
        if start[:2] == b"PK" or _LEGACY in start:
            return _torch_load(file)
        return _Unpickler(_again(file), encoding="latin1").load()


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn whatever reading raises inside into the ProbekitError that names the file."""
    try:
        yield
    except OSError as error:
        raise ProbekitError(f"file {str(path)!r}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ProbekitError(f"file {str(path)!r}: is no checkpoint, or damaged ({reason})") from error


_LEGACY = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, without the `module.` that DataParallel puts before every name."""
    found = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if found and all(key.startswith("module.") for key in found):
        return {key.removeprefix("module."): value for key, value in found.items()}
    return found


def allow(make: Callable[[], nn.Module], state: Mapping[str, Tensor]) -> nn.Module:
    """`make()`, where the network has about as many values as the file: the sizes in a file must cost no more than it holds.

    Raises ProbekitError for one that has far more, and for sizes that no network has.
    """
    try:
        with torch.device("meta"):
            wanted = sum(value.numel() for value in make().state_dict().values())
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ProbekitError(f"its sizes make no network ({' '.join(str(error).split())[:160]})") from error
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    if wanted > 2 * (held := sum(storages.values())) + 10_000_000:
        raise ProbekitError(f"its sizes are those of a network of {wanted:,} values, it holds {held:,} bytes")
    return make()

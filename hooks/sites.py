"""Places in a running network: where a tensor, or a part of it, enters or leaves a module; how it is read and written there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import ProbekitError


@dataclass(frozen=True)
class Tokens:
    """Where the image's tokens stand in a sequence that holds text, too.

    length: how many there are; first: whether they stand before the text; starts: by row, where they begin, in sequences whose
    text is not padded to one length.
    """

    length: int
    first: bool = False
    starts: tuple[int, ...] | None = None

    def range(self, which: Literal["image", "text"], row: int, total: int) -> tuple[int, int]:
        """The tokens of a row's image or text, from the first to the one after the last, in a sequence of `total`."""
        if self.starts is not None:
            start = self.starts[row]
            return (start, start + self.length) if which == "image" else (0, start)
        if self.first:
            return (0, self.length) if which == "image" else (self.length, total)
        return (total - self.length, total) if which == "image" else (0, total - self.length)


@dataclass(frozen=True)
class Site:
    """One tensor at a module's border, or a part of it.

    `path` leads into the module's output (item numbers; an empty path means the output itself, or the only
    tensor of a tuple or output object), or into its input (the argument's name, then item numbers).
    tokens: only the image's or the text's in a sequence of both. features: only these ranges of the last dimension.
    """

    module: str
    path: tuple[int | str, ...] = ()
    border: Literal["output", "input"] = "output"
    tokens: Literal["image", "text"] | None = None
    features: tuple[tuple[int, int], ...] | None = None


def read(value: Any, path: Sequence[int | str] = ()) -> Tensor:
    """The tensor at the end of `path` in a module's output (or in its bound arguments)."""
    for key in path:
        value = value[key]
    if not isinstance(value, Tensor):
        tensors = [item for item in (value.values() if isinstance(value, dict) else value) if isinstance(item, Tensor)]
        if len(tensors) != 1:
            raise ProbekitError(f"a layer returned {len(tensors)} tensors, and which one is meant is not known")
        value = tensors[0]
    return value


def write(value: Any, path: Sequence[int | str], tensor: Tensor) -> Any:
    """A copy of `value` with the tensor at the end of `path` replaced; nothing is changed in place."""
    if not path:
        if isinstance(value, Tensor):
            return tensor
        items = value.values() if isinstance(value, dict) else value
        path = (next(i for i, item in enumerate(items) if isinstance(item, Tensor)),)
    key, rest = path[0], path[1:]
    if isinstance(value, dict):
        if isinstance(key, int):
            key = list(value)[key]
        changed: dict[Any, Any] = dict(value)
        changed[key] = write(value[key], rest, tensor)
        # a diffusers output object is an ordered dict that is built from its fields
        return type(value)(**changed) if type(value) is not dict else changed
    assert isinstance(key, int)
    items = list(value)
    items[key] = write(items[key], rest, tensor)
    return type(value)(items)


class View:
    """The part of a batched tensor that a site means: rows of it are read, and written into a copy.

    tokens: where the image stands, of a site that means tokens of one kind. batch: how many rows there must be.
    """

    def __init__(self, site: Site, tensor: Tensor, tokens: Tokens | None, batch: int) -> None:
        self.site, self.tensor, self.tokens = site, tensor, tokens
        if len(tensor) != batch:
            # perturbed-attention guidance splits the batch inside its attentions
            raise ProbekitError(f"{site.module}: it is given {len(tensor)} of a batch of {batch}, and which is not known")
        if site.tokens is not None and tokens is None:
            raise ProbekitError(f"{site.module}: where its image tokens stand is not known")

    def read(self, rows: Sequence[int]) -> Tensor:
        """Rows' values, shape (rows, *the part's shape)."""
        return _joined(self.tensor, self._pieces(rows), rows)

    def _pieces(self, rows: Sequence[int]) -> list[tuple[Any, ...]]:
        """For each row, or for all at once where they are alike, the index after the row's."""
        features: list[Any] = [...] if self.site.features is None else [_columns(self.site.features)]
        if self.site.tokens is None:
            return [(..., *features)] if self.site.features is not None else [(...,)]
        assert self.tokens is not None
        ranges = [self.tokens.range(self.site.tokens, row, self.tensor.shape[1]) for row in rows]
        if len({stop - start for start, stop in ranges}) > 1:
            lengths = " and ".join(map(str, sorted({stop - start for start, stop in ranges})))
            raise ProbekitError(f"{self.site.tokens} tokens at {self.site.module}: there are {lengths} of them, by the row")
        kept = [(slice(start, stop), *([...] if self.site.features is None else [..., *features])) for start, stop in ranges]
        return kept[:1] if len(set(ranges)) == 1 else kept

    def write(self, into: Tensor, rows: Sequence[int], values: Tensor) -> None:
        """Put rows' values (as `read` gives them) into a tensor of the whole's shape, in place."""
        pieces = self._pieces(rows)
        shape = into[(rows[0], *pieces[0])].shape
        if values.shape[1:] != shape:
            what = f"{self.site.tokens} tokens" if self.site.tokens else "activation"
            raise ProbekitError(
                f"{what} at {self.site.module}: of shape {tuple(values.shape[1:])}, where {tuple(shape)} are written; "
                "captions of other lengths have other tokens"
            )
        if len(pieces) == 1:
            index = torch.tensor(rows, device=into.device)
            if pieces[0] == (...,):
                into[index] = values
            else:
                part = into[index]
                part[(slice(None), *pieces[0])] = values
                into[index] = part
            return
        for row, piece, value in zip(rows, pieces, values, strict=True):
            into[(row, *piece)] = value


def _columns(ranges: tuple[tuple[int, int], ...]) -> Any:
    """The index of feature ranges: a slice where they are one, else their numbers."""
    if len(ranges) == 1:
        return slice(*ranges[0])
    return [i for start, stop in ranges for i in range(start, stop)]


def _joined(tensor: Tensor, pieces: list[tuple[Any, ...]], rows: Sequence[int]) -> Tensor:
    if len(pieces) == 1:
        taken = tensor[torch.tensor(rows, device=tensor.device)]
        return taken if pieces[0] == (...,) else taken[(slice(None), *pieces[0])]
    return torch.stack([tensor[(row, *piece)] for row, piece in zip(rows, pieces, strict=True)])


# --- hooks -------------------------------------------------------------------------------------------------------------


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """A forward call's arguments by name, however they were passed; the first of `args` is the module itself."""
    # the class's signature: nnsight and accelerate put wrappers without one in the place of an instance's forward
    return inspect.signature(type(module).forward).bind(module, *args, **kwargs)


def attach(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules of those names. Raises ProbekitError for a compiled model, which ignores hooks added after compilation."""
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise ProbekitError(
            f"a compiled {type(model._orig_mod).__name__} ignores hooks: pass it as it was before torch.compile"
        )
    modules = {name: model.get_submodule(name) for name in names}
    for module in (model, *modules.values()):
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ProbekitError(f"a compiled {type(module).__name__} ignores hooks: load the model without compiling it")
    return modules


def hook_sites(
    model: nn.Module,
    sites: Iterable[Site],
    on_output: Callable[[list[Site]], Callable[..., Any]],
    on_input: Callable[[list[Site]], Callable[..., Any]],
) -> list[RemovableHandle]:
    """Register, for every module that has sites, a forward hook for those in its output and a pre-hook for those in its input.

    on_output, on_input: given a module's sites, the hook; that of an input is called with the keyword arguments too.
    """
    by_place: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        by_place.setdefault((site.module, site.border), []).append(site)
    modules = attach(model, {name for name, _ in by_place})
    return [
        modules[name].register_forward_hook(on_output(found))
        if border == "output"
        else modules[name].register_forward_pre_hook(on_input(found), with_kwargs=True)
        for (name, border), found in by_place.items()
    ]

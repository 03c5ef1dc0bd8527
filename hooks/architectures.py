"""The named layers of a denoiser, in execution order, and where each reads and writes the image stream.

This is the only place that knows what a diffusers block returns. A layer is named as diffusers spells it
(`down_blocks.2.resnets.1`, `transformer_blocks.7`); a layer carries one or more streams:

- U-Net encoders write their tensor to the `main` path and to a `skip` connection; `both` (the default) writes both;
- blocks of SD3 and Flux carry an `image` stream (the default) and a `text` stream, and `both`;
- everything else has the one stream `main`.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import ProbekitError

Kind = Literal["resnet", "attention", "block", "mid", "conv", "sampler", "projection"]

GROUPS: dict[str, tuple[Kind, ...]] = {
    "@resnets": ("resnet",),
    "@attentions": ("attention",),
    "@blocks": ("block", "mid"),
    "@mid": ("mid",),
    "@convs": ("conv",),
    "@samplers": ("sampler",),
    "@projections": ("projection",),
    "@all": ("resnet", "attention", "block", "mid", "conv", "sampler", "projection"),
}
"""Names that select layers by kind."""


@dataclass(frozen=True)
class Site:
    """One tensor at a module's border.

    `path` leads into the module's output (item numbers; an empty path means the output itself, or the only
    tensor of a tuple or output object), or into its input (the argument's name, then item numbers).
    """

    module: str
    path: tuple[int | str, ...] = ()
    border: Literal["output", "input"] = "output"


@dataclass(frozen=True)
class Stream:
    """The sites a stream writes, and the sites that must keep their value although they share a written tensor."""

    writes: tuple[Site, ...]
    keeps: tuple[Site, ...] = ()


@dataclass(frozen=True)
class Layer:
    """A place in a denoiser whose activation can be captured and swapped; the first of `streams` is the default."""

    name: str
    order: int
    kind: Kind
    streams: Mapping[str, Stream] = field(repr=False, compare=False)

    def stream(self, name: str | None = None) -> Stream:
        """The stream of that name, or the default one. Raises ProbekitError when the layer has no such stream."""
        if name is None:
            return next(iter(self.streams.values()))
        if name not in self.streams:
            raise ProbekitError(f"stream {name!r} of layer {self.name}: it has {', '.join(self.streams)}")
        return self.streams[name]


def layers(model: nn.Module) -> list[Layer]:
    """Every layer of a denoiser in execution order.

    Knows `UNet2DConditionModel`, `UNet2DModel` and whatever is built of their blocks, SD3 and Flux with their two streams,
    and takes any other model that holds stacks of transformer blocks. Raises ProbekitError where there is neither.
    """
    is_unet = hasattr(model, "down_blocks") and hasattr(model, "up_blocks")
    found = list(_unet(model) if is_unet else _transformer(model))
    if not found:
        raise ProbekitError(f"{type(model).__name__} has neither U-Net blocks nor a stack of transformer blocks")
    return [Layer(name, order, kind, streams) for order, (name, kind, streams) in enumerate(found)]


def default_layers(model: nn.Module) -> tuple[str, ...]:
    """What the injection paper swaps: a U-Net's resnets and attentions, a transformer's blocks."""
    return ("@resnets", "@attentions") if hasattr(model, "down_blocks") else ("@blocks",)


def select(available: Sequence[Layer], patterns: Iterable[str]) -> list[Layer]:
    """The layers that match any of the patterns, in execution order.

    A pattern is a name, a glob (`up_blocks.*.attentions.*`) or one of `GROUPS`. Raises ProbekitError for a pattern that
    matches nothing, with the names nearest to it.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("@"):
            if pattern not in GROUPS:
                raise ProbekitError(f"layer group {pattern!r}: choose from {', '.join(GROUPS)}")
            matches = {layer.name for layer in available if layer.kind in GROUPS[pattern]}
        else:
            matches = {layer.name for layer in available if fnmatch.fnmatchcase(layer.name, pattern)}
        if not matches:
            near = difflib.get_close_matches(pattern, [layer.name for layer in available], n=3, cutoff=0.4)
            hint = (
                f"nearest: {', '.join(near)}"
                if near
                else f"there are {', '.join(sorted({la.kind for la in available}))} layers"
            )
            raise ProbekitError(f"no layer {pattern!r} in this model ({hint})")
        chosen |= matches
    return [layer for layer in available if layer.name in chosen]


# --- reading and writing -----------------------------------------------------------------------------------------------


def read(value: Any, path: Sequence[int | str] = ()) -> Tensor:
    """The tensor at the end of `path` in a module's output (or in its bound arguments)."""
    for key in path:
        value = value[key]
    if not isinstance(value, Tensor):
        tensors = [item for item in (value.values() if isinstance(value, dict) else value) if isinstance(item, Tensor)]
        if len(tensors) != 1:
            raise ProbekitError(
                f"a layer returned {len(tensors)} tensors, and which carries the image is not known for this model"
            )
        value = tensors[0]
    return value


def write(value: Any, path: Sequence[int | str], tensor: Tensor) -> Any:
    """A copy of `value` with the tensor at the end of `path` replaced; nothing is changed in place."""
    if not path:
        if isinstance(value, Tensor):
            return tensor
        path = (next(i for i, item in enumerate(value.values() if isinstance(value, dict) else value) if item is not None),)
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


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """A forward call's arguments by name, however they were passed; the first of `args` is the module itself."""
    # the class's signature: nnsight and accelerate put wrappers without one in the place of an instance's forward
    return inspect.signature(type(module).forward).bind(module, *args, **kwargs)


# --- U-Nets ------------------------------------------------------------------------------------------------------------

_Found = tuple[str, Kind, dict[str, Stream]]


def _main(name: str) -> dict[str, Stream]:
    return {"main": Stream((Site(name),))}


def _unet(model: Any) -> Iterator[_Found]:
    skips = _skip_sites(model)

    def encoder(name: str, skip: Site) -> dict[str, Stream]:
        out = Site(name)
        return {"both": Stream((out,)), "main": Stream((out,), keeps=(skip,)), "skip": Stream((skip,))}

    yield "conv_in", "conv", encoder("conv_in", next(skips))
    for i, block in enumerate(model.down_blocks):
        name = f"down_blocks.{i}"
        attentions = getattr(block, "attentions", None) or []
        count = 0
        for j in range(len(block.resnets)):
            if len(attentions):
                yield f"{name}.resnets.{j}", "resnet", _main(f"{name}.resnets.{j}")
                last: tuple[str, Kind] = (f"{name}.attentions.{j}", "attention")
            else:
                last = (f"{name}.resnets.{j}", "resnet")
            yield (*last, encoder(last[0], next(skips)))
            count += 1
        for j in range(len(getattr(block, "downsamplers", None) or [])):
            yield f"{name}.downsamplers.{j}", "sampler", encoder(f"{name}.downsamplers.{j}", next(skips))
            count += 1
        main = Site(name, (0,))
        rest = tuple(Site(name, (1, k)) for k in range(count))
        yield name, "block", {"both": Stream((main, *rest)), "main": Stream((main,)), "skip": Stream(rest)}

    if model.mid_block is not None:
        attentions = getattr(model.mid_block, "attentions", None) or []
        for j in range(len(model.mid_block.resnets)):
            if 0 < j <= len(attentions) and attentions[j - 1] is not None:
                yield f"mid_block.attentions.{j - 1}", "attention", _main(f"mid_block.attentions.{j - 1}")
            yield f"mid_block.resnets.{j}", "resnet", _main(f"mid_block.resnets.{j}")
        yield "mid_block", "mid", _main("mid_block")

    for i, block in enumerate(model.up_blocks):
        name = f"up_blocks.{i}"
        attentions = getattr(block, "attentions", None) or []
        for j in range(len(block.resnets)):
            yield f"{name}.resnets.{j}", "resnet", _main(f"{name}.resnets.{j}")
            if len(attentions):
                yield f"{name}.attentions.{j}", "attention", _main(f"{name}.attentions.{j}")
        for j in range(len(getattr(block, "upsamplers", None) or [])):
            yield f"{name}.upsamplers.{j}", "sampler", _main(f"{name}.upsamplers.{j}")
        yield name, "block", _main(name)
    yield "conv_out", "conv", _main("conv_out")


def _skip_sites(model: Any) -> Iterator[Site]:
    """Where each skip tensor, in the order the encoder makes them, enters the decoder.

    Every up block takes as many from the end of the stack as it has resnets.
    """
    taken = [
        (f"up_blocks.{i}", j) for i, block in reversed(list(enumerate(model.up_blocks))) for j in range(len(block.resnets))
    ]
    for name, j in taken:
        yield Site(name, ("res_hidden_states_tuple", j), "input")


# --- transformers ------------------------------------------------------------------------------------------------------

_TEXT_THEN_IMAGE = ("SD3Transformer2DModel", "FluxTransformer2DModel")
_STACKS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")
_BEFORE = ("x_embedder", "pos_embed")
_AFTER = ("proj_out", "proj_out_2")


def _transformer(model: nn.Module) -> Iterator[_Found]:
    stacks = [name for name in _STACKS if isinstance(getattr(model, name, None), nn.ModuleList)]
    if not stacks:
        return
    # of Flux's two only x_embedder carries the image, its pos_embed makes angles; the others embed patches in pos_embed
    before = [name for name in _BEFORE if isinstance(getattr(model, name, None), nn.Module)]
    for name in before[:1]:
        yield name, "projection", _main(name)
    for stack in stacks:
        for i, block in enumerate(getattr(model, stack)):
            name = f"{stack}.{i}"
            if type(model).__name__ not in _TEXT_THEN_IMAGE:
                yield name, "block", _main(name)
                continue
            text, image = Site(name, (0,)), Site(name, (1,))
            if getattr(block, "context_pre_only", False):  # SD3's last block returns (None, image)
                yield name, "block", {"image": Stream((image,))}
            else:
                streams = {"image": Stream((image,)), "text": Stream((text,)), "both": Stream((text, image))}
                yield name, "block", streams
    # DiT scales by proj_out_1 inside its output stage; only the last projection is the prediction
    after = [name for name in _AFTER if isinstance(getattr(model, name, None), nn.Module)]
    for name in after[-1:]:
        yield name, "projection", _main(name)


def output_shapes(model: nn.Module, chosen: Sequence[Layer], run: Callable[[], Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each layer's output, batch first, as seen while `run()` calls the model.

    For layers with two streams it is that of the default one's first tensor.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def watch(layer: Layer) -> Callable[..., None]:
        path = layer.stream().writes[0].path

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            shapes[layer.name] = tuple(read(output, path).shape)

        return hook

    modules = attach(model, [layer.name for layer in chosen])
    handles = [modules[layer.name].register_forward_hook(watch(layer)) for layer in chosen]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return shapes


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

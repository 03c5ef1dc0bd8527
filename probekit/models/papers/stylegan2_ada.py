"""stylegan2-ada's pickles (NVlabs/stylegan2-ada-pytorch), of which only the data is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor

from probekit.hooks.errors import ProbekitError
from probekit.models.families.stylegan2 import CLAMP, MAPPING_RATE, Generator, as_model, config_of
from probekit.models.formats import Format
from probekit.models.model import Model
from probekit.models.papers.checkpoint import Foreign, allow

# stylegan2-ada pickles every module as a call of this, with the source of the module's class among the arguments. The
# source is text to us and stays so: the classes are those of families.stylegan2, the file gives their data.
_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"


def matches(content: Any) -> bool:
    """Whether the content of a file, as `checkpoint.read` gives it, is that of stylegan2-ada's pickle."""
    if not isinstance(content, Mapping) or "G_ema" not in content:
        return False
    try:
        return "b4" in _part(_module(content["G_ema"], "synthesis"), "_modules")
    except ProbekitError:
        return False


def from_ada(content: Mapping[str, Any], name: str) -> Model:
    """The model in a stylegan2-ada `.pkl`, from what `checkpoint.read` gave for it: the averaged generator, 'G_ema'.

    Raises ProbekitError, in one line, for a file without such a generator, for a conditional one, and for options of the
    reference that would make other images than `Generator` does.
    """
    try:
        if not isinstance(content, Mapping) or "G_ema" not in content:
            raise ProbekitError("is no stylegan2-ada pickle, it has no 'G_ema'")
        generator = content["G_ema"]
        layer = _module(generator, "synthesis", "b4", "conv1")
        fully_connected = _module(generator, "mapping", "fc0")
        for fields, option, known in (
            (layer, "activation", "lrelu"),
            (fully_connected, "activation", "lrelu"),
            (fully_connected, "bias_gain", MAPPING_RATE),
        ):
            value = fields.get(option, known)
            if not isinstance(value, type(known)) or value != known:
                raise ProbekitError(f"its {option} is not {known!r}, which alone is supported")
        clamp = layer.get("conv_clamp", CLAMP)
        if clamp is not None and not isinstance(clamp, int | float):
            raise ProbekitError(f"its conv_clamp is of type {type(clamp).__name__}, a number or None is expected")
        state = dict(_tensors(generator))
        network = cast(Generator, allow(lambda: Generator(**config_of(state) | {"conv_clamp": clamp}), state))
        _load(network, state)
    except ProbekitError as error:
        raise ProbekitError(f"model {name!r}: {error}") from error
    return as_model(network, name)


def _module(item: Any, *path: str) -> Mapping[str, Any]:
    """The `__dict__` of a pickled module, or of its child at the path."""
    meta = item.arguments[0] if isinstance(item, Foreign) and item.name == _PERSISTENT and item.arguments else None
    fields = meta.get("state") if isinstance(meta, Mapping) else None
    if not isinstance(fields, Mapping):
        raise ProbekitError("'G_ema' is no generator that stylegan2-ada pickled")
    if not path:
        return fields
    children = _part(fields, "_modules")
    if path[0] not in children:
        raise ProbekitError(f"'G_ema' is no StyleGAN2 generator, it has no module {path[0]!r}")
    return _module(children[path[0]], *path[1:])


def _part(fields: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = fields.get(key)
    if not isinstance(part, Mapping):
        raise ProbekitError(f"'G_ema' holds a module without {key}")
    return part


def _tensors(item: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The state dict of a pickled module."""
    if prefix.count(".") > 4:  # synthesis.b4.conv1.affine. is the deepest there is; a made-up file may hold itself
        raise ProbekitError(f"'G_ema' is no StyleGAN2 generator, it has a module {prefix!r}")
    fields = _module(item)
    for kind in ("_parameters", "_buffers"):
        yield from ((f"{prefix}{key}", value) for key, value in _part(fields, kind).items() if isinstance(value, Tensor))
    for key, child in _part(fields, "_modules").items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{key}.")


def _load(network: Generator, state: Mapping[str, Tensor]) -> None:
    """load_state_dict, which must fit exactly, with an error of one line."""
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            has, needs = found.get(key, "none"), wanted.get(key, "none")
            raise ProbekitError(f"StyleGAN2 weights: {key} has shape {has}, a generator of this size needs {needs}")
    network.load_state_dict(dict(state))


FORMATS = (
    Format(
        "StyleGAN2-ADA's `.pkl`",
        lambda place: place.is_file and matches(place.content),
        lambda place: from_ada(place.content, place.name),
    ),
)

"""A model of the user's own: a class with encode, decode or both, in a Python file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probekit import checked, own_code
from probekit.hooks.errors import ProbekitError
from probekit.latents import LatentSpace
from probekit.models.model import Model, fixed

MOST_PIXELS = 4096
"""Of a side of its images."""


def load_class(file: Path, class_name: str) -> Model:
    """The model that a class in a Python file describes, which is run; its one space is called `latent`.

    The class is made without arguments. What it holds of modules and tensors counts as its weights. It has `image_size`, and
    `encode(images) -> latents`, `decode(latents) -> images` or both: images (n, 3, h, w) in [-1, 1], latents (n, …), tensors.
    A class that cannot encode also has `sample(n, generator)`, which draws latents, so that its own pictures can be used.

    Raises ProbekitError, in one line, for a file that cannot be read, has no such class, or whose class is not so.
    """
    where = f"{file}:{class_name}"
    found = own_code.run(f"model {where!r}", file).get(class_name)
    if not callable(found):
        raise ProbekitError(f"model {where!r}: the file has no class {class_name!r}")
    with own_code.called(f"model {where!r}"):
        made = found()
        size = getattr(made, "image_size", None)
        ways = {way: getattr(made, way, None) for way in ("encode", "decode", "sample")}
        about = str(found.__doc__ or "").strip() or "a model of one's own"
        weights = _weights(made)
    if type(size) is not int or not 1 <= size <= MOST_PIXELS:
        said = checked.shown(size)
        raise ProbekitError(f"model {where!r}: needs image_size, 1 to {MOST_PIXELS} pixels of a side; it has {said}")
    if not (ways["encode"] or (ways["decode"] and ways["sample"])):
        raise ProbekitError(f"model {where!r}: needs encode(images), or decode(latents) and sample(n, generator)")

    def result(way: str, *given: Any) -> Tensor:
        with own_code.called(f"model {where!r}: {way}"):
            value = ways[way](*given)  # type: ignore[misc]
        n = given[0] if way == "sample" else len(given[0])
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != n:
            raise ProbekitError(f"model {where!r}: {way} must return a tensor with a row an item, not {got} for {n}")
        if way == "decode" and got != (n, 3, size, size):
            raise ProbekitError(f"model {where!r}: decode must return images {(n, 3, size, size)}, not {got}")
        return value.detach().float().cpu()

    with torch.no_grad():
        if ways["encode"]:
            one = result("encode", torch.zeros(1, 3, size, size))
        else:
            one = result("sample", 1, torch.Generator().manual_seed(0))
        if ways["decode"]:
            result("decode", one)
    space = LatentSpace(
        "latent",
        tuple(one.shape[1:]),
        about.splitlines()[0],
        encoder=(lambda images, _: result("encode", images)) if ways["encode"] else None,
        decoder=(lambda latents: result("decode", latents).clamp(-1, 1)) if ways["decode"] else None,
        sampler=(lambda n, generator: result("sample", n, generator)) if ways["sample"] else None,
    )
    source = hashlib.sha256(class_name.encode() + file.read_bytes()).hexdigest()
    return Model(where, "custom", size, weights, fixed(space), source=source)


def _weights(made: Any) -> nn.Module | None:
    """The modules and tensors of an object as one module, None where it has none."""
    if isinstance(made, nn.Module):
        return made
    parts = {name: value for name, value in getattr(made, "__dict__", {}).items() if isinstance(value, nn.Module | Tensor)}
    held = nn.Module()
    for name, value in parts.items():
        if isinstance(value, Tensor):
            held.register_buffer(f"tensor_{name}", value.detach())
        else:
            held.add_module(f"module_{name}", value)
    return held if parts else None

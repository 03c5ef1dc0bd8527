"""rosinality's Glow (rosinality/glow-pytorch): the `.pt` that its train.py writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch

from probekit.hooks.errors import ProbekitError
from probekit.models.families.glow import FIRST, Glow, as_model, config_of
from probekit.models.formats import Format
from probekit.models.model import Model
from probekit.models.papers import checkpoint

IMAGE_SIZE = 64  # its --img_size, which its files do not hold


def matches(state_keys: Iterable[str]) -> bool:
    """Whether these are the names of a Glow's state dict, with `module.` before them or without."""
    names = {key.removeprefix("module.") for key in state_keys}
    return {f"{FIRST}actnorm.loc", f"{FIRST}coupling.net.0.weight"} <= names


def from_rosinality(content: Any, name: str) -> Model:
    """The model that a `.pt` of rosinality's train.py holds, as checkpoint.read gave it; images are 64x64, its default.

    Raises ProbekitError where the names or shapes are not those of a Glow.
    """
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ProbekitError(f"model {name!r}: a {type(content).__name__} that is no state dict")
    state = checkpoint.tensors(content)
    try:
        config = config_of(state)
        with torch.random.fork_rng(devices=[]):  # initial weights, soon overwritten, cost the caller no random numbers
            network = cast(Glow, checkpoint.allow(lambda: Glow(**config), state))
    except ProbekitError as error:
        raise ProbekitError(f"model {name!r}: {error}") from error
    expected = network.state_dict()
    if odd := sorted(expected.keys() ^ state.keys()):
        said = "lacks" if odd[0] in expected else "has, beyond a Glow's weights,"
        raise ProbekitError(f"model {name!r}: its state dict {said} {odd[0]} ({len(odd)} such names)")
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise ProbekitError(f"model {name!r}: {key} has shape {tuple(state[key].shape)}, a Glow's is {tuple(value.shape)}")
    network.load_state_dict(state)
    return as_model(network, name, IMAGE_SIZE)


FORMATS = (
    Format(
        "rosinality's Glow `.pt`",
        lambda place: place.is_file and isinstance(place.content, Mapping) and matches(map(str, place.content)),
        lambda place: from_rosinality(place.content, place.name),
    ),
)

"""Networks that probekit saved itself: tensors, and beside them the family and the images' size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from torch import Tensor, nn

from probekit.files import write_whole
from probekit.hooks.errors import ProbekitError
from probekit.models.formats import Place
from probekit.models.papers import checkpoint

Network = TypeVar("Network", bound=nn.Module)


def save(network: nn.Module, folder: Path, family: str, image_size: int) -> None:
    """Write a network's tensors in half precision to `model.safetensors`; the same network gives the same bytes."""
    state = {key: value.half() if value.is_floating_point() else value for key, value in network.state_dict().items()}
    state = {key: value.contiguous() for key, value in state.items()}  # safetensors takes no others
    content = safetensors.torch.save(state)
    length = int.from_bytes(content[:8], "little")
    # safetensors itself puts metadata into a header in an order that changes from call to call
    header = {"__metadata__": {"family": family, "image_size": str(image_size)}, **json.loads(content[8 : 8 + length])}
    told = json.dumps(header, separators=(",", ":")).encode()
    told += b" " * (-len(told) % 8)  # the tensors begin at a multiple of 8 bytes
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "model.safetensors", len(told).to_bytes(8, "little") + told + content[8 + length :])


def rebuilt(
    place: Place, build: Callable[..., Network], config_of: Callable[[Mapping[str, Tensor]], dict[str, Any]]
) -> Network:
    """The network whose tensors lie at the place, float32, from its tensors alone.

    Raises ProbekitError, naming the model, for tensors that make none.
    """
    kept = checkpoint.tensors(place.content)
    state = {key: value.float() if value.is_floating_point() else value for key, value in kept.items()}
    try:
        network: Any = checkpoint.allow(lambda: build(**config_of(state)), state)
    except ProbekitError as error:
        raise ProbekitError(f"model {place.name!r}: {error}") from error
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise ProbekitError(f"model {place.name!r}: its tensors make no {build.__name__} ({reason})") from error
    return network.eval()

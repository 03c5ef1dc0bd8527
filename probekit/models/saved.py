"""Networks that probekit saved itself: tensors, and beside them the family and the images' size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from probekit.hooks.errors import ProbekitError
from probekit.models.formats import Place
from probekit.models.papers import checkpoint

Network = TypeVar("Network", bound=nn.Module)


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

"""The same network before it was trained, for what training has nothing to do with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from probekit.hooks.errors import ProbekitError


@contextlib.contextmanager
def untrained(network: Any, seed: int = 0) -> Iterator[None]:
    """Inside, a diffusers network has random weights, those that its class begins a training with, drawn from the seed.

    Its own are put back on leaving. Raises ProbekitError for a network that is not built from a config, and for one whose
    weights are moved to the device as they are needed.
    """
    if not hasattr(type(network), "from_config"):
        raise ProbekitError(f"a {type(network).__name__} is not built from a config: how it began is not known")
    if any(p.is_meta for p in network.parameters()):
        raise ProbekitError("a network whose weights are offloaded cannot be given others")
    own = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        began = type(network).from_config(dict(network.config))
    network.load_state_dict(began.state_dict())
    try:
        yield
    finally:
        network.load_state_dict(own)

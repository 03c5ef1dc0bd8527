"""Capture and swap block activations of any diffusers denoiser, across timesteps.

Names are looked up when they are first used, so that `ProbekitError` costs nobody the import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .architectures import (
        BLOCKS,
        DENOISERS,
        GROUPS,
        Block,
        Denoiser,
        Layer,
        Layers,
        Stream,
        default_layers,
        layers,
        output_shapes,
        select,
    )
    from .captures import Captured, capture
    from .errors import ProbekitError
    from .injections import Context, Injection, Mean, Nothing, Operation, Row, Stored, add, blend, inject, replace
    from .pictures import stack
    from .sites import bind
    from .steps import Steps, distinct_timesteps
    from .sweeps import DENOISER_NAMES, TEXT_ENCODERS, Swept, denoiser, injected, sweep, text_layers
    from .tracing import layer, trace

_MODULES = {
    "captures": ("Captured", "capture"),
    "errors": ("ProbekitError",),
    "injections": (
        "Context",
        "Injection",
        "Mean",
        "Nothing",
        "Operation",
        "Row",
        "Stored",
        "add",
        "blend",
        "inject",
        "replace",
    ),
    "architectures": (
        "BLOCKS",
        "DENOISERS",
        "GROUPS",
        "Block",
        "Denoiser",
        "Layer",
        "Layers",
        "Layers",
        "Stream",
        "default_layers",
        "layers",
        "output_shapes",
        "select",
    ),
    "sites": ("bind",),
    "pictures": ("stack",),
    "steps": ("Steps", "distinct_timesteps"),
    "sweeps": ("DENOISER_NAMES", "TEXT_ENCODERS", "Swept", "denoiser", "injected", "sweep", "text_layers"),
    "tracing": ("layer", "trace"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [
    "BLOCKS",
    "DENOISERS",
    "DENOISER_NAMES",
    "GROUPS",
    "TEXT_ENCODERS",
    "Block",
    "Captured",
    "Context",
    "Denoiser",
    "Injection",
    "Layer",
    "Layers",
    "Mean",
    "Nothing",
    "Operation",
    "ProbekitError",
    "Row",
    "Steps",
    "Stored",
    "Stream",
    "Swept",
    "add",
    "bind",
    "blend",
    "capture",
    "default_layers",
    "denoiser",
    "distinct_timesteps",
    "inject",
    "injected",
    "layer",
    "layers",
    "output_shapes",
    "replace",
    "select",
    "stack",
    "sweep",
    "text_layers",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)

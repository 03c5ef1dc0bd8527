"""Capture and swap block activations of any diffusers denoiser, across timesteps."""

from .capture import Captured, capture
from .inject import Context, Injection, Operation, Row, Stored, add, blend, inject, replace
from .layers import GROUPS, HookError, Layer, Stream, bind, default_layers, layers, output_shapes, select
from .steps import Steps
from .sweep import Swept, denoiser, stack, sweep
from .trace import layer, trace

__all__ = [
    "GROUPS",
    "Captured",
    "Context",
    "HookError",
    "Injection",
    "Layer",
    "Operation",
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
    "inject",
    "layer",
    "layers",
    "output_shapes",
    "replace",
    "select",
    "stack",
    "sweep",
    "trace",
]

"""Free-form tracing with nnsight, over the same model and layer names."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from .errors import ProbekitError


def trace(model: Any) -> Any:
    """nnsight's view of a denoiser or of a whole, already loaded diffusers pipeline.

    A module gives an `nnsight.NNsight`, a pipeline an `nnsight` model whose `.generate(...)` runs it and whose `.unet` or
    `.transformer` carries the layers under the names that `layers` lists. Use `layer(traced, name)` for a name with dots.
    nnsight puts wrappers of its own in the place of the modules' forwards and leaves them there; hooks work beside them.
    """
    # before nnsight gives every object a `save`, over which torchsde, where it is installed, stumbles as it is imported
    with contextlib.suppress(RuntimeError):  # whoever imports nnsight first has it stumble
        from diffusers import DPMSolverSDEScheduler as DPMSolverSDEScheduler
    from nnsight import NNsight
    from nnsight.modeling.diffusion import DiffusionModel, _PipelineModule

    if isinstance(model, nn.Module):
        return NNsight(model)
    traced = DiffusionModel(_PipelineModule(model))
    traced.pipeline = model
    return traced


def layer(traced: Any, name: str) -> Any:
    """The envoy of a layer by its dotted name, such as `down_blocks.2.resnets.1`, in a traced denoiser."""
    envoy = traced
    for part in name.split("."):
        try:
            envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
        except (AttributeError, IndexError) as error:
            raise ProbekitError(f"no layer {name!r} in this model") from error
    return envoy

"""The experiments: one module each, with a frozen config that plans its units, does one, and tells what came out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probekit.experiments.dynamics_diffusion import DynamicsDiffusion as DynamicsDiffusion
    from probekit.experiments.dynamics_flow import DynamicsFlow as DynamicsFlow
    from probekit.experiments.inject_calibrate import InjectCalibrate as InjectCalibrate
    from probekit.experiments.inject_picture import InjectImage as InjectImage
    from probekit.experiments.inject_picture import InjectScript as InjectScript
    from probekit.experiments.inject_sweep import InjectSweep as InjectSweep
    from probekit.experiments.invert_interpolate import InvertInterpolate as InvertInterpolate
    from probekit.experiments.invert_run import InvertRun as InvertRun
    from probekit.experiments.invert_trajectory import InvertTrajectory as InvertTrajectory
    from probekit.experiments.noise_map_run import NoiseMapRun as NoiseMapRun
    from probekit.experiments.probe_layers import ProbeLayers as ProbeLayers
    from probekit.experiments.probe_run import ProbeRun as ProbeRun
    from probekit.experiments.properties_run import PropertiesRun as PropertiesRun
    from probekit.experiments.stitch_edit import StitchEdit as StitchEdit
    from probekit.experiments.stitch_run import StitchRun as StitchRun
    from probekit.runs.experiment import Experiment

EXPERIMENTS = {
    "inject-sweep": "inject_sweep:InjectSweep",
    "inject-image": "inject_picture:InjectImage",
    "inject-script": "inject_picture:InjectScript",
    "inject-calibrate": "inject_calibrate:InjectCalibrate",
    "stitch-run": "stitch_run:StitchRun",
    "stitch-edit": "stitch_edit:StitchEdit",
    "probe-run": "probe_run:ProbeRun",
    "probe-layers": "probe_layers:ProbeLayers",
    "dynamics-flow": "dynamics_flow:DynamicsFlow",
    "dynamics-diffusion": "dynamics_diffusion:DynamicsDiffusion",
    "invert-run": "invert_run:InvertRun",
    "invert-trajectory": "invert_trajectory:InvertTrajectory",
    "invert-interpolate": "invert_interpolate:InvertInterpolate",
    "noise-map-run": "noise_map_run:NoiseMapRun",
    "properties-run": "properties_run:PropertiesRun",
}
"""By the name of the command and of the runs' folder: the module and its class."""


def find(name: str) -> type[Experiment]:
    """The class of the experiment of that name. Raises KeyError where there is none."""
    module, _, found = EXPERIMENTS[name].partition(":")
    return getattr(importlib.import_module(f"probekit.experiments.{module}"), found)


def __getattr__(name: str) -> type[Experiment]:
    # every experiment by its class, without the import of the others
    for key, place in EXPERIMENTS.items():
        if place.endswith(f":{name}"):
            return find(key)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

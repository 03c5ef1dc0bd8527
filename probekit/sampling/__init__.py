"""Sampling and inversion: trajectories between noise and image, both ways, for diffusion and rectified flow."""

from probekit.sampling.diffusion import BATCH, Diffusion
from probekit.sampling.interpolation import slerp
from probekit.sampling.schedule import Schedule
from probekit.sampling.trajectory import (
    Denoiser,
    Trajectory,
    invert,
    invert_coupled,
    invert_fixed_point,
    invert_newton,
    invert_renoise,
    invert_renoised,
    sample,
    sample_coupled,
)

__all__ = [
    "BATCH",
    "Denoiser",
    "Diffusion",
    "Schedule",
    "Trajectory",
    "invert",
    "invert_coupled",
    "invert_fixed_point",
    "invert_newton",
    "invert_renoise",
    "invert_renoised",
    "sample",
    "sample_coupled",
    "slerp",
]

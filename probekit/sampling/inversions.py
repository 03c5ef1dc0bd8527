"""The inversions by name: each with its way back, so that experiments can hold them side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from probekit.sampling.schedule import Schedule
from probekit.sampling.trajectory import (
    Denoiser,
    Trajectory,
    invert,
    invert_coupled,
    invert_fixed_point,
    invert_renoised,
    sample,
    sample_coupled,
)

RENOISED = 0.05
"""The share of the steps that `renoised` replaces, one at least."""


@dataclass(frozen=True)
class Inversion:
    """One way from images to latents and back.

    invert: (denoiser, image states, schedule, generator) to the trajectory to the latents; back: (denoiser, latents, schedule)
    to the trajectory to the images. pairs: whether its latents are pairs of states (n, 2, ...), in float64.
    """

    about: str
    invert: Callable[[Denoiser, Tensor, Schedule, torch.Generator], Trajectory]
    back: Callable[[Denoiser, Tensor, Schedule], Trajectory]
    pairs: bool = False


def _renoised(denoiser: Denoiser, image: Tensor, schedule: Schedule, generator: torch.Generator) -> Trajectory:
    return invert_renoised(denoiser, image, schedule, generator, renoised=max(1, round(RENOISED * len(schedule))))


def _pair(states: Tensor) -> Tensor:
    return torch.stack([states, states], 1).double()


INVERSIONS: dict[str, Inversion] = {
    "plain": Inversion(
        "the sampling steps backwards (Dhariwal and Nichol 2021)",
        lambda d, x, s, g: invert(d, x, s),
        lambda d, z, s: sample(d, z, s),
    ),
    "fixed-point": Inversion(
        "each step solved for where it started (Pan et al. 2023)",
        lambda d, x, s, g: invert_fixed_point(d, x, s),
        lambda d, z, s: sample(d, z, s),
    ),
    "renoised": Inversion(
        "the first steps replaced by fresh noise (Hidden Relations)", _renoised, lambda d, z, s: sample(d, z, s)
    ),
    "edict": Inversion(
        "two states coupled, exact (Wallace et al. 2023)",
        lambda d, x, s, g: invert_coupled(d, _pair(x), s),
        lambda d, z, s: sample_coupled(d, z if z.ndim > 4 else _pair(z), s),
        pairs=True,
    ),
}

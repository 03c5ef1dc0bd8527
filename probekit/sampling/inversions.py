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


@dataclass(frozen=True)
class Inversion:
    """One way from images to latents and back.

    invert: (denoiser, image states, schedule, fresh noise, how many steps it replaces) to the trajectory to the latents, the
    last two for `renoised` only; back: (denoiser, latents, schedule) to the trajectory to the images. pairs: whether its
    latents are pairs of states (n, 2, ...), in float64.
    """

    about: str
    invert: Callable[[Denoiser, Tensor, Schedule, Tensor, int], Trajectory]
    back: Callable[[Denoiser, Tensor, Schedule], Trajectory]
    pairs: bool = False


def _pair(states: Tensor) -> Tensor:
    return torch.stack([states, states], 1).double()


INVERSIONS: dict[str, Inversion] = {
    "plain": Inversion(
        "the sampling steps backwards (Dhariwal and Nichol 2021)",
        lambda d, x, s, epsilon, k: invert(d, x, s),
        lambda d, z, s: sample(d, z, s),
    ),
    "fixed-point": Inversion(
        "each step solved for where it started (Pan et al. 2023)",
        lambda d, x, s, epsilon, k: invert_fixed_point(d, x, s),
        lambda d, z, s: sample(d, z, s),
    ),
    "renoised": Inversion(
        "the first steps replaced by fresh noise (Hidden Relations)",
        lambda d, x, s, epsilon, k: invert_renoised(d, x, s, epsilon, renoised=k),
        lambda d, z, s: sample(d, z, s),
    ),
    "edict": Inversion(
        "two states coupled, exact (Wallace et al. 2023)",
        lambda d, x, s, epsilon, k: invert_coupled(d, _pair(x), s),
        lambda d, z, s: sample_coupled(d, z, s),
        pairs=True,
    ),
}

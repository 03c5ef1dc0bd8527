"""The inversions by name, each with its way back: what the space `inverted` and the experiments on it run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from probekit.hooks.errors import ProbekitError
from probekit.sampling.diffusion import Diffusion
from probekit.sampling.schedule import Schedule
from probekit.sampling.trajectory import (
    Denoiser,
    Trajectory,
    invert,
    invert_coupled,
    invert_fixed_point,
    invert_newton,
    invert_renoised,
    sample,
    sample_coupled,
)


@dataclass(frozen=True)
class Inversion:
    """One way from images to latents and back.

    invert: (denoiser, image states, schedule, fresh noise, how many steps it replaces) to the trajectory to the latents, the
    last two for `renoised` only, which `draws`; back: (denoiser, latents, schedule) to the trajectory to the images. pairs:
    whether its latents are pairs of states (n, 2, ...), in float64 (on mps, which has none, in float32).
    """

    about: str
    invert: Callable[[Denoiser, Tensor, Schedule, Tensor, int], Trajectory]
    back: Callable[[Denoiser, Tensor, Schedule], Trajectory]
    pairs: bool = False
    draws: bool = False


def _pair(states: Tensor) -> Tensor:
    return _precise(torch.stack([states, states], 1))


def _precise(states: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return states.float() if states.device.type == "mps" else states.double()


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
    "newton": Inversion(
        "fixed-point, with Newton-Krylov for the steps that stall (Knoll and Keyes 2004)",
        lambda d, x, s, epsilon, k: invert_newton(d, x, s),
        lambda d, z, s: sample(d, z, s),
    ),
    "renoised": Inversion(
        "the first steps replaced by fresh noise (Hidden Relations)",
        lambda d, x, s, epsilon, k: invert_renoised(d, x, s, epsilon, renoised=k),
        lambda d, z, s: sample(d, z, s),
        draws=True,
    ),
    "edict": Inversion(
        "two states coupled, exact (Wallace et al. 2023)",
        lambda d, x, s, epsilon, k: invert_coupled(d, _pair(x), s),
        lambda d, z, s: sample_coupled(d, z, s),
        pairs=True,
    ),
}


def check_method(name: str) -> Inversion:
    """The inversion of that name. Raises ProbekitError for what is none."""
    if name not in INVERSIONS:
        raise ProbekitError(f"inversion {name!r}: choose {', '.join(INVERSIONS)}")
    return INVERSIONS[name]


def default_renoised(steps: int) -> int:
    """How many steps the remedy replaces where nobody says: a twentieth, one at least."""
    return max(1, round(0.05 * steps))


def inverted(
    diffusion: Diffusion, method: str, states: Tensor, schedule: Schedule, fresh: Tensor, *, renoised: int | None = None
) -> Trajectory:
    """Noiseless states (n, ...) to latents, all in one batch, by the method of that name.

    fresh: normal noise of the states' shape, which only `renoised` uses. The latents are float32, those of pairs float64.
    """
    inversion, count = check_method(method), default_renoised(len(schedule)) if renoised is None else renoised
    there, fresh = states.to(diffusion.device), fresh.to(diffusion.device)
    return inversion.invert(diffusion.denoiser(len(states)), there, schedule, fresh, count)


def restored(diffusion: Diffusion, method: str, latents: Tensor, schedule: Schedule) -> Tensor:
    """Latents to noiseless states (n, ...), all in one batch: the way back of the method of that name, on the CPU."""
    inversion, device = check_method(method), diffusion.device
    there = (latents.float() if device.type == "mps" else latents).to(device)
    end = inversion.back(diffusion.denoiser(len(there)), _precise(there) if inversion.pairs else there, schedule).end
    return (end[:, 0] if inversion.pairs else end).float().cpu()

"""The inversions by name, each with its way back: what the space `inverted` and the experiments on it run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probekit.hooks.errors import ProbekitError
from probekit.sampling.diffusion import Diffusion
from probekit.sampling.noise_maps import invert_noise_maps, sample_noise_maps
from probekit.sampling.schedule import Schedule
from probekit.sampling.second_order import invert_fireflow, invert_rf_solver, sample_fireflow, sample_rf_solver
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
from probekit.sampling.two_step import bdia, begin_two_step, belm, invert_two_step, sample_two_step


def _one(steps: int) -> int:
    return 1


def _none(steps: int) -> int:
    return 0


@dataclass(frozen=True)
class Inversion:
    """One way from images to latents and back.

    invert: (denoiser, image states (n, ...), schedule, fresh noise, how many steps it replaces) to the trajectory to the
    latents, the last for `renoised` only; back: (denoiser, latents, schedule) to the trajectory to the images.
    parts: of a number of steps, how many states a latent is; where they are several, latents are (n, parts, ...), in float64
    (on mps, which has none, in float32), with the noise first. draws: how many noises a row it is given; where they are
    several, (n, draws, ...). begin: from noise (n, ...) to latents that nothing was inverted to, where they are not noise
    alone. flows: whether it is for rectified flows only.
    """

    about: str
    invert: Callable[[Denoiser, Tensor, Schedule, Tensor, int], Trajectory]
    back: Callable[[Denoiser, Tensor, Schedule], Trajectory] = sample
    parts: Callable[[int], int] = _one
    draws: Callable[[int], int] = _none
    begin: Callable[[Denoiser, Tensor, Schedule], Tensor] | None = None
    flows: bool = False


def _pair(states: Tensor) -> Tensor:
    return _precise(torch.stack([states, states], 1))


def _precise(states: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return states.float() if states.device.type == "mps" else states.double()


def _first(walked: Trajectory) -> Trajectory:
    return replace(walked, end=walked.end[:, 0])


INVERSIONS: dict[str, Inversion] = {
    "plain": Inversion(
        "the sampling steps backwards (Dhariwal and Nichol 2021)",
        lambda d, x, s, epsilon, k: invert(d, x, s),
    ),
    "fixed-point": Inversion(
        "each step solved for where it started (Pan et al. 2023)",
        lambda d, x, s, epsilon, k: invert_fixed_point(d, x, s),
    ),
    "newton": Inversion(
        "fixed-point, and Newton-Krylov for the steps that stall (Knoll and Keyes 2004)",
        lambda d, x, s, epsilon, k: invert_newton(d, x, s),
    ),
    "renoise": Inversion(
        "each step repeated, predictions averaged (ReNoise, Garibi et al. 2024)",
        lambda d, x, s, epsilon, k: invert_renoise(d, x, s),
    ),
    "renoised": Inversion(
        "the first steps replaced by fresh noise (Hidden Relations)",
        lambda d, x, s, epsilon, k: invert_renoised(d, x, s, epsilon, renoised=k),
        draws=_one,
    ),
    "edict": Inversion(
        "two states coupled, exact (Wallace et al. 2023)",
        lambda d, x, s, epsilon, k: invert_coupled(d, _pair(x), s),
        lambda d, z, s: _first(sample_coupled(d, z, s)),
        parts=lambda steps: 2,
        begin=lambda d, z, s: torch.stack([z, z], 1),
    ),
    "bdia": Inversion(
        "each state from the two after it, exact (Zhang et al. 2023)",
        lambda d, x, s, epsilon, k: invert_two_step(d, _precise(x), s, bdia),
        lambda d, z, s: sample_two_step(d, z, s, bdia),
        parts=lambda steps: 2,
        begin=begin_two_step,
    ),
    "belm": Inversion(
        "the same with the least local error, exact (O-BELM, Wang et al. 2024)",
        lambda d, x, s, epsilon, k: invert_two_step(d, _precise(x), s, belm),
        lambda d, z, s: sample_two_step(d, z, s, belm),
        parts=lambda steps: 2,
        begin=begin_two_step,
    ),
    "edit-friendly": Inversion(
        "noise maps of ancestral sampling, exact (Huberman-Spiegelglas et al. 2024)",
        lambda d, x, s, epsilon, k: invert_noise_maps(d, _precise(x), s, epsilon.reshape(len(x), len(s), *x.shape[1:])),
        lambda d, z, s: sample_noise_maps(d, z, s),
        parts=lambda steps: steps + 1,
        draws=lambda steps: steps,
    ),
    "rf-solver": Inversion(
        "second order, for flows (Wang et al. 2024)",
        lambda d, x, s, epsilon, k: invert_rf_solver(d, x, s),
        lambda d, z, s: sample_rf_solver(d, z, s),
        flows=True,
    ),
    "fireflow": Inversion(
        "second order at a call a step, for flows (Deng et al. 2024)",
        lambda d, x, s, epsilon, k: invert_fireflow(d, x, s),
        lambda d, z, s: sample_fireflow(d, z, s),
        flows=True,
    ),
}


def check_method(name: str, prediction: str | None = None) -> Inversion:
    """The inversion of that name. Raises ProbekitError for what is none, or none for a network of that kind of prediction."""
    if name not in INVERSIONS:
        raise ProbekitError(f"inversion {name!r}: choose {', '.join(INVERSIONS)}")
    if INVERSIONS[name].flows and prediction not in (None, "flow"):
        others = ", ".join(other for other, inversion in INVERSIONS.items() if not inversion.flows)
        raise ProbekitError(f"inversion {name!r}: is for rectified flows, the network predicts {prediction}; choose {others}")
    return INVERSIONS[name]


def default_renoised(steps: int) -> int:
    """How many steps the remedy replaces where nobody says: a twentieth, one at least."""
    return max(1, round(0.05 * steps))


def noises(method: str, steps: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the fresh noise that a method is given for a row, a noise being of that shape."""
    count = INVERSIONS[method].draws(steps)
    return (count, *shape) if count > 1 else shape


def inverted(
    diffusion: Diffusion, method: str, states: Tensor, schedule: Schedule, fresh: Tensor, *, renoised: int | None = None
) -> Trajectory:
    """Noiseless states (n, ...) to latents, all in one batch, by the method of that name.

    fresh: normal noise, of the shape that `noises` says, for those that draw. The latents are float32, those of several parts
    float64. Raises ProbekitError as `check_method`.
    """
    inversion = check_method(method, schedule.prediction)
    count = default_renoised(len(schedule)) if renoised is None else renoised
    there, fresh = states.to(diffusion.device), fresh.to(diffusion.device)
    return inversion.invert(diffusion.denoiser(len(states)), there, schedule, fresh, count)


def restored(diffusion: Diffusion, method: str, latents: Tensor, schedule: Schedule) -> Tensor:
    """Latents to noiseless states (n, ...), all in one batch: the way back of the method of that name, on the CPU."""
    inversion, device = check_method(method, schedule.prediction), diffusion.device
    there = (latents.float() if device.type == "mps" else latents).to(device)
    several = inversion.parts(len(schedule)) > 1
    end = inversion.back(diffusion.denoiser(len(there)), _precise(there) if several else there, schedule).end
    return end.float().cpu()

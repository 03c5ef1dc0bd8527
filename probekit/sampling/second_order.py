"""Second-order ways of rectified flows, both ways: by the velocity in the middle of each step."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from probekit.hooks.errors import ProbekitError
from probekit.sampling.schedule import Schedule
from probekit.sampling.trajectory import Denoiser, States, Trajectory, Walk


@torch.no_grad()
def sample_rf_solver(denoiser: Denoiser, start: States, schedule: Schedule, *, keep: Collection[int] = ()) -> Trajectory:
    """RF-Solver (Wang et al. 2024, equation 8): Taylor's second term, whose derivative is a difference over half a step.

    state + h v + h²/2 (v' - v) / (h/2), v' the velocity half a step on, which is the midpoint rule. Two calls a step. Raises
    ProbekitError for a schedule that is no flow's.
    """
    return _walked(denoiser, start, schedule, range(len(schedule) + 1), keep, again=False)


@torch.no_grad()
def invert_rf_solver(denoiser: Denoiser, start: States, schedule: Schedule, *, keep: Collection[int] = ()) -> Trajectory:
    """RF-Solver from the image on: the same rule, with time turned. Not exact: it errs by the square of the steps."""
    return _walked(denoiser, start, schedule, reversed(range(len(schedule) + 1)), keep, again=False)


@torch.no_grad()
def sample_fireflow(denoiser: Denoiser, start: States, schedule: Schedule, *, keep: Collection[int] = ()) -> Trajectory:
    """FireFlow (Deng et al. 2024, algorithm 1): the midpoint rule with the last midpoint's velocity for the first half step.

    One call a step, and one at the start. Raises ProbekitError for a schedule that is no flow's.
    """
    return _walked(denoiser, start, schedule, range(len(schedule) + 1), keep, again=True)


@torch.no_grad()
def invert_fireflow(denoiser: Denoiser, start: States, schedule: Schedule, *, keep: Collection[int] = ()) -> Trajectory:
    """FireFlow from the image on: the same rule, with time turned."""
    return _walked(denoiser, start, schedule, reversed(range(len(schedule) + 1)), keep, again=True)


def _walked(
    denoiser: Denoiser, start: Tensor, schedule: Schedule, order: Iterable[int], keep: Collection[int], *, again: bool
) -> Trajectory:
    """The midpoint rule through the states in that order. again: each step's half uses the last velocity that was predicted."""
    if schedule.prediction != "flow":
        raise ProbekitError(f"schedule of {schedule.prediction}: second-order inversion is for rectified flows")
    told = schedule.timesteps[0] / schedule.sources[0][1]  # the network's time of a noise level of 1
    walk, velocity = Walk(denoiser, start, schedule, keep), None
    states = walk.start
    for number, (here, there) in enumerate(itertools.pairwise(order)):
        states = walk.at(here, states) if number == 0 else states
        now, then = schedule.level(here)[1], schedule.level(there)[1]
        if velocity is None or not again:
            velocity = walk.predict_at(states, told * now)
        velocity = walk.predict_at(states + (then - now) / 2 * velocity, told * (now + then) / 2)
        states = walk.at(there, states + (then - now) * velocity)
    return walk.end(states)

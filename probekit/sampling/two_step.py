"""Exact inversions by two steps: each state follows from the two before it, and so the first of three from the last two."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from jaxtyping import Float
from torch import Tensor

from probekit.sampling.schedule import Schedule, between, slope, straight
from probekit.sampling.trajectory import Denoiser, States, Trajectory, Walk

Rule = Callable[[Schedule, int], tuple[float, float, float]]
"""Of a schedule and a step, from 1: (p, q, r), the next state being p * the one before + q * state + r * prediction."""

BDIA_GAMMA = 0.96
"""In the middle of what the authors recommend, 0.92 to 1; inverting magnifies what differs by 1 / gamma a step."""


def bdia(schedule: Schedule, step: int) -> tuple[float, float, float]:
    """Bi-directional integration approximation (Zhang et al. 2023, equation 18).

    next = DDIM(state) + gamma * (before - DDIM'(state)), where DDIM' is DDIM's step from the state back to the level before.
    """
    a, b = schedule.forward(step)
    back, against = between(schedule.prediction, schedule.level(step), schedule.level(step - 1))
    return BDIA_GAMMA, a - BDIA_GAMMA * back, b - BDIA_GAMMA * against


def belm(schedule: Schedule, step: int) -> tuple[float, float, float]:
    """O-BELM, the bidirectional explicit linear two-step rule of the least local error (Wang et al. 2024, equation 18).

    In the coordinates in which ways are straight, with steps h and h' in time and r = h' / h:
    next = r² * before + (1 - r²) * state + h' (1 + r) * slope.
    """
    kind = schedule.prediction
    (before, start), (here, now), (after, end) = (straight(kind, schedule.level(i)) for i in (step - 1, step, step + 1))
    ratio = (end - now) / (now - start)
    of_state, of_prediction = slope(kind, schedule.level(step))
    of_slope = after * (end - now) * (1 + ratio)
    return (
        after / before * ratio**2,
        after / here * (1 - ratio**2) + of_slope * of_state,
        of_slope * of_prediction,
    )


def _moving(schedule: Schedule) -> int:
    """How many steps there are but for those at the end that stay where they are, from which none leads back."""
    count = len(schedule)
    while count > 1 and schedule.level(count) == schedule.level(count - 1):
        count -= 1
    return count


@torch.no_grad()
def begin_two_step(denoiser: Denoiser, noise: States, schedule: Schedule) -> Float[Tensor, "n 2 ..."]:
    """Noise and the state after it, by a step of `sample`: what `sample_two_step` starts from without inversion. One call."""
    walk = Walk(denoiser, noise, schedule, ())
    a, b = schedule.forward(0)
    return torch.stack([walk.start, a * walk.start + b * walk.predict(walk.start, 0)], 1)


@torch.no_grad()
def sample_two_step(
    denoiser: Denoiser, start: Float[Tensor, "n 2 ..."], schedule: Schedule, rule: Rule, *, keep: Collection[int] = ()
) -> Trajectory:
    """Sampling by a rule of two steps. start: the noise and the state after it. One call a step but the first."""
    walk = Walk(denoiser, start, schedule, keep)
    before, states = walk.start.unbind(1)
    walk.at(0, before)
    walk.at(1, states)
    last = _moving(schedule)
    for step in range(1, last):
        p, q, r = rule(schedule, step)
        before, states = states, p * before + q * states + r * walk.predict(states, step)
        walk.at(step + 1, states)
    for state in range(last + 1, len(schedule) + 1):
        walk.at(state, states)
    return walk.end(states)


@torch.no_grad()
def invert_two_step(
    denoiser: Denoiser, start: States, schedule: Schedule, rule: Rule, *, keep: Collection[int] = ()
) -> Trajectory:
    """`sample_two_step` backwards, exact but for rounding. The first step is one of plain inversion, as both papers have it.

    The end is a pair (n, 2, ...): the noise and the state after it. One call a step.
    """
    walk = Walk(denoiser, start, schedule, keep)
    last = _moving(schedule)
    for state in range(last, len(schedule) + 1):
        walk.at(state, walk.start)
    a, b = schedule.backward(last - 1)
    after, states = walk.start, a * walk.start + b * walk.predict(walk.start, last - 1)
    walk.at(last - 1, states)
    for step in reversed(range(1, last)):
        p, q, r = rule(schedule, step)
        after, states = states, (after - q * states - r * walk.predict(states, step)) / p
        walk.at(step - 1, states)
    return walk.end(torch.stack([states, after], 1))

"""Deterministic sampling and its inversions: one function an algorithm, for any denoiser and `Schedule`.

A denoiser maps states (n, ...) and a timestep to the schedule's kind of prediction, of the states' shape. States are numbered
as the schedule's steps: 0 is the noise, len(schedule) the image. Steps are computed in float64 (on mps, which has none, in
float32) and results are float32, or float64 where the start is: going from a noise level with little signal to the image
magnifies rounding by 1 / signal, 157 times for Ho et al.'s betas. All functions raise ProbekitError where a prediction is not
finite.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probekit.hooks.errors import ProbekitError
from probekit.sampling import newton
from probekit.sampling.schedule import Schedule

Denoiser = Callable[[Tensor, float], Tensor]
States = Float[Tensor, "n ..."]

EDICT_MIX = 0.93
"""The mixing weight p that Wallace et al. (2023, section 4.1) use."""


@dataclass(frozen=True)
class Trajectory:
    """What a sampling or inversion gave. end: the last state, where the start was; kept: the states that were asked for.

    `calls` is the number of times that the denoiser was called. Of inversions that solve their steps, for each row (n,):
    unsolved: how many steps do not lead back to where they were solved for, within the tolerance. folded: in how many the step
    was found to fold (`invert_newton`), so that other states may lead to the same next one: the latent may be one of several.
    """

    end: States
    kept: dict[int, States] = field(default_factory=dict)
    calls: int = 0
    unsolved: Int[Tensor, " n"] | None = None
    folded: Int[Tensor, " n"] | None = None


class Walk:
    """The bookkeeping of one trajectory: precision, calls, and the states to keep, on the CPU."""

    def __init__(self, denoiser: Denoiser, start: Tensor, schedule: Schedule, keep: Collection[int]) -> None:
        if outside := [state for state in keep if not 0 <= state <= len(schedule)]:
            raise ProbekitError(f"keep {outside[0]}: states are 0 to {len(schedule)}")
        self.denoiser, self.schedule, self.keep = denoiser, schedule, frozenset(keep)
        self.start = start.float() if start.device.type == "mps" else start.double()
        self.result = torch.float64 if start.dtype == torch.float64 else torch.float32
        self.calls = 0
        self.kept: dict[int, Tensor] = {}

    def predict(self, states: Tensor, step: int) -> Tensor:
        """What the network says of states at a step."""
        return self.predict_at(states, self.schedule.timesteps[step])

    def predict_at(self, states: Tensor, timestep: float) -> Tensor:
        """The same at any timestep."""
        self.calls += 1
        return self.denoiser(states, timestep).to(states.dtype)

    def at(self, state: int, states: Tensor) -> Tensor:
        """The states themselves, which are kept if they were asked for."""
        if state in self.keep:
            self.kept[state] = states.cpu().to(self.result)
        return states

    def end(self, states: Tensor) -> Trajectory:
        """The trajectory that ends there. Raises ProbekitError for values that are not finite."""
        # once for all steps: what is not finite stays so
        if not torch.isfinite(states).all():
            raise ProbekitError("denoiser: gives values that are not finite; half precision may be too little, use float32")
        return Trajectory(states.to(self.result), self.kept, self.calls)


@torch.no_grad()
def sample(denoiser: Denoiser, start: States, schedule: Schedule, *, keep: Collection[int] = ()) -> Trajectory:
    """From noise to image by DDIM with eta 0 (Song et al. 2021, equation 12), for a flow by Euler's method.

    One call of the denoiser a step. `keep` names the states to keep. As `DDIMScheduler.step` and
    `FlowMatchEulerDiscreteScheduler.step` do it.
    """
    walk = Walk(denoiser, start, schedule, keep)
    states = walk.at(0, walk.start)
    for step in range(len(schedule)):
        a, b = schedule.forward(step)
        states = walk.at(step + 1, a * states + b * walk.predict(states, step))
    return walk.end(states)


@torch.no_grad()
def invert(
    denoiser: Denoiser, start: States, schedule: Schedule, *, keep: Collection[int] = (), first: int | None = None
) -> Trajectory:
    """Plain inversion: `sample`'s steps backwards, the prediction at a state taken for that at the state it leads to.

    As `DDIMInverseScheduler.step` does it (Dhariwal and Nichol 2021, appendix F): the network is told the timestep of the
    noisier state. One call a step; exact only in the limit of many steps. first: start at this state instead of the image.
    """
    walk = Walk(denoiser, start, schedule, keep)
    first = len(schedule) if first is None else first
    states = walk.at(first, walk.start)
    for step in reversed(range(first)):
        a, b = schedule.backward(step)
        states = walk.at(step, a * states + b * walk.predict(states, step))
    return walk.end(states)


@torch.no_grad()
def invert_fixed_point(
    denoiser: Denoiser,
    start: States,
    schedule: Schedule,
    *,
    keep: Collection[int] = (),
    tolerance: float = 1e-6,
    most: int = 20,
) -> Trajectory:
    """Inversion that solves each sampling step for the state it started from (Pan et al. 2023, AIDI).

    state = (next - b * prediction(state)) / a is repeated, with Anderson acceleration as there, from the plain inversion's
    state until sampling leads back to `next` within `tolerance` of its root mean square, or the denoiser was called `most`
    times in this step. Of all iterates each row keeps the one that leads back best: where a step has no solution, as the last
    one to a noiseless image that the network would not make, repeating would drift away.
    """
    walk = Walk(denoiser, start, schedule, keep)
    states = walk.at(len(schedule), walk.start)
    unsolved = torch.zeros(len(states), dtype=torch.long)
    for step in reversed(range(len(schedule))):
        states, error = _fixed_point(walk, states, step, tolerance, most)
        states = walk.at(step, states)
        unsolved += (error > tolerance).cpu()
    return replace(walk.end(states), unsolved=unsolved)


@torch.no_grad()
def invert_newton(
    denoiser: Denoiser,
    start: States,
    schedule: Schedule,
    *,
    keep: Collection[int] = (),
    tolerance: float = 2e-7,
    most: int = 20,
    newton_most: int = 1000,
) -> Trajectory:
    """`invert_fixed_point`, whose steps that stall are solved further by Newton-Krylov (`newton.solve`).

    A step stalls where its Jacobian has eigenvalues around zero, as one of the last has in trained models. newton_most: calls
    of the denoiser in such a step beyond `most`; a Jacobian-vector product is one. Where the Jacobian has a negative eigenvalue
    the step folds, and the state that is found may be one of several; `folded` says so.
    """
    walk = Walk(denoiser, start, schedule, keep)
    states = walk.at(len(schedule), walk.start)
    unsolved, folded = torch.zeros(2, len(states), dtype=torch.long)
    for step in reversed(range(len(schedule))):
        target = states
        states, error = _fixed_point(walk, target, step, tolerance, most)
        if (error > tolerance).any():
            a, b = schedule.forward(step)

            def sampled(states: Tensor, step: int = step, a: float = a, b: float = b) -> Tensor:
                return a * states + b * walk.predict(states, step)

            found = newton.solve(sampled, target, states, tolerance=tolerance, most=newton_most)
            states, error = found.states, found.errors
            folded += found.folded.cpu()
        states = walk.at(step, states)
        unsolved += (error > tolerance).cpu()
    return replace(walk.end(states), unsolved=unsolved, folded=folded)


def _fixed_point(walk: Walk, states: Tensor, step: int, tolerance: float, most: int) -> tuple[Tensor, Tensor]:
    """Where a step started that led to `states`, and how far it leads from them, (n,), in their norm."""
    a, b = walk.schedule.backward(step)
    guess = best = a * states + b * walk.predict(states, step)
    a, b = walk.schedule.forward(step)
    least = torch.full((len(states),), float("inf"), dtype=states.dtype, device=states.device)
    scale = states.flatten(1).norm(dim=1).clamp_min(torch.finfo(states.dtype).tiny)
    accelerated = _Anderson()
    for _ in range(most - 1):
        moved = (states - b * walk.predict(guess, step)) / a
        # sampling leads from the guess to a * guess + b * prediction, which is states + a * (guess - moved)
        error = abs(a) * (moved - guess).flatten(1).norm(dim=1) / scale
        better = error < least
        best = torch.where(better.view(-1, *[1] * (states.ndim - 1)), guess, best)
        least = torch.where(better, error, least)
        if (least <= tolerance).all():
            break
        guess = accelerated.next(guess, moved)
    return best, least


class _Anderson:
    """Anderson acceleration of a fixed-point map, each row by itself (Walker and Ni 2011, equation 2.2; memory 3)."""

    memory = 3

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.residuals: list[Tensor] = []

    def next(self, guess: Tensor, image: Tensor) -> Tensor:
        """The next guess, given the map's image of the last."""
        self.images = [*self.images[-self.memory :], image.flatten(1)]
        self.residuals = [*self.residuals[-self.memory :], (image - guess).flatten(1)]
        if len(self.images) == 1:
            return image
        images, residuals = (torch.stack(past, 2).diff(dim=2) for past in (self.images, self.residuals))
        gram = residuals.mT @ residuals
        # a row that no longer moves has no differences
        lift = 1e-10 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(gram.dtype).tiny)
        gram = gram + lift[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        weights = torch.linalg.solve(gram, residuals.mT @ self.residuals[-1][:, :, None])
        return image - (images @ weights).view_as(image)


@torch.no_grad()
def invert_renoise(denoiser: Denoiser, start: States, schedule: Schedule, *, keep: Collection[int] = ()) -> Trajectory:
    """ReNoise (Garibi et al. 2024, algorithm 1): each step repeated as a fixed-point map, and predictions averaged.

    As `renoise_inversion.py` of the authors does it with its defaults: at timesteps under 250 five predictions, all averaged,
    at others ten, of which the last two are; what is averaged are the network's predictions, of whatever kind. Their steps
    towards editability (regularisation) and exactness (noise that sampling adds) are left out. Five or ten calls a step.
    """
    walk = Walk(denoiser, start, schedule, keep)
    states = walk.at(len(schedule), walk.start)
    for step in reversed(range(len(schedule))):
        a, b = schedule.forward(step)
        count, averaged = (5, 5) if schedule.timesteps[step] < 250 else (10, 2)
        guess, total = states, torch.zeros_like(states)
        for i in range(count):
            predicted = walk.predict(guess, step)
            guess = (states - b * predicted) / a
            total = total + predicted if i >= count - averaged else total
        states = walk.at(step, (states - b * total / averaged) / a)
    return walk.end(states)


@torch.no_grad()
def invert_renoised(
    denoiser: Denoiser,
    start: States,
    schedule: Schedule,
    epsilon: States,
    *,
    keep: Collection[int] = (),
    renoised: int = 1,
) -> Trajectory:
    """The remedy of Hidden Relations: the first inversion steps are replaced by the forward process with fresh noise.

    The first `renoised` steps from the image, whose predictions are the worst, give signal * image + noise * epsilon;
    from there on it is the plain inversion. epsilon: standard normal, and not what the image was sampled from. Raises
    ProbekitError for a number that is not 0 to len(schedule).
    """
    if not 0 <= renoised <= len(schedule):
        raise ProbekitError(f"renoised {renoised}: choose 0 to {len(schedule)}, the number of steps")
    first, image = len(schedule) - renoised, start if start.dtype == torch.float64 else start.float()
    signal, noise = schedule.level(first) if renoised else (1.0, 0.0)
    noised = signal * image + noise * epsilon.to(image)
    walked = invert(denoiser, noised, schedule, keep=[state for state in keep if state <= first], first=first)
    kept = {len(schedule): image.cpu()} if len(schedule) in keep else {}
    return Trajectory(walked.end, walked.kept | kept, walked.calls)


@torch.no_grad()
def sample_coupled(
    denoiser: Denoiser, start: Float[Tensor, "n 2 ..."], schedule: Schedule, *, keep: Collection[int] = ()
) -> Trajectory:
    """EDICT's sampling (Wallace et al. 2023, equation 14): two states, each moved by the other's prediction, then mixed.

    start: pairs of states; noise may be given twice. Two calls a step. The image is the first of the last pair.
    """
    walk, p = Walk(denoiser, start, schedule, keep), EDICT_MIX
    pair = walk.at(0, walk.start)
    for step in range(len(schedule)):
        a, b = schedule.forward(step)
        x, y = pair.unbind(1)
        x = a * x + b * walk.predict(y, step)
        y = a * y + b * walk.predict(x, step)
        x = p * x + (1 - p) * y
        y = p * y + (1 - p) * x
        pair = walk.at(step + 1, torch.stack([x, y], 1))
    return walk.end(pair)


@torch.no_grad()
def invert_coupled(
    denoiser: Denoiser, start: Float[Tensor, "n 2 ..."], schedule: Schedule, *, keep: Collection[int] = ()
) -> Trajectory:
    """EDICT's inversion (Wallace et al. 2023, equation 15): `sample_coupled` backwards, exact but for rounding.

    Rounding grows by 1 / p² a step: give pairs in float64 for many steps. An image is given twice.
    """
    walk, p = Walk(denoiser, start, schedule, keep), EDICT_MIX
    pair = walk.at(len(schedule), walk.start)
    for step in reversed(range(len(schedule))):
        a, b = schedule.forward(step)
        x, y = pair.unbind(1)
        y = (y - (1 - p) * x) / p
        x = (x - (1 - p) * y) / p
        y = (y - b * walk.predict(x, step)) / a
        x = (x - b * walk.predict(y, step)) / a
        pair = walk.at(step, torch.stack([x, y], 1))
    return walk.end(pair)

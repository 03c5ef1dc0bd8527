"""The inversions that go beyond sampling's own steps: against known answers, the papers' equations, and each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from probekit import ProbekitError, load
from probekit.experiments.denoising import CHOICES
from probekit.sampling import Schedule, denoisers, invert, invert_fixed_point, invert_newton, invert_renoise, sample
from probekit.sampling.editing import flow_edit
from probekit.sampling.inversions import INVERSIONS, noises
from probekit.sampling.newton import solve
from probekit.sampling.noise_maps import ancestral, invert_noise_maps, sample_noise_maps
from probekit.sampling.second_order import invert_fireflow, invert_rf_solver, sample_fireflow, sample_rf_solver
from probekit.sampling.two_step import BDIA_GAMMA, bdia, begin_two_step, belm, invert_two_step, sample_two_step
from tests.conftest import smooth

SCHEDULERS: dict[str, Any] = {
    "epsilon": DDIMScheduler(clip_sample=False),
    "epsilon, no step to no noise": DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
    "velocity": DDIMScheduler(clip_sample=False, prediction_type="v_prediction", beta_schedule="scaled_linear"),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cubic(states: Tensor) -> Tensor:
    """A step that folds in every value but the first: between its folds, ±0.316, three lead to the same next one."""
    return torch.cat([states[:, :1], states[:, 1:] ** 3 - 0.3 * states[:, 1:]], 1)


ONE = Schedule.of(FlowMatchEulerDiscreteScheduler(), 1)  # the next state is the state less the prediction


def folding(states: Tensor, timestep: float) -> Tensor:
    return states - cubic(states)


@pytest.mark.parametrize("seed", range(3))
def test_a_step_that_folds_is_solved_and_its_solution_is_said_to_be_one_of_several(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    true = 1.4 * torch.rand(8, 6, generator=generator, dtype=torch.float64) - 0.7
    true[0] = 0.9  # beyond the folds, with one solution
    true[:, 0] = 30  # folds are small beside the states
    target = cubic(true)
    plain, found = invert_fixed_point(folding, target, ONE, tolerance=2e-7), invert_newton(folding, target, ONE)
    assert plain.unsolved is not None and found.unsolved is not None and found.folded is not None
    assert (plain.unsolved > 0).any() and (found.unsolved == 0).all()
    assert (sample(folding, found.end, ONE).end - target).norm(dim=1).max() < 1e-6 * target.norm(dim=1).max()
    # whoever stalled had met a fold, between which three states lead to the same next one
    assert torch.equal(found.folded > 0, plain.unsolved > 0)
    row = int(found.folded.argmax())
    others = [np.roots([1, 0, -0.3, -float(value)]) for value in target[row, 1:]]
    assert any((abs(roots.imag) < 1e-6).all() for roots in others)
    assert found.folded[0] == 0


def test_a_nearly_singular_step_is_solved_to_the_residual_that_is_asked_for() -> None:
    # slopes from 1e-4 to 1 in a random basis: repeating leaves what is in the flattest directions
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    slopes = torch.logspace(-4, 0, 12, dtype=torch.float64)
    matrix = basis @ torch.diag(slopes) @ basis.T
    true = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    calls: list[int] = []

    def step(states: Tensor) -> Tensor:
        calls.append(len(states))
        return states @ matrix

    found = solve(step, true @ matrix, true + 0.02 * torch.randn(3, 12, generator=generator), tolerance=1e-7, most=2000)
    assert found.errors.max() <= 1e-7 and not found.folded.any()
    assert ((found.states @ matrix - true @ matrix).norm(dim=1) / (true @ matrix).norm(dim=1)).max() <= 1e-7
    assert len(calls) < 2000
    for most, bound in ((57, 57), (5000, 2500)):  # what is at rounding is given up
        calls.clear()
        solve(step, true @ matrix, true + 1, tolerance=0, most=most)
        assert len(calls) <= bound


def test_what_newton_calls_is_counted_and_nothing_is_called_where_no_step_stalls() -> None:
    calls = 0

    def easy(states: Tensor, timestep: float) -> Tensor:
        nonlocal calls
        calls += 1
        return 0.3 * states

    image = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    schedule = Schedule.of(FlowMatchEulerDiscreteScheduler(), 4)
    found = invert_newton(easy, image, schedule)
    assert found.calls == calls and torch.equal(found.end, invert_fixed_point(easy, image, schedule).end)
    calls = 0
    target = cubic(torch.tensor([[30, 0.2, -0.05, 0.1, -0.15, 0.3]], dtype=torch.float64))

    def counted(states: Tensor, timestep: float) -> Tensor:
        nonlocal calls
        calls += 1
        return folding(states, timestep)

    assert invert_newton(counted, target, ONE).calls == calls > 20


@pytest.mark.slow
def test_a_trained_model_s_stalling_step_is_solved() -> None:
    diffusion = load("avatar-ldm", device="cpu").diffusion
    schedule, denoiser = diffusion.schedule(50), diffusion.denoiser(1)
    image = sample(denoiser, diffusion.noise([3], 0), schedule).end
    fixed, newton = (way(denoiser, image, schedule) for way in (invert_fixed_point, invert_newton))
    errors = [float((sample(denoiser, way.end, schedule).end - image).square().mean().sqrt()) for way in (fixed, newton)]
    assert errors[1] < 1e-5 < errors[0] and newton.calls > fixed.calls
    assert fixed.unsolved == 1 and newton.unsolved == 0


# --- exact ones --------------------------------------------------------------------------------------------------------


def levels_of(scheduler: Any, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """alpha and sigma of every state, in the papers' letters."""
    alphas, sigmas = torch.tensor([schedule.level(i) for i in range(len(schedule) + 1)], dtype=torch.float64).T
    return alphas, sigmas


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("method", [name for name, way in INVERSIONS.items() if way.parts(9) > 1])
def test_exact_inversions_come_back_to_float_precision(kind: str, method: str) -> None:
    predict, schedule, way = denoisers.unconditional(smooth()), Schedule.of(SCHEDULERS[kind], 9), INVERSIONS[method]
    image, fresh = normal(2, 3, 8, 8), normal(2, *noises(method, 9, (3, 8, 8)), seed=1)
    there = way.invert(predict, image, schedule, fresh, 1)
    assert there.end.shape == (2, way.parts(9), 3, 8, 8) and there.end.dtype == torch.float64
    back = way.back(predict, there.end, schedule)
    assert (back.end - image).abs().max() < 1e-9
    assert there.calls == {"edict": 18}.get(method, 8 if kind.endswith("no noise") and method != "edit-friendly" else 9)


def test_bdia_is_the_papers_equation() -> None:
    # z_next = gamma z_before + (1 ... ) in the form that the authors print: two DDIM updates from the same state
    schedule, predict = Schedule.of(SCHEDULERS["epsilon"], 6), denoisers.unconditional(smooth())
    alpha, sigma = levels_of(SCHEDULERS["epsilon"], schedule)
    states = [normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed=1)]
    pair = torch.stack(states, 1)
    with torch.no_grad():
        for i in range(1, 6):
            epsilon = predict(states[i], schedule.timesteps[i])
            clean = (states[i] - sigma[i] * epsilon) / alpha[i]
            there, before = (alpha[j] * clean + sigma[j] * epsilon for j in (i + 1, i - 1))
            states.append(there + BDIA_GAMMA * (states[i - 1] - before))
    assert torch.allclose(sample_two_step(predict, pair, schedule, bdia).end, states[-1], atol=1e-8)


@pytest.mark.parametrize("kind", ["epsilon", "velocity"])
def test_belm_is_the_papers_equation(kind: str) -> None:
    schedule, predict = Schedule.of(SCHEDULERS[kind], 6), denoisers.unconditional(smooth())
    alpha, sigma = levels_of(SCHEDULERS[kind], schedule)
    states = [normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed=1)]
    pair = torch.stack(states, 1)
    with torch.no_grad():
        for i in range(1, 6):
            epsilon = predict(states[i], schedule.timesteps[i])
            if kind == "velocity":
                epsilon = alpha[i] * epsilon + sigma[i] * states[i]
            # with h_i the differences of sigma / alpha, as in the authors' sampler
            h, h_before = (sigma[j] / alpha[j] - sigma[j + 1] / alpha[j + 1] for j in (i, i - 1))
            states.append(
                alpha[i + 1]
                * (
                    h**2 / h_before**2 * states[i - 1] / alpha[i - 1]
                    + (h_before**2 - h**2) / h_before**2 * states[i] / alpha[i]
                    - h * (h + h_before) / h_before * epsilon
                )
            )
    found = sample_two_step(predict, pair, schedule, belm)
    assert torch.allclose(found.end, states[-1], atol=1e-8) and found.calls == 5
    some = sample_two_step(predict, pair, schedule, belm, keep=[0, 1, 3, 6])
    assert all(torch.equal(some.kept[i], pair[:, i]) for i in (0, 1)) and torch.allclose(some.kept[3], states[3], atol=1e-8)


def test_without_an_inversion_two_step_sampling_begins_with_a_step_of_ddim() -> None:
    schedule, predict, noise = Schedule.of(SCHEDULERS["velocity"], 6), denoisers.unconditional(smooth()), normal(2, 3, 8, 8)
    first = sample(predict, noise, schedule, keep=[1]).kept[1]
    pair = begin_two_step(predict, noise, schedule)
    assert torch.equal(pair[:, 0], noise) and torch.allclose(pair[:, 1], first)
    image = invert_two_step(predict, noise, schedule, belm, keep=[5, 6])
    assert torch.equal(image.kept[6], noise)
    assert torch.allclose(image.kept[5], invert(predict, noise, schedule, keep=[5]).kept[5])


def test_noise_maps_are_the_papers_algorithm() -> None:
    scheduler = SCHEDULERS["epsilon, no step to no noise"]
    schedule, predict, image = Schedule.of(scheduler, 5), denoisers.unconditional(smooth()), normal(2, 3, 8, 8)
    fresh = normal(2, 5, 3, 8, 8, seed=1)
    bars = [float(scheduler.alphas_cumprod[int(t)]) for t in schedule.timesteps] + [float(scheduler.final_alpha_cumprod)]
    noised = [bar**0.5 * image + (1 - bar) ** 0.5 * fresh[:, i] for i, bar in enumerate(bars[:-1])] + [image]
    found = invert_noise_maps(predict, image, schedule, fresh)
    assert torch.allclose(found.end[:, 0], noised[0])
    with torch.no_grad():
        for i in range(4):
            epsilon = predict(noised[i], schedule.timesteps[i])
            variance = (1 - bars[i + 1]) / (1 - bars[i]) * (1 - bars[i] / bars[i + 1])
            clean = (noised[i] - (1 - bars[i]) ** 0.5 * epsilon) / bars[i] ** 0.5
            mean = bars[i + 1] ** 0.5 * clean + (1 - bars[i + 1] - variance) ** 0.5 * epsilon
            assert ancestral(schedule, i)[2] == pytest.approx(variance**0.5)
            assert torch.allclose(found.end[:, 1 + i], (noised[i + 1] - mean) / variance**0.5, atol=1e-8)


def test_with_white_maps_it_is_ddpms_sampling() -> None:
    from diffusers import DDIMScheduler as Scheduler

    unet, schedule = smooth(), Schedule.of(SCHEDULERS["epsilon"], 8)
    scheduler = Scheduler.from_config(SCHEDULERS["epsilon"].config)
    scheduler.set_timesteps(8)
    states, maps = normal(2, 3, 8, 8), normal(2, 8, 3, 8, 8, seed=1)
    maps[:, -1] = 0  # no noise is added at the end
    found = sample_noise_maps(denoisers.unconditional(unet), torch.cat([states[:, None], maps], 1), schedule).end
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            predicted = unet(states.float(), t).sample.double()
            states = scheduler.step(predicted, t, states, eta=1.0, variance_noise=maps[:, i]).prev_sample
    assert torch.allclose(found, states, atol=1e-3 * float(states.abs().max()))


# --- second order ------------------------------------------------------------------------------------------------------

VARIANCES = torch.tensor([4.0, 0.25, 1.0, 0.04], dtype=torch.float64)


def velocity(states: Tensor, timestep: float) -> Tensor:
    """Of normal data of those variances, at every time; its ways are known: sqrt((1 - t)² v + t²), up to a factor."""
    t = timestep / 1000
    return states * (t - (1 - t) * VARIANCES) / ((1 - t) ** 2 * VARIANCES + t**2)


def ends(steps: int) -> Schedule:
    times = [0.9 - 0.8 * i / steps for i in range(steps + 1)]
    levels = [(1 - t, t) for t in times]
    return Schedule(tuple(1000 * t for t in times[:-1]), tuple(levels[:-1]), tuple(levels[1:]), "flow")


@pytest.mark.parametrize(
    ("there", "back", "order", "calls"),
    [
        (invert, sample, 1, lambda n: n),
        (invert_rf_solver, sample_rf_solver, 2, lambda n: 2 * n),
        (invert_fireflow, sample_fireflow, 2, lambda n: n + 1),
    ],
)
def test_each_converges_at_its_order_to_the_ways_of_normal_data(
    there: Callable[..., Any], back: Callable[..., Any], order: int, calls: Callable[[int], int]
) -> None:
    def way(t: float) -> Tensor:
        return ((1 - t) ** 2 * VARIANCES + t**2).sqrt()

    noise = normal(3, 4)
    image = noise * way(0.1) / way(0.9)
    for walked, start, end in ((back, noise, image), (there, image, noise)):
        found = {n: walked(velocity, start, ends(n)) for n in (160, 320)}
        assert all(made.calls == calls(n) for n, made in found.items())
        errors = [float((made.end - end).abs().max()) for made in found.values()]
        # the midpoint rule gains an order where ways are roots of quadratics
        assert order - 0.2 < np.log2(errors[0] / errors[1]) < (1.2 if order == 1 else 3.2)


def test_rf_solver_is_the_papers_equation_and_fireflow_its_algorithm() -> None:
    schedule, states = ends(4), normal(2, 4)
    first = again = states
    midway: Tensor | None = None
    for i in range(4):
        now, h = schedule.level(i)[1], schedule.level(i + 1)[1] - schedule.level(i)[1]
        v = velocity(first, 1000 * now)
        derivative = (velocity(first + h / 2 * v, 1000 * (now + h / 2)) - v) / (h / 2)
        first = first + h * v + h**2 / 2 * derivative
        v = velocity(again, 1000 * now) if midway is None else midway
        midway = velocity(again + h / 2 * v, 1000 * (now + h / 2))
        again = again + h * midway
    found = sample_rf_solver(velocity, states, schedule, keep=[0, 4])
    assert torch.allclose(found.end, first) and torch.equal(found.kept[0], states) and torch.equal(found.kept[4], found.end)
    assert torch.allclose(sample_fireflow(velocity, states, schedule).end, again)
    with pytest.raises(ProbekitError, match="schedule of epsilon: second-order inversion is for rectified flows"):
        invert_rf_solver(velocity, states, Schedule.of(SCHEDULERS["epsilon"], 4))


# --- ReNoise and FlowEdit ----------------------------------------------------------------------------------------------


def test_renoise_is_the_papers_algorithm_with_its_averages() -> None:
    schedule, predict, image = Schedule.of(SCHEDULERS["epsilon"], 4), denoisers.unconditional(smooth()), normal(1, 3, 8, 8)
    alpha, sigma = levels_of(SCHEDULERS["epsilon"], schedule)
    states = image
    with torch.no_grad():
        for i in reversed(range(4)):
            guess, said = states, []
            low = schedule.timesteps[i] < 250
            for _ in range(5 if low else 10):
                said.append(predict(guess, schedule.timesteps[i]))
                clean = (states - sigma[i + 1] * said[-1]) / alpha[i + 1]
                guess = alpha[i] * clean + sigma[i] * said[-1]
            epsilon = torch.stack(said if low else said[8:10]).mean(0)
            states = alpha[i] * (states - sigma[i + 1] * epsilon) / alpha[i + 1] + sigma[i] * epsilon
    found = invert_renoise(predict, image, schedule)
    assert torch.allclose(found.end, states, atol=1e-8) and found.calls == 5 + 30


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_flow_edit_is_the_papers_algorithm_and_leaves_what_neither_caption_changes(kind: str) -> None:
    source, schedule, image = denoisers.unconditional(smooth()), Schedule.of(SCHEDULERS[kind], 5), normal(2, 3, 8, 8)
    epsilon = normal(2, 5, 3, 8, 8, seed=1)
    assert torch.equal(flow_edit(source, source, image, schedule, epsilon).end, image)

    def target(states: Tensor, timestep: float) -> Tensor:
        return source(states, timestep) + 0.1

    found = flow_edit(source, target, image, schedule, epsilon, skipped=2)
    assert found.calls == 6
    if kind == "flow":
        edited = image
        with torch.no_grad():
            for i in range(2, 5):
                t, then = schedule.level(i)[1], schedule.level(i + 1)[1]
                noised = (1 - t) * image + t * epsilon[:, i]
                moved = edited + noised - image
                edited = edited + (then - t) * (target(moved, schedule.timesteps[i]) - source(noised, schedule.timesteps[i]))
        assert torch.allclose(found.end, edited, atol=1e-9)
    with pytest.raises(ProbekitError, match="skipped 5: choose 0 to 4"):
        flow_edit(source, target, image, schedule, epsilon, skipped=5)


def test_the_help_names_every_inversion() -> None:
    assert ", ".join(INVERSIONS) == CHOICES

"""The inversions that go beyond sampling's own steps: against known answers, the papers' equations, and each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from probekit import load
from probekit.sampling import Schedule, invert_fixed_point, invert_newton, sample
from probekit.sampling.newton import solve


def cubic(states: Tensor) -> Tensor:
    """A step that folds in every value but the first: three lead to the same next one between the folds, at -0.316 and 0.316."""
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
    calls.clear()
    solve(step, true @ matrix, true + 1, tolerance=0, most=57)
    assert len(calls) <= 57


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

"""Second moments: the best denoiser of normal data, and the linear maps that sampling and inversion then are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from probekit import ProbekitError
from probekit.metrics.geometry import top_correlations
from probekit.sampling import Schedule, invert, sample
from probekit.sampling.gaussian import Gaussian
from probekit.sampling.inversions import INVERSIONS

SCHEDULERS = {
    "epsilon": DDIMScheduler(clip_sample=False),
    "velocity": DDIMScheduler(clip_sample=False, prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}
SHAPE = (2, 3, 4)
# those that draw one noise at most, and ask for the schedule's levels only
METHODS = [name for name, inversion in INVERSIONS.items() if inversion.draws(10) <= 1 and not inversion.flows]


def data(n: int, seed: int = 0) -> torch.Tensor:
    """Normal data with very different variances in 24 directions, and a mean."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(24, 24, generator=generator, dtype=torch.float64) * torch.logspace(-2, 1, 24, dtype=torch.float64)
    white = torch.randn(n, 24, generator=generator, dtype=torch.float64)
    return (white @ mixing + torch.linspace(-1, 1, 24, dtype=torch.float64)).reshape(n, *SHAPE)


def test_it_has_the_moments_of_the_data_however_many_there_are() -> None:
    for n in (5, 24, 400):
        x = data(n)
        flat, found = x.flatten(1), Gaussian.of(x)
        covariance = found.directions.T @ torch.diag(found.variances) @ found.directions
        assert torch.allclose(covariance, torch.cov(flat.T), atol=1e-8)
        assert torch.allclose(found.mean, x.mean(0))
        k = len(found.variances)
        assert torch.allclose(found.directions @ found.directions.T, torch.eye(k, dtype=torch.float64), atol=1e-8)
        assert k == min(n - 1, 24)


@pytest.mark.parametrize("n", [6, 400])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_closed_form_is_what_sampling_and_inverting_give(kind: str, n: int) -> None:
    known, schedule = Gaussian.of(data(n)), Schedule.of(SCHEDULERS[kind], 10)
    denoiser = known.denoiser(schedule)
    noise = torch.randn(7, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    made = sample(denoiser, noise, schedule).end
    assert torch.allclose(known.sampled(noise, schedule), made, atol=1e-8)
    back = invert(denoiser, made, schedule).end
    assert torch.allclose(known.inverted(made, schedule), back, atol=1e-8, rtol=1e-6)
    assert (back - noise).abs().max() > 1e-3  # ten steps of plain inversion err


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_trajectory_s_gains_are_the_products_of_its_steps(kind: str) -> None:
    known, schedule = Gaussian.of(data(400)), Schedule.of(SCHEDULERS[kind], 10)
    gains = torch.ones_like(known.variances)
    for step, (a, s) in enumerate(schedule.sources):
        v, (kept, moved) = known.variances, schedule.forward(step)
        image, noise = a * v / (a * a * v + s * s), s / (a * a * v + s * s)  # the guesses' slopes in the state
        gains *= kept + moved * {"epsilon": noise, "velocity": a * noise - s * image, "flow": noise - image}[kind]
    some = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(known.gains(schedule), gains, atol=1e-10)
    # of two states the difference: the mean is gone
    before, after = (x.flatten(1).diff(dim=0) @ known.directions.T for x in (some, known.sampled(some, schedule)))
    assert torch.allclose(after, gains * before, atol=1e-10)


@pytest.mark.parametrize("n", [6, 400])
@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("method", METHODS)
def test_trajectories_and_latents_of_every_inversion_are_those_of_the_exact_denoiser(method: str, kind: str, n: int) -> None:
    known, schedule, inversion = Gaussian.of(data(n)), Schedule.of(SCHEDULERS[kind], 10), INVERSIONS[method]
    generator = torch.Generator().manual_seed(1)
    noise, fresh = (torch.randn(40, *SHAPE, dtype=torch.float64, generator=generator) for _ in range(2))

    def way(denoiser: Any, start: torch.Tensor, fresh: torch.Tensor) -> list[torch.Tensor]:
        walked = sample(denoiser, start, schedule, keep=range(11))
        latents = inversion.invert(denoiser, walked.end, schedule, fresh, 2).end
        back = inversion.back(denoiser, latents, schedule).end
        return [*(walked.kept[i] for i in range(11)), latents[:, 0] if inversion.parts(10) > 1 else latents, back]

    found = known.along(way, schedule, noise, fresh)
    *states, latents, back = (known.values(each) for each in found)
    *walked, reached, returned = way(known.denoiser(schedule), noise, fresh)
    assert max((a - b).abs().max() for a, b in zip(states, walked, strict=True)) < 1e-10
    assert ((back - returned).abs().max() / returned.abs().max()) < 2e-5
    # distances in the coordinates are those of the states
    apart = (found[3] - found[-2]).norm(dim=1)
    assert torch.allclose(apart, (states[3] - latents).flatten(1).norm(dim=1), rtol=1e-10)
    if method not in ("fixed-point", "newton"):  # which stop within a tolerance, in steps that shrink nearly all to nothing
        assert ((latents - reached).abs().max() / reached.abs().max()) < 1e-8
        assert abs(latents.std() / reached.std() - 1) < 1e-8
        assert abs(top_correlations(latents)[0] - top_correlations(reached)[0]) < 1e-5


def test_many_steps_of_the_best_denoiser_give_the_data_again() -> None:
    x = data(400)
    known, schedule = Gaussian.of(x), Schedule.of(SCHEDULERS["velocity"], 1000)
    noise = torch.randn(4000, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    made = known.sampled(noise, schedule).flatten(1)
    along = made @ known.directions.T
    wide = known.variances > 0.01  # narrower ones than the last step's noise are made narrower still
    assert wide.sum() > 10 and torch.allclose(along.std(0)[wide], known.variances.sqrt()[wide], rtol=0.12)
    assert torch.allclose(made.mean(0), known.mean.flatten(), atol=4 * known.variances.max().sqrt().item() / 4000**0.5)


def test_of_all_denoisers_it_errs_least() -> None:
    known, schedule = Gaussian.of(data(400)), Schedule.of(SCHEDULERS["epsilon"], 10)
    generator = torch.Generator().manual_seed(3)
    image = (torch.randn(2000, 24, generator=generator, dtype=torch.float64) * known.variances.sqrt()) @ known.directions
    image = image.reshape(-1, *SHAPE) + known.mean
    for timestep, (signal, level) in zip(schedule.timesteps, schedule.sources, strict=True):
        noise = torch.randn(image.shape, generator=generator, dtype=torch.float64)
        states = signal * image + level * noise
        guess = known.denoiser(schedule)(states, timestep)
        # nothing of what is left can be guessed from the state: no linear change of the guess makes it better
        rest, seen = (guess - noise).flatten(1), states.flatten(1)
        both = torch.corrcoef(torch.cat([rest, seen], 1).T)[:24, 24:]
        assert both.abs().max() < 5 / len(states) ** 0.5


def test_what_has_no_covariance_and_no_level_is_refused() -> None:
    with pytest.raises(ProbekitError, match="at least two, all finite"):
        Gaussian.of(torch.zeros(1, 3))
    with pytest.raises(ProbekitError, match="at least two, all finite"):
        Gaussian.of(torch.full((3, 3), torch.nan))
    schedule = Schedule.of(SCHEDULERS["epsilon"], 10)
    with pytest.raises(ProbekitError, match="timestep 3: is none of the schedule's 10"):
        Gaussian.of(data(30)).denoiser(schedule)(torch.zeros(1, *SHAPE), 3.0)

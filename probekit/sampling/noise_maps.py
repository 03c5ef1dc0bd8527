"""Edit-friendly inversion: an image as the noise that ancestral sampling would have added, step by step, to make it."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor

from probekit.sampling.schedule import Schedule, between
from probekit.sampling.trajectory import Denoiser, States, Trajectory, Walk


def ancestral(schedule: Schedule, step: int) -> tuple[float, float, float]:
    """(a, b, std) of an ancestral step: the next state is a * state + b * prediction + std * noise.

    The standard deviation is that of DDIM with eta 1 (Song et al. 2021, equation 16), DDPM's posterior: what of the noise at
    the target is not explained by that at the source. For a flow it is the same of its own levels.
    """
    (signal, noise), (signal_, noise_) = schedule.sources[step], schedule.targets[step]
    variance = noise_**2 * max(0.0, 1 - (signal * noise_ / (signal_ * noise)) ** 2)
    a, b = between(schedule.prediction, (signal, noise), (signal_, math.sqrt(noise_**2 - variance)))
    return a, b, math.sqrt(variance)


@torch.no_grad()
def sample_noise_maps(
    denoiser: Denoiser, start: Float[Tensor, "n maps ..."], schedule: Schedule, *, keep: Collection[int] = ()
) -> Trajectory:
    """Ancestral sampling with given noise. start: the state that it starts from, then a map a step. One call a step."""
    walk = Walk(denoiser, start, schedule, keep)
    states = walk.at(0, walk.start[:, 0])
    for step in range(len(schedule)):
        a, b, std = ancestral(schedule, step)
        states = walk.at(step + 1, a * states + b * walk.predict(states, step) + (std or 1.0) * walk.start[:, step + 1])
    return walk.end(states)


@torch.no_grad()
def invert_noise_maps(
    denoiser: Denoiser,
    start: States,
    schedule: Schedule,
    epsilon: Float[Tensor, "n steps ..."],
    *,
    keep: Collection[int] = (),
) -> Trajectory:
    """Edit-friendly DDPM inversion (Huberman-Spiegelglas et al. 2024, algorithm 1), exact but for rounding.

    Every state is noised from the image by noise of its own, independent of the others', and a step's map is what ancestral
    sampling would have to add to get from one to the next. epsilon: that noise, standard normal, one a step. A step to no noise
    adds none; what it misses the image by is its map then, so that the way back stays exact. The end is (n, 1 + steps, ...):
    the first state and the maps, which are not white: they have more variance than 1. One call a step.
    """
    walk = Walk(denoiser, start, schedule, keep)
    image, drawn = walk.start, epsilon.to(walk.start)
    noised = [signal * image + noise * drawn[:, i] for i, (signal, noise) in enumerate(schedule.sources)]
    noised.append(image)
    maps = [walk.at(0, noised[0])]
    for step in range(len(schedule)):
        a, b, std = ancestral(schedule, step)
        mean = a * noised[step] + b * walk.predict(noised[step], step)
        maps.append((noised[step + 1] - mean) / (std or 1.0))
        walk.at(step + 1, noised[step + 1])
    return walk.end(torch.stack(maps, 1))

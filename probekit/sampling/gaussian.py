"""What second moments alone predict: for normal data the best denoiser is known, and sampling and inversion are linear maps.

Data are N(mean, covariance). A state at a noise level is x = a * image + s * epsilon, so that image and x are jointly normal;
for a direction of the covariance with variance v the best guesses (conditional expectations) are

    image = mean + a v / (a² v + s²) * (x - a mean),    epsilon = s / (a² v + s²) * (x - a mean).

Both are affine in x, direction by direction, and so is every step of `sampling.sample` and `sampling.invert`, which keeps what
is predicted: a trajectory multiplies what a state has in a direction by a gain, and adds a multiple of the mean. (Wang and
Vastola 2023, "Diffusion Models Generate Images Like Painters", read trajectories of trained models so.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from probekit.hooks.errors import ProbekitError
from probekit.sampling.schedule import Level, Schedule
from probekit.sampling.trajectory import Denoiser


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Normal data, in float64. directions: orthonormal, a row each; variances: along them; orthogonal to them there is none.

    mean: of the data, of the shape of one of them.
    """

    mean: Float[Tensor, "..."]
    directions: Float[Tensor, "k d"]
    variances: Float[Tensor, " k"]

    @classmethod
    def of(cls, data: Float[Tensor, "n ..."]) -> Gaussian:
        """With the mean and the covariance (over n - 1) of the data. Raises ProbekitError for fewer than two, or not finite."""
        if len(data) < 2 or not torch.isfinite(data).all():
            raise ProbekitError(f"data of shape {tuple(data.shape)}: at least two, all finite, have a covariance")
        flat = data.detach().cpu().double().reshape(len(data), -1)
        mean = flat.mean(0)
        centred = (flat - mean) / math.sqrt(len(flat) - 1)
        if len(flat) > flat.shape[1]:
            variances, vectors = torch.linalg.eigh(centred.T @ centred)
            directions = vectors.T
        else:  # fewer data than values: by the products of the data, which have the same variances
            variances, vectors = torch.linalg.eigh(centred @ centred.T)
            kept = variances > variances[-1] * len(flat) * torch.finfo(torch.float64).eps
            variances, vectors = variances[kept], vectors[:, kept]
            directions = (centred.T @ vectors / variances.sqrt()).T
        return cls(mean.reshape(data.shape[1:]), directions, variances.clamp(min=0))

    def denoiser(self, schedule: Schedule) -> Denoiser:
        """The best denoiser of these data, for the timesteps of a schedule: what a network would learn in the limit.

        It sees states (n, *shape of the data) and gives the schedule's kind of prediction. Raises ProbekitError for a timestep
        that is not one of the schedule's.
        """
        levels = dict(zip(schedule.timesteps, schedule.sources, strict=True))

        def predict(states: Tensor, timestep: float) -> Tensor:
            if timestep not in levels:
                raise ProbekitError(f"timestep {timestep:g}: is none of the schedule's {len(levels)}")
            mean = self.mean.to(states).flatten()
            factors, rest, constant = _prediction(schedule.prediction, levels[timestep], self.variances)
            away = states.flatten(1) - levels[timestep][0] * mean
            within = away @ self.directions.T.to(states)
            made = rest * away + (within * (factors - rest).to(states)) @ self.directions.to(states) + constant * mean
            return made.reshape(states.shape)

        return predict

    def sampled(self, noise: Float[Tensor, "n ..."], schedule: Schedule) -> Float[Tensor, "n ..."]:
        """What `sampling.sample` makes of noise with the best denoiser, in closed form."""
        return self._mapped(noise, *self._walk(schedule, range(len(schedule)), back=False))

    def inverted(self, images: Float[Tensor, "n ..."], schedule: Schedule) -> Float[Tensor, "n ..."]:
        """What `sampling.invert` makes of images with the best denoiser, in closed form."""
        return self._mapped(images, *self._walk(schedule, reversed(range(len(schedule))), back=True))

    def _walk(self, schedule: Schedule, steps: Iterable[int], *, back: bool) -> tuple[Tensor, Tensor]:
        """Gains and shifts of a trajectory: an entry a direction, the last for all that is orthogonal to them.

        A state that has y in a direction, in which the mean has m, ends with gain * y + shift * m.
        """
        variances = torch.cat([self.variances, self.variances.new_zeros(1)])
        gains, shifts = torch.ones_like(variances), torch.zeros_like(variances)
        for step in steps:
            a, b = schedule.backward(step) if back else schedule.forward(step)
            signal, _ = level = schedule.sources[step]
            factors, rest, constant = _prediction(schedule.prediction, level, variances)
            factors[-1] = rest
            # a * x + b * (factor * (x - signal * mean) + constant * mean)
            gains, shifts = (a + b * factors) * gains, (a + b * factors) * shifts + b * (constant - factors * signal)
        return gains, shifts

    def _mapped(self, states: Tensor, gains: Tensor, shifts: Tensor) -> Tensor:
        flat, mean = states.detach().cpu().double().flatten(1), self.mean.flatten()
        within, of_mean = flat @ self.directions.T, self.directions @ mean
        moved = within * (gains[:-1] - gains[-1]) + of_mean * (shifts[:-1] - shifts[-1])
        return (gains[-1] * flat + shifts[-1] * mean + moved @ self.directions).reshape(states.shape)


def _prediction(kind: str, level: Level, variances: Tensor) -> tuple[Tensor, float, float]:
    """What is predicted of x at a level: factor * (x - a mean) + constant * mean, a factor for each variance, and for none."""
    a, s = level

    def factor(v: Tensor) -> Tensor:
        of_image, of_noise = a * v / (a * a * v + s * s), s / (a * a * v + s * s)
        if kind == "epsilon":
            return of_noise
        return a * of_noise - s * of_image if kind == "v_prediction" else of_noise - of_image

    constant = {"epsilon": 0.0, "v_prediction": -s}.get(kind, -1.0)
    return factor(variances), factor(torch.zeros((), dtype=torch.float64)).item(), constant

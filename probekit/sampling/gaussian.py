"""What second moments alone predict: for normal data the best denoiser is known, and sampling and inversion are linear maps.

Data are N(mean, covariance). A state at a noise level is x = a * image + s * epsilon, so that image and x are jointly normal;
for a direction of the covariance with variance v the best guesses (conditional expectations) are

    image = mean + a v / (a² v + s²) * (x - a mean),    epsilon = s / (a² v + s²) * (x - a mean).

Both are affine in x, direction by direction. So is every step of sampling and of its inversions, which goes from x to
a' x + b' * prediction: where what is predicted is f * (x - a mean) + c * mean, a state that has y in a direction, in which the
mean has m, becomes (a' + b' f) y + b' (c - f a) m. A whole trajectory therefore multiplies y by a gain, the product of its
steps' a' + b' f, and adds a multiple of m. What starts from fresh noise on the way (`invert_renoised`) adds a multiple of that,
and of two coupled states (`invert_coupled`) each becomes a sum of multiples of both. All these multiples are what the algorithm
itself makes of unit states: y, fresh noise and m, 1 each in turn (`Gaussian.along`). (Wang and Vastola 2023, "Diffusion Models
Generate Images Like Painters", read trajectories of trained models so.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from probekit.hooks.errors import ProbekitError
from probekit.sampling.schedule import Level, Schedule
from probekit.sampling.trajectory import Denoiser, invert, sample

Way = Callable[[Denoiser, Tensor, Tensor], Sequence[Tensor]]
"""What trajectories make of starts (n, ...) and of as much fresh noise: states of the same shape."""


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
        (made,) = self.along(lambda denoiser, start, fresh: [sample(denoiser, start, schedule).end], schedule, noise)
        return self.values(made)

    def inverted(self, images: Float[Tensor, "n ..."], schedule: Schedule) -> Float[Tensor, "n ..."]:
        """What `sampling.invert` makes of images with the best denoiser, in closed form."""
        (made,) = self.along(lambda denoiser, start, fresh: [invert(denoiser, start, schedule).end], schedule, images)
        return self.values(made)

    def gains(self, schedule: Schedule) -> Float[Tensor, " k"]:
        """What `sampling.sample` multiplies a state by along each direction; in many steps about the root of its variance."""
        (of_start, _, _), *_ = self._responses(lambda denoiser, start, fresh: [sample(denoiser, start, schedule).end], schedule)
        return of_start[:-1]

    def along(
        self, way: Way, schedule: Schedule, start: Float[Tensor, "n ..."], fresh: Float[Tensor, "n ..."] | None = None
    ) -> list[Float[Tensor, "n c"]]:
        """What a way makes of starts and fresh noise with the best denoiser, in closed form: the `coordinates` of its states.

        way: any that is affine in what it is given, as all of `sampling` are; those that solve for a state, where they find it.
        fresh: none where the way draws none.
        """
        given = [self.coordinates(each) for each in (start, start * 0 if fresh is None else fresh, self.mean[None])]
        size = self.mean.numel()
        made = []
        for response in self._responses(way, schedule):
            each = torch.cat([response[:, :-1], response[:, -1:].expand(3, size)], 1)
            made.append(each[0] * given[0] + each[1] * given[1] + each[2] * given[2])
        return made

    def _responses(self, way: Way, schedule: Schedule) -> list[Float[Tensor, "3 _k"]]:
        """What each state of a way has of the start, of fresh noise and of the mean, which are 1 in turn: a row each.

        An entry a direction, and one for all that is orthogonal to them, where there is no variance.
        """
        variances = torch.cat([self.variances, self.variances.new_zeros(1)])
        of_start, of_fresh, of_mean = torch.eye(3, dtype=torch.float64)[:, :, None].expand(3, 3, len(variances))
        levels = dict(zip(schedule.timesteps, schedule.sources, strict=True))

        def predict(states: Tensor, timestep: float) -> Tensor:
            factors, _, constant = _prediction(schedule.prediction, levels[timestep], variances)
            return factors * (states - levels[timestep][0] * of_mean) + constant * of_mean

        return list(way(predict, of_start, of_fresh))

    def coordinates(self, states: Float[Tensor, "n ..."]) -> Float[Tensor, "n c"]:
        """States along the directions, then what of them is orthogonal to these: distances are those of the states."""
        flat = states.detach().cpu().double().flatten(1)
        within = flat @ self.directions.T
        return torch.cat([within, flat - within @ self.directions], 1)

    def values(self, coordinates: Float[Tensor, "n c"]) -> Float[Tensor, "n ..."]:
        """The states that have these coordinates."""
        within, rest = coordinates.tensor_split([len(self.variances)], 1)
        return (within @ self.directions + rest).reshape(-1, *self.mean.shape)


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

"""Trajectory: how far each step of sampling is from each point on the way from noise to latent (Hidden Relations, figure 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from probekit.experiments.denoising import BLOCK, CHOICES, SHOWN, Inverting, Predicting, inversions, numbered
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Bench, Findings, Unit, Work

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

    from probekit.runs.folder import Run
    from probekit.sampling.gaussian import Gaussian, Way
    from probekit.sampling.trajectory import Denoiser

POINTS = 25
"""Points between noise and latent, as in the reference."""
KEPT = 2**27
"""Numbers of all steps' states that are kept at a time: 512 MiB."""

PASSING = "passing"
"""The unit that says where the way passes the latent, and where second moments predict that it does."""


@dataclass(frozen=True, kw_only=True)
class InvertTrajectory(Inverting, Predicting):
    """How far every step of sampling is from every point on the way from noise to latent (figure 5)."""

    name: ClassVar[str] = "invert-trajectory"

    method: Annotated[str, typer.Option(help=f"The latent's: {CHOICES}.")] = "plain"
    steps: Annotated[int, typer.Option(min=1, help="Steps of sampling and of inversion.")] = 100
    n: Annotated[int, typer.Option("--n", min=2, help="How many samples.")] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.chosen) != 1:
            raise ProbekitError(f"--method {self.method!r}: one inversion at a time")

    @property
    def chosen(self) -> list[str]:
        """The name of `--method`."""
        return inversions(self.method, "--method")

    def inputs(self) -> dict[str, Any]:
        """The fingerprints of the model, and of the data whose covariance predicts."""
        return super().inputs() | self.of_theory()

    def plan(self) -> list[Unit]:
        """Blocks of samples, then where all of them pass the latent."""
        blocks = [Unit(f"block-{start:06d}", min(BLOCK, self.n - start)) for start in range(0, self.n, BLOCK)]
        return [*blocks, Unit(PASSING, needs=tuple(block.name for block in blocks))]

    def work(self, unit: Unit, bench: Bench) -> Work:
        """A block's distances, or where the way passes the latent.

        by: whose trajectories: the `model`'s, or those that second moments of the `data`, or of the `samples`, predict.
        A row for each step, 0 (noise) … steps (sample), and point, 0 (noise) … 1 (latent): distance, the mean L2 of n samples.
        And a row for each measure: value with its 95% bootstrap interval over the samples. nearest: the share of the steps
        after which the mean distance to the latent is smallest; there, start, end: that distance then, of noise, of sample;
        nearer: start - there; beyond nearest, beyond there: by how much more the model's is than the predicted.
        """
        return self._passing(bench) if unit.name == PASSING else self._block(unit, bench)

    def _block(self, unit: Unit, bench: Bench) -> Work:
        """Arrays: `states`, the samples; `to_latent` (n, steps + 1), the distance of every state to the latent."""
        import torch

        from probekit import seeds
        from probekit.images import as_pictures
        from probekit.sampling.inversions import noises

        (method,), diffusion, first = self.chosen, self.diffusion, int(unit.name.removeprefix("block-"))
        drawn = noises(method, self.steps, diffusion.shape)
        count, rows = self.steps + 1, range(first, first + unit.size)
        size = min(self.batch_size, max(1, KEPT // (count * math.prod(diffusion.shape))))
        distances = _Distances()
        samples: list[Tensor] = []
        pictures: dict[str, Tensor] = {}
        for numbers in (rows[start : start + size] for start in range(0, len(rows), size)):
            noise, fresh = diffusion.noise(numbers, self.seed), seeds.fresh_noise(drawn, numbers, self.seed)
            made = self._way(diffusion.denoiser(len(numbers)), noise.to(diffusion.device), fresh.to(diffusion.device))
            *states, latents = (each.float().cpu() for each in made)
            distances.add(states, noise, latents)
            samples.append(states[-1])
            if (left := SHOWN - numbers[0]) > 0:
                shown = {"noise": as_pictures(noise[:left]), "latent": as_pictures(latents[:left])}
                for name, some in (shown | {"sample": diffusion.decode(states[-1][:left])}).items():
                    pictures |= numbered(name, some, numbers[0])
            bench.advance(len(numbers))
        kept = {"states": torch.cat(samples).numpy(), "to_latent": distances.to_latent}
        return Work(distances.rows("model"), pictures, kept)

    @property
    def _way(self) -> Way:
        """From noise by every state to the sample, and on to its latent."""
        from probekit.sampling import sample
        from probekit.sampling.inversions import INVERSIONS, default_renoised

        (method,) = self.chosen
        inversion, schedule = INVERSIONS[method], self.diffusion.schedule(self.steps)
        renoised = default_renoised(self.steps) if self.renoised is None else self.renoised
        several = inversion.parts(self.steps) > 1

        def way(denoiser: Denoiser, noise: Tensor, fresh: Tensor) -> list[Tensor]:
            walked = sample(denoiser, noise, schedule, keep=range(len(schedule) + 1))
            latents = inversion.invert(denoiser, walked.end, schedule, fresh, renoised).end
            return [*(walked.kept[i] for i in range(len(schedule) + 1)), latents[:, 0] if several else latents]

        return way

    def _passing(self, bench: Bench) -> Work:
        import pandas as pd
        import torch

        from probekit.sampling.gaussian import Gaussian

        blocks = [unit.name for unit in self.plan() if not unit.needs]
        to_latent = bench.stacked(blocks, "to_latent")[:]
        parts = [_passed("model", to_latent, self.seed)]
        if self.second_moments is not None and self.predicts(*self.chosen, self.steps):
            samples = Gaussian.of(torch.from_numpy(bench.stacked(blocks, "states")[:]))
            for by, known in {"data": self.second_moments, "samples": samples}.items():
                distances = self._predicted(known)
                parts += [distances.rows(by), _passed(by, distances.to_latent, self.seed, beside=to_latent)]
        return Work(pd.concat(parts, ignore_index=True))

    def _predicted(self, known: Gaussian) -> _Distances:
        """The distances for the same noises, were the data normal."""
        schedule, found = self.diffusion.schedule(self.steps), _Distances()
        size = max(1, KEPT // 4 // ((self.steps + 1) * math.prod(self.diffusion.shape)))  # float64, and more coordinates
        for start in range(0, self.n, size):
            numbers = range(start, min(self.n, start + size))
            noise, fresh = (draw(numbers, self.seed) for draw in (self.diffusion.noise, self.diffusion.fresh_noise))
            *states, latents = known.along(self._way, schedule, noise, fresh)
            found.add(states, known.coordinates(noise), latents)  # where distances are those of the states
        return found

    def findings(self, run: Run, rows: pd.DataFrame) -> Findings:
        """Where the way passes the latent."""
        from probekit.report.trajectory import findings

        return findings(run, rows)


class _Distances:
    """Of the states of trajectories to the points between noise and latent, gathered batch by batch."""

    def __init__(self) -> None:
        self._totals: list[np.ndarray] = []
        self._to_latent: list[np.ndarray] = []

    def add(self, states: Sequence[Tensor], noise: Tensor, latents: Tensor) -> None:
        """Count a batch: every state, of the noise's shape."""
        import torch

        from probekit.metrics.geometry import interpolation_distances

        self._totals.append(interpolation_distances(states, noise, latents, POINTS).numpy() * len(noise))
        each = [(state.double() - latents.double()).flatten(1).norm(dim=1) for state in states]
        self._to_latent.append(torch.stack(each, 1).numpy())

    @property
    def to_latent(self) -> np.ndarray:
        """(n, states): the distance of every row's every state to its latent."""
        import numpy as np

        return np.concatenate(self._to_latent)

    def rows(self, by: str) -> pd.DataFrame:
        """The mean distance of every state to every point."""
        import numpy as np
        import pandas as pd

        n = len(self.to_latent)
        mean = np.sum(self._totals, axis=0) / n
        count = len(mean)
        told = {"step": np.repeat(np.arange(count), POINTS), "point": np.tile(np.linspace(0, 1, POINTS), count)}
        return pd.DataFrame({"by": by, **told, "distance": mean.ravel(), "n": n})


def _passed(by: str, to_latent: np.ndarray, seed: int, beside: np.ndarray | None = None) -> pd.DataFrame:
    """Where the mean distance to the latent is smallest, with intervals; beside: those of the model, for the same noises."""
    import pandas as pd

    from probekit.metrics.distributions import bootstrap

    def curve(rows: np.ndarray, of: np.ndarray = to_latent) -> np.ndarray:
        return of[rows].mean(0)

    steps = to_latent.shape[1] - 1
    measures: dict[str, Callable[[np.ndarray], float]] = {
        "nearest": lambda rows: curve(rows).argmin() / steps,
        "there": lambda rows: curve(rows).min(),
        "start": lambda rows: curve(rows)[0],
        "end": lambda rows: curve(rows)[-1],
        "nearer": lambda rows: curve(rows)[0] - curve(rows).min(),
    }
    if beside is not None:
        measures["beyond nearest"] = lambda rows: (int(curve(rows, beside).argmin()) - int(curve(rows).argmin())) / steps
        measures["beyond there"] = lambda rows: curve(rows, beside).min() - curve(rows).min()
    told = []
    for measure, statistic in measures.items():
        value, low, high = bootstrap(statistic, len(to_latent), seed=seed)
        told.append({"by": by, "measure": measure, "value": value, "low": low, "high": high, "n": len(to_latent)})
    return pd.DataFrame(told)

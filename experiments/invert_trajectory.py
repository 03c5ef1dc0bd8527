"""Trajectory: how far each step of sampling is from each point on the way from noise to latent (Hidden Relations, figure 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from probekit.experiments.denoising import BLOCK, CHOICES, SHOWN, Inverting, inversions, numbered
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Bench, Findings, Unit, Work

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from probekit.runs.folder import Run

POINTS = 25
"""Points between noise and latent, as in the reference."""
KEPT = 2**27
"""Numbers of all steps' states that are kept at a time: 512 MiB."""


@dataclass(frozen=True, kw_only=True)
class InvertTrajectory(Inverting):
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

    def plan(self) -> list[Unit]:
        """Blocks of samples."""
        return [Unit(f"block-{start:06d}", min(BLOCK, self.n - start)) for start in range(0, self.n, BLOCK)]

    def work(self, unit: Unit, bench: Bench) -> Work:
        """Mean distances of a block's samples, a row for each step and point, and the first samples' pictures.

        step: 0 (noise) … steps (sample); point: 0 (noise) … 1 (latent); distance: mean L2; n: the block's samples.
        """
        import numpy as np
        import pandas as pd
        import torch

        from probekit import seeds
        from probekit.images import as_pictures
        from probekit.metrics.geometry import interpolation_distances
        from probekit.sampling import sample
        from probekit.sampling.inversions import INVERSIONS, inverted, noises

        (method,), diffusion = self.chosen, self.diffusion
        drawn, several = noises(method, self.steps, diffusion.shape), INVERSIONS[method].parts(self.steps) > 1
        schedule, first = diffusion.schedule(self.steps), int(unit.name.removeprefix("block-"))
        count, rows = len(schedule) + 1, range(first, first + unit.size)
        size = min(self.batch_size, max(1, KEPT // (count * math.prod(diffusion.shape))))
        distances = torch.zeros(count, POINTS, dtype=torch.float64)
        pictures: dict[str, Tensor] = {}
        for numbers in (rows[start : start + size] for start in range(0, len(rows), size)):
            noise = diffusion.noise(numbers, self.seed)
            walked = sample(diffusion.denoiser(len(numbers)), noise.to(diffusion.device), schedule, keep=range(count))
            fresh = seeds.fresh_noise(drawn, numbers, self.seed)
            latents = inverted(diffusion, method, walked.end, schedule, fresh, renoised=self.renoised).end.cpu()
            latents = latents[:, 0].float() if several else latents
            states = [walked.kept[i] for i in range(count)]
            distances += interpolation_distances(states, noise, latents, POINTS) * len(numbers) / len(rows)
            if (left := SHOWN - numbers[0]) > 0:
                shown = {"noise": as_pictures(noise[:left]), "latent": as_pictures(latents[:left])}
                for name, some in (shown | {"sample": diffusion.decode(walked.end[:left])}).items():
                    pictures |= numbered(name, some, numbers[0])
            bench.advance(len(numbers))
        frame = pd.DataFrame(
            {
                "step": np.repeat(np.arange(count), POINTS),
                "point": np.tile(np.linspace(0, 1, POINTS), count),
                "distance": distances.numpy().ravel(),
                "n": len(rows),
            }
        )
        return Work(frame, pictures)

    def findings(self, run: Run, rows: pd.DataFrame) -> Findings:
        """Where the way passes the latent."""
        from probekit.report.trajectory import findings

        return findings(run, rows)

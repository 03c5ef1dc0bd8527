"""Noise map: which noise belongs to which sample, by L2 alone (Hidden Relations, "Noise-to-Sample mapping")."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from probekit.experiments.denoising import Predicting, step_counts
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Bench, Findings, Unit, Work

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from probekit.runs.folder import Run, Stacked

HELD = 2**26
"""Values of the noises that are held in memory at a time to predict where they go."""

EXAMPLES = 6
"""Samples that are drawn with their nearest noise, and noises whose nearest sample is another's."""


@dataclass(frozen=True, kw_only=True)
class NoiseMapRun(Predicting):
    """Sample from numbered noises, then find each sample's noise and each noise's sample as the nearest by L2."""

    name: ClassVar[str] = "noise-map-run"

    steps: Annotated[str, typer.Option(help="Numbers of sampling steps, separated by commas.")] = "10,100"
    n: Annotated[int, typer.Option("--n", help="Noises, and as many samples, to find each other among.")] = 512
    splits: Annotated[
        int, typer.Option(help="Parts of the n over which the std is taken; the candidates are always all n.")
    ] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        step_counts(self.steps)
        if self.splits < 2:
            raise ProbekitError(f"--splits {self.splits}: at least 2, a std is taken over them")
        if self.n < 2 * self.splits:
            raise ProbekitError(f"--n {self.n}: at least {2 * self.splits}, two for each of the {self.splits} --splits")

    def inputs(self) -> dict[str, Any]:
        """The model's fingerprint, what it predicts, and what its noise is the shape of."""
        diffusion = self.diffusion
        prediction, *_ = [diffusion.schedule(count).prediction for count in step_counts(self.steps)]  # refuses too many
        space = "pixels" if diffusion.encoder is None else "latents"
        told = {"prediction": prediction, "space": space, "shape": list(diffusion.shape)}
        return self.of_model() | told | self.of_theory()

    def plan(self) -> list[Unit]:
        """For every number of steps the samples, then the match of all of them."""
        units: list[Unit] = []
        for steps in step_counts(self.steps):
            samples = self.sample_units(steps, self.n)
            units += [*samples, Unit(match_unit(steps), 2 * self.n, needs=tuple(unit.name for unit in samples))]
        return units

    def work(self, unit: Unit, bench: Bench) -> Work:
        """A block of samples, or both directions for one number of steps: a row each, and pictures.

        accuracy: the percent of rows whose nearest of all n candidates is their own partner; low, high: its 95% Wilson
        interval; std: that of `splits` parts' accuracies; chance: 100 / n. wrong: how many rows have another nearest; named:
        how many different candidates these name. own, other: mean L2 distance of the first 256 rows to their partner and to
        the nearest of all others. predicted, predicted_of_samples: the accuracy that the covariance of the training data, or
        of these samples, predicts (`sampling.gaussian`); NaN where these are not known, or too many to be held.
        """
        if not unit.needs:
            return self.sample_work(unit, bench)
        import torch

        from probekit.metrics import geometry
        from probekit.metrics.distributions import share_interval
        from probekit.models.hub import choose_device
        from probekit.report.noise_map import TO_NOISE, TO_SAMPLE

        noise, sampled = (bench.stacked(unit.needs, key) for key in ("noise", "states"))
        steps, n, device = int(unit.name.split("-")[1]), self.n, choose_device(self.device)
        rows, found = list[dict[str, Any]](), {}
        for direction, queries, candidates in ((TO_NOISE, sampled, noise), (TO_SAMPLE, noise, sampled)):
            found[direction] = answers = geometry.nearest(queries, candidates, device=device, on_rows=bench.advance)
            accuracy, std = geometry.matching_accuracy(answers, self.splits)
            wrong = answers != torch.arange(n)
            low, high = share_interval(n - int(wrong.sum()), n)
            own, other = geometry.margin(queries, candidates)
            rows.append(
                {
                    "steps": steps,
                    "direction": direction,
                    "accuracy": 100 * accuracy,
                    "std": 100 * std,
                    "low": 100 * low,
                    "high": 100 * high,
                    "n": n,
                    "chance": 100 / n,
                    "wrong": int(wrong.sum()),
                    "named": len(set(answers[wrong].tolist())),
                    "own": own,
                    "other": other,
                }
            )
        of_data, of_samples = self._predicted(steps, noise, sampled)
        for row in rows:
            row |= {"predicted": of_data[row["direction"]], "predicted_of_samples": of_samples[row["direction"]]}
        return Work(rows, self._pictures(noise, sampled, found[TO_NOISE].tolist(), found[TO_SAMPLE].tolist()))

    def _predicted(self, steps: int, noise: Stacked, sampled: Stacked) -> tuple[dict[str, float], dict[str, float]]:
        """By direction the accuracy, in percent, of the linear map from this noise that second moments alone would make."""
        import torch

        from probekit.metrics import geometry
        from probekit.models.hub import choose_device
        from probekit.report.noise_map import TO_NOISE, TO_SAMPLE
        from probekit.sampling.gaussian import Gaussian

        unknown = dict.fromkeys((TO_NOISE, TO_SAMPLE), math.nan)
        if self.second_moments is None or math.prod(noise.shape) > HELD:
            return unknown, dict(unknown)
        start, made, schedule = torch.from_numpy(noise[:]), torch.from_numpy(sampled[:]), self.diffusion.schedule(steps)
        found = []
        for known in (self.second_moments, Gaussian.of(made)):
            mapped = known.sampled(start, schedule).float()
            pairs = {TO_NOISE: (mapped, start), TO_SAMPLE: (start, mapped)}
            nearest = {way: geometry.nearest(*pair, device=choose_device(self.device)) for way, pair in pairs.items()}
            own = torch.arange(self.n)
            found.append({way: 100 * (answers == own).double().mean().item() for way, answers in nearest.items()})
        return found[0], found[1]

    def _pictures(self, noise: Stacked, sampled: Stacked, of_samples: list[int], of_noises: list[int]) -> dict[str, Tensor]:
        """The first samples with their own and their nearest noise, and the first noises whose nearest sample is not their own.

        Named found-ROW-ANSWER-PART and missed-ROW-ANSWER-PART.
        """
        import torch

        from probekit.images import as_pictures

        def image(row: int) -> Tensor:
            return self.diffusion.decode(torch.from_numpy(sampled[row])[None])[0]

        def drawn(row: int) -> Tensor:
            return as_pictures(torch.from_numpy(noise[row])[None])[0]

        pictures: dict[str, Tensor] = {}
        for row, answer in list(enumerate(of_samples))[:EXAMPLES]:
            parts = {"sample": image(row), "own": drawn(row), "nearest": drawn(answer)}
            pictures |= {f"found-{row}-{answer}-{part}": picture for part, picture in parts.items()}
        for row, answer in [(row, answer) for row, answer in enumerate(of_noises) if row != answer][:EXAMPLES]:
            parts = {"noise": drawn(row), "own": image(row), "nearest": image(answer)}
            pictures |= {f"missed-{row}-{answer}-{part}": picture for part, picture in parts.items()}
        return pictures

    def findings(self, run: Run, rows: pd.DataFrame) -> Findings:
        """How often the nearest is the own one."""
        from probekit.report.noise_map import findings

        return findings(run, rows)


def match_unit(steps: int) -> str:
    """The name of the unit that matches the samples of a number of steps."""
    return f"steps-{steps:06d}"

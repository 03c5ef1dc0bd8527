"""Dynamics: how early in a training stands what a model makes of noise (Hidden Relations, figure 6, right)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from probekit.experiments.denoising import BLOCK
from probekit.experiments.loading import Dtype
from probekit.experiments.training import OnTraining, step_unit
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Bench, Findings, Unit, Work

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

    from probekit.models import Model
    from probekit.runs.folder import Run

EXAMPLES = 8
"""Noises whose pictures are kept as pictures."""
NEIGHBOURS = 50
"""The paper's, of 2,048 samples; of n samples at most n // 10."""

Measured = tuple[str, float, float, float, float, int]
"""A measure's name, value, low and high end of its 95% interval, what it is by chance, and of how many samples."""


@dataclass(frozen=True, kw_only=True)
class DynamicsDiffusion(OnTraining):
    """Sample the same noises with every checkpoint of a training, and see when they become what they are at its end."""

    name: ClassVar[str] = "dynamics-diffusion"

    model: Annotated[str, typer.Option(help="A bundled model, or a folder with step-<n> folders or files in it.")] = (
        "avatar-ddpm"
    )
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 50
    n: Annotated[int, typer.Option("--n", min=16, help="How many noises, the same for every checkpoint.")] = 256
    prompt: Annotated[str | None, typer.Option(help="The caption of a text-to-image model's images.")] = None
    label: Annotated[int | None, typer.Option(min=0, help="The class of a DiT's images, by its number.")] = None
    guidance: Annotated[float, typer.Option(min=0, help="Classifier-free guidance; 1 is none.")] = 1.0
    dtype: Dtype = "auto"
    batch_size: Annotated[int, typer.Option(min=1, max=64, help="How many pictures go through the model at a time.")] = (
        dataclasses.field(default=32, compare=False)
    )

    @property
    def neighbours(self) -> int:
        """Of the k-NN overlap."""
        return min(NEIGHBOURS, self.n // 10)

    def loaded(self, path: Path) -> Model:
        """The model that lies there, under the condition."""
        from probekit.models import load

        model = load(path, device=self.device, dtype=self.dtype)
        return model.conditioned(prompt=self.prompt, label=self.label, guidance=self.guidance)

    def inputs(self) -> dict[str, Any]:
        """The fingerprint of every checkpoint: of its weights, its schedule, the condition.

        Raises ProbekitError where one is no diffusion model, fewer timesteps than `steps`, or other shapes than the last.
        """
        digests, kinds = {}, {}
        for step in self.paths:
            digests[str(step)], kinds[step] = self._told(step)
        *_, last = kinds
        if other := [step for step in kinds if kinds[step] != kinds[last]]:
            said = ", ".join(f"step {step} {kinds[step]}" for step in (other[0], last))
            raise ProbekitError(f"--model {self.model!r}: its checkpoints make no series ({said})")
        return {"checkpoints": digests}

    def _told(self, step: int) -> tuple[str, str]:
        """A checkpoint's digest and of which kind it is: nothing that would keep it loaded."""
        model = self.checkpoint(step)
        sides = "x".join(map(str, model.diffusion.shape))
        kind = f"has states {sides} and images of {model.diffusion.image_size} pixels"
        return model.space("noise", steps=self.steps).digest, kind

    def plan(self) -> list[Unit]:
        """For every checkpoint the blocks of its samples; then its measures, which need its own and the last one's."""
        *_, last = self.paths
        samples, measures = [], []
        for step in self.paths:
            samples += [Unit(name, size, group=step_unit(step)) for name, size in self._blocks(step).items()]
            needs = tuple(dict.fromkeys([*self._blocks(step), *self._blocks(last)]))
            measures.append(Unit(step_unit(step), needs=needs, group=step_unit(step)))
        return [*samples, *measures]

    def _blocks(self, step: int) -> dict[str, int]:
        """The names of the units of a checkpoint's samples, and how many noises each starts from."""
        return {f"samples-{step:09d}-{start:07d}": min(BLOCK, self.n - start) for start in range(0, self.n, BLOCK)}

    def work(self, unit: Unit, bench: Bench) -> Work:
        """A block of a checkpoint's samples, or its measures: a row each, and the first pictures."""
        import pandas as pd

        if not unit.needs:
            return self._sample(unit, bench)
        step = int(unit.name.removeprefix("step-"))
        *_, last = self.paths
        (states, pictures), (final, last_pictures) = (self._sampled([*self._blocks(s)], bench) for s in (step, last))
        measured = (
            mapping(self._noise(states.shape[1:], 0, self.n), states)
            + alike(states, final, self.neighbours)
            + alike_pictures(pictures, last_pictures, self.seed)
        )
        rows = pd.DataFrame(measured, columns=["measure", "value", "low", "high", "chance", "n"])
        rows.insert(0, "step", step)
        kept = {str(i): pictures[i] for i in range(EXAMPLES)}
        return Work(rows[["step", "measure", "value", "low", "high", "n", "chance"]], kept)

    def _sample(self, unit: Unit, bench: Bench) -> Work:
        """Arrays: `states`, the noiseless ends; where they are not the pictures themselves, `pictures`, too.

        They spare the measures the autoencoders: a model would be loaded twice for each checkpoint.
        """
        import torch

        from probekit.sampling import sample

        _, step, start = unit.name.split("-")
        diffusion = self.checkpoint(int(step)).diffusion
        schedule = diffusion.schedule(self.steps)
        made = []
        for part in torch.split(self._noise(diffusion.shape, int(start), unit.size), self.batch_size):
            made.append(diffusion.walk(part, lambda denoiser, states: sample(denoiser, states, schedule).end, self.batch_size))
            bench.advance(len(part))
        states = torch.cat(made)
        arrays = {"states": states.float().numpy()}
        if diffusion.decoder is not None:
            arrays["pictures"] = diffusion.decode(states).numpy()
        return Work(arrays=arrays)

    def _noise(self, shape: Sequence[int], start: int, count: int) -> Tensor:
        """Noises from number `start` on, the same for every checkpoint."""
        from probekit import seeds

        return seeds.noise(shape, range(start, start + count), self.seed)

    def _sampled(self, blocks: Sequence[str], bench: Bench) -> tuple[Tensor, Tensor]:
        """A checkpoint's states and pictures."""
        import torch

        states = torch.from_numpy(bench.stacked(blocks, "states")[:])
        if "pictures" in bench.arrays(blocks[0]):
            return states, torch.from_numpy(bench.stacked(blocks, "pictures")[:])
        return states, states.clamp(-1, 1)

    def findings(self, run: Run, rows: pd.DataFrame) -> Findings:
        """When each measure stands."""
        from probekit.report.dynamics_diffusion import findings

        return findings(run, rows, self.neighbours)


def mapping(noise: Tensor, states: Tensor) -> list[Measured]:
    """The percent of samples whose L2-nearest noise is their own, and the other way round, with Wilson intervals."""
    import torch

    from probekit.metrics.distributions import share_interval
    from probekit.metrics.geometry import nearest

    n, found = len(noise), []
    for name, queries, candidates in (("sample to noise", states, noise), ("noise to sample", noise, states)):
        hits = int((nearest(queries, candidates) == torch.arange(n)).sum())
        low, high = share_interval(hits, n)
        found.append((name, 100 * hits / n, 100 * low, 100 * high, 100 / n, n))
    return found


def alike(states: Tensor, final: Tensor, k: int) -> list[Measured]:
    """How alike the samples of a checkpoint and the last one's lie as sets, whatever a rotation: CKA, SVCCA, k-NN overlap.

    They have no intervals: drawn again, a sample would be its own neighbour.
    """
    from probekit.metrics.similarity import cka, mutual_knn, svcca

    n, nan = len(states), float("nan")
    x, y = states.flatten(1), final.flatten(1)
    value, by_chance = svcca(x, y)
    return [
        ("CKA", cka(x, y), nan, nan, 0.0, n),
        ("SVCCA", value, nan, nan, by_chance, n),
        ("k-NN overlap", mutual_knn(x, y, k), nan, nan, k / (n - 1), n),
    ]


def alike_pictures(pictures: Tensor, final: Tensor, seed: int) -> list[Measured]:
    """SSIM, PSNR (dB) and L2 of each picture and the last checkpoint's from the same noise: means with bootstrap intervals.

    Equal pictures have no PSNR and are left out of its mean, which is NaN where all are. By chance: of the last checkpoint's
    picture from the next noise.
    """
    import numpy as np

    from probekit.metrics.distributions import bootstrap

    same, other = picture_measures(pictures, final), picture_measures(pictures, final.roll(-1, 0))
    found = []
    for name, values in same.items():
        values, others = (v[~np.isnan(v)] for v in (values, other[name]))
        interval = bootstrap(values, seed=seed) if len(values) else (float("nan"),) * 3
        found.append((name, *interval, float(others.mean()) if len(others) else float("nan"), len(values)))
    return found


def picture_measures(a: Tensor, b: Tensor) -> dict[str, np.ndarray]:
    """Of every picture (3, h, w) in [-1, 1] and its counterpart: SSIM in [-1, 1], PSNR in dB, L2 of all its values.

    SSIM has 7x7 windows in each channel (Wang et al. 2004, by scikit-image); PSNR is 10 log10(2² / mean squared error), NaN of
    equal pictures.
    """
    import numpy as np
    from skimage.metrics import structural_similarity

    pairs = zip(a.numpy(), b.numpy(), strict=True)
    ssim = np.array([structural_similarity(p, q, data_range=2.0, channel_axis=0) for p, q in pairs], dtype=np.float64)
    square = (a.double() - b.double()).square().flatten(1)
    error = square.mean(1).numpy()
    psnr = 10 * np.log10(4 / np.where(error > 0, error, np.nan))
    return {"SSIM": ssim, "PSNR": psnr, "L2": square.sum(1).sqrt().numpy()}

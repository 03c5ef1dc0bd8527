"""Interpolation: two images become each other through their latents."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from probekit.experiments.denoising import CHOICES, METHODS, Inverting, inversions, numbered
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Bench, Findings, Unit, Work, whole_numbers

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from probekit.data.dataset import Dataset
    from probekit.runs.folder import Run


@dataclass(frozen=True, kw_only=True)
class InvertInterpolate(Inverting):
    """Two images become each other, along the great circle between their latents, by every inversion."""

    name: ClassVar[str] = "invert-interpolate"

    methods: Annotated[str, typer.Option(help=f"Inversions, separated by commas: {CHOICES}.")] = METHODS
    data: Annotated[str, typer.Option(help="Where the two images are from: avatars, celeba:PATH, folder:PATH.")] = "avatars"
    split: Annotated[str, typer.Option(help="Which of the data's images: train or test.")] = "test"
    pictures: Annotated[str, typer.Option(help="The two images' numbers in the split.")] = "0,1"
    frames: Annotated[int, typer.Option(min=3, max=1000, help="Pictures from the one to the other, both included.")] = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        from probekit.data.dataset import check_split

        check_split(self.split, "--split")
        _ = self.chosen  # refuses what is none

    @property
    def chosen(self) -> list[str]:
        """The names of `--methods`."""
        return inversions(self.methods, "--methods")

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The images of `--data`."""
        return self.images_of(self.data)

    @functools.cached_property
    def images(self) -> Tensor:
        """The two images, (2, 3, h, w). Raises ProbekitError for other than two numbers of the split."""
        there = self.dataset.split(self.split)
        numbers = whole_numbers(self.pictures, "--pictures", f"two numbers from 0 to {len(there) - 1}, as 0,1")
        if len(numbers) != 2 or not all(number < len(there) for number in numbers):
            raise ProbekitError(f"--pictures {self.pictures!r}: write two numbers from 0 to {len(there) - 1}, as 0,1")
        return self.dataset.images(there[numbers])

    def inputs(self) -> dict[str, Any]:
        """The fingerprints of the model and of the data set, whose two images it reads."""
        of_model = super().inputs()
        len(self.images)  # refuses numbers that are none
        return of_model | {"data_digest": self.dataset.digest}

    def plan(self) -> list[Unit]:
        """A unit a method."""
        return [Unit(method, self.frames) for method in self.chosen]

    def work(self, unit: Unit, bench: Bench) -> Work:
        """How evenly a method's frames change, a row a frame but the first, and all frames as pictures.

        lpips: from the frame before; end_error: the larger root mean square error of the two ends to their images.
        """
        import pandas as pd

        from probekit.metrics import lpips

        frames = self._frames(unit.name, bench)
        change = lpips.distances(frames[:-1], frames[1:])
        error = (frames[[0, -1]] - self.images).flatten(1).square().mean(1).sqrt()
        rows = pd.DataFrame(
            {"method": unit.name, "frame": range(1, len(frames)), "lpips": change.numpy(), "end_error": float(error.max())}
        )
        return Work(rows, numbered("frame", frames) | {"from": self.images[0], "to": self.images[1]})

    def _frames(self, method: str, bench: Bench) -> Tensor:
        """What is sampled from the great circle between the two images' latents, as images (frames, 3, h, w)."""
        import torch

        from probekit import seeds
        from probekit.sampling import slerp
        from probekit.sampling.inversions import INVERSIONS, inverted, noises, restored

        diffusion, several = self.diffusion, INVERSIONS[method].parts(self.steps) > 1
        schedule = diffusion.schedule(self.steps)
        fresh = seeds.fresh_noise(noises(method, self.steps, diffusion.shape), range(2), self.seed)
        states = diffusion.encode(self.images)
        ends = inverted(diffusion, method, states, schedule, fresh, renoised=self.renoised).end.cpu().double()
        fractions = torch.linspace(0, 1, self.frames, dtype=torch.float64)
        # the states of a latent each on a circle of their own
        circles = [slerp(part[0], part[1], fractions) for part in (ends.unbind(1) if several else [ends])]
        path = torch.stack(circles, 1) if several else circles[0]
        made = []
        for part in torch.split(path, self.batch_size):
            made.append(restored(diffusion, method, part, schedule))
            bench.advance(len(part))
        return diffusion.decode(torch.cat(made))

    def findings(self, run: Run, rows: pd.DataFrame) -> Findings:
        """How far the ways are, how even, and how exact their ends."""
        from probekit.report.interpolation import findings

        return findings(run, rows)

"""Inversion: from samples or images to latents and back, and where these latents lie (Hidden Relations)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from probekit.experiments.denoising import BLOCK, CHOICES, METHODS, SHOWN, Inverting, Predicting, inversions, numbered
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Bench, Findings, Unit, Work

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

    from probekit.data.dataset import Dataset
    from probekit.runs.folder import Run
    from probekit.sampling.trajectory import Denoiser

_COLUMNS = (
    *("method", "measure", "value", "std", "low", "high", "n"),
    *("predicted", "predicted_of_samples", "beyond_low", "beyond_high"),
)

ENDS = "noise and sample"
"""The unit of what is no latent: noise and samples themselves, and what white noise is expected to be."""


@dataclass(frozen=True, kw_only=True)
class InvertRun(Inverting, Predicting):
    """Invert by every method, sample back, and measure the latents: how they differ from noise, and where they lie."""

    name: ClassVar[str] = "invert-run"

    methods: Annotated[str, typer.Option(help=f"Inversions, separated by commas: {CHOICES}.")] = METHODS
    n: Annotated[int, typer.Option("--n", min=20, help="How many pictures; correlations depend on it.")] = 128
    data: Annotated[str | None, typer.Option(help="Invert these images instead of samples: avatars, celeba:PATH, …")] = None
    split: Annotated[str, typer.Option(help="Which of the data's images: train or test.")] = "test"

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
    def dataset(self) -> Dataset | None:
        """The images of `--data`. Raises ProbekitError where they are too few."""
        if self.data is None:
            return None
        images = self.images_of(self.data)
        if (there := len(images.split(self.split))) < self.n:
            raise ProbekitError(f"--n {self.n}: the {self.split} split of {self.data!r} has {there} images")
        return images

    def inputs(self) -> dict[str, Any]:
        """The fingerprints of the model, of the images that are inverted, and of those whose covariance predicts."""
        of_model = super().inputs()  # refuses a model or a number of steps before any data is looked at
        return of_model | ({} if self.dataset is None else {"data_digest": self.dataset.digest}) | self.of_theory()

    # --- units -----------------------------------------------------------------------------------------------------------

    def plan(self) -> list[Unit]:
        """Blocks of samples or images; what these measure; and for every method its blocks, then what all of them measure."""
        sources = self._sources()
        units = [*sources, Unit(ENDS, needs=tuple(unit.name for unit in sources))]
        for method in self.chosen:
            # whoever made a block inverts it, so that several shards need nothing of each other till all is measured
            blocks = [Unit(f"{method}-{_start(s):07d}", s.size, needs=(s.name,), group=s.group) for s in sources]
            units += [*blocks, Unit(method, needs=tuple(unit.name for unit in (*sources, *blocks)))]
        return units

    def _sources(self) -> list[Unit]:
        """The units of what is inverted: array `states`, noiseless, of samples from numbered noises or of `--data`."""
        if self.dataset is None:
            made = self.sample_units(self.steps, self.n)
        else:
            made = [Unit(f"images-{start:07d}", min(BLOCK, self.n - start)) for start in range(0, self.n, BLOCK)]
        return [dataclasses.replace(unit, group=f"block-{_start(unit):07d}") for unit in made]

    def work(self, unit: Unit, bench: Bench) -> Work:
        """A block of states, or a block's way there and back, or what a method's latents or the ends themselves measure."""
        if not unit.needs:
            return self.sample_work(unit, bench) if self.dataset is None else self._encoded(unit, self.dataset)
        if unit.group:
            return self._there_and_back(unit, bench)
        return self._ends(bench) if unit.name == ENDS else self._measured(unit, bench)

    def _encoded(self, unit: Unit, dataset: Dataset) -> Work:
        wanted = dataset.split(self.split)[: self.n][_rows(unit)]
        return Work(arrays={"states": self.diffusion.encode(dataset.images(wanted)).numpy()})

    def _there_and_back(self, unit: Unit, bench: Bench) -> Work:
        """Arrays: `latents` (n, *shape), of several states (n, parts, *shape), as the space `inverted` has them; `back`
        (n, *shape), sampled from them; `calls` (n,) of the network, of a row's batch, there; of methods that solve their steps,
        `unsolved` (n,) and of newton `folded` (n,), as `sampling.Trajectory` has them.

        Latents of several states go back in float64, as they came: rounded, they would lead elsewhere.
        """
        import torch

        from probekit import seeds
        from probekit.sampling.inversions import inverted, noises, restored

        diffusion, method = self.diffusion, unit.name.rpartition("-")[0]
        schedule = diffusion.schedule(self.steps)
        states = torch.from_numpy(bench.arrays(unit.needs[0])["states"])
        numbers = range(_start(unit), _start(unit) + unit.size)
        fresh = seeds.fresh_noise(noises(method, self.steps, diffusion.shape), numbers, self.seed)
        latents, back, calls = [], [], []
        counts: dict[str, list[Tensor]] = {}
        for part, noise in zip(*(torch.split(rows, self.batch_size) for rows in (states, fresh)), strict=True):
            there = inverted(diffusion, method, part, schedule, noise, renoised=self.renoised)
            back.append(restored(diffusion, method, there.end, schedule))
            latents.append(there.end.float().cpu())
            calls.append(torch.full((len(part),), float(there.calls)))
            for name, found in (("unsolved", there.unsolved), ("folded", there.folded)):
                if found is not None:
                    counts.setdefault(name, []).append(found)
            bench.advance(len(part))
        arrays = {"latents": latents, "back": back, "calls": calls} | counts
        return Work(arrays={name: torch.cat(parts).numpy() for name, parts in arrays.items()})

    def _measured(self, unit: Unit, bench: Bench) -> Work:
        """All measures of one method's latents, a row each, and pictures of the first.

        value, std: mean and standard deviation over pictures, of correlations over pairs of pixels; low, high: the mean's
        bootstrap 95% interval; n: the pictures that have the measure. predicted, predicted_of_samples: what the covariance of
        the training data, or of these images, predicts for the same noises (`sampling.gaussian`); beyond_low, beyond_high: the
        95% interval of value - predicted, by bootstrap of means, else by jackknife. NaN where there is none.
        """
        import pandas as pd
        import torch
        import torch.nn.functional as F

        from probekit.metrics import geometry
        from probekit.metrics.distributions import bootstrap, jackknife
        from probekit.sampling.inversions import INVERSIONS

        diffusion, rows = self.diffusion, list[dict[str, Any]]()
        blocks = [name for name in unit.needs if name.startswith(f"{unit.name}-")]
        images = self._states(bench)
        latents, back, calls = (torch.from_numpy(bench.stacked(blocks, key)[:]) for key in ("latents", "back", "calls"))
        latents = latents[:, 0] if INVERSIONS[unit.name].parts(self.steps) > 1 else latents
        # nobody knows what noise the images of a data set would have come from
        noise = diffusion.noise(range(self.n), self.seed) if self.data is None else None
        ways = [_Way(images, latents, back), *self._predicted(unit.name, images)]

        def of_each(measure: str, found: list[Tensor]) -> None:
            """A measure of every picture, measured and predicted."""
            known = torch.isfinite(found[0])
            values, *predicted = (values[known].double() for values in found)
            value, low, high = bootstrap(values.numpy(), seed=self.seed) if len(values) else (float("nan"),) * 3
            std = float(values.std()) if len(values) > 1 else float("nan")
            row = {"measure": measure, "value": value, "std": std, "low": low, "high": high, "n": len(values)}
            if predicted:
                _, low, high = bootstrap((values - predicted[0]).numpy(), seed=self.seed)
                row |= _beside([float(each.mean()) for each in predicted]) | {"beyond_low": low, "beyond_high": high}
            rows.append(row)

        of_each("round-trip error", [_rms(way.back - way.images) for way in ways])
        of_each("network calls", [calls])
        for key, measure in (("unsolved", "steps unsolved"), ("folded", "steps that fold")):
            if key in bench.arrays(blocks[0]):
                of_each(measure, [torch.from_numpy(bench.stacked(blocks, key)[:])])
        found = [_of_distribution(way.latents, diffusion.shape) for way in ways]
        for row, *predicted in zip(*found, strict=True):
            rows.append(row | _beside([each["value"] for each in predicted]))
            if predicted and (measured := _WHOLE.get(row["measure"])):
                _, low, high = jackknife(_difference(measured, ways[0].latents, ways[1].latents), self.n)
                rows[-1] |= {"beyond_low": low, "beyond_high": high}
        if noise is not None:
            of_each("error to the noise", [_rms(way.latents - noise) for way in ways])
            for of, name in ((geometry.distances, "distance"), (geometry.angles, "angle at")):
                first, *others = (of(noise, way.latents, way.images) for way in ways)
                for what, pair in first.items():
                    rows.append(_summary(f"{name} {what}", *pair, self.n) | _beside([other[what][0] for other in others]))
            if len(diffusion.shape) == 3:
                pictures = F.interpolate(diffusion.decode(images), diffusion.shape[1:], mode="area")
                plain, textured = geometry.plain_and_textured(latents - noise, pictures)
                of_each("error to the noise, plain areas", [plain])
                of_each("error to the noise, textured areas", [textured])
                of_each("error to the noise, plain less textured areas", [plain - textured])
        frame = pd.DataFrame(rows).assign(method=unit.name).reindex(columns=_COLUMNS)
        return Work(frame, self._pictures(noise, latents, images, back))

    def _predicted(self, method: str, images: Tensor) -> list[_Way]:
        """What second moments alone predict of a method: those of the training data, and of the images that are inverted."""
        from probekit.sampling import sample
        from probekit.sampling.gaussian import Gaussian
        from probekit.sampling.inversions import INVERSIONS, default_renoised

        if self.second_moments is None or not self.predicts(method, self.steps):
            return []
        diffusion, inversion = self.diffusion, INVERSIONS[method]
        schedule, fresh = diffusion.schedule(self.steps), diffusion.fresh_noise(range(self.n), self.seed)
        renoised = default_renoised(self.steps) if self.renoised is None else self.renoised
        noise = diffusion.noise(range(self.n), self.seed) if self.data is None else None

        def way(denoiser: Denoiser, start: Tensor, fresh: Tensor) -> list[Tensor]:
            made = start if noise is None else sample(denoiser, start, schedule).end
            latents = inversion.invert(denoiser, made, schedule, fresh, renoised).end
            back = inversion.back(denoiser, latents, schedule).end
            return [made, latents[:, 0] if inversion.parts(self.steps) > 1 else latents, back]

        found = []
        for known in (self.second_moments, Gaussian.of(images)):
            states = known.along(way, schedule, images if noise is None else noise, fresh)
            found.append(_Way(*(known.values(each).float() for each in states)))
        return found

    def _ends(self, bench: Bench) -> Work:
        """What noise and images themselves measure, and what white noise is expected to."""
        import pandas as pd

        from probekit.metrics import geometry

        n, shape, frames = self.n, self.diffusion.shape, []
        found = {
            "noise": _of_distribution(self.diffusion.noise(range(n), self.seed), shape),
            "sample": _of_distribution(self._states(bench), shape),
        }
        if len(shape) == 3:
            channels, height, width = shape
            value = geometry.noise_correlation(n, channels * height * width)
            found["white noise, expected"] = [_summary("top-10 correlation", value, float("nan"), n)]
            if height % 8 == 0 and width % 8 == 0:
                value = geometry.noise_correlation(n, channels * 64, 20)
                found["white noise, expected"].append(_summary("top-20 correlation, patches", value, float("nan"), n))
        for name, rows in found.items():
            frames.append(pd.DataFrame(rows).assign(method=name).reindex(columns=_COLUMNS))
        return Work(pd.concat(frames, ignore_index=True))

    def _states(self, bench: Bench) -> Tensor:
        """All that is inverted, (n, *shape)."""
        import torch

        return torch.from_numpy(bench.stacked([unit.name for unit in self._sources()], "states")[:])

    def _pictures(self, noise: Tensor | None, latents: Tensor, images: Tensor, back: Tensor) -> dict[str, Tensor]:
        """The first pictures: noise, latent, sample, noise less latent (scaled to a std of 1), and what is sampled back."""
        from probekit.images import as_pictures

        decode = self.diffusion.decode
        shown = {"latent": as_pictures(latents[:SHOWN]), "sample": decode(images[:SHOWN]), "back": decode(back[:SHOWN])}
        if noise is not None:
            difference = (noise - latents)[:SHOWN]
            scale = difference.flatten(1).std(1).clamp_min(1e-12).view(-1, *[1] * (noise.ndim - 1))
            shown |= {"noise": as_pictures(noise[:SHOWN]), "difference": as_pictures(difference / scale)}
        return {key: picture for name, pictures in shown.items() for key, picture in numbered(name, pictures).items()}

    def findings(self, run: Run, rows: pd.DataFrame) -> Findings:
        """Which way there and back is the most faithful, and where the latents lie."""
        from probekit.report.inversion import findings

        return findings(run, rows)


@dataclass(frozen=True, eq=False)
class _Way:
    """Images, their latents, and what these lead back to."""

    images: Tensor
    latents: Tensor
    back: Tensor


def _start(unit: Unit) -> int:
    """The number of a block's first picture."""
    return int(unit.name.rpartition("-")[2])


def _rows(unit: Unit) -> slice:
    """A block's pictures."""
    return slice(_start(unit), _start(unit) + unit.size)


def _of_distribution(states: Tensor, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """How close to standard normal noise the states are: moments, Kolmogorov-Smirnov distance, correlated pixels."""
    import torch
    from scipy.stats import kstest

    from probekit.metrics import geometry

    n, flat = len(states), states.flatten().double()
    centred = flat - flat.mean()
    kurtosis = float(centred.pow(4).mean() / centred.square().mean().square() - 3)
    some = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[:100_000]]
    rows = [
        _summary("std of values", _std(states), float("nan"), n),
        _summary("excess kurtosis", kurtosis, float("nan"), n),
        _summary("distance to normal (KS)", float(kstest(some.numpy(), "norm").statistic), float("nan"), n),
    ]
    if len(shape) == 3:
        rows.append(_summary("top-10 correlation", *geometry.top_correlations(states), n))
        if shape[1] % 8 == 0 and shape[2] % 8 == 0:
            rows.append(_summary("top-20 correlation, patches", *geometry.top_correlations(states, k=20, patch=8), n))
    return rows


def _std(states: Tensor) -> float:
    return float(states.flatten().double().std())


def _top(states: Tensor) -> float:
    from probekit.metrics import geometry

    return geometry.top_correlations(states)[0]


_WHOLE: dict[str, Callable[[Tensor], float]] = {"std of values": _std, "top-10 correlation": _top}
"""Measures of all latents together whose distance to what is predicted gets an interval."""


def _difference(of: Callable[[Tensor], float], a: Tensor, b: Tensor) -> Callable[[np.ndarray], float]:
    """By how much more rows of a measure than the same rows of b."""
    return lambda rows: of(a[rows]) - of(b[rows])


def _rms(error: Tensor) -> Tensor:
    return error.flatten(1).square().mean(1).sqrt()


def _beside(predicted: list[float]) -> dict[str, float]:
    """What the data's second moments predict, and the images' own."""
    return dict(zip(("predicted", "predicted_of_samples"), predicted, strict=False))


def _summary(measure: str, value: float, std: float, n: int) -> dict[str, Any]:
    return {"measure": measure, "value": value, "std": std, "low": float("nan"), "high": float("nan"), "n": n}

"""Inversion: from samples or images to latents and back, and where these latents lie (Hidden Relations)."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from probekit.experiments.denoising import (
    MODEL,
    BatchSize,
    Denoising,
    Dtype,
    Guidance,
    Label,
    ModelName,
    Prompt,
    as_picture,
    load,
    samples,
)
from probekit.experiments.places import Device, Out, Seed, progress

from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

    from probekit.data.dataset import Dataset
    from probekit.runs import Run
    from probekit.sampling import Denoiser

app = typer.Typer(help="From images to latents and back, and where the latents lie.", no_args_is_help=True)

SHOWN = 6
"""Pictures that are kept as pictures."""
POINTS = 25
"""Points between noise and latent, as in the reference."""
KEPT = 2**27
"""Numbers of all steps' states that are kept at a time: 512 MiB."""

METHODS = "plain,fixed-point,renoised,edict"
Methods = Annotated[str, typer.Option(help="Inversions, separated by commas: plain, fixed-point, renoised, edict.")]
Renoised = Annotated[
    int | None, typer.Option(min=0, help="Steps that renoised replaces by fresh noise. [default: a twentieth, one at least]")
]
Steps = Annotated[int, typer.Option(min=1, help="Steps of sampling and of inversion.")]
Source = Annotated[str | None, typer.Option("--data", help="Invert these images instead of samples: avatars, celeba:PATH, …")]
Split = Annotated[str, typer.Option(help="Which of the data's images: train or test.")]


@app.command()
def run(
    model: ModelName = MODEL,
    methods: Methods = METHODS,
    steps: Steps = 50,
    renoised: Renoised = None,
    n: Annotated[int, typer.Option("--n", min=20, help="How many pictures; correlations depend on it.")] = 128,
    data: Source = None,
    split: Split = "test",
    prompt: Prompt = None,
    label: Label = None,
    guidance: Guidance = 1.0,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
) -> None:
    """Invert by every method, sample back, and measure the latents: how they differ from noise, and where they lie."""
    from probekit.runs import Run, default_folder

    chosen = _methods(methods)
    denoising = load(model, device, dtype, prompt, label, guidance, batch_size)
    denoising.diffusion.schedule(steps)  # refuses what is no schedule before anything is written
    dataset, of_data = _images_of(denoising, data, split, n)
    fresh = _renoised(renoised, steps)
    options = denoising.options | {"methods": chosen, "steps": steps, "renoised": fresh, "n": n, "seed": seed} | of_data
    opened = Run(out or default_folder("invert-run", Path(model).name, options), "invert-run", options, sys.argv)
    rows = _invert_all(opened, denoising, chosen, dataset)
    show(opened.folder, opened.config | {"command": sys.argv}, rows)


@app.command()
def trajectory(
    model: ModelName = MODEL,
    method: Annotated[str, typer.Option(help="The latent's: plain, fixed-point, renoised or edict.")] = "plain",
    steps: Steps = 100,
    renoised: Renoised = None,
    n: Annotated[int, typer.Option("--n", min=2, help="How many samples.")] = 64,
    prompt: Prompt = None,
    label: Label = None,
    guidance: Guidance = 1.0,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
) -> None:
    """How far every step of sampling is from every point on the way from noise to latent (figure 5)."""
    from probekit.runs import Run, default_folder

    if len(chosen := _methods(method)) != 1:
        raise ProbekitError(f"--method {method!r}: one inversion at a time")
    denoising = load(model, device, dtype, prompt, label, guidance, batch_size)
    denoising.diffusion.schedule(steps)
    fresh = _renoised(renoised, steps)
    options = denoising.options | {"method": chosen[0], "steps": steps, "renoised": fresh, "n": n, "seed": seed}
    folder = out or default_folder("invert-trajectory", Path(model).name, options)
    opened = Run(folder, "invert-trajectory", options, sys.argv)
    rows = _follow(opened, denoising)
    show_trajectory(opened.folder, opened.config | {"command": sys.argv}, rows)


@app.command()
def interpolate(
    model: ModelName = MODEL,
    methods: Methods = METHODS,
    steps: Steps = 50,
    renoised: Renoised = None,
    data: Annotated[str, typer.Option(help="Where the two images are from: avatars, celeba:PATH, folder:PATH.")] = "avatars",
    split: Split = "test",
    pictures: Annotated[str, typer.Option(help="The two images' numbers in the split.")] = "0,1",
    frames: Annotated[int, typer.Option(min=3, help="Pictures from the one to the other, both included.")] = 9,
    prompt: Prompt = None,
    label: Label = None,
    guidance: Guidance = 1.0,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
) -> None:
    """Two images become each other, along the great circle between their latents, by every inversion."""
    from probekit.data import load as load_data
    from probekit.runs import Run, default_folder

    chosen = _methods(methods)
    denoising = load(model, device, dtype, prompt, label, guidance, batch_size)
    diffusion = denoising.diffusion
    diffusion.schedule(steps)
    images = load_data(data, diffusion.image_size)
    there = images.split(split)
    numbers = [int(part) if part.strip().isdecimal() else -1 for part in pictures.split(",")]
    if len(numbers) != 2 or not all(0 <= number < len(there) for number in numbers):
        raise ProbekitError(f"--pictures {pictures!r}: write two numbers from 0 to {len(there) - 1}, as 0,1")
    options = denoising.options | {
        "methods": chosen, "steps": steps, "renoised": _renoised(renoised, steps), "data": data,
        "data_digest": images.digest, "split": split, "pictures": numbers, "frames": frames, "seed": seed,
    }  # fmt: skip
    folder = out or default_folder("invert-interpolate", Path(model).name, options)
    opened = Run(folder, "invert-interpolate", options, sys.argv)
    rows = _interpolate_all(opened, denoising, chosen, images.images(there[numbers]))
    show_interpolation(opened.folder, opened.config | {"command": sys.argv}, rows)


def _methods(text: str) -> list[str]:
    """`--methods` as names. Raises ProbekitError for what is none."""
    from probekit.sampling.inversions import INVERSIONS

    chosen = [part.strip() for part in text.split(",")]
    if wrong := [name for name in chosen if name not in INVERSIONS]:
        raise ProbekitError(f"inversion {wrong[0]!r}: choose {', '.join(INVERSIONS)}")
    return list(dict.fromkeys(chosen))


def _renoised(count: int | None, steps: int) -> int:
    """`--renoised` as a number of steps. Raises ProbekitError for more than there are."""
    count = max(1, round(0.05 * steps)) if count is None else count
    if count > steps:
        raise ProbekitError(f"--renoised {count}: there are {steps} steps")
    return count


def _images_of(denoising: Denoising, data: str | None, split: str, n: int) -> tuple[Dataset | None, dict[str, Any]]:
    """The data set whose images are inverted, and the options that name it. Raises ProbekitError where there are too few."""
    from probekit.data import load as load_data

    if data is None:
        return None, {"data": None}
    images = load_data(data, denoising.diffusion.image_size)
    if (there := len(images.split(split))) < n:
        raise ProbekitError(f"--n {n}: the {split} split of {data!r} has {there} images")
    return images, {"data": data, "data_digest": images.digest, "split": split}


# --- run ---------------------------------------------------------------------------------------------------------------


def _invert_all(opened: Run, denoising: Denoising, methods: list[str], dataset: Dataset | None) -> pd.DataFrame:
    """What is to be inverted, then every method that is not finished; then all rows."""
    import torch

    options = opened.config["options"]
    n, steps = options["n"], options["steps"]
    with progress("inverting", n * (1 + len(methods))) as advance:
        images = _to_invert(opened, denoising, dataset, advance)
        for method in methods:
            if opened.finished(method):
                advance(n)
            else:
                there_and_back = _there_and_back(opened, denoising, method, images, advance)
                latents, back, calls = (torch.from_numpy(part) for part in there_and_back)
                noise = denoising.diffusion.noise(range(n), options["seed"]) if dataset is None else None
                _measure(opened, denoising, method, noise, latents, torch.from_numpy(images[:]), back, calls)
        reference = "noise and sample"
        if not opened.finished(reference):
            _measure_ends(opened, denoising, reference, torch.from_numpy(images[:]), n, steps)
    return opened.collect([reference, *methods])


def _to_invert(opened: Run, denoising: Denoising, dataset: Dataset | None, advance: Any) -> np.ndarray:
    """Noiseless states: samples from numbered noises, or the images of `--data`."""
    options, diffusion = opened.config["options"], denoising.diffusion
    if dataset is None:
        steps = options["steps"]
        return samples(opened, f"samples-{steps}", denoising, steps, options["n"], options["seed"], advance)
    numbers = dataset.split(options["split"])[: options["n"]]

    def make(rows: range) -> Tensor:
        return diffusion.encode(dataset.images(numbers[rows.start : rows.stop]))

    return opened.states("images", options["n"], diffusion.shape, make, advance)


def _there_and_back(
    opened: Run, denoising: Denoising, method: str, images: np.ndarray, advance: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents and what is sampled back from them, (n, *shape), and the network's calls for each row, there."""
    import torch

    from probekit.sampling.inversions import INVERSIONS

    options, diffusion, inversion = opened.config["options"], denoising.diffusion, INVERSIONS[method]
    schedule = diffusion.schedule(options["steps"])
    size = torch.Size(diffusion.shape).numel()

    def make(rows: range) -> Tensor:
        def way(denoiser: Denoiser, both: Tensor) -> Tensor:
            there = inversion.invert(denoiser, both[:, 0], schedule, both[:, 1], options["renoised"])
            back = inversion.back(denoiser, there.end, schedule).end
            latent, back = (states[:, 0] if inversion.pairs else states for states in (there.end, back))
            calls = torch.full((len(both), 1), float(there.calls))
            return torch.cat([latent.flatten(1).float(), back.flatten(1).float(), calls], 1)

        fresh = diffusion.fresh_noise(rows, options["seed"])
        return denoising.walk(torch.stack([torch.from_numpy(images[rows.start : rows.stop]), fresh], 1), way)

    whole = opened.states(f"{method}-{options['steps']}", options["n"], (2 * size + 1,), make, advance)
    latents, back = (whole[:, i * size : (i + 1) * size].reshape(-1, *diffusion.shape) for i in (0, 1))
    return latents, back, whole[:, -1]


def _measure(
    opened: Run, denoising: Denoising, method: str, noise: Tensor | None, latents: Tensor, images: Tensor, back: Tensor,
    calls: Tensor,
) -> None:  # fmt: skip
    """All measures of one method's latents, as rows; pictures of the first."""
    import pandas as pd
    import torch
    import torch.nn.functional as F

    from probekit.metrics import geometry
    from probekit.metrics.distributions import bootstrap

    seed, diffusion = opened.config["options"]["seed"], denoising.diffusion
    rows: list[dict[str, Any]] = []

    def of_each(measure: str, values: Tensor) -> None:
        known = values[torch.isfinite(values)].double()
        value, low, high = bootstrap(known.numpy(), seed=seed) if len(known) else (float("nan"),) * 3
        std = float(known.std()) if len(known) > 1 else float("nan")
        rows.append({"measure": measure, "value": value, "std": std, "low": low, "high": high, "n": len(known)})

    of_each("round-trip error", (back - images).flatten(1).square().mean(1).sqrt())
    of_each("network calls", calls)
    rows += _of_distribution(latents, diffusion.shape)
    if noise is not None:
        of_each("error to the noise", (latents - noise).flatten(1).square().mean(1).sqrt())
        for measure, pair in geometry.distances(noise, latents, images).items():
            rows.append(_summary(f"distance {measure}", *pair, len(images)))
        for corner, pair in geometry.angles(noise, latents, images).items():
            rows.append(_summary(f"angle at {corner}", *pair, len(images)))
        if len(diffusion.shape) == 3:
            pictures = F.interpolate(diffusion.decode(images), diffusion.shape[1:], mode="area")
            plain, textured = geometry.plain_and_textured(latents - noise, pictures)
            of_each("error to the noise, plain areas", plain)
            of_each("error to the noise, textured areas", textured)
    frame = pd.DataFrame(rows)
    frame.insert(0, "method", method)
    opened.write(method, frame, _pictures(denoising, noise, latents, images, back))


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
        _summary("std of values", float(flat.std()), float("nan"), n),
        _summary("excess kurtosis", kurtosis, float("nan"), n),
        _summary("distance to normal (KS)", float(kstest(some.numpy(), "norm").statistic), float("nan"), n),
    ]
    if len(shape) == 3:
        rows.append(_summary("top-10 correlation", *geometry.top_correlations(states), n))
        if shape[1] % 8 == 0 and shape[2] % 8 == 0:
            rows.append(_summary("top-20 correlation, patches", *geometry.top_correlations(states, k=20, patch=8), n))
    return rows


def _measure_ends(opened: Run, denoising: Denoising, unit: str, images: Tensor, n: int, steps: int) -> None:
    """What noise and images themselves measure, and what white noise is expected to."""
    import pandas as pd

    from probekit.metrics import geometry

    options, shape = opened.config["options"], denoising.diffusion.shape
    frames = []
    for name, states in (("noise", denoising.diffusion.noise(range(n), options["seed"])), ("sample", images)):
        frame = pd.DataFrame(_of_distribution(states, shape))
        frame.insert(0, "method", name)
        frames.append(frame)
    if len(shape) == 3:
        channels, height, width = shape
        expected = [_summary("top-10 correlation", geometry.noise_correlation(n, channels * height * width), float("nan"), n)]
        if height % 8 == 0 and width % 8 == 0:
            value = geometry.noise_correlation(n, channels * 64, 20)
            expected.append(_summary("top-20 correlation, patches", value, float("nan"), n))
        frame = pd.DataFrame(expected)
        frame.insert(0, "method", "white noise, expected")
        frames.append(frame)
    opened.write(unit, pd.concat(frames, ignore_index=True), {})


def _summary(measure: str, value: float, std: float, n: int) -> dict[str, Any]:
    return {"measure": measure, "value": value, "std": std, "low": float("nan"), "high": float("nan"), "n": n}


def _pictures(denoising: Denoising, noise: Tensor | None, latents: Tensor, images: Tensor, back: Tensor) -> dict[str, Tensor]:
    """The first pictures: noise, latent, sample, noise less latent (scaled to a std of 1), and what is sampled back."""
    shown = {"latent": as_picture(latents[:SHOWN]), "sample": denoising.diffusion.decode(images[:SHOWN])}
    shown["back"] = denoising.diffusion.decode(back[:SHOWN])
    if noise is not None:
        difference = (noise - latents)[:SHOWN]
        scale = difference.flatten(1).std(1).clamp_min(1e-12).view(-1, *[1] * (noise.ndim - 1))
        shown |= {"noise": as_picture(noise[:SHOWN]), "difference": as_picture(difference / scale)}
    return {f"{name}-{i}": picture for name, pictures in shown.items() for i, picture in enumerate(pictures)}


def show(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> None:
    """Write the report of a finished `run` and print its result."""
    from probekit.report.inversion import print_measures, write_report
    from probekit.runs import writing

    with writing(folder):
        report = write_report(folder, config, rows)
    print_measures(rows)
    typer.echo(f"\nreport: {report}")


# --- trajectory --------------------------------------------------------------------------------------------------------


def _follow(opened: Run, denoising: Denoising) -> pd.DataFrame:
    """Distances of every block of samples; then their mean over all."""
    from probekit.runs import BLOCK

    n = opened.config["options"]["n"]
    blocks = {f"block-{start:06d}": range(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)}
    with progress("following", n) as advance:
        for unit, rows in blocks.items():
            if opened.finished(unit):
                advance(len(rows))
            else:
                _follow_block(opened, denoising, unit, rows, advance)
    return opened.collect(list(blocks))


def _follow_block(opened: Run, denoising: Denoising, unit: str, rows: range, advance: Callable[[int], None]) -> None:
    """Mean distances of a block of samples, as its unit; the first block's pictures."""
    import numpy as np
    import pandas as pd
    import torch

    from probekit.metrics.geometry import interpolation_distances
    from probekit.sampling import sample
    from probekit.sampling.inversions import INVERSIONS

    options, diffusion = opened.config["options"], denoising.diffusion
    schedule, inversion, seed = diffusion.schedule(options["steps"]), INVERSIONS[options["method"]], options["seed"]
    count = len(schedule) + 1
    most = max(1, KEPT // (count * math.prod(diffusion.shape)))
    distances = torch.zeros(count, POINTS, dtype=torch.float64)
    pictures: dict[str, Tensor] = {}
    size = min(denoising.batch_size, most)
    for numbers in (rows[start : start + size] for start in range(0, len(rows), size)):
        denoiser, noise = diffusion.denoiser(len(numbers)), diffusion.noise(numbers, seed)
        walked = sample(denoiser, noise, schedule, keep=range(count))
        fresh = diffusion.fresh_noise(numbers, seed)
        latents = inversion.invert(denoiser, walked.end, schedule, fresh, options["renoised"]).end.cpu()
        latents = latents[:, 0].float() if inversion.pairs else latents
        states = [walked.kept[i] for i in range(count)]
        distances += interpolation_distances(states, noise, latents, POINTS) * len(numbers) / len(rows)
        shown = {"noise": as_picture(noise), "latent": as_picture(latents), "sample": diffusion.decode(walked.end)}
        pictures |= {f"{k}-{i}": shown[k][i - numbers.start] for k in shown for i in numbers if i < SHOWN}
        advance(len(numbers))
    frame = pd.DataFrame(
        {"step": np.repeat(np.arange(count), POINTS), "point": np.tile(np.linspace(0, 1, POINTS), count),
         "distance": distances.numpy().ravel(), "n": len(rows)}
    )  # fmt: skip
    opened.write(unit, frame, pictures)


def show_trajectory(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> None:
    """Write the report of a finished `trajectory` and print its result."""
    from probekit.report.inversion import print_passing, write_trajectory_report
    from probekit.runs import writing

    with writing(folder):
        report = write_trajectory_report(folder, config, rows)
    print_passing(rows)
    typer.echo(f"\nreport: {report}")


# --- interpolate -------------------------------------------------------------------------------------------------------


def slerp(a: Tensor, b: Tensor, fractions: Tensor) -> Tensor:
    """Points on the great circle from a to b, whole tensors of one shape each (Shoemake 1985), (len(fractions), *shape).

    Nearly parallel ones are joined by a straight line. A normal latent keeps its norm along the way.
    """
    import torch

    angle = torch.acos(torch.clamp((a * b).sum() / (a.norm() * b.norm()), -1, 1))
    weights = fractions.view(-1, *[1] * a.ndim)
    if angle < 1e-4:
        return (1 - weights) * a + weights * b
    return (torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b) / torch.sin(angle)


def _interpolate_all(opened: Run, denoising: Denoising, methods: list[str], images: Tensor) -> pd.DataFrame:
    """The frames of every method that is not finished, and how evenly they change; then all rows."""
    import pandas as pd

    from probekit.metrics import lpips

    states = denoising.diffusion.encode(images)
    with progress("interpolating", len(methods)) as advance:
        for method in methods:
            if not opened.finished(method):
                frames = _frames(denoising, method, states, opened.config["options"])
                change = lpips.distances(frames[:-1], frames[1:])
                error = (frames[[0, -1]] - images).flatten(1).square().mean(1).sqrt()
                frame = pd.DataFrame(
                    {"method": method, "frame": range(1, len(frames)), "lpips": change.numpy(),
                     "end_error": float(error.max())}
                )  # fmt: skip
                pictures = {f"frame-{i}": picture for i, picture in enumerate(frames)}
                opened.write(method, frame, pictures | {"from": images[0], "to": images[1]})
            advance(1)
    return opened.collect(methods)


def _frames(denoising: Denoising, method: str, states: Tensor, options: dict[str, Any]) -> Tensor:
    """What is sampled from the great circle between the latents of two states, as images (frames, 3, h, w)."""
    import torch

    from probekit.sampling.inversions import INVERSIONS

    diffusion, inversion = denoising.diffusion, INVERSIONS[method]
    schedule, fresh = diffusion.schedule(options["steps"]), diffusion.fresh_noise(range(2), options["seed"])
    ends = inversion.invert(diffusion.denoiser(2), states, schedule, fresh, options["renoised"]).end.double()
    # the two states of a pair each on a circle of their own
    parts = ends.unbind(1) if inversion.pairs else [ends]
    fractions = torch.linspace(0, 1, options["frames"], dtype=torch.float64)
    path = torch.stack([slerp(part[0], part[1], fractions) for part in parts], 1)
    path = path if inversion.pairs else path[:, 0]
    made = denoising.walk(path, lambda denoiser, part: inversion.back(denoiser, part, schedule).end)
    return diffusion.decode((made[:, 0] if inversion.pairs else made).float())


def show_interpolation(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> None:
    """Write the report of a finished `interpolate` and print its result."""
    from probekit.report.inversion import print_changes, write_interpolation_report
    from probekit.runs import writing

    with writing(folder):
        report = write_interpolation_report(folder, config, rows)
    print_changes(rows)
    typer.echo(f"\nreport: {report}")

"""Noise map: which noise belongs to which sample, by L2 alone (Hidden Relations, "Noise-to-Sample mapping")."""

from __future__ import annotations

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
    step_counts,
)
from probekit.experiments.places import Device, Out, Seed, progress

from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch
    from torch import Tensor

    from probekit.runs import Run

app = typer.Typer(help="Which noise belongs to which sample, by L2.", no_args_is_help=True)

EXAMPLES = 6
"""Samples that are drawn with their nearest noise, and noises whose nearest sample is another's."""


@app.callback()
def root() -> None:
    """Which noise belongs to which sample, by L2."""


@app.command()
def run(
    model: ModelName = MODEL,
    steps: Annotated[str, typer.Option(help="Numbers of sampling steps, separated by commas.")] = "10,100",
    n: Annotated[int, typer.Option("--n", help="Noises, and as many samples, to find each other among.")] = 512,
    splits: Annotated[
        int, typer.Option(help="Parts of the n over which the std is taken; the candidates are always all n.")
    ] = 8,
    prompt: Prompt = None,
    label: Label = None,
    guidance: Guidance = 1.0,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
) -> None:
    """Sample from numbered noises, then find each sample's noise and each noise's sample as the nearest by L2."""
    from probekit.runs import Run, default_folder

    counts = step_counts(steps)
    if splits < 2:
        raise ProbekitError(f"--splits {splits}: at least 2, a std is taken over them")
    if n < 2 * splits:
        raise ProbekitError(f"--n {n}: at least {2 * splits}, two for each of the {splits} --splits")
    denoising = load(model, device, dtype, prompt, label, guidance, batch_size)
    diffusion = denoising.diffusion
    prediction, *_ = [diffusion.schedule(count).prediction for count in counts]  # of all: refuses what is too many
    pixels = diffusion.shape == (3, diffusion.image_size, diffusion.image_size)
    options: dict[str, Any] = denoising.options | {
        "prediction": prediction, "space": "pixels" if pixels else "latents", "shape": list(diffusion.shape), "steps": counts,
        "n": n, "splits": splits, "seed": seed,
    }  # fmt: skip
    folder = out or default_folder("noise-map-run", Path(model).name, options)
    opened = Run(folder, "noise-map-run", options, sys.argv)
    rows = match_all(opened, denoising, device)
    show(folder, opened.config | {"command": sys.argv}, rows)


def match_all(opened: Run, denoising: Denoising, device: str) -> pd.DataFrame:
    """Sample and match for every number of steps that is not finished; then all rows."""
    from probekit.models.text_to_image import choose_device
    from probekit.report.noise_map import unit

    options = opened.config["options"]
    n, seed, diffusion = options["n"], options["seed"], denoising.diffusion
    waiting = [steps for steps in options["steps"] if not opened.finished(unit(steps))]
    if waiting:
        with progress("drawing noise", n) as advance:
            noise = opened.states("noise", n, diffusion.shape, lambda rows: diffusion.noise(rows, seed), advance)
    for steps in waiting:
        with progress(f"sampling in {steps} steps", n) as advance:
            sampled = samples(opened, f"samples-{steps}", denoising, steps, n, seed, advance)
        with progress(f"matching at {steps} steps", 2 * n) as advance:
            _match(opened, denoising, steps, noise, sampled, choose_device(device), advance)
    return opened.collect([unit(steps) for steps in options["steps"]])


def _match(
    opened: Run, denoising: Denoising, steps: int, noise: np.ndarray, sampled: np.ndarray, device: torch.device,
    on_rows: Callable[[int], None],
) -> None:  # fmt: skip
    """Both directions for one number of steps, written as its unit: a row each, and pictures.

    accuracy: the percent of rows whose nearest of all n candidates is their own partner; low, high: its 95% Wilson interval;
    std: that of `splits` parts' accuracies; chance: 100 / n. wrong: how many rows have another nearest; named: how many
    different candidates these name. own, other: mean L2 distance of the first 256 rows to their partner and to the nearest
    of all others.
    """
    import pandas as pd
    import torch

    from probekit.metrics import geometry
    from probekit.metrics.distributions import share_interval
    from probekit.report.noise_map import TO_NOISE, TO_SAMPLE, unit

    n = len(noise)
    rows, found = [], {}
    for direction, queries, candidates in ((TO_NOISE, sampled, noise), (TO_SAMPLE, noise, sampled)):
        found[direction] = answers = geometry.nearest(queries, candidates, device=device, on_rows=on_rows)
        accuracy, std = geometry.matching_accuracy(answers, opened.config["options"]["splits"])
        wrong = answers != torch.arange(n)
        low, high = share_interval(n - int(wrong.sum()), n)
        own, other = geometry.margin(queries, candidates)
        rows.append({"steps": steps, "direction": direction, "accuracy": 100 * accuracy, "std": 100 * std, "low": 100 * low,
                     "high": 100 * high, "n": n, "chance": 100 / n, "wrong": int(wrong.sum()),
                     "named": len(set(answers[wrong].tolist())), "own": own, "other": other})  # fmt: skip
    pictures = _pictures(denoising, noise, sampled, found[TO_NOISE].tolist(), found[TO_SAMPLE].tolist())
    opened.write(unit(steps), pd.DataFrame(rows), pictures)


def _pictures(
    denoising: Denoising, noise: np.ndarray, sampled: np.ndarray, of_samples: list[int], of_noises: list[int]
) -> dict[str, Tensor]:
    """The first samples with their own and their nearest noise, and the first noises whose nearest sample is not their own.

    Named found-ROW-ANSWER-PART and missed-ROW-ANSWER-PART.
    """
    import numpy as np
    import torch

    def image(row: int) -> Tensor:
        return denoising.diffusion.decode(torch.from_numpy(np.array(sampled[row]))[None])[0]

    def drawn(row: int) -> Tensor:
        return as_picture(torch.from_numpy(np.array(noise[row]))[None])[0]

    pictures: dict[str, Tensor] = {}
    for row, answer in list(enumerate(of_samples))[:EXAMPLES]:
        parts = {"sample": image(row), "own": drawn(row), "nearest": drawn(answer)}
        pictures |= {f"found-{row}-{answer}-{part}": picture for part, picture in parts.items()}
    for row, answer in [(row, answer) for row, answer in enumerate(of_noises) if row != answer][:EXAMPLES]:
        parts = {"noise": drawn(row), "own": image(row), "nearest": image(answer)}
        pictures |= {f"missed-{row}-{answer}-{part}": picture for part, picture in parts.items()}
    return pictures


def show(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> None:
    """Write the report of a finished run and print its result."""
    from probekit.report.noise_map import print_matches, write_report
    from probekit.runs import writing

    with writing(folder):
        report = write_report(folder, config, rows)
    print_matches(config, rows)
    typer.echo(f"\nreport: {report}")

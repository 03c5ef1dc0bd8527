"""Dynamics: how early in a training a model's latent space, or what it makes of noise, stands.

`flow` is All Roads, section 4.3; `diffusion` is Hidden Relations, figure 6, right.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from probekit.experiments.denoising import MODEL, BatchSize, Denoising, samples
from probekit.experiments.places import Codes, Data, Device, Out, Place, Seed, Train, encode_all, image_sets, progress

from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

    from probekit.models import Model
    from probekit.runs import Run

app = typer.Typer(help="How latent spaces form while a model is trained.", no_args_is_help=True)

Training = Annotated[str, typer.Option("--model", help="A bundled model, or a folder with step-<n> folders or files in it.")]

EXAMPLES = 8
"""Noises whose pictures are kept as pictures."""
NEIGHBOURS = 50
"""The paper's, of 2,048 samples; of n samples at most n // 10."""


@app.callback()
def root() -> None:
    """How latent spaces form while a model is trained."""


@app.command()
def flow(
    model: Training = "avatar-flow",
    space: Annotated[str | None, typer.Option(help="Which of its spaces. [default: its first]")] = None,
    data: Data = "avatars",
    train: Train = 9000,
    kind: Annotated[str, typer.Option(help="lasso (the paper's), ridge or logistic.")] = "lasso",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Fit probes in the space of every checkpoint of a training, and see when they have become as good as at its end."""
    from probekit.latents.probes import KINDS
    from probekit.runs import Run, default_folder

    if kind not in KINDS:
        raise ProbekitError(f"--kind {kind!r}: choose {', '.join(KINDS)}")
    places = checkpoints(model, space, device)
    (codes,) = image_sets(list(places.values()), data, train, 0, seed, samples=False).values()
    options: dict[str, Any] = {
        "model": model, "checkpoints": {str(step): p.model.digest for step, p in places.items()},
        "space": next(iter(places.values())).space.name, "data": data, "data_digest": codes.data.digest, "train": train,
        "kind": kind, "seed": seed,
    }  # fmt: skip
    folder = out or default_folder("dynamics-flow", Path(model).name, options)
    opened = Run(folder, "dynamics-flow", options, sys.argv)
    rows = probe_checkpoints(opened, places, codes)
    show(folder, opened.config | {"command": sys.argv}, rows)


@app.command()
def diffusion(
    model: Training = MODEL,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 50,
    n: Annotated[int, typer.Option(min=16, help="How many noises, the same for every checkpoint.")] = 256,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Sample the same noises with every checkpoint of a training, and see when they become what they are at its end."""
    from probekit.models.text_to_image import choose_device
    from probekit.runs import Run, default_folder

    paths = checkpoint_paths(model)
    digests = sampling_checkpoints(model, paths, steps)
    choose_device(device)  # refuses what is not there
    options: dict[str, Any] = {
        "model": model, "checkpoints": {str(step): digest for step, digest in digests.items()}, "steps": steps, "n": n,
        "neighbours": min(NEIGHBOURS, n // 10), "seed": seed,
    }  # fmt: skip
    folder = out or default_folder("dynamics-diffusion", Path(model).name, options)
    opened = Run(folder, "dynamics-diffusion", options, sys.argv)
    rows = sample_checkpoints(opened, paths, device, batch_size)
    show_diffusion(folder, opened.config | {"command": sys.argv}, rows)


def checkpoint_paths(model: str) -> dict[int, Path]:
    """The checkpoints of a training by their number of steps, the finished model, where there is one, as the last.

    They are what is called step-<n> in the model's folder. Raises ProbekitError where there are fewer than two.
    """
    from probekit.bundled import MODELS, trained, weights

    folder = weights(model) if model in MODELS else Path(model).expanduser()
    paths = sorted(folder.glob("step-*"))  # the same order everywhere
    found = {int(match[1]): path for path in paths if (match := re.match(r"step-(\d+)", path.name))}
    if model in MODELS and found and trained(model):
        from probekit.zoo.avatar_families import FAMILIES

        found[FAMILIES[model].schedule.steps] = folder
    if len(found) < 2:
        raise ProbekitError(f"--model {model!r}: {len(found)} checkpoints step-<n> in {str(folder)!r}, at least 2 are needed")
    return dict(sorted(found.items()))


def load_checkpoint(model: str, path: Path, device: str) -> Model:
    """One of them. Raises ProbekitError for a text-to-image pipeline."""
    from probekit.models import Model, load

    loaded = load(path, device=device)
    if not isinstance(loaded, Model):
        raise ProbekitError(f"--model {model!r}: {path.name} is a text-to-image pipeline, which has no latent spaces yet")
    return loaded


def checkpoints(model: str, space: str | None, device: str) -> dict[int, Place]:
    """Every checkpoint's latent space. Raises ProbekitError as `checkpoint_paths`, and where one cannot be loaded."""
    loaded = {step: load_checkpoint(model, path, device) for step, path in checkpoint_paths(model).items()}
    return {step: Place(f"step {step}", made, made.space(space)) for step, made in loaded.items()}


def probe_checkpoints(opened: Run, places: dict[int, Place], codes: Codes) -> pd.DataFrame:
    """Probes of every checkpoint that is not finished; then all rows."""
    import pandas as pd

    from probekit.latents.probes import DEFAULT_LASSO_ALPHA, LASSO_ALPHA, fit_probes
    from probekit.metrics.distributions import share_interval

    options = opened.config["options"]
    labels = codes.data.labels(codes.train)
    binary = labels[[name for name in labels if labels[name].dtype == bool]]
    if binary.shape[1] == 0:
        raise ProbekitError(f"--data {options['data']!r}: has no binary labels to probe for")
    waiting = {step: place for step, place in places.items() if not opened.finished(f"step-{step:09d}")}
    encode_all([(place, codes) for place in waiting.values()])
    done = len(places) - len(waiting)
    with progress("probing", len(places) * binary.shape[1], done=done * binary.shape[1]) as advance:
        for step, place in waiting.items():
            weight = LASSO_ALPHA.get(place.model.family, DEFAULT_LASSO_ALPHA) if options["kind"] == "lasso" else 1.0
            fitted = fit_probes(
                codes.of(place, "train"), binary, options["kind"], weight, options["seed"], on_probe=lambda name: advance(1)
            )
            rows = []
            for row in fitted.scores.itertuples():
                low, high = share_interval(round(row.accuracy * row.test), row.test)
                rows.append({"step": step, "attribute": row.attribute, "accuracy": 100 * row.accuracy,
                             "low": 100 * low, "high": 100 * high, "n": row.test})  # fmt: skip
            columns = ["step", "attribute", "accuracy", "low", "high", "n"]
            opened.write(f"step-{step:09d}", pd.DataFrame(rows, columns=columns), {})
    found = opened.collect([f"step-{step:09d}" for step in places])
    if found.empty:
        raise ProbekitError(f"--train {options['train']}: too few images with, or without, any of the attributes")
    return found


def sampling_checkpoints(model: str, paths: dict[int, Path], steps: int) -> dict[int, str]:
    """The fingerprint of every checkpoint; they are loaded one at a time.

    Raises ProbekitError where one is no diffusion model, has fewer timesteps than `steps`, or has other shapes than the last.
    """
    digests, kinds = {}, {}
    for step, path in paths.items():
        loaded = load_checkpoint(model, path, "cpu")
        if loaded.diffusion is None:
            raise ProbekitError(
                f"--model {model!r}: {path.name} is a {loaded.family}, which makes no images from noise step by step"
            )
        loaded.diffusion.schedule(steps)  # refuses too many
        sides = "x".join(map(str, loaded.diffusion.shape))
        digests[step], kinds[step] = loaded.digest, f"has states {sides} and images of {loaded.diffusion.image_size} pixels"
    *_, last = kinds
    if other := [step for step in kinds if kinds[step] != kinds[last]]:
        said = ", ".join(f"step {step} {kinds[step]}" for step in (other[0], last))
        raise ProbekitError(f"--model {model!r}: its checkpoints make no series ({said})")
    return digests


def sample_checkpoints(opened: Run, paths: dict[int, Path], device: str, batch_size: int) -> pd.DataFrame:
    """The measures of every checkpoint that is not finished; then all rows.

    The last one is sampled first, as all are compared with it, and one is loaded at a time. Samples are kept in
    states/step-<n>.npy.
    """
    import torch

    model, n, seed, steps, k = (opened.config["options"][name] for name in ("model", "n", "seed", "steps", "neighbours"))
    *_, last = paths
    units = {step: f"step-{step:09d}" for step in paths}
    waiting = [step for step in paths if not opened.finished(units[step])]
    if not waiting:
        return opened.collect(list(units.values()))
    with progress("sampling", len(paths) * n, done=(len(paths) - len({last, *waiting})) * n) as advance:

        def sampled(step: int) -> tuple[Tensor, Tensor, Tensor]:
            diffusion = load_checkpoint(model, paths[step], device).diffusion
            assert diffusion is not None
            denoising = Denoising(diffusion, {}, batch_size)
            states = torch.from_numpy(samples(opened, units[step], denoising, steps, n, seed, advance))
            return diffusion.noise(range(n), seed), states, diffusion.decode(states)

        final = sampled(last)
        for step in waiting:
            noise, states, pictures = final if step == last else sampled(step)
            rows = mapping(noise, states) + alike(states, final[1], k) + alike_pictures(pictures, final[2], seed)
            opened.write(units[step], _table(step, rows), {str(i): pictures[i] for i in range(EXAMPLES)})
    return opened.collect(list(units.values()))


Measured = tuple[str, float, float, float, float, int]
"""A measure's name, value, low and high end of its 95% interval, what it is by chance, and of how many samples."""


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


def _table(step: int, rows: list[Measured]) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame(rows, columns=["measure", "value", "low", "high", "chance", "n"])
    table.insert(0, "step", step)
    return table[["step", "measure", "value", "low", "high", "n", "chance"]]


def show(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> None:
    """Write the report of a finished run and print its result."""
    from probekit.report.dynamics import print_plateaus, write_report
    from probekit.runs import writing

    with writing(folder):
        report = write_report(folder, config, rows)
    print_plateaus(rows)
    typer.echo(f"\nreport: {report}")


def show_diffusion(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> None:
    """Write the report of a finished run of `diffusion` and print its result."""
    from probekit.report.dynamics_diffusion import headline, print_standings, write_report
    from probekit.runs import writing

    with writing(folder):
        report = write_report(folder, config, rows)
    print_standings(rows)
    typer.echo(f"\n{headline(rows)}\n\nreport: {report}")

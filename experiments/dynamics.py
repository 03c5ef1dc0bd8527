"""Dynamics: how early in a training a model's latent space stands (All Roads, section 4.3)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from probekit.experiments.places import Codes, Data, Device, Out, Place, Seed, Train, encode_all, image_sets, progress

from probekit.errors import ProbekitError

if TYPE_CHECKING:
    import pandas as pd

    from probekit.runs import Run

app = typer.Typer(help="How latent spaces form while a model is trained.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """How latent spaces form while a model is trained."""


@app.command()
def flow(
    model: Annotated[
        str, typer.Option(help="A bundled model, or a folder with step-<n> folders or files in it.")
    ] = "avatar-flow",
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


def checkpoints(model: str, space: str | None, device: str) -> dict[int, Place]:
    """The checkpoints of a training by their number of steps, the finished model, where there is one, as the last.

    They are what is called step-<n> in the model's folder. Raises ProbekitError where there are fewer than two.
    """
    from probekit.models import Model, load
    from probekit.zoo import MODELS, weights

    folder = weights(model) if model in MODELS else Path(model).expanduser()
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := re.match(r"step-(\d+)", path.name))}
    places: dict[int, Place] = {}
    for step, path in sorted(found.items()):
        loaded = load(path, device=device)
        assert isinstance(loaded, Model)
        places[step] = Place(f"step {step}", loaded, loaded.space(space))
    if model in MODELS and found:
        from probekit.zoo.avatar_families import FAMILIES

        last = load(model, device=device)
        assert isinstance(last, Model)
        places[FAMILIES[model].schedule.steps] = Place("trained", last, last.space(space))
    if len(places) < 2:
        raise ProbekitError(f"--model {model!r}: {len(places)} checkpoints step-<n> in {str(folder)!r}, at least 2 are needed")
    return places


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
            opened.write(f"step-{step:09d}", pd.DataFrame(rows), {})
    return opened.collect([f"step-{step:09d}" for step in places])


def show(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> None:
    """Write the report of a finished run and print its result."""
    from probekit.report.dynamics import print_plateaus, write_report
    from probekit.runs import writing

    with writing(folder):
        report = write_report(folder, config, rows)
    print_plateaus(rows)
    typer.echo(f"\nreport: {report}")

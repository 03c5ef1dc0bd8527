"""Probing: which attributes can be read off a latent space linearly, and which survive a map from another (All Roads, 4.2)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from probekit.experiments.places import (
    Alpha,
    Codes,
    Data,
    Device,
    Models,
    Out,
    Place,
    Seed,
    Train,
    encode_all,
    image_sets,
    load_places,
    penalty,
    progress,
)  # fmt: skip

from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from probekit.latents.probes import Probes
    from probekit.runs import Run

app = typer.Typer(help="Read attributes off latent spaces with linear probes.", no_args_is_help=True)

NAN = float("nan")
MODELS = "avatar-vae,avatar-vqvae,avatar-flow,avatar-ddpm:noised,avatar-ddpm:h"
"""The paper's encoders, and beyond them the diffusion model's h-space."""


@app.command()
def run(
    models: Models = MODELS,
    data: Data = "avatars",
    train: Train = 9000,
    test: Annotated[int, typer.Option(min=2, help="Images on which probes are compared before and after a map.")] = 1000,
    kind: Annotated[str, typer.Option(help="lasso (the paper's), ridge or logistic.")] = "lasso",
    alpha: Alpha = "loo",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Fit a probe for every attribute in every space, and see how much of it a map from another space keeps."""
    from probekit.latents.probes import KINDS
    from probekit.runs import Run, default_folder

    penalty(alpha, "vae", "vae")
    if kind not in KINDS:
        raise ProbekitError(f"--kind {kind!r}: choose {', '.join(KINDS)}")
    places = load_places(models, device, baseline=True)
    (codes,) = image_sets(places, data, train, test, seed, samples=False).values()
    options: dict[str, Any] = {
        "models": {p.name: f"{p.model.family} {p.model.digest}" for p in places}, "data": data,
        "data_digest": codes.data.digest, "train": train, "test": test, "kind": kind, "alpha": alpha, "seed": seed,
    }  # fmt: skip
    folder = out or default_folder("probe-run", Path(data).name, options)
    opened = Run(folder, "probe-run", options, sys.argv)
    rows = probe_all(opened, places, codes)
    show(folder, opened.config | {"command": sys.argv}, rows)


def probe_all(opened: Run, places: list[Place], codes: Codes) -> pd.DataFrame:
    """Probes of every space, then every map between two; then all rows."""

    labels = codes.data.labels(codes.train)
    if labels.shape[1] == 0:
        raise ProbekitError(f"--data {opened.config['options']['data']!r}: has no labels to probe for")
    encode_all([(place, codes) for place in places])
    probes = {place.name: _probes(opened, place, codes, labels) for place in places}
    if not (attributes := probes[places[0].name].attributes):
        return opened.collect([_unit("probes", place) for place in places])
    own = {place.name: probes[place.name].predict(codes.of(place, "test")) for place in places}
    truth = codes.data.labels(codes.test)[attributes]
    waiting = [place for place in places if not opened.finished(_unit("maps", place))]
    with progress("mapping", len(places), done=len(places) - len(waiting)) as advance:
        for source in waiting:
            targets = [place for place in places if place is not source and place.name != "random"]
            _map(opened, source, targets, codes, probes, own, truth)
            advance(1)
    return opened.collect([_unit(what, place) for what in ("probes", "maps") for place in places])


def _unit(what: str, place: Place) -> str:
    from probekit.runs import file_name

    return file_name(f"{what}-{place.name}")


def _probes(opened: Run, place: Place, codes: Codes, labels: pd.DataFrame) -> Probes:
    """The probes of a space: those kept in the run's folder, or new ones, written there.

    Labels that are not binary are read, too, but only in their own space: those rows have the measures r2 and accuracy of
    classes, each beside its baseline.
    """
    import pandas as pd

    from probekit.latents.probes import DEFAULT_LASSO_ALPHA, LASSO_ALPHA, Probes, fit_probes, probe_values
    from probekit.metrics.distributions import share_interval

    file = opened.folder / "probes" / f"{_unit('probes', place)}.npz"
    if opened.finished(_unit("probes", place)) and file.exists():
        return Probes.load(file)
    options = opened.config["options"]
    weight = LASSO_ALPHA.get(place.model.family, DEFAULT_LASSO_ALPHA) if options["kind"] == "lasso" else 1.0
    binary, latents = labels.select_dtypes(bool), codes.of(place, "train")
    with progress(f"probing {place.name}", labels.shape[1]) as advance:
        fitted = fit_probes(latents, binary, options["kind"], weight, options["seed"], on_probe=lambda name: advance(1))
        others = labels.drop(columns=list(binary))
        read = probe_values(latents, others, seed=options["seed"], on_probe=lambda name: advance(1))
    rows: list[dict[str, Any]] = []

    def add(attribute: str, measure: str, value: float, n: int, low: float = NAN, high: float = NAN, note: str = "") -> None:
        rows.append({"source": "", "target": place.name, "attribute": attribute, "measure": measure, "value": value,
                     "low": low, "high": high, "n": n, "note": note})  # fmt: skip

    for row in fitted.scores.itertuples():
        low, high = share_interval(round(row.accuracy * row.test), row.test)
        note = "" if row.converged else "did not converge"
        add(row.attribute, "accuracy", 100 * row.accuracy, row.test, 100 * low, 100 * high, note)
        add(row.attribute, "coefficients", row.nonzero, row.train)
    for attribute, reason in fitted.skipped.items():
        add(attribute, "skipped", NAN, 0, note=reason)
    for row in read.itertuples():
        if row.skipped:
            add(row.label, "skipped", NAN, 0, note=row.skipped)
            continue
        measure, scale = ("r2", 1) if row.measure == "r2" else ("accuracy of classes", 100)
        add(row.label, measure, scale * row.score, row.test)
        add(row.label, f"{measure}, baseline", scale * row.baseline, row.test)
    fitted.save(file)
    opened.write(_unit("probes", place), pd.DataFrame(rows), {})
    return fitted


def _map(
    opened: Run, source: Place, targets: list[Place], codes: Codes, probes: dict[str, Probes],
    own: dict[str, np.ndarray], truth: pd.DataFrame,
) -> None:  # fmt: skip
    """What each target's probes say of latents mapped from the source, beside what they say of the target's own."""
    import numpy as np
    import pandas as pd

    from probekit.latents.maps import LinearMap, RidgeSolver
    from probekit.latents.probes import percent_change, percent_match
    from probekit.metrics.distributions import share_interval

    solver = RidgeSolver(codes.of(source, "train"))
    here = codes.of(source, "test")
    rows: list[dict[str, Any]] = []
    for target in targets:
        weight = penalty(opened.config["options"]["alpha"], source.model.family, target.model.family)
        mapped = LinearMap(weight).fit(solver, codes.of(target, "train")).predict(here)
        said, before = probes[target.name].predict(mapped), own[target.name]
        attributes = probes[target.name].attributes
        real = truth[attributes].to_numpy()
        match = percent_match(before, said)
        change = percent_change(_balanced_accuracy(before, real), _balanced_accuracy(said, real))
        for i, attribute in enumerate(attributes):
            low, high = share_interval(int((before[:, i] == said[:, i]).sum()), len(said))
            base = {"source": source.name, "target": target.name, "attribute": attribute, "n": len(said), "note": ""}
            rows.append(base | {"measure": "match", "value": match[i], "low": 100 * low, "high": 100 * high})
            rows.append(base | {"measure": "change", "value": change[i], "low": np.nan, "high": np.nan})
    columns = ["source", "target", "attribute", "measure", "value", "low", "high", "n", "note"]
    opened.write(_unit("maps", source), pd.DataFrame(rows, columns=columns), {})


def _balanced_accuracy(said: np.ndarray, real: np.ndarray) -> np.ndarray:
    """The mean of the shares of either class that are right, for each attribute; the test images are not balanced."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        right = said == real
        return (np.where(real, right, 0).sum(0) / real.sum(0) + np.where(~real, right, 0).sum(0) / (~real).sum(0)) / 2


def show(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> None:
    """Write the report of a finished run and print its result."""
    from probekit.report.probing import print_probes, write_report
    from probekit.runs import writing

    with writing(folder):
        report = write_report(folder, config, rows)
    print_probes(rows)
    typer.echo(f"\nreport: {report}")

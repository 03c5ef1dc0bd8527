"""Stitching: one model's encoder, a linear map, another's decoder (All Roads Lead to Rome, sections 3.2 and 4.1, A.4)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from probekit.experiments.edit import edit
from probekit.experiments.places import (
    MODELS,
    Alpha,
    Codes,
    Data,
    Device,
    Models,
    Out,
    Place,
    Seed,
    Test,
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

    from probekit.latents.maps import RidgeSolver
    from probekit.runs import Run

app = typer.Typer(help="Map one model's latent space into another's by a linear map.", no_args_is_help=True)

app.command()(edit)

EXAMPLES = 8
"""Test pictures that are kept as pictures."""
COMPARED = 2000
"""Images of which spaces are compared without a map."""

Planned = tuple[str, Place, Place, str, Codes]
"""A unit's name, source, target, the images' name and their codes."""


@app.command()
def run(
    models: Models = MODELS,
    data: Data = "avatars",
    train: Train = 9000,
    test: Test = 100,
    alpha: Alpha = "loo",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Stitch every model's encoder to every other's decoder, and measure what is left of the picture."""
    from probekit.runs import Run, default_folder

    penalty(alpha, "vae", "vae")  # refuses what is no penalty before anything is computed
    places = load_places(models, device, baseline=True)
    if all(place.space.decoder is None for place in places):
        raise ProbekitError(f"--models {models!r}: none of them can decode")
    sets = image_sets(places, data, train, test, seed)
    distance = frechet_distance()
    options: dict[str, Any] = {
        "models": {p.name: f"{p.model.family} {p.model.digest}" for p in places}, "data": data,
        "data_digest": {name: codes.data.digest for name, codes in sets.items()}, "train": train, "test": test,
        "alpha": alpha, "frechet": distance, "seed": seed,
    }  # fmt: skip
    folder = out or default_folder("stitch-run", Path(data).name, options)
    opened = Run(folder, "stitch-run", options, sys.argv)
    rows = stitch_all(opened, places, sets)
    show(folder, opened.config | {"command": sys.argv}, rows)


def frechet_distance() -> str:
    """The Fréchet distance that can be had: FID with the paper's 64 features, or fd-alexnet."""
    import torch

    from probekit.metrics.distributions import inception_features

    try:
        inception_features(torch.zeros(1, 3, 32, 32), 64)
    except ProbekitError:
        return "fd-alexnet"
    return "FID, 64 features"


def pairs(places: list[Place], sets: dict[str, Codes]) -> Iterator[tuple[Place, Place, str, Codes]]:
    """(source, target, set's name, set): every source with every target that decodes, its own included.

    A pair with a model that cannot encode takes the set of its samples; two such models have no images in common.
    """
    drawn = {codes.drawn_by.name: (name, codes) for name, codes in sets.items() if codes.drawn_by is not None}
    data = next((name, codes) for name, codes in sets.items() if codes.drawn_by is None)
    for source in places:
        for target in places:
            blind = {p.name for p in (source, target) if p.space.encoder is None}
            if target.space.decoder is not None and len(blind) <= 1:
                yield (source, target, *(drawn[blind.pop()] if blind else data))


def stitch_all(opened: Run, places: list[Place], sets: dict[str, Codes]) -> pd.DataFrame:
    """Every pair that is not finished yet; then all rows."""
    from probekit.latents.maps import RidgeSolver

    planned: list[Planned] = [(unit_name(s, t), s, t, name, codes) for s, t, name, codes in pairs(places, sets)]
    waiting = [unit for unit in planned if not opened.finished(unit[0])]
    encode_all([(place, codes) for _, *both, _, codes in waiting for place in both])
    # one source and set after another, so that one factorization serves all its targets
    waiting.sort(key=lambda unit: (unit[1].name, unit[3]))
    solver: RidgeSolver | None = None
    at: tuple[str, str] | None = None
    with progress("stitching", len(planned), done=len(planned) - len(waiting)) as advance:
        for unit, source, target, name, codes in waiting:
            if at != (source.name, name):
                at, solver = (source.name, name), RidgeSolver(codes.of(source, "train"))
            assert solver is not None
            _stitch(opened, unit, source, target, name, codes, solver)
            advance(1)
    return opened.collect([p[0] for p in planned])


def unit_name(source: Place, target: Place) -> str:
    """The name of a pair's file."""
    from probekit.runs import file_name

    return file_name(f"{source.name}--{target.name}")


def _stitch(opened: Run, unit: str, source: Place, target: Place, name: str, codes: Codes, solver: RidgeSolver) -> None:
    """Map, decode and measure one pair; a space is decoded from its own latents, without a map."""
    import numpy as np
    import pandas as pd
    import torch

    from probekit.latents.maps import LinearMap
    from probekit.metrics import lpips
    from probekit.metrics.distributions import alexnet_features, bootstrap, frechet, inception_features
    from probekit.metrics.similarity import cka, mutual_knn

    options = opened.config["options"]
    wanted = codes.of(target, "test")
    errors: dict[str, np.ndarray] = {}
    alpha = float("nan")
    if source is target:
        mapped = wanted
    else:
        truth = codes.of(target, "train")
        fitted = LinearMap(penalty(options["alpha"], source.model.family, target.model.family)).fit(solver, truth)
        alpha = fitted.alpha_
        mapped = fitted.predict(codes.of(source, "test")).astype(np.float32)
        errors["latent MSE, train"] = ((fitted.predict(codes.of(source, "train")) - truth) ** 2).mean(1)
        errors["latent MSE, test"] = ((mapped - wanted) ** 2).mean(1)
        errors["latent error over variance, test"] = errors["latent MSE, test"] / truth.var(0).mean()
    with torch.no_grad():
        shaped = torch.from_numpy(mapped).reshape(-1, *target.space.shape)
        images = torch.cat([target.space.decode(part) for part in torch.split(shaped, 50)])
        true = codes.data.images(codes.test)
        errors["RMSE"] = ((images - true) / 2).square().mean((1, 2, 3)).sqrt().numpy()
        errors["LPIPS"] = lpips.distances(images, true).numpy()
    features = alexnet_features if options["frechet"] == "fd-alexnet" else lambda x: inception_features(x, 64)
    one, two = features(images).numpy(), features(true).numpy()
    drawn_by = "" if codes.drawn_by is None else codes.drawn_by.name
    measured = {what: (*bootstrap(values, seed=options["seed"]), len(values)) for what, values in errors.items()}
    resampled = bootstrap(lambda rows: frechet(one[rows], two[rows]), len(one), seed=options["seed"], resamples=100)
    measured[options["frechet"]] = (*resampled, len(one))
    if source is not target:
        # without any map: of how alike the two spaces see the same images
        here, there = (codes.of(place, "train")[:COMPARED] for place in (source, target))
        alike = {"CKA": cka(here, there), "mutual 10-NN": mutual_knn(here, there, k=min(10, len(here) - 1))}
        measured |= {what: (value, float("nan"), float("nan"), len(here)) for what, value in alike.items()}
    rows = [
        {"source": source.name, "target": target.name, "images": name, "drawn_by": drawn_by, "alpha": alpha, "measure": what,
         "value": value, "low": low, "high": high, "n": n}
        for what, (value, low, high, n) in measured.items()
    ]  # fmt: skip
    pictures = {f"{i}": images[i] for i in range(min(EXAMPLES, len(images)))}
    pictures |= {f"true-{i}": true[i] for i in range(min(EXAMPLES, len(true)))}
    opened.write(unit, pd.DataFrame(rows), pictures)


def show(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> None:
    """Write the report of a finished run and print its result."""
    from probekit.report.stitching import print_measures, write_report
    from probekit.runs import writing

    with writing(folder):
        report = write_report(folder, config, rows)
    print_measures(rows)
    typer.echo(f"\nreport: {report}")

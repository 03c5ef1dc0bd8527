"""Stitching: one model's encoder, a linear map, another's decoder (All Roads Lead to Rome, sections 3.2 and 4.1, A.4)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probekit.errors import ProbekitError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from probekit.data.dataset import Dataset
    from probekit.latents import LatentSpace
    from probekit.latents.maps import RidgeSolver
    from probekit.latents.store import LatentStore
    from probekit.models import Model
    from probekit.runs import Run

app = typer.Typer(help="Map one model's latent space into another's by a linear map.", no_args_is_help=True)

MODELS = "avatar-vae,avatar-vqvae,avatar-gan,avatar-flow,avatar-ddpm:noised"
"""The paper's five, each in the space that it used."""
EXAMPLES = 8
"""Test pictures that are kept as pictures."""

Models = Annotated[str, typer.Option(help="Models or model:space, separated by commas; file.py:Class for a model of your own.")]
Data = Annotated[str, typer.Option(help="avatars, celeba:PATH, folder:PATH or a folder.")]
Train = Annotated[int, typer.Option(min=10, help="Images that maps and probes are fitted on.")]
Test = Annotated[int, typer.Option(min=2, help="Images that they are tested on.")]
Alpha = Annotated[str, typer.Option(help="Ridge penalty: loo (leave-one-out), paper (its table 1) or a number.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of noise, samples and bootstrap.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Out = Annotated[Path | None, typer.Option(help="The run's folder. [default: runs/…]")]


@dataclass(frozen=True, eq=False)
class Place:
    """A latent space that takes part, and the model it belongs to."""

    name: str
    model: Model
    space: LatentSpace


class Codes:
    """The latents of every place for one set of images, encoded once and kept on the disk.

    Where a model cannot encode, the images are its own samples, and what they are drawn from is their code (A.4).
    """

    def __init__(self, data: Dataset, drawn_by: Place | None, train: np.ndarray, test: np.ndarray, seed: int) -> None:
        self.data, self.drawn_by, self.train, self.test, self.seed = data, drawn_by, train, test, seed

    def encode(self, place: Place, on_block: Callable[[int], None]) -> None:
        """Encode what is not yet; on_block is told how many images each block held."""
        if self.drawn_by is not place:
            self._store(place).encode([*self.train, *self.test], on_block)

    def of(self, place: Place, part: str) -> np.ndarray:
        """Flat latents (n, d) of the part `train` or `test`, once they are encoded.

        Raises ProbekitError for latents that do not vary, naming the space.
        """
        from probekit.data.samples import Samples

        index = self.train if part == "train" else self.test
        if self.drawn_by is place and isinstance(self.data, Samples):
            latents = self.data.latents(index).flatten(1).numpy()
        else:
            latents = self._store(place).read(index)
        if float(latents.std(0).max()) == 0:
            raise ProbekitError(f"space {str(place.space)!r}: gives every image the same latent")
        return latents

    def _store(self, place: Place) -> LatentStore:
        from probekit.latents.store import LatentStore, default_folder

        folder = default_folder(place.space, place.model.digest, self.data, self.seed)
        return LatentStore(folder, place.space, place.model.digest, self.data, seed=self.seed)


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
    places = [*load_places(models, device), *load_places("random", device)]
    sets = image_sets(places, data, train, test, seed)
    options: dict[str, Any] = {
        "models": {p.name: f"{p.model.family} {p.model.digest}" for p in places}, "data": data,
        "data_digest": {name: codes.data.digest for name, codes in sets.items()}, "train": train, "test": test,
        "alpha": alpha, "seed": seed,
    }  # fmt: skip
    folder = out or default_folder("stitch-run", Path(data).name, options)
    opened = Run(folder, "stitch-run", options, sys.argv)
    rows = stitch_all(opened, places, sets)
    show(folder, opened.config | {"command": sys.argv}, rows)


def load_places(models: str, device: str) -> list[Place]:
    """The spaces that `--models` names. Raises ProbekitError where it names none, one twice, or one that cannot be loaded."""
    from probekit.models import load_space

    names = [name.strip() for name in models.split(",") if name.strip()]
    if not names:
        raise ProbekitError("--models: names none")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ProbekitError(f"--models {models!r}: {sorted(twice)[0]!r} stands there twice")
    return [Place(name, *load_space(name, device=device)) for name in names]


def image_sets(places: list[Place], data: str, train: int, test: int, seed: int) -> dict[str, Codes]:
    """The data set, and for each place that cannot encode the set of its own samples; by name.

    Maps are fitted on the data set's test split, which the models were not trained on, as in the paper. Raises ProbekitError
    where it is too small, or the models' images differ in size.
    """
    import numpy as np

    from probekit.data import load
    from probekit.data.samples import Samples

    sizes = {p.model.image_size for p in places if p.model.family != "random"}
    if len(sizes) > 1:
        said = ", ".join(f"{p.name} {p.model.image_size}" for p in places if p.model.family != "random")
        raise ProbekitError(f"--models: of different image sizes ({said} pixels)")
    size = sizes.pop() if sizes else 32
    dataset = load(data, size)
    index = dataset.split("test")
    if len(index) < train + test:
        index = np.concatenate([dataset.split("train"), index])  # a small data set: what there is
    if len(index) < train + test:
        raise ProbekitError(f"--train {train} and --test {test}: {dataset.name} has {len(index)} images")
    sets = {dataset.name: Codes(dataset, None, index[:train], index[len(index) - test :], seed)}
    for place in places:
        if place.space.encoder is None:
            drawn = Samples(place.space, place.model.digest, size, train + test, test, seed)
            sets[drawn.name] = Codes(drawn, place, drawn.split("train"), drawn.split("test"), seed)
    return sets


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


def penalty(alpha: str, source: str, target: str) -> float | str:
    """`LinearMap`'s alpha for a pair of families. Raises ProbekitError for what is none."""
    from probekit.latents.maps import PAPER_ALPHAS

    if alpha == "loo":
        return "auto"
    if alpha == "paper":
        return PAPER_ALPHAS.get((source, target), 0.0)
    try:
        value = float(alpha)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ProbekitError(f"--alpha {alpha!r}: write loo, paper, or a number from 0")
    return value


def stitch_all(opened: Run, places: list[Place], sets: dict[str, Codes]) -> pd.DataFrame:
    """Every pair that is not finished yet; then all rows."""
    from probekit.latents.maps import RidgeSolver

    planned: list[Planned] = [(unit_name(s, t), s, t, name, codes) for s, t, name, codes in pairs(places, sets)]
    waiting = [unit for unit in planned if not opened.finished(unit[0])]
    encoded = {(p.name, name): (p, codes) for _, *both, name, codes in waiting for p in both}
    blocks = sum(len(codes.train) + len(codes.test) for p, codes in encoded.values() if codes.drawn_by is not p)
    with _progress("encoding", blocks) as advance:
        for place, codes in encoded.values():
            codes.encode(place, advance)
    # one source and set after another, so that one factorization serves all its targets
    waiting.sort(key=lambda unit: (unit[1].name, unit[3]))
    solver: RidgeSolver | None = None
    at: tuple[str, str] | None = None
    with _progress("stitching", len(planned), done=len(planned) - len(waiting)) as advance:
        for unit, source, target, name, codes in waiting:
            if at != (source.name, name):
                at, solver = (source.name, name), RidgeSolver(codes.of(source, "train"))
            assert solver is not None
            _stitch(opened, unit, source, target, name, codes, solver)
            advance(1)
    return opened.collect([p[0] for p in planned])


def unit_name(source: Place, target: Place) -> str:
    """The name of a pair's file."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in f"{source.name}--{target.name}")


def _stitch(opened: Run, unit: str, source: Place, target: Place, name: str, codes: Codes, solver: RidgeSolver) -> None:
    """Map, decode and measure one pair; a space is decoded from its own latents, without a map."""
    import numpy as np
    import pandas as pd
    import torch
    import torch.nn.functional as F

    from probekit.latents.maps import LinearMap
    from probekit.metrics import lpips
    from probekit.metrics.distributions import alexnet_features, bootstrap, frechet

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
        large = [F.interpolate(x, (64, 64), mode="bilinear") if x.shape[-1] < 64 else x for x in (images, true)]
        parts = zip(*(torch.split(x, 50) for x in large), strict=True)
        errors["LPIPS"] = torch.cat([lpips.network()(a, b).flatten() for a, b in parts]).numpy()
    one, two = alexnet_features(images).numpy(), alexnet_features(true).numpy()
    drawn_by = "" if codes.drawn_by is None else codes.drawn_by.name
    measured = {what: (*bootstrap(values, seed=options["seed"]), len(values)) for what, values in errors.items()}
    resampled = bootstrap(lambda rows: frechet(one[rows], two[rows]), len(one), seed=options["seed"], resamples=100)
    measured["fd-alexnet"] = (*resampled, len(one))
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


def _progress(title: str, total: int, done: int = 0) -> Any:
    """A progress bar as a context, which gives the function that advances it."""
    import contextlib

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    @contextlib.contextmanager
    def bar() -> Iterator[Any]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
                   TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, transient=True) as progress:
            task = progress.add_task(title, total=total, completed=done)
            yield lambda count: progress.advance(task, count)

    return bar()

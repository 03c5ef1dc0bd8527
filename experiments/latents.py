"""Latents on disk: encode a data set once, for the other experiments and for one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from probekit.experiments.places import Data, Device, Seed, load_places, progress

from probekit.hooks.errors import ProbekitError

app = typer.Typer(help="Encode data sets into latent spaces, once.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """Encode data sets into latent spaces, once."""


@app.command()
def encode(
    model: Annotated[str, typer.Argument(help="A model, model:space, or file.py:Class for a model of your own.")],
    data: Data = "avatars",
    split: Annotated[str, typer.Option(help="train or test.")] = "test",
    n: Annotated[int | None, typer.Option(min=1, help="How many images, the split's first. [default: all of them]")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="The folder to write to. [default: runs/latents/…]")] = None,
) -> None:
    """Write the latents of a data set's images: a zarr array, with labels and where they come from beside it."""
    from probekit.data import load
    from probekit.latents.store import LatentStore, default_folder

    if "," in model:
        raise ProbekitError(f"model {model!r}: one at a time")
    (place,) = load_places(model, device)
    dataset = load(data, place.model.image_size)
    index = dataset.split(split)
    if n is not None and n > len(index):
        raise ProbekitError(f"--n {n}: the {split} split of {dataset.name} has {len(index)} images")
    folder = out or default_folder(place.space, place.model.digest, dataset, seed)
    store = LatentStore(folder, place.space, place.model.digest, dataset, seed=seed)
    wanted = index[:n]
    with progress(f"{place.name} encodes {dataset.name}", len(wanted)) as advance:
        store.encode(wanted, advance)
    shape = "x".join(map(str, place.space.shape))
    typer.echo(f"{len(wanted)} latents of {shape}: {folder}")

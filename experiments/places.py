"""What the experiments on latent spaces share: the spaces that take part, the images, and the codes of the one in the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    import numpy as np

    from probekit.data.dataset import Dataset
    from probekit.latents import LatentSpace
    from probekit.latents.store import LatentStore
    from probekit.models import Model

MODELS = "avatar-vae,avatar-vqvae,avatar-gan,avatar-flow,avatar-ddpm:noised,avatar-ddpm:h"
"""The paper's five, each in the space that it used, and beyond it the diffusion model's h-space, which cannot decode."""
Models = Annotated[str, typer.Option(help="Models or model:space, separated by commas; file.py:Class for a model of your own.")]
Data = Annotated[str, typer.Option(help="avatars, celeba:PATH, folder:PATH or a folder.")]
Train = Annotated[int, typer.Option(min=10, help="Images that maps and probes are fitted on.")]
Test = Annotated[int, typer.Option(min=2, help="Images that they are tested on.")]
Alpha = Annotated[str, typer.Option(help="Ridge penalty: loo (leave-one-out), paper (its table 1) or a number.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of noise, samples and bootstrap.")]
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
        from probekit.latents.samples import Samples

        index = self.train if part == "train" else self.test
        if self.drawn_by is place and isinstance(self.data, Samples):
            latents = self.data.latents(index).flatten(1).numpy()
        else:
            latents = self._store(place).read(index)
        if not (latents != latents[0]).any():
            raise ProbekitError(f"space {str(place.space)!r}: gives every image the same latent")
        return latents

    def _store(self, place: Place) -> LatentStore:
        from probekit.latents.store import LatentStore, default_folder

        folder = default_folder(place.space, place.model.digest, self.data, self.seed)
        return LatentStore(folder, place.space, place.model.digest, self.data, seed=self.seed)


def load_places(models: str, device: str, *, baseline: bool = False) -> list[Place]:
    """The spaces that `--models` names, and with `baseline` the random encoder beside them.

    Convolutional models among others take the others' image size, as All Roads has it with the VQ-VAE made for 256 pixels.
    Raises ProbekitError where it names none, one twice, or one that cannot be loaded.
    """
    from probekit.models import load_space

    names = [name.strip() for name in models.split(",") if name.strip()]
    if not names:
        raise ProbekitError("--models: names none")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ProbekitError(f"--models {models!r}: {sorted(twice)[0]!r} stands there twice")
    if baseline and "random" not in names:
        names.append("random")
    places = [Place(name, *load_space(name, device=device)) for name in names]
    fixed = {p.model.image_size for p in places if p.model.at_size is None and p.model.family != "random"}
    return [_at_size(place, *fixed) if len(fixed) == 1 else place for place in places]


def _at_size(place: Place, size: int) -> Place:
    if place.model.at_size is None or place.model.image_size == size:
        return place
    model = place.model.at_size(size)
    return Place(place.name, model, model.space(place.space.name))


def image_sets(places: list[Place], data: str, train: int, test: int, seed: int, *, samples: bool = True) -> dict[str, Codes]:
    """The data set, and for each place that cannot encode the set of its own samples; by name.

    Maps are fitted on the data set's test split, which the models were not trained on, as in the paper. samples: whether
    models that cannot encode take part. Raises ProbekitError where the data set is too small, the models' images differ in
    size, or a model cannot encode and may not take part by its samples.
    """
    import numpy as np

    from probekit.data import load
    from probekit.latents.samples import Samples

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
            if not samples:
                raise ProbekitError(f"--models: {place.name} cannot encode, and its samples have no labels")
            drawn = Samples(place.space, place.model.digest, size, train + test, test, seed)
            sets[drawn.name] = Codes(drawn, place, drawn.split("train"), drawn.split("test"), seed)
    return sets


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


def encode_all(wanted: list[tuple[Place, Codes]]) -> None:
    """Encode every place's images that are not encoded yet, with one progress bar."""
    each = {(place.name, codes.data.name): (place, codes) for place, codes in wanted if codes.drawn_by is not place}
    with progress("encoding", sum(len(codes.train) + len(codes.test) for _, codes in each.values())) as advance:
        for place, codes in each.values():
            codes.encode(place, advance)


@contextlib.contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A progress bar, and the function that advances it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda count: bar.advance(task, count)

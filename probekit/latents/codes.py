"""The latents of a set of images in several spaces: encoded once, kept on the disk, read as flat vectors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probekit.data import load_data
from probekit.data.dataset import Dataset
from probekit.hooks.errors import ProbekitError
from probekit.latents.samples import Samples
from probekit.latents.space import LatentSpace
from probekit.latents.store import LatentStore, default_folder


@dataclass(frozen=True, eq=False)
class Codes:
    """One set of images, split for maps and probes, and its latents in any space.

    train, test: numbers of images. drawn_by: where a space cannot encode, the images are its own samples, and what they are
    drawn from is their code (All Roads, A.4).
    """

    data: Dataset
    train: np.ndarray
    test: np.ndarray
    seed: int
    drawn_by: LatentSpace | None = None

    @property
    def numbers(self) -> list[int]:
        """All images that take part."""
        return [*self.train.tolist(), *self.test.tolist()]

    def encode(self, space: LatentSpace, on_block: Callable[[int], None] = lambda images: None) -> None:
        """Encode what is not yet; on_block is told how many images each block held."""
        if not self.draws(space):
            self._store(space).encode(self.numbers, on_block)

    def of(self, space: LatentSpace, part: str) -> Float[np.ndarray, "n d"]:
        """Flat latents of the part `train` or `test`; what is not encoded yet is.

        Raises ProbekitError, naming the space, for latents that do not vary.
        """
        index = self.train if part == "train" else self.test
        if self.draws(space):
            assert isinstance(self.data, Samples)
            latents = self.data.latents(index).flatten(1).numpy()
        else:
            store = self._store(space)
            store.encode(index)
            latents = store.read(index)
        if len(latents) > 1 and not (latents != latents[0]).any():
            raise ProbekitError(f"space {str(space)!r}: gives every image the same latent")
        return latents

    def images(self, part: str) -> Float[Tensor, "n 3 h w"]:
        """The pictures of the part `train` or `test`."""
        return self.data.images(self.train if part == "train" else self.test)

    def draws(self, space: LatentSpace) -> bool:
        """Whether the images are the space's own samples, so that there is nothing to encode."""
        return self.drawn_by is not None and self.drawn_by.digest == space.digest

    @functools.cached_property
    def _stores(self) -> dict[str, LatentStore]:
        return {}

    def _store(self, space: LatentSpace) -> LatentStore:
        if space.digest not in self._stores:
            folder = default_folder(space, self.data, self.seed)
            self._stores[space.digest] = LatentStore(folder, space, self.data, seed=self.seed)
        return self._stores[space.digest]


def code_sets(
    spaces: Sequence[LatentSpace], data: str, train: int, test: int, seed: int, *, samples: bool = True
) -> dict[str, Codes]:
    """The data set, and for each space that cannot encode the set of its own samples; by name.

    Maps are fitted on the data set's test split, which the models were not trained on, as in the paper. samples: whether
    spaces that cannot encode take part. Raises ProbekitError where the data set is too small, the models' images differ in
    size, or a space cannot encode and may not take part by its samples.
    """
    size = common_size(spaces)
    dataset = load_data(data, size)
    if any(space.takes == "captions" for space in spaces):
        dataset.captions(dataset.split("test")[:1])  # refuses a data set without
    index = dataset.split("test")
    if len(index) < train + test:
        index = np.concatenate([dataset.split("train"), index])  # a small data set: what there is
    if len(index) < train + test:
        raise ProbekitError(f"--train {train} and --test {test}: {dataset.name} has {len(index)} images")
    sets = {dataset.name: Codes(dataset, index[:train], index[len(index) - test :], seed)}
    for space in spaces:
        if space.encoder is None:
            if not samples:
                raise ProbekitError(f"--models: {space} cannot encode, and its samples have no labels")
            drawn = Samples(space, size, train + test, test, seed)
            sets[drawn.name] = Codes(drawn, drawn.split("train"), drawn.split("test"), seed, space)
    return sets


def common_size(spaces: Sequence[LatentSpace]) -> int:
    """The image size of the spaces' models. Raises ProbekitError where they differ; 32 where any will do."""
    sizes = {space.image_size for space in spaces if space.image_size is not None}
    if len(sizes) > 1:
        said = ", ".join(f"{space} {space.image_size}" for space in spaces if space.image_size is not None)
        raise ProbekitError(f"--models: of different image sizes ({said} pixels)")
    return sizes.pop() if sizes else 32


def decode(space: LatentSpace, latents: Float[np.ndarray, "n d"], *, rest_of: Tensor | None = None) -> Float[Tensor, "n 3 h w"]:
    """Images of flat latents, 50 at a time; rest_of as `LatentSpace.decode` has it, an image a latent."""
    shaped = torch.from_numpy(np.asarray(latents, dtype=np.float32)).reshape(-1, *space.shape)
    parts = torch.split(shaped, 50)
    rests = torch.split(rest_of, 50) if rest_of is not None else [None] * len(parts)
    return torch.cat([space.decode(part, rest_of=rest) for part, rest in zip(parts, rests, strict=True)])

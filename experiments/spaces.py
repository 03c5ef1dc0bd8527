"""What the experiments on latent spaces share: the spaces that take part, the images, and their codes."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from probekit.runs.experiment import Bench, Experiment, Unit, Work, names

if TYPE_CHECKING:
    from probekit.latents import LatentSpace
    from probekit.latents.codes import Codes

FIVE = "avatar-vae,avatar-vqvae,avatar-gan,avatar-flow,avatar-ddpm:noised,avatar-ddpm:h"
"""All Roads' five families, each in the space that it used, and beyond it the diffusion model's h-space."""


@dataclass(frozen=True, kw_only=True)
class OnSpaces(Experiment):
    """An experiment on several latent spaces and the same images in each."""

    baseline: ClassVar[bool] = False
    """Whether the random encoder, which knows nothing of an image, stands beside the spaces."""

    models: Annotated[
        str,
        typer.Option(help="Models, MODEL:SPACE or MODEL:SPACE:key=value, separated by commas; file.py:Class for one's own."),
    ] = FIVE
    data: Annotated[str, typer.Option(help="avatars, scenes, photos, celeba:PATH, folder:PATH or a folder.")] = "avatars"
    train: Annotated[int, typer.Option(min=10, help="Images that maps and probes are fitted on.")] = 9000
    test: Annotated[int, typer.Option(min=2, help="Images that they are tested on.")] = 100
    alpha: Annotated[str, typer.Option(help="Ridge penalty: loo (leave-one-out), paper (its table 1) or a number.")] = "loo"
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of noise, samples and bootstrap.")] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        names(self.models, "--models")
        self.penalty("vae", "vae")  # refuses what is no penalty

    @property
    def subject(self) -> str:
        """The data set's name."""
        return Path(self.data).name

    @property
    @abstractmethod
    def sets(self) -> dict[str, Codes]:
        """The sets of images, by name, as `code_sets` makes them."""

    @functools.cached_property
    def spaces(self) -> list[LatentSpace]:
        """The spaces that take part. Raises ProbekitError as `load_spaces`."""
        from probekit.models import load_spaces

        return load_spaces(names(self.models, "--models"), device=self.device, baseline=self.baseline)

    def space(self, label: str) -> LatentSpace:
        """One of them, by how it was asked for."""
        return next(space for space in self.spaces if str(space) == label)

    def inputs(self) -> dict[str, Any]:
        """The fingerprints of spaces and images."""
        return {
            "spaces": {str(space): f"{space.family} {space.digest}" for space in self.spaces},
            "data_digest": {name: codes.data.digest for name, codes in self.sets.items()},
        }

    def penalty(self, source: str, target: str) -> float | str:
        """`LinearMap`'s alpha for a pair of families."""
        from probekit.latents.maps import penalty

        return penalty(self.alpha, source, target)

    def encode_units(self, pairs: Sequence[tuple[LatentSpace, str]]) -> list[Unit]:
        """A unit for each space and set of images in which it is needed, so that encoding is seen, and shared by workers.

        They give nothing but the latents on the disk; a unit that needs latents which are not there encodes them itself. Where
        the images are a space's own samples there is nothing to encode.
        """
        wanted = {encode_unit(space, name): self.sets[name] for space, name in pairs if not self.sets[name].draws(space)}
        return [Unit(unit, len(codes.numbers)) for unit, codes in wanted.items()]

    def encode_work(self, unit: Unit, bench: Bench) -> Work:
        """One of `encode_units`."""
        for name, codes in self.sets.items():
            for space in self.spaces:
                if unit.name == encode_unit(space, name):
                    codes.encode(space, bench.advance)
        return Work()


def encode_unit(space: LatentSpace, name: str) -> str:
    """The name of the unit that encodes a set of images in a space."""
    return f"encode {space} of {name}"

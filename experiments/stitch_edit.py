"""Carried edits: a direction found in one latent space, mapped into another and applied there (All Roads, section 5).

The paper expects that edit directions can be carried over by the linear map; this tries it, and judges the pictures.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from probekit.experiments.spaces import OnSpaces
from probekit.files import file_name
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Bench, Findings, Unit, Work, names

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

    from probekit.latents import LatentSpace
    from probekit.latents.codes import Codes
    from probekit.runs.folder import Run

STRENGTHS = (0.5, 1.0, 1.5, 2.0)
"""How far pictures are moved, in lengths of the step between the means of images without and with the attribute."""
PAIRS = 32
"""Counterfactual pairs of avatars that edits are held against."""


@dataclass(frozen=True, kw_only=True)
class StitchEdit(OnSpaces):
    """Find an attribute's direction in every space, carry it into every other, and judge the pictures edited with it.

    What a space does not hold is kept: an edit in h-space changes the activation and leaves the rest of the picture.
    """

    name: ClassVar[str] = "stitch-edit"

    models: Annotated[
        str,
        typer.Option(help="Models, MODEL:SPACE or MODEL:SPACE:key=value, separated by commas; file.py:Class for one's own."),
    ] = "avatar-vae:mean,avatar-vqvae,avatar-flow"
    test: Annotated[int, typer.Option(min=2, help="Images to edit, for each attribute those of them without it.")] = 60
    attributes: Annotated[str, typer.Option(help="Attributes to give, separated by commas.")] = (
        "Eyeglasses,Smiling,Mustache,Wearing_Hat,Pale_Skin,Blue_Background"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        from probekit.data.avatars import ATTRIBUTES

        if self.data != "avatars":
            raise ProbekitError(
                f"--data {self.data!r}: edits are judged by the avatar reader and on counterfactual pairs; avatars only"
            )
        if unknown := [name for name in self.wanted if name not in ATTRIBUTES]:
            raise ProbekitError(f"--attributes {unknown[0]!r}: choose from {', '.join(ATTRIBUTES)}")

    @property
    def wanted(self) -> list[str]:
        """The attributes by name."""
        return names(self.attributes, "--attributes")

    @functools.cached_property
    def sets(self) -> dict[str, Codes]:
        """The avatars. Raises ProbekitError for a space that cannot encode them, or decode."""
        from probekit.latents.codes import code_sets

        for space in self.spaces:
            if space.takes != "images":
                raise ProbekitError(f"--models: {space} encodes {space.takes}; directions are found between images")
            if space.encoder is None or space.decoder is None:
                raise ProbekitError(f"--models: {space} cannot {'encode' if space.encoder is None else 'decode'}")
        return code_sets(self.spaces, self.data, self.train, self.test, self.seed, samples=False)

    @property
    def codes(self) -> Codes:
        """The only set."""
        (codes,) = self.sets.values()
        return codes

    def plan(self) -> list[Unit]:
        """The encoding of the images, then a unit a target."""
        (data,) = self.sets
        size = (len(self.spaces) + 1) * len(self.wanted) * len(STRENGTHS) * self.test
        targets = [Unit(str(space), size) for space in self.spaces]
        return [*self.encode_units([(space, data) for space in self.spaces]), *targets]

    def work(self, unit: Unit, bench: Bench) -> Work:
        """One of `encode_units`; or all edits in one target, by its own directions, those carried into it, and random ones.

        A row a source, attribute and strength. success: the share of n images without the attribute in which the reader then
        finds it; low, high: its 95% Wilson interval. kept: the share of their other attributes that it reads as before. cosine:
        with the mean step between counterfactuals. apart: LPIPS from the edited one of a counterfactual pair to the other, at
        the best strength; apart_unedited: without an edit. Pictures: four images of each, moved by one step.
        """
        target = next((space for space in self.spaces if str(space) == unit.name), None)
        if target is None:
            return self.encode_work(unit, bench)
        import numpy as np
        import pandas as pd
        import torch

        from probekit.data.avatars import ATTRIBUTES
        from probekit.latents.codes import decode
        from probekit.metrics.distributions import share_interval
        from probekit.metrics.readers import avatar_reader

        codes, reader = self.codes, avatar_reader()
        ours, images, truth = codes.of(target, "test"), codes.images("test"), codes.data.labels(codes.test)
        plain = decode(target, ours, rest_of=images)
        read_plain = reader.read(plain).numpy()
        true = {name: _Counterfactuals.of(target, name, codes.data.image_size, self.seed) for name in self.wanted}
        rows: list[dict[str, Any]] = []
        pictures: dict[str, Tensor] = {}
        for (source, name), step in self._directions(target).items():
            column = ATTRIBUTES.index(name)
            without = np.flatnonzero(~truth[name].to_numpy() & ~read_plain[:, column])
            if len(without) == 0:
                bench.advance(len(STRENGTHS) * self.test)
                continue
            exact = true[name].step
            cosine = float(step @ exact / max(np.linalg.norm(step) * np.linalg.norm(exact), 1e-12))
            for strength in STRENGTHS:
                moved = ours[without] + np.float32(strength) * step.astype(np.float32)
                edited = decode(target, moved, rest_of=images[without])
                seen = reader.read(edited).numpy()
                given = seen[:, column]
                others = np.delete(seen == read_plain[without], column, axis=1)
                low, high = share_interval(int(given.sum()), len(given))
                rows.append(
                    {
                        "source": source,
                        "target": str(target),
                        "attribute": name,
                        "strength": strength,
                        "success": given.mean(),
                        "low": low,
                        "high": high,
                        "kept": others.mean(),
                        "cosine": cosine,
                        "apart": np.nan,
                        "apart_unedited": true[name].apart,
                        "n": len(without),
                    }
                )
                if strength == 1.0:
                    pictures[f"{file_name(source)}-{name}"] = torch.cat(list(edited[:4]), dim=2)
                    pictures[f"plain-{name}"] = torch.cat(list(plain[torch.from_numpy(without[:4])]), dim=2)
                bench.advance(self.test)
            best = max(rows[-len(STRENGTHS) :], key=lambda row: (row["success"], -row["strength"]))
            best["apart"] = true[name].distance(np.float32(best["strength"]) * step.astype(np.float32))
        return Work(pd.DataFrame(rows), pictures)

    def _directions(self, target: LatentSpace) -> dict[tuple[str, str], np.ndarray]:
        """The steps in a target by source and attribute: its own, those carried into it, random ones as long as its own."""
        import numpy as np
        import torch

        from probekit import seeds
        from probekit.latents.maps import LinearMap
        from probekit.report.editing import RANDOM

        codes, wanted = self.codes, self.wanted
        labels, here = codes.data.labels(codes.train), codes.of(target, "train")
        found = {(str(target), name): _direction(here, labels[name].to_numpy()) for name in wanted}
        for source in self.spaces:
            if source is not target:
                there = codes.of(source, "train")
                linear = LinearMap(self.penalty(source.family, target.family)).fit(there, here).coef_
                for name in wanted:
                    found[str(source), name] = linear @ _direction(there, labels[name].to_numpy())
        for name in wanted:
            own = found[str(target), name]
            draw = seeds.named("random direction", self.seed, name)
            noise = torch.randn(len(own), generator=draw, dtype=torch.float64).numpy()
            found[RANDOM, name] = noise * (np.linalg.norm(own) / np.linalg.norm(noise))
        return found

    def findings(self, run: Run, rows: pd.DataFrame) -> Findings:
        """Which directions do what they should. Raises ProbekitError where there was nothing to edit."""
        from probekit.report.editing import findings

        if rows.empty:
            raise ProbekitError(f"--test {self.test}: no image is without {' or '.join(self.wanted)}")
        return findings(run, rows)


def _direction(latents: np.ndarray, has: np.ndarray) -> np.ndarray:
    """The step from the mean latent of images without an attribute to that of images with it."""
    return (latents[has].mean(0) - latents[~has].mean(0)).astype("float64")


@dataclass(frozen=True, eq=False)
class _Counterfactuals:
    """Avatars that differ in one attribute only: what an edit should have done.

    without, with_: flat latents; rest, pictures: the images of both. apart: LPIPS between the two, not edited.
    """

    space: LatentSpace
    without: np.ndarray
    with_: np.ndarray
    rest: Tensor
    pictures: Tensor
    apart: float

    @classmethod
    def of(cls, space: LatentSpace, name: str, image_size: int, seed: int) -> _Counterfactuals:
        import numpy as np
        import torch

        from probekit import seeds
        from probekit.data.avatars import TRAIN, counterfactual
        from probekit.latents.codes import decode
        from probekit.metrics import lpips

        both = [counterfactual(TRAIN + i, name) for i in range(PAIRS)]
        rest, pictures = (torch.from_numpy(np.stack([p[k].draw(image_size) for p in both])).float() / 127.5 - 1 for k in (0, 1))
        # what is drawn is drawn alike
        without, with_ = (
            space.encode(images, seeds.named("counterfactuals", seed)).flatten(1).numpy() for images in (rest, pictures)
        )
        apart = lpips.distances(decode(space, without, rest_of=rest), pictures).mean().item()
        return cls(space, without, with_, rest, pictures, apart)

    @property
    def step(self) -> np.ndarray:
        """The mean step from the code of the avatar without the attribute to that of the one with it."""
        return (self.with_ - self.without).mean(0).astype("float64")

    def distance(self, step: np.ndarray) -> float:
        """Mean LPIPS between the avatars without the attribute, moved by a step, and those with it."""
        from probekit.latents.codes import decode
        from probekit.metrics import lpips

        return lpips.distances(decode(self.space, self.without + step, rest_of=self.rest), self.pictures).mean().item()

"""Stitching: one model's encoder, a linear map, another's decoder (All Roads Lead to Rome, sections 3.2 and 4.1, A.4)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from probekit.experiments.spaces import OnSpaces, encode_unit
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Bench, Findings, Unit, Work

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor

    from probekit.latents import LatentSpace
    from probekit.latents.codes import Codes
    from probekit.latents.ridge import RidgeSolver
    from probekit.runs.folder import Run

EXAMPLES = 8
"""Test pictures that are kept as pictures."""
COMPARED = 2000
"""Images of which spaces are compared without a map."""
INCEPTION, ALEXNET = "FID, 64 features", "fd-alexnet"
"""The Fréchet distances: the paper's, and what is had without its weights."""


@dataclass(frozen=True, kw_only=True)
class StitchRun(OnSpaces):
    """Stitch every model's encoder to every other's decoder, and measure what is left of the picture."""

    name: ClassVar[str] = "stitch-run"
    baseline: ClassVar[bool] = True

    @functools.cached_property
    def sets(self) -> dict[str, Codes]:
        """The data set, and the samples of each space that cannot encode. Raises ProbekitError where no space can decode."""
        from probekit.latents.codes import code_sets

        if all(space.decoder is None for space in self.spaces):
            raise ProbekitError(f"--models {self.models!r}: none of them can decode")
        return code_sets(self.spaces, self.data, self.train, self.test, self.seed)

    def inputs(self) -> dict[str, Any]:
        """The fingerprints of spaces and images, and the Fréchet distance that can be had here."""
        return super().inputs() | {"frechet": frechet_distance()}

    def plan(self) -> list[Unit]:
        """Encoding, then every pair; one source and set after another, so that one factorization serves all its targets."""
        pairs = sorted(self._pairs(), key=lambda pair: (self.spaces.index(pair[0]), list(self.sets).index(pair[2])))
        both = [(space, name) for source, target, name in pairs for space in (source, target)]
        encoding = self.encode_units(both)
        there = {unit.name for unit in encoding}
        units = []
        for source, target, name in pairs:
            needs = dict.fromkeys(encode_unit(space, name) for space in (source, target))
            units.append(
                Unit(
                    pair_unit(source, target),
                    # a map, and pictures to decode and to compare
                    10 * self.test,
                    needs=tuple(need for need in needs if need in there),
                    group=f"from {source}, {name}",
                )
            )
        return [*encoding, *units]

    def work(self, unit: Unit, bench: Bench) -> Work:
        """A set's latents in a space, or a pair of spaces: map, decode and measure; a space's own latents need no map.

        A row a measure: its value with the 95% bootstrap interval over `n` images, of that set of images, which may be
        `drawn_by` a space; `alpha` is the map's penalty. Latent errors are of the map; RMSE, of pixels in [0, 1], LPIPS and the
        Fréchet distance of the pictures; CKA and mutual 10-NN compare the two spaces without any map. Pictures: the first
        decoded ones by number, and the `true-` ones.
        """
        for source, target, name in self._pairs():
            if unit.name == pair_unit(source, target):
                return self._stitch(source, target, name, self.sets[name])
        return self.encode_work(unit, bench)

    def _pairs(self) -> Iterator[tuple[LatentSpace, LatentSpace, str]]:
        """(source, target, set's name): every source with every target that decodes, its own included.

        A pair with a space that cannot encode takes the set of its samples; two such spaces have no images in common. Samples
        have no captions.
        """
        data = next(name for name, codes in self.sets.items() if codes.drawn_by is None)
        drawn = {str(codes.drawn_by): name for name, codes in self.sets.items() if codes.drawn_by is not None}
        for source in self.spaces:
            for target in self.spaces:
                blind = {str(space) for space in (source, target) if space.encoder is None}
                worded = any(space.takes == "captions" for space in (source, target))
                if target.decoder is not None and len(blind) <= 1 and not (blind and worded):
                    yield source, target, drawn[blind.pop()] if blind else data

    @functools.cached_property
    def _solver(self) -> Callable[[str, str], RidgeSolver]:
        """The factorization of a source and set; the last is kept, which is large."""
        from probekit.latents.ridge import RidgeSolver

        @functools.lru_cache(maxsize=1)
        def made(source: str, name: str) -> RidgeSolver:
            return RidgeSolver(self.sets[name].of(self.space(source), "train"))

        return made

    @functools.cached_property
    def _true(self) -> Callable[[str], tuple[Tensor, np.ndarray]]:
        """A set's test pictures, and their features; the last sets' are kept."""

        @functools.lru_cache(maxsize=2)
        def made(name: str) -> tuple[Tensor, np.ndarray]:
            pictures = self.sets[name].images("test")
            return pictures, features(pictures, frechet_distance())

        return made

    def _stitch(self, source: LatentSpace, target: LatentSpace, name: str, codes: Codes) -> Work:
        import numpy as np

        from probekit.latents.codes import decode
        from probekit.latents.maps import LinearMap
        from probekit.metrics import lpips
        from probekit.metrics.distributions import bootstrap, frechet
        from probekit.metrics.similarity import cka, mutual_knn

        wanted = codes.of(target, "test")
        errors: dict[str, np.ndarray] = {}
        alike: dict[str, float] = {}
        alpha = float("nan")
        if source is target:
            mapped = wanted
        else:
            here, truth = (codes.of(space, "train") for space in (source, target))
            fitted = LinearMap(self.penalty(source.family, target.family)).fit(self._solver(str(source), name), truth)
            alpha = fitted.alpha_
            mapped = fitted.predict(codes.of(source, "test")).astype(np.float32)
            errors["latent MSE, train"] = ((fitted.predict(here) - truth) ** 2).mean(1)
            errors["latent MSE, test"] = ((mapped - wanted) ** 2).mean(1)
            errors["latent error over variance, test"] = errors["latent MSE, test"] / truth.var(0).mean()
            near = min(10, len(here[:COMPARED]) - 1)
            alike["CKA"] = cka(here[:COMPARED], truth[:COMPARED])
            alike["mutual 10-NN"] = mutual_knn(here[:COMPARED], truth[:COMPARED], k=near)
        # nothing of the true pictures goes in: a space that holds a part only is decoded with the rest that it has by default
        images = decode(target, mapped)
        true, of_true = self._true(name)
        errors["RMSE"] = ((images - true) / 2).square().mean((1, 2, 3)).sqrt().numpy()
        errors["LPIPS"] = lpips.distances(images, true).numpy()
        distance = frechet_distance()
        of_images = features(images, distance)
        measured = {what: (*bootstrap(values, seed=self.seed), len(values)) for what, values in errors.items()}
        resampled = bootstrap(lambda rows: frechet(of_images[rows], of_true[rows]), len(images), seed=self.seed, resamples=100)
        measured[distance] = (*resampled, len(images))
        # without any map: how alike the two spaces see the same images
        measured |= {what: (value, np.nan, np.nan, min(COMPARED, self.train)) for what, value in alike.items()}
        told = {
            "source": str(source),
            "target": str(target),
            "images": name,
            "drawn_by": str(codes.drawn_by or ""),
            "alpha": alpha,
        }
        rows = [
            told | {"measure": what, "value": value, "low": low, "high": high, "n": n}
            for what, (value, low, high, n) in measured.items()
        ]
        pictures = {f"{i}": images[i] for i in range(min(EXAMPLES, len(images)))}
        pictures |= {f"true-{i}": true[i] for i in range(min(EXAMPLES, len(true)))}
        return Work(rows, pictures)

    def findings(self, run: Run, rows: pd.DataFrame) -> Findings:
        """What comes through the maps."""
        from probekit.report.stitching import findings

        return findings(run, rows)


def pair_unit(source: LatentSpace, target: LatentSpace) -> str:
    """The name of a pair's unit."""
    return f"{source}--{target}"


@functools.cache
def frechet_distance() -> str:
    """The Fréchet distance that can be had: FID with the paper's 64 features, or fd-alexnet."""
    import torch

    from probekit.metrics.distributions import inception_features

    try:
        inception_features(torch.zeros(1, 3, 32, 32), 64)
    except ProbekitError:
        return ALEXNET
    return INCEPTION


def features(images: Tensor, distance: str) -> np.ndarray:
    """What that Fréchet distance compares of images (n, 3, h, w): (n, d)."""
    from probekit.metrics.distributions import alexnet_features, inception_features

    return (alexnet_features(images) if distance == ALEXNET else inception_features(images, 64)).numpy()

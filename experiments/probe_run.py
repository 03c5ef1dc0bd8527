"""Probing: what can be read off a latent space linearly, and what of it survives a map from another (All Roads, 4.2)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from probekit.experiments.spaces import OnSpaces, encode_unit
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Bench, Findings, Unit, Work

if TYPE_CHECKING:
    import pandas as pd

    from probekit.latents import LatentSpace
    from probekit.latents.codes import Codes
    from probekit.runs.folder import Run

NAN = float("nan")
COLUMNS = ["source", "target", "attribute", "measure", "value", "low", "high", "n", "note"]


@dataclass(frozen=True, kw_only=True)
class ProbeRun(OnSpaces):
    """Fit a probe for every label in every space, and see how much of it a map from another space keeps."""

    name: ClassVar[str] = "probe-run"
    baseline: ClassVar[bool] = True

    models: Annotated[
        str,
        typer.Option(help="Models, MODEL:SPACE or MODEL:SPACE:key=value, separated by commas; file.py:Class for one's own."),
    ] = "avatar-vae,avatar-vqvae,avatar-flow,avatar-ddpm:noised,avatar-ddpm:h"
    test: Annotated[int, typer.Option(min=2, help="Images on which probes are compared before and after a map.")] = 1000
    kind: Annotated[
        str,
        typer.Option(help="lasso (the paper's), ridge or logistic, for attributes; classes are read by logistic regression."),
    ] = "lasso"

    def __post_init__(self) -> None:
        super().__post_init__()
        from probekit.latents.probes import KINDS

        if self.kind not in KINDS:
            raise ProbekitError(f"--kind {self.kind!r}: choose {', '.join(KINDS)}")

    @functools.cached_property
    def sets(self) -> dict[str, Codes]:
        """The data set. Raises ProbekitError where it has no labels, or a space cannot encode it."""
        from probekit.latents.codes import code_sets

        sets = code_sets(self.spaces, self.data, self.train, self.test, self.seed, samples=False)
        (codes,) = sets.values()
        if codes.data.labels(codes.train[:1]).shape[1] == 0:
            raise ProbekitError(f"--data {self.data!r}: has no labels to probe for")
        return sets

    @property
    def codes(self) -> Codes:
        """The only set."""
        (codes,) = self.sets.values()
        return codes

    def plan(self) -> list[Unit]:
        """Encoding, then the probes of each space, then the maps from each source into all others."""
        (name,) = self.sets
        encoding = self.encode_units([(space, name) for space in self.spaces])
        labels = self.codes.data.labels(self.codes.train[:1]).shape[1]
        # of a probe and of a map take the time of so many images
        probing = [Unit(probes_unit(space), 100 * labels, needs=(encode_unit(space, name),)) for space in self.spaces]
        needs = tuple(unit.name for unit in (*encoding, *probing))
        maps = [Unit(f"maps-{space}", 1000 * len(self._targets(space)), needs=needs) for space in self.spaces]
        return [*encoding, *probing, *maps]

    def work(self, unit: Unit, bench: Bench) -> Work:
        """A set's latents in a space; the probes of a space; or what each target's probes say of latents mapped from a source.

        A row a label and measure. Of the probes, in a `target` without source: accuracy in percent and its coefficients, of
        attributes; accuracy of classes in percent, and r2 of numbers, each with its baseline, what always the same answer
        scores; or `skipped`, the reason being the note. Of the maps: match, the percentage of all test images of which the
        probe says the same of the mapped as of the target's own latents, and change, that of its balanced accuracy in percent.
        low, high: 95% Wilson intervals; n: images.
        """
        for space in self.spaces:
            if unit.name == probes_unit(space):
                return self._probe(space, bench)
            if unit.name == f"maps-{space}":
                return self._map(space, bench)
        return self.encode_work(unit, bench)

    def findings(self, run: Run, rows: pd.DataFrame) -> Findings:
        """What can be read, and what survives."""
        from probekit.report.probing import findings

        return findings(run, rows)

    def _targets(self, source: LatentSpace) -> list[LatentSpace]:
        return [space for space in self.spaces if space is not source and space.family != "random"]

    def _probe(self, space: LatentSpace, bench: Bench) -> Work:
        import pandas as pd

        from probekit.latents.probes import (
            DEFAULT_LASSO_ALPHA,
            LASSO_ALPHA,
            fit_probes,
            is_attribute,
            is_class,
            probe_numbers,
        )
        from probekit.metrics.distributions import share_interval

        labels, latents = self.codes.data.labels(self.codes.train), self.codes.of(space, "train")
        numbers = [name for name in labels if not is_attribute(labels[name]) and not is_class(labels[name])]
        weight = LASSO_ALPHA.get(space.family, DEFAULT_LASSO_ALPHA) if self.kind == "lasso" else 1.0

        def advance(name: str) -> None:
            bench.advance(100)

        fitted = fit_probes(latents, labels.drop(columns=numbers), self.kind, weight, self.seed, on_probe=advance)  # type: ignore[arg-type]
        read = probe_numbers(latents, labels[numbers], seed=self.seed, on_probe=advance)
        rows: list[dict[str, Any]] = []

        def add(label: str, measure: str, value: float, n: int, low: float = NAN, high: float = NAN, note: str = "") -> None:
            told = ("", str(space), label, measure, value, low, high, n, note)
            rows.append(dict(zip(COLUMNS, told, strict=True)))

        for row in fitted.scores.itertuples():
            low, high = (100 * share for share in share_interval(round(row.accuracy * row.test), row.test))
            note = "" if row.converged else "did not converge"
            if row.attribute in fitted.classes:
                add(row.attribute, "accuracy of classes", 100 * row.accuracy, row.test, low, high, note)
                add(row.attribute, "accuracy of classes, baseline", 100 * row.baseline, row.test)
            else:
                add(row.attribute, "accuracy", 100 * row.accuracy, row.test, low, high, note)
                add(row.attribute, "coefficients", row.nonzero, row.train)
        for label, reason in fitted.skipped.items():
            add(label, "skipped", NAN, 0, note=reason)
        for row in read.itertuples():
            if row.skipped:
                add(row.label, "skipped", NAN, 0, note=row.skipped)
            else:
                add(row.label, "r2", row.score, row.test)
                add(row.label, "r2, baseline", row.baseline, row.test)
        said = fitted.predict(self.codes.of(space, "test"))
        return Work(pd.DataFrame(rows, columns=COLUMNS), arrays=fitted.to_arrays() | {"said": said})

    def _map(self, source: LatentSpace, bench: Bench) -> Work:
        import numpy as np
        import pandas as pd

        from probekit.latents.maps import LinearMap
        from probekit.latents.probes import Probes, balanced_accuracy, percent_change, percent_match
        from probekit.latents.ridge import RidgeSolver
        from probekit.metrics.distributions import share_interval

        labels = self.codes.data.labels(self.codes.test)
        solver: RidgeSolver | None = None
        rows: list[dict[str, Any]] = []
        for target in self._targets(source):
            kept = bench.arrays(probes_unit(target))
            probes, before = Probes.of_arrays(kept), kept["said"]
            if probes.attributes:
                solver = solver or RidgeSolver(self.codes.of(source, "train"))
                weight = self.penalty(source.family, target.family)
                fitted = LinearMap(weight).fit(solver, self.codes.of(target, "train"))
                after = probes.predict(fitted.predict(self.codes.of(source, "test")))
                real = probes.truth(labels)
                match = np.atleast_1d(percent_match(before, after))
                change = np.atleast_1d(percent_change(balanced_accuracy(before, real), balanced_accuracy(after, real)))
                for i, label in enumerate(probes.attributes):
                    low, high = share_interval(int((before[:, i] == after[:, i]).sum()), len(after))
                    told = {"source": str(source), "target": str(target), "attribute": label, "n": len(after), "note": ""}
                    rows.append(told | {"measure": "match", "value": match[i], "low": 100 * low, "high": 100 * high})
                    rows.append(told | {"measure": "change", "value": change[i], "low": NAN, "high": NAN})
            bench.advance(1000)
        return Work(pd.DataFrame(rows, columns=COLUMNS))


def probes_unit(space: LatentSpace) -> str:
    """The name of the unit that fits a space's probes; its arrays are `Probes.to_arrays` and `said`, of the test latents."""
    return f"probes-{space}"

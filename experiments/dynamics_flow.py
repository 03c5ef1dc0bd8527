"""Dynamics: how early in a training a model's latent space stands, as far as probes see it (All Roads, section 4.3)."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from probekit.experiments.training import OnTraining, step_unit
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Bench, Findings, Unit, Work

if TYPE_CHECKING:
    import pandas as pd

    from probekit.latents import LatentSpace
    from probekit.latents.codes import Codes
    from probekit.runs.folder import Run

PROBE = 100
"""Images whose encoding takes the progress bar as far as one probe."""


@dataclass(frozen=True, kw_only=True)
class DynamicsFlow(OnTraining):
    """Fit probes in the space of every checkpoint of a training, and see when they have become as good as at its end."""

    name: ClassVar[str] = "dynamics-flow"

    model: Annotated[str, typer.Option(help="A bundled model, or a folder with step-<n> folders or files in it.")] = (
        "avatar-flow"
    )
    space: Annotated[
        str | None, typer.Option(help="Which of its spaces, as SPACE or SPACE:key=value. [default: its first]")
    ] = None
    data: Annotated[str, typer.Option(help="avatars, scenes, photos, celeba:PATH, folder:PATH or a folder.")] = "avatars"
    train: Annotated[int, typer.Option(min=10, help="Images that maps and probes are fitted on.")] = 9000
    kind: Annotated[str, typer.Option(help="lasso (the paper's), ridge or logistic.")] = "lasso"

    def __post_init__(self) -> None:
        super().__post_init__()
        from probekit.latents.probes import KINDS

        if self.kind not in KINDS:
            raise ProbekitError(f"--kind {self.kind!r}: choose {', '.join(KINDS)}")

    def space_at(self, step: int) -> LatentSpace:
        """A checkpoint's latent space. Raises ProbekitError, naming what there is, where it has no such space."""
        return self.checkpoint(step).space(self.space, label=f"step {step}")

    @functools.cached_property
    def codes(self) -> Codes:
        """The images, all checkpoints' being of one size."""
        from probekit.latents.codes import code_sets

        *_, last = self.paths
        (codes,) = code_sets([self.space_at(last)], self.data, self.train, 0, self.seed, samples=False).values()
        return codes

    @functools.cached_property
    def labels(self) -> pd.DataFrame:
        """The binary labels of the images. Raises ProbekitError where there are none."""
        labels = self.codes.data.labels(self.codes.train)
        binary = labels[[name for name in labels if labels[name].dtype == bool]]
        if binary.shape[1] == 0:
            raise ProbekitError(f"--data {self.data!r}: has no binary labels to probe for")
        return binary

    def inputs(self) -> dict[str, Any]:
        """The fingerprints of every checkpoint's space and of the images, and what the space is called.

        Raises ProbekitError for a checkpoint that cannot be loaded or encode, and where they have images of different sizes.
        """
        digests, sizes = {}, {}
        for step in self.paths:
            digests[str(step)], sizes[step], called = self._told(step)
        *_, last = sizes
        if other := [step for step in sizes if sizes[step] != sizes[last]]:
            said = ", ".join(f"step {step} has images of {sizes[step]} pixels" for step in (other[0], last))
            raise ProbekitError(f"--model {self.model!r}: its checkpoints make no series ({said})")
        _ = self.labels  # refuses images without any
        return {"checkpoints": digests, "space": self.space or called, "data_digest": self.codes.data.digest}

    def _told(self, step: int) -> tuple[str, int | None, str]:
        """A checkpoint's digest, image size and its space's name: nothing that would keep it loaded."""
        space = self.space_at(step)
        if space.encoder is None:
            raise ProbekitError(f"--space {self.space or space.name!r}: cannot encode, there is nothing to probe")
        return space.digest, space.image_size, space.name

    def plan(self) -> list[Unit]:
        """A unit a checkpoint."""
        size = len(self.codes.train) + PROBE * self.labels.shape[1]
        return [Unit(step_unit(step), size) for step in self.paths]

    def work(self, unit: Unit, bench: Bench) -> Work:
        """A checkpoint's images encoded, and its probes: a row an attribute.

        accuracy: percent right on n held-out latents, half of which have the attribute; low, high: its 95% Wilson interval.
        """
        import pandas as pd

        from probekit.latents.probes import DEFAULT_LASSO_ALPHA, KINDS, LASSO_ALPHA, fit_probes
        from probekit.metrics.distributions import share_interval

        # before the checkpoint, or it would be loaded twice; a copy, since codes keep the spaces they encoded, and so models
        codes, binary = dataclasses.replace(self.codes), self.labels
        step = int(unit.name.removeprefix("step-"))
        space = self.space_at(step)
        codes.encode(space, bench.advance)
        weight = LASSO_ALPHA.get(space.family, DEFAULT_LASSO_ALPHA) if self.kind == "lasso" else 1.0
        (kind,) = (known for known in KINDS if known == self.kind)
        fitted = fit_probes(
            codes.of(space, "train"), binary, kind, weight, self.seed, on_probe=lambda name: bench.advance(PROBE)
        )
        rows = []
        for row in fitted.scores.itertuples():
            low, high = share_interval(round(row.accuracy * row.test), row.test)
            rows.append(
                {
                    "step": step,
                    "attribute": row.attribute,
                    "accuracy": 100 * row.accuracy,
                    "low": 100 * low,
                    "high": 100 * high,
                    "n": row.test,
                }
            )
        return Work(pd.DataFrame(rows, columns=["step", "attribute", "accuracy", "low", "high", "n"]))

    def findings(self, run: Run, rows: pd.DataFrame) -> Findings:
        """When each attribute stands. Raises ProbekitError where no attribute could be probed."""
        from probekit.report.dynamics_flow import findings

        if rows.empty:
            raise ProbekitError(f"--train {self.train}: too few images with, or without, any of the attributes")
        return findings(run, rows)

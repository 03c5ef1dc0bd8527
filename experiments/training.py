"""What the experiments on a training share: its checkpoints, of which one at a time is loaded."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probekit import checked
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Experiment

if TYPE_CHECKING:
    from probekit.models import Model


@dataclass(frozen=True, kw_only=True)
class OnTraining(Experiment):
    """An experiment on every checkpoint of one training."""

    model: Annotated[str, typer.Option(help="A bundled model, or a folder with step-<n> folders or files in it.")]
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of noise, samples and bootstrap.")] = 0

    @property
    def subject(self) -> str:
        """The model's name."""
        return Path(self.model).name

    @functools.cached_property
    def paths(self) -> dict[int, Path]:
        """The checkpoints by their number of steps, in order. Raises ProbekitError as `checkpoint_paths`."""
        return checkpoint_paths(self.model)

    def checkpoint(self, step: int) -> Model:
        """One of them. The last that was asked for is kept, and given up before another is loaded.

        Raises ProbekitError as `probekit.load`.
        """
        if step not in self._held:
            self._held.clear()
            self._held[step] = self.loaded(self.paths[step])
        return self._held[step]

    def loaded(self, path: Path) -> Model:
        """The model that lies there."""
        from probekit.models import load

        return load(path, device=self.device)

    @functools.cached_property
    def _held(self) -> dict[int, Model]:
        return {}


def checkpoint_paths(model: str) -> dict[int, Path]:
    """The checkpoints of a training by their number of steps, the finished model, where there is one, as the last.

    They are what is called step-<n> in the model's folder. Raises ProbekitError where there are fewer than two.
    """
    from probekit.bundled import MODELS, trained, weights

    folder = weights(model) if model in MODELS else checked.path(f"--model {checked.shown(model)}", model)
    paths = sorted(folder.glob("step-*"))  # the same order everywhere
    found = {int(match[1]): path for path in paths if (match := re.match(r"step-([0-9]{1,9})(?![0-9])", path.name))}
    if model in MODELS and found and trained(model):
        from probekit.zoo.avatar_families import FAMILIES

        found[FAMILIES[model].schedule.steps] = folder
    if len(found) < 2:
        raise ProbekitError(f"--model {model!r}: {len(found)} checkpoints step-<n> in {str(folder)!r}, at least 2 are needed")
    return dict(sorted(found.items()))


def step_unit(step: int) -> str:
    """The name of a checkpoint's unit of results."""
    return f"step-{step:09d}"

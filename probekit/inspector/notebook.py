"""The inspector in a notebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from probekit.inspector.server import Inspector, open_inspector
from probekit.models import Model, load


def inspect(*subjects: Model | str | Path) -> Inspector:
    """Open the inspector of a model, of one or two finished runs, or of both; in a notebook it shows itself inline.

    subjects: a model (`load`'s, or what `load` takes) and the folders of runs. Raises ProbekitError as `open_inspector`, and
    for two models.
    """
    model, runs = chosen(subjects)
    return open_inspector(model, runs)


def chosen(subjects: tuple[Model | str | Path, ...], **loading: Any) -> tuple[Model | None, list[Path]]:
    """The model among the subjects, loaded, and the runs. Raises ProbekitError for two models."""
    from probekit.hooks.errors import ProbekitError

    model: Model | None = None
    runs: list[Path] = []
    for subject in subjects:
        if isinstance(subject, Model):
            found = subject
        elif (Path(subject) / "config.json").is_file() and not (Path(subject) / "model_index.json").is_file():
            runs.append(Path(subject))
            continue
        else:
            found = load(subject, **loading)
        if model is not None:
            raise ProbekitError(f"inspect: two models, {model.name!r} and {found.name!r}; one is asked at a time")
        model = found
    return model, runs

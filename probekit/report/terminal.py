"""What the commands print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from probekit import hooks

if TYPE_CHECKING:
    from probekit.models import Model
    from probekit.report import findings
    from probekit.zoo.measured import Measured


def console() -> Console:
    """Where tables go: as wide as the terminal, and wide enough for whole rows where the output is piped."""
    here = Console()
    return here if here.is_terminal else Console(width=240)


class _Table(Table):
    """A table whose title, headings and cells are text: rich reads markup in strings, and names may look like it."""

    def __init__(self, title: str) -> None:
        super().__init__(title=Text(title), title_justify="left")

    def add(self, *cells: str, style: str = "", at: int = -1) -> None:
        """A row; style: rich's, of one of its cells, the last if nothing is said."""
        texts = [Text(cell) for cell in cells]
        texts[at].stylize(style)
        self.add_row(*texts)


def print_table(told: findings.Table) -> None:
    """A table of findings."""
    table = _Table(told.title)
    for heading in told.columns:
        left = heading in told.text
        table.add_column(Text(heading), justify="left" if left else "right", no_wrap=left)
    for number, row in enumerate(told.rows):
        table.add(*row, style=told.styles.get(number, ""))
    console().print(table)


def print_layers(model: Model, layers: Sequence[hooks.Layer]) -> None:
    """A table of a denoiser's layers; output shapes are those of one picture, read off one call of the denoiser."""
    of_text = [la for la in layers if la.name.split(".")[0] in hooks.TEXT_ENCODERS]
    shapes = hooks.output_shapes(model.denoiser, [la for la in layers if la not in of_text], model.denoise_once)
    parts = {name: getattr(model.pipeline, name) for name in {la.name.split(".")[0] for la in of_text}}
    modules = {f"{part}.{name}": module for part, whole in parts.items() for name, module in whole.named_modules()}
    modules |= dict(model.denoiser.named_modules())
    table = _Table(f"{model.name}: {type(model.denoiser).__name__}")
    for heading in ("order", "layer", "type", "streams", "output", "parameters"):
        table.add_column(heading, justify="right" if heading in ("order", "parameters") else "left", no_wrap=True)
    for la in layers:
        module = modules.get(la.name)  # chosen heads are no module
        count = "" if module is None else f"{sum(p.numel() for p in module.parameters()):,}"
        shape = "x".join(map(str, shapes.get(la.name, ())[1:]))
        table.add(f"{la.order:.4g}", la.name, la.kind, ", ".join(la.streams), shape, count)
    console().print(table)


def print_models(models: Sequence[Model]) -> None:
    """A table of models: one line a latent space, with what it can do."""
    table = _Table("models")
    for heading in (
        "name",
        "family",
        "images",
        "weights",
        "space",
        "shape",
        "takes",
        "encodes",
        "decodes",
        "samples",
        "what it is",
    ):
        table.add_column(heading, justify="right" if heading == "weights" else "left", no_wrap=heading != "what it is")
    for model in models:
        size = "any" if model.image_size is None else f"{model.image_size}x{model.image_size}"
        first = (model.name, model.family, size, f"{model.parameters:,}")
        for i, space in enumerate(model.spaces.values()):
            can = ("yes" if part else "-" for part in (space.encoder, space.decoder, space.sampler))
            shape = "x".join(map(str, space.shape))
            table.add(*(first if i == 0 else [""] * 4), space.name, shape, space.takes, *can, space.about)
        if not model.spaces:
            table.add(*first)
        table.add_section()
    console().print(table)


def print_zoo() -> None:
    """A table of the bundled models."""
    from probekit.bundled import weights
    from probekit.zoo.recipes import RECIPES

    table = _Table("the zoo")
    for heading in ("name", "what it is", "size"):
        table.add_column(heading, justify="right" if heading == "size" else "left")
    for name, recipe in RECIPES.items():
        size = sum(f.stat().st_size for f in weights(name).rglob("*") if f.is_file()) / 2**20
        table.add(name, recipe.about, f"{size:.1f} MiB" if size else "not trained yet")
    console().print(table)


def print_evaluation(name: str, rows: Sequence[Measured]) -> None:
    """A table of a model's measurement with the bars it is meant to reach."""
    table = _Table(name)
    for heading in ("measured", "value", "bar"):
        table.add_column(heading, justify="left" if heading == "measured" else "right")
    for what, value, bar, unit in rows:
        shown = "-" if math.isnan(value) else f"{value:.1%}" if unit == "share" else f"{value:.3g} {unit}".strip()
        missed = bar is not None and value < bar
        table.add(what, shown, "" if bar is None else f"{bar:.0%}", style="red" if missed else "", at=1)
    console().print(table)

"""The report of a probing run: what can be read off each space, and what of it survives a map from another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probekit.report.figures import command_line, render, save_figure, style
from probekit.files import write_whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def print_probes(rows: pd.DataFrame) -> None:
    """Probe accuracy of every space and attribute, and how alike an attribute is represented."""
    from rich.table import Table

    from probekit.report.terminal import console

    accuracy, alike = _wide(rows, "accuracy"), ranking(rows)
    if len(accuracy):
        table = Table(
            title="probe accuracy in percent, by space; match: probes say the same of mapped latents", title_justify="left"
        )
        table.add_column("attribute", no_wrap=True)
        for heading in (*accuracy.columns, "match"):
            table.add_column(heading, justify="right")
        for attribute, values in accuracy.reindex(alike.index).iterrows():
            match = alike.match[attribute]
            table.add_row(str(attribute), *(f"{v:.0f}" for v in values), f"{match:.0f}")
        table.add_section()
        table.add_row("mean", *(f"{v:.1f}" for v in accuracy.mean()), f"{alike.match.mean():.1f}")
        console().print(table)
    for measure, grid in _values(rows).items():
        table = Table(title=f"{measure}, by space; in brackets what always the same answer scores", title_justify="left")
        table.add_column("label", no_wrap=True)
        for heading in grid.columns:
            table.add_column(heading, justify="right")
        for label, cells in grid.iterrows():
            table.add_row(str(label), *cells)
        console().print(table)
    for told in notes(rows):
        console().print(f"{told['attribute']}: {told['note']}", highlight=False)


def notes(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The attributes that were not probed, or whose solver stopped early, and why; one a note."""
    told = rows[rows.note != ""]
    return [
        {"attribute": attribute, "note": note if measure == "skipped" else f"{note} in {', '.join(group.target)}"}
        for (attribute, measure, note), group in told.groupby(["attribute", "measure", "note"], sort=False)
    ]


def _values(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """For r2 and the accuracy of classes, labels by spaces, each cell as it is shown."""
    import pandas as pd

    found = {}
    for measure, write in (("r2", "{:.2f} ({:.2f})"), ("accuracy of classes", "{:.0f} % ({:.0f} %)")):
        score, baseline = _wide(rows, measure), _wide(rows, f"{measure}, baseline")
        if len(score):
            cells = {space: [*map(write.format, score[space], baseline[space])] for space in score}
            found[measure] = pd.DataFrame(cells, index=score.index)
    return found


def ranking(rows: pd.DataFrame) -> pd.DataFrame:
    """Attributes, those first that are represented most alike: one column `match` over the pairs of models, one `random`.

    The mean percentage of images of which a probe says the same of a space's own latents and of latents mapped into it; a probe
    that nearly always says no is easily matched, and `random`, the same from the random encoder, shows by how much.
    """
    import pandas as pd

    match = rows[rows.measure == "match"]
    found = pd.DataFrame({
        "match": match[match.source != "random"].groupby("attribute").value.mean(),
        "random": match[match.source == "random"].groupby("attribute").value.mean(),
    })  # fmt: skip
    found["above"] = found.match - found.random
    return found.sort_values("above", ascending=False, kind="stable")


def _wide(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Attributes by spaces, in the order of the run."""
    own = rows[rows.measure == measure]
    return own.pivot(index="attribute", columns="target", values="value").reindex(
        index=own.attribute.unique(), columns=own.target.unique()
    )


def write_report(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> Path:
    """Write figures/ (PNG and SVG) and report.html; returns the page's path."""
    (folder / "figures").mkdir(exist_ok=True)
    alike = ranking(rows)
    order = alike.index.tolist()
    accuracy = _wide(rows, "accuracy").reindex(order)
    figures = {} if accuracy.empty else {
        "accuracy": save_figure(_heatmap(accuracy, 50, 100, "Greens"), folder / "figures" / "accuracy"),
        "match": save_figure(_heatmap(_pairs(rows, "match", order), 50, 100, "Blues"), folder / "figures" / "match"),
        "change": save_figure(_heatmap(_pairs(rows, "change", order), -50, 50, "RdBu"), folder / "figures" / "change"),
    }  # fmt: skip
    page = render(
        "probing.html",
        config=config, options=config["options"], command=command_line(config["command"]), figures=figures,
        alike=alike.reset_index().to_dict("records"), means=accuracy.mean().round(1).to_dict(), rows=rows.to_dict("records"),
        values={m: (list(g.columns), list(g.itertuples(name=None))) for m, g in _values(rows).items()}, notes=notes(rows),
    )  # fmt: skip
    report = folder / "report.html"
    write_whole(report, page)
    return report


def _pairs(rows: pd.DataFrame, measure: str, order: list[str]) -> pd.DataFrame:
    """Attributes by pairs, `source -> target`, the random encoder's last."""
    found = rows[rows.measure == measure].copy()
    found["pair"] = found.source + " → " + found.target
    pairs = [p for p in found.pair.unique() if not p.startswith("random")] + [
        p for p in found.pair.unique() if p.startswith("random")
    ]
    return found.pivot(index="attribute", columns="pair", values="value").reindex(index=order, columns=pairs)


def _heatmap(grid: pd.DataFrame, low: float, high: float, shades: str) -> Figure:
    """Rows of `grid` across, columns down, each cell with its number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    values = grid.to_numpy(dtype=float).T
    with plt.rc_context(style()):
        figure, ax = plt.subplots(figsize=(2.6 + 0.3 * values.shape[1], 1.35 + 0.24 * values.shape[0]), layout="constrained")
        image = ax.imshow(values, cmap=shades, vmin=low, vmax=high, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            if not np.isnan(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.55
                ax.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=6.5, color="white" if dark else "#26251f")
        ax.set_xticks(range(values.shape[1]), [str(a).replace("_", " ") for a in grid.index], rotation=55, ha="right",
                      rotation_mode="anchor", fontsize=7.5)  # fmt: skip
        ax.set_yticks(range(values.shape[0]), list(grid.columns), fontsize=7.5)
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
        plt.close(figure)
    return figure

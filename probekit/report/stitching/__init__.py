"""The report of a stitching run: the grids of stitched reconstructions, and the measures as heatmaps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from probekit.report.figures import command_line, render, save_figure, style
from probekit.files import file_name, write_whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# what is told first: latents differ in scale from space to space, so the error is taken in parts of the target's variance
_MAIN = ("latent error over variance, test", "RMSE", "LPIPS", "FID, 64 features", "fd-alexnet")
_ALIKE = ("CKA", "mutual 10-NN")
_LATENT = ("latent MSE, train", "latent MSE, test")
_SHADES = "YlGnBu"


def print_measures(rows: pd.DataFrame) -> None:
    """One line a pair: its penalty and the measures with their intervals."""
    from rich.table import Table

    from probekit.report.terminal import console

    table = Table(
        title="stitched: encoder of the source, linear map, decoder of the target; 95% intervals", title_justify="left"
    )
    measures = _present(rows, _MAIN)
    for heading in ("source", "target", "alpha", *measures):
        table.add_column(heading, justify="left" if heading in ("source", "target") else "right")
    for (source, target), group in rows.groupby(["source", "target"], sort=False):
        by = group.set_index("measure")
        alpha = by.alpha.iloc[0]
        cells = [f"{r.value:.3g} {r.low:.3g}-{r.high:.3g}" if (r := _row(by, m)) is not None else "" for m in measures]
        table.add_row(source, target, "" if np.isnan(alpha) else f"{alpha:.3g}", *cells)
    console().print(table)


def write_report(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> Path:
    """Write figures/ (PNG and SVG) and report.html; returns the page's path."""
    (folder / "figures").mkdir(exist_ok=True)
    figures: list[dict[str, str]] = []

    def add(title: str, name: str, shown: pd.DataFrame, examples: range) -> None:
        if len(shown) and examples:
            figures.append({"title": title, "svg": save_figure(_grid(folder, shown, examples), folder / "figures" / name)})

    kept = min(8, config["options"]["test"])
    for number, (images, group) in enumerate(rows.groupby("images", sort=False)):
        drawn_by = group.drawn_by.iloc[0]
        if drawn_by:  # of a model's own samples, what other encoders and its decoder make of them (figure 2), and the reverse
            add(f"Stitched reconstructions of {images}", f"samples-{number}", group[group.target == drawn_by], range(kept))
            others = group[(group.source == drawn_by) & (group.target != drawn_by)]
            add(f"What other decoders make of {images}", f"from-{number}", others, range(min(3, kept)))
        else:  # figures 1 and 9
            add(f"Stitched reconstructions of {images}", "reconstructions", group, range(min(3, kept)))
            add(f"More of {images}", "more-reconstructions", group, range(3, min(6, kept)))
    heat = save_figure(_heatmaps(rows, _present(rows, _MAIN)), folder / "figures" / "measures")
    alike = save_figure(_heatmaps(rows, _ALIKE), folder / "figures" / "similarity")
    latent = save_figure(_heatmaps(rows, _LATENT), folder / "figures" / "latent-mse")
    page = render(
        "stitching.html",
        config=config, options=config["options"], command=command_line(config["command"]), figures=figures, heat=heat,
        alike=alike, latent=latent, best=_best(rows), rows=rows.to_dict("records"), n=config["options"]["test"],
    )  # fmt: skip
    report = folder / "report.html"
    write_whole(report, page)
    return report


def _present(rows: pd.DataFrame, measures: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(m for m in measures if (rows.measure == m).any())


def _row(by: pd.DataFrame, measure: str) -> Any:
    return by.loc[measure] if measure in by.index else None


def _best(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """For every target, the source whose stitched pictures are nearest in LPIPS, and its own decoder's and chance's value."""
    found = []
    # on the same pictures only: a decoder's own samples where it cannot encode, else the data set
    lpips = rows[(rows.measure == "LPIPS") & ((rows.drawn_by == "") | (rows.drawn_by == rows.target))]
    for target, group in lpips.groupby("target", sort=False):
        by = group.set_index("source").value
        others = by.drop([target, "random"], errors="ignore")
        if len(others):
            found.append({"target": target, "source": others.idxmin(), "value": others.min(),
                          "own": by.get(target, float("nan")), "random": by.get("random", float("nan"))})  # fmt: skip
    return found


def _grid(folder: Path, rows: pd.DataFrame, examples: range) -> Figure:
    """Figures 1 and 2: a row a source, a column a target, for each example; the true picture on the left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sources, targets = rows.source.unique().tolist(), rows.target.unique().tolist()
    several = len(targets) > 1
    columns = [(e, t) for e in examples for t in ([None, *targets] if several else targets)]
    lines = sources if several else [None, *sources]
    with plt.rc_context(style()):
        # inches; titles stand at 60 degrees
        size, top = 0.62, 0.2 + 0.052 * max(map(len, targets)) if several else 0.05
        figure, axes = plt.subplots(
            len(lines), len(columns), figsize=(2.0 + size * len(columns), 0.1 + top + size * len(lines)), squeeze=False,
            gridspec_kw={"wspace": 0.06, "hspace": 0.06},
        )  # fmt: skip
        for i, source in enumerate(lines):
            for j, (example, target) in enumerate(columns):
                ax = axes[i, j]
                ax.set_xticks([])
                ax.set_yticks([])
                truth = target is None or source is None
                unit = file_name(f"{sources[0] if source is None else source}--{targets[0] if target is None else target}")
                file = folder / "images" / unit / f"{'true-' if truth else ''}{example}.png"
                blank = truth and several and i != len(lines) // 2
                if file.exists() and not blank:
                    ax.imshow(Image.open(file), interpolation="nearest")
                own = source is not None and source == target
                for spine in ax.spines.values():
                    spine.set_visible(own)
                    spine.set_color("#c8445b")
                    spine.set_linewidth(2)
                if i == 0 and several:
                    ax.set_title("true" if target is None else target, rotation=60, ha="left", va="bottom", fontsize=7.5)
                if j == 0:
                    ax.set_ylabel("true" if source is None else source, rotation=0, ha="right", va="center", fontsize=8)
        width, height = figure.get_size_inches()
        figure.subplots_adjust(
            left=1.5 / width, right=1 - (0.5 if several else 0.05) / width, bottom=0.01, top=1 - top / height
        )
        plt.close(figure)
    return figure


def _heatmaps(rows: pd.DataFrame, measures: tuple[str, ...]) -> Figure:
    """Each measure of every pair. Figure 1, right, and figure 5."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm, Normalize

    sources, targets = rows.source.unique().tolist(), rows.target.unique().tolist()
    with plt.rc_context(style()):
        width, height = 1.5 + 0.66 * len(targets), 1.35 + 0.36 * len(sources)
        across = 2
        down = -(-len(measures) // across)
        figure, axes = plt.subplots(down, across, figsize=(across * width, down * height), squeeze=False, layout="constrained")
        for ax, measure in zip(axes.flat, measures, strict=False):
            grid = rows[rows.measure == measure].pivot(index="source", columns="target", values="value")
            grid = grid.reindex(index=sources, columns=targets)
            values = grid.to_numpy()
            low, high = np.nanmin(values), np.nanmax(values)
            wide = low > 0 and high / low > 30 and measure not in _ALIKE
            # what is exact would take all shades for itself
            norm = LogNorm(max(low, high / 1000), high, clip=True) if wide else Normalize(0, 1 if measure in _ALIKE else high)
            ax.imshow(values, cmap=_SHADES, norm=norm, aspect="auto")
            for (y, x), value in np.ndenumerate(values):
                if not np.isnan(value):
                    ax.text(
                        x, y, f"{value:.2g}" if value < 100 else f"{value:.0f}", ha="center", va="center", fontsize=7.5,
                        color="white" if norm(value) > 0.55 else "#26251f",
                        fontweight="bold" if sources[y] == targets[x] else "normal",
                    )  # fmt: skip
            ax.set_title(measure, loc="left", fontsize=10, fontweight="bold")
            ax.set_xticks(range(len(targets)), targets, rotation=35, ha="right", rotation_mode="anchor")
            ax.set_yticks(range(len(sources)), sources)
            ax.tick_params(length=0)
            for spine in ax.spines.values():
                spine.set_visible(False)
        figure.supylabel("encoder", fontsize=9)
        figure.supxlabel("decoder (bold: the model's own)", fontsize=9)
        plt.close(figure)
    return figure

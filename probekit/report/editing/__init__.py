"""The report of carried edits: pictures moved along directions from other spaces, and whether the reader sees it."""

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

RANDOM = "random direction"


def best(rows: pd.DataFrame) -> pd.DataFrame:
    """For each target, source and attribute the strength with the most success, the least such one."""
    ordered = rows.sort_values(["success", "strength"], ascending=[False, True], kind="stable")
    return ordered.groupby(["target", "source", "attribute"], sort=False).head(1).sort_index()


def print_edits(rows: pd.DataFrame) -> None:
    """One line a target and source: success at the best strength, what else is kept, how near counterfactuals are."""
    from rich.table import Table

    from probekit.report.terminal import console

    table = Table(title="edits: a direction of the source, applied in the target", title_justify="left")
    for heading in (
        "target",
        "direction of",
        "attribute given",
        "others kept",
        "cosine with counterfactuals",
        "LPIPS to them",
        "not edited",
    ):
        table.add_column(heading, justify="left" if heading in ("target", "direction of") else "right")
    for (target, source), group in best(rows).groupby(["target", "source"], sort=False):
        name = f"{source} (its own)" if source == target else source
        table.add_row(target, name, f"{group.success.mean():.0%}", f"{group.kept.mean():.0%}", f"{group.cosine.mean():.2f}",
                      f"{group.apart.mean():.3f}", f"{group.apart_unedited.mean():.3f}")  # fmt: skip
    console().print(table)


def write_report(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> Path:
    """Write figures/ (PNG and SVG) and report.html; returns the page's path."""
    (folder / "figures").mkdir(exist_ok=True)
    strips = []
    for number, target in enumerate(rows.target.unique()):
        figure = _pictures(folder, str(target), rows[rows.target == target])
        strips.append({"target": target, "svg": save_figure(figure, folder / "figures" / f"edits-{number}")})
    success = save_figure(_bars(best(rows)), folder / "figures" / "success")
    page = render(
        "editing.html",
        config=config, options=config["options"], command=command_line(config["command"]), strips=strips, success=success,
        rows=rows.to_dict("records"), random=RANDOM,
    )  # fmt: skip
    report = folder / "report.html"
    write_whole(report, page)
    return report


def _pictures(folder: Path, target: str, rows: pd.DataFrame) -> Figure:
    """A row a direction's source, a column an attribute: four pictures each, moved by one step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    unit = file_name(target)
    lines = ["plain", target, *(s for s in rows.source.unique() if s not in (target, RANDOM)), RANDOM]
    names = rows.attribute.unique().tolist()
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            len(lines), len(names), figsize=(1.6 + 1.75 * len(names), 0.45 + 0.48 * len(lines)), squeeze=False,
            gridspec_kw={"wspace": 0.06, "hspace": 0.1},
        )  # fmt: skip
        for i, line in enumerate(lines):
            for j, name in enumerate(names):
                ax = axes[i, j]
                ax.axis("off")
                file = folder / "images" / unit / f"{line.replace('/', '_')}-{name}.png"
                if file.exists():
                    ax.imshow(Image.open(file), interpolation="nearest")
                if i == 0:
                    ax.set_title(name.replace("_", " "), fontsize=8.5, fontweight="bold")
                if j == 0:
                    label = {"plain": "not edited", target: "its own"}.get(line, line if line == RANDOM else f"from {line}")
                    ax.text(-0.04, 0.5, label, transform=ax.transAxes, ha="right", va="center", fontsize=8)
        width, height = figure.get_size_inches()
        figure.subplots_adjust(left=1.5 / width, right=0.99, bottom=0.01, top=1 - 0.3 / height)
        plt.close(figure)
    return figure


def _bars(found: pd.DataFrame) -> Figure:
    """Success at the best strength in each target: by its own direction, carried ones and a random one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    targets, names = found.target.unique().tolist(), found.attribute.unique().tolist()
    colours = ["#4b4b52", "#2f6db5", "#5b8c5a", "#8a5aa8", "#3aa0a0"]
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            len(targets), 1, figsize=(8.6, 0.7 + 1.75 * len(targets)), squeeze=False, layout="constrained", sharex=True
        )
        for ax, target in zip(axes[:, 0], targets, strict=True):
            own = found[found.target == target]
            sources = [target, *(s for s in own.source.unique() if s not in (target, RANDOM)), RANDOM]
            width = 0.8 / len(sources)
            for k, source in enumerate(sources):
                by = own[own.source == source].set_index("attribute").reindex(names)
                at = np.arange(len(names)) + (k - (len(sources) - 1) / 2) * width
                colour = "#d5d4cf" if source == RANDOM else colours[k % len(colours)]
                label = "its own" if source == target else source if source == RANDOM else f"from {source}"
                ax.bar(at, by.success, width * 0.9, color=colour, label=label)
                spread = np.abs(np.vstack([by.success - by.low, by.high - by.success]))
                ax.errorbar(at, by.success, yerr=spread, fmt="none", ecolor="#26251f", elinewidth=0.8, capsize=1.5)
                ax.plot(
                    at, by.kept, "o", ms=3, color="#c8445b", label="other attributes kept" if k == len(sources) - 1 else None
                )
            ax.set(ylim=(0, 1.05), ylabel="share")
            ax.set_title(f"applied in {target}", loc="left", fontsize=9.5, fontweight="bold")
            ax.set_xticks(range(len(names)), [n.replace("_", " ") for n in names])
            ax.tick_params(length=0)
            ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7.5)
        plt.close(figure)
    return figure

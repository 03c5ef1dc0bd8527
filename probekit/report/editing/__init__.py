"""The report of carried edits: pictures moved along directions from other spaces, and whether the reader sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probekit.files import file_name
from probekit.report.figures import render, save_figure, style
from probekit.report.findings import Findings, Table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probekit.runs.folder import Run

RANDOM = "random direction"


def best(rows: pd.DataFrame) -> pd.DataFrame:
    """For each target, source and attribute the strength with the most success, the least such one."""
    ordered = rows.sort_values(["success", "strength"], ascending=[False, True], kind="stable")
    return ordered.groupby(["target", "source", "attribute"], sort=False).head(1).sort_index()


def headline(rows: pd.DataFrame) -> str:
    """How often directions give their attribute at their best strength: a space's own, carried ones and random ones."""
    found = best(rows)
    own, random = found.source == found.target, found.source == RANDOM
    said = f"At the best strength a space's own directions give the attribute in {found.success[own].mean():.0%} of the images"
    if (carried := ~own & ~random).any():
        said += f", those carried from other spaces in {found.success[carried].mean():.0%}"
    return f"{said}, random ones in {found.success[random].mean():.0%}."


def findings(run: Run, rows: pd.DataFrame) -> Findings:
    """What a run's rows come to.

    A line a target and source: success at the best strength, what else is kept, how near counterfactuals are.
    """
    columns = (
        "target",
        "direction of",
        "attribute given",
        "others kept",
        "cosine with counterfactuals",
        "LPIPS to them",
        "not edited",
    )
    told = [
        (
            str(target),
            f"{source} (its own)" if source == target else str(source),
            f"{group.success.mean():.0%}",
            f"{group.kept.mean():.0%}",
            f"{group.cosine.mean():.2f}",
            f"{group.apart.mean():.3f}",
            f"{group.apart_unedited.mean():.3f}",
        )
        for (target, source), group in best(rows).groupby(["target", "source"], sort=False)
    ]
    table = Table("edits: a direction of the source, applied in the target", columns, told, text=("target", "direction of"))
    figures = ["success", *(f"edits-{number}" for number in range(rows.target.nunique()))]
    return Findings(run, rows, [table], lambda: _page(run, rows), figures, headline(rows))


def _page(run: Run, rows: pd.DataFrame) -> bytes:
    figures = run.folder / "figures"
    strips = []
    for number, target in enumerate(rows.target.unique()):
        figure = _pictures(run, str(target), rows[rows.target == target])
        strips.append({"target": target, "svg": save_figure(figure, figures / f"edits-{number}")})
    return render(
        "editing/page.html",
        run,
        strips=strips,
        success=save_figure(_bars(best(rows)), figures / "success"),
        rows=rows.to_dict("records"),
        random=RANDOM,
        headline=headline(rows),
    )


def _pictures(run: Run, target: str, rows: pd.DataFrame) -> Figure:
    """A row a direction's source, a column an attribute: four pictures each, moved by one step."""
    import matplotlib
    from matplotlib.figure import Figure
    from PIL import Image

    lines = {"plain": "not edited", target: "its own"}
    lines |= {source: f"from {source}" for source in rows.source.unique() if source not in (target, RANDOM)}
    lines[RANDOM] = RANDOM
    names = rows.attribute.unique().tolist()
    left = max(1.5, 0.075 * max(map(len, lines.values())))  # inches for the names of spaces, which may be long
    width, height = left + 0.1 + 1.75 * len(names), 0.45 + 0.48 * len(lines)
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(width, height))
        axes = figure.subplots(len(lines), len(names), squeeze=False, gridspec_kw={"wspace": 0.06, "hspace": 0.1})
        for i, (line, label) in enumerate(lines.items()):
            for j, name in enumerate(names):
                ax = axes[i, j]
                ax.axis("off")
                file = run.picture(target, f"{file_name(line)}-{name}")
                if file.exists():
                    ax.imshow(Image.open(file), interpolation="nearest")
                if i == 0:
                    ax.set_title(name.replace("_", " "), fontsize=8.5, fontweight="bold")
                if j == 0:
                    ax.text(-0.04, 0.5, label, transform=ax.transAxes, ha="right", va="center", fontsize=8)
        figure.subplots_adjust(left=left / width, right=0.99, bottom=0.01, top=1 - 0.3 / height)
    return figure


def _bars(found: pd.DataFrame) -> Figure:
    """Success at the best strength in each target: by its own direction, carried ones and a random one."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    targets, names = found.target.unique().tolist(), found.attribute.unique().tolist()
    colours = ["#4b4b52", "#2f6db5", "#5b8c5a", "#8a5aa8", "#3aa0a0"]
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(8.6, 0.7 + 1.75 * len(targets)), layout="constrained")
        axes = figure.subplots(len(targets), 1, squeeze=False, sharex=True)
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
    return figure

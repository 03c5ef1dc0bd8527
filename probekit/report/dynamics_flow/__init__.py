"""The report of a training's dynamics: probe accuracy over the steps, and when it has become what it stays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.report.figures import command_line, render, save_figure, style
from probekit.files import write_whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SHOWN = 10
"""Attributes that have a line of their own: those that change most."""


def plateaus(rows: pd.DataFrame) -> pd.DataFrame:
    """For each attribute: accuracy at the first and last checkpoint, and `step`, from which on it stays where it ends.

    That is the first checkpoint from which on every accuracy lies in the last one's 95% interval.
    """
    import pandas as pd

    found = []
    for attribute, group in rows.sort_values("step").groupby("attribute", sort=False):
        last = group.iloc[-1]
        inside = (group.accuracy >= last.low) & (group.accuracy <= last.high)
        stays = group.step[inside[::-1].cummin()[::-1].to_numpy()]
        found.append(
            {"attribute": attribute, "first": group.accuracy.iloc[0], "last": last.accuracy, "step": int(stays.iloc[0])}
        )
    return pd.DataFrame(found).sort_values(["step", "last"], ascending=[True, False], kind="stable")


def print_plateaus(rows: pd.DataFrame) -> None:
    """One line an attribute, the earliest first."""
    from rich.table import Table

    from probekit.report.terminal import console

    table = Table(title="probe accuracy in percent over training", title_justify="left")
    for heading in ("attribute", "first", "last", "stands from step"):
        table.add_column(heading, justify="left" if heading == "attribute" else "right")
    for row in plateaus(rows).itertuples():
        table.add_row(row.attribute, f"{row.first:.0f}", f"{row.last:.0f}", f"{row.step:,}")
    console().print(table)


def write_report(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> Path:
    """Write figures/ (PNG and SVG) and report.html; returns the page's path."""
    (folder / "figures").mkdir(exist_ok=True)
    figure = save_figure(_lines(rows), folder / "figures" / "accuracy")
    steps = sorted(rows.step.unique().tolist())
    found = plateaus(rows)
    page = render(
        "dynamics.html",
        config=config, options=config["options"], command=command_line(config["command"]), figure=figure, steps=steps,
        plateaus=found.to_dict("records"), half=int(found.step.median()),
    )  # fmt: skip
    report = folder / "report.html"
    write_whole(report, page)
    return report


def _lines(rows: pd.DataFrame) -> Figure:
    """Figure 4: accuracy of each attribute's probe at every checkpoint, with intervals; the mean of all in black."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    wide = rows.pivot(index="step", columns="attribute", values="accuracy")
    shown = (wide.max() - wide.min()).sort_values(ascending=False, kind="stable").index[:SHOWN]
    colours = plt.get_cmap("tab10")
    with plt.rc_context(style()):
        figure, ax = plt.subplots(figsize=(8.2, 4.4), layout="constrained")
        for attribute in wide.columns.difference(shown):
            ax.plot(wide.index, wide[attribute], color="#d5d4cf", lw=0.8, zorder=1)
        for i, attribute in enumerate(shown):
            own = rows[rows.attribute == attribute].sort_values("step")
            ax.fill_between(own.step, own.low, own.high, color=colours(i), alpha=0.08, lw=0)
            ax.plot(own.step, own.accuracy, "o-", ms=3.5, lw=1.5, color=colours(i), label=str(attribute).replace("_", " "))
        ax.plot(wide.index, wide.mean(axis=1), "o-", color="#26251f", lw=2.4, ms=4, label=f"mean of {wide.shape[1]}")
        ax.set_xscale("log")
        ax.set_xticks(wide.index, [f"{s:,}" for s in wide.index], rotation=35, ha="right", rotation_mode="anchor")
        ax.minorticks_off()
        ax.axhline(50, color="#8a8880", lw=0.8, ls=":")
        ax.set(xlabel="training steps", ylabel="probe accuracy, %", ylim=(45, 101))
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
        plt.close(figure)
    return figure

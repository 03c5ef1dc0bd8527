"""The report of a training's dynamics: probe accuracy over the steps, and when it has become what it stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probekit.report.figures import render, save_figure, style
from probekit.report.findings import Findings, Table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probekit.runs.folder import Run

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


def headline(rows: pd.DataFrame) -> str:
    """The finding in a sentence."""
    half, end = _half(rows), int(rows.step.max())
    return f"Half of the attributes stand from step {half:,} on, {100 * half / end:.0f} % of the training."


def findings(run: Run, rows: pd.DataFrame) -> Findings:
    """What a run's rows come to: a line an attribute, the earliest first."""
    told = [(str(r.attribute), f"{r.first:.0f}", f"{r.last:.0f}", f"{r.step:,}") for r in plateaus(rows).itertuples()]
    columns = ("attribute", "first", "last", "stands from step")
    table = Table("probe accuracy in percent over training", columns, told, text=("attribute",))
    return Findings(run, rows, [table], lambda: _page(run, rows), ("accuracy",), headline(rows))


def _page(run: Run, rows: pd.DataFrame) -> bytes:
    return render(
        "dynamics_flow/page.html",
        run,
        figure=save_figure(_lines(rows), run.folder / "figures" / "accuracy"),
        steps=sorted(rows.step.unique().tolist()),
        plateaus=plateaus(rows).to_dict("records"),
        headline=headline(rows),
    )


def _half(rows: pd.DataFrame) -> int:
    """The step from which on half of the attributes stand."""
    return int(plateaus(rows).step.median())


def _lines(rows: pd.DataFrame) -> Figure:
    """Figure 4: accuracy of each attribute's probe at every checkpoint, with intervals; the mean of all in black."""
    import matplotlib
    from matplotlib.figure import Figure

    wide = rows.pivot(index="step", columns="attribute", values="accuracy")
    shown = (wide.max() - wide.min()).sort_values(ascending=False, kind="stable").index[:SHOWN]
    colours = matplotlib.colormaps["tab10"]
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(8.2, 4.4), layout="constrained")
        ax = figure.add_subplot()
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
    return figure

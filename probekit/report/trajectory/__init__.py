"""The report of a trajectory: how near the way from noise to sample comes to the latent (Hidden Relations, figure 5)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from probekit.report.figures import data_url, render, save_figure, style
from probekit.report.findings import Findings, Table
from probekit.report.verdicts import Bounded, interval, side

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probekit.runs.folder import Run

PAPER = (0.5, 0.7)
"""After which shares of the steps the paper's trajectories are nearest to the latent."""
MODEL, DATA, SAMPLES = "model", "data", "samples"
"""Whose trajectories rows are of: the model's, and those predicted by second moments of the data and of the samples."""


def findings(run: Run, rows: pd.DataFrame) -> Findings:
    """What a run's rows come to: where the way passes the latent."""
    says = " ".join(filter(None, (headline(rows), second_moments(run.config, rows))))
    columns = ("trajectory", "nearest after, %", "distance then", "of the noise", "of the sample")
    table = Table("where the way passes the latent (95% intervals)", columns, told(run.config, rows), text=columns[:1])
    return Findings(run, rows, [table], lambda: _page(run, rows), ("distances",), says)


def headline(rows: pd.DataFrame) -> str:
    """The finding in numbers: where the way passes the latent, and whether the paper's does so there, too."""
    found = passing(rows)
    nearest, low, high = found["nearest"]
    start, end, there = (found[name][0] for name in ("start", "end", "there"))
    paper = f"The paper found {PAPER[0]:.0%} to {PAPER[1]:.0%}"
    if high == 0:
        return f"The way only goes away from the latent: it starts {start:.2f} away from it and ends {end:.2f} away. {paper}."
    said = f"The way is nearest to the latent after {nearest:.0%} of the steps"
    said += "" if math.isnan(low) else f" (95% interval {low:.0%} to {high:.0%})"
    said += f", at a distance of {there:.2f}; it started {start:.2f} away from it and ends {end:.2f} away."
    closer, least, most = found["nearer"]
    if side(least, most):
        said += f" It comes {closer:.2g} nearer than it starts ({interval(least, most, '.2g')})."
    # the smallest of many means is never above the first: what of resamples have none smaller, cannot be told from none
    else:
        said += " Whether it comes nearer at all than it starts cannot be told."
    held = {1: "later than that", -1: "earlier than that"}
    sides = [side(low, high, end) for end in PAPER]
    if sides == [1, -1]:
        return f"{said} {paper}, and so it is here."
    return (
        f"{said} {paper}: here it is {held[sides[0]]}."
        if sides[0] == sides[1] != 0
        else f"{said} {paper}; whether it is within cannot be told."
    )


def second_moments(config: dict[str, Any], rows: pd.DataFrame) -> str:
    """Where the covariance of the data predicts that the way passes, and what the network does beyond it.

    Nothing where it is not known. The two are told apart where the interval of their difference is clear of 0.
    """
    found = passing(rows, DATA)
    if "beyond nearest" not in found:
        return ""
    said = (
        f"If {config['inputs']['theory_data']} were normal with their mean and covariance, the way of the best denoiser would "
        f"be nearest after {found['nearest'][0]:.0%} of the steps, at a distance of {found['there'][0]:.2f}"
    )
    own = passing(rows, SAMPLES)
    said += f" (by the samples' own, after {own['nearest'][0]:.0%}, at {own['there'][0]:.2f})."
    (steps, low, high), (away, least, most) = found["beyond nearest"], found["beyond there"]
    parts = [
        f"the network passes {abs(steps):.0%} of the steps {'later' if steps > 0 else 'earlier'}, {interval(low, high, '+.0%')}"
        if side(low, high)
        else "whether the network passes earlier or later cannot be told",
        f"{abs(away):.2f} {'farther away' if away > 0 else 'nearer'}, {interval(least, most, '+.2f')}"
        if side(least, most)
        else "whether nearer or farther away cannot be told",
    ]
    return f"{said} What second moments leave unexplained: {'; '.join(parts)}."


def told(config: dict[str, Any], rows: pd.DataFrame) -> list[tuple[str, ...]]:
    """A line for the model, and for every prediction that there is."""
    names = {MODEL: "of the model", SAMPLES: "second moments of its samples"}
    names[DATA] = f"second moments of {config['inputs'].get('theory_data', '')}"
    lines = []
    for by in (MODEL, DATA, SAMPLES):
        if not (found := passing(rows, by)):
            continue
        (nearest, low, high), *away = (found[name] for name in ("nearest", "there", "start", "end"))
        share = f"{100 * nearest:.0f}" + ("" if math.isnan(low) else f" ({interval(100 * low, 100 * high, '.0f')})")
        lines.append((names[by], share, *(f"{value:.2f} ({interval(least, most)})" for value, least, most in away)))
    return lines


def mean_distances(rows: pd.DataFrame, by: str = MODEL) -> pd.DataFrame:
    """(steps + 1) x points: the mean distance over all samples, blocks weighted by their size; empty where not predicted."""
    own = rows[(rows.by == by) & rows.distance.notna()] if "by" in rows else rows
    weighted = (
        own.assign(total=own.distance * own.n, step=own.step.astype(int)).groupby(["step", "point"])[["total", "n"]].sum()
    )
    return (weighted.total / weighted.n).unstack()


def passing(rows: pd.DataFrame, by: str = MODEL) -> dict[str, Bounded]:
    """Where the way passes the latent, each value with its 95% interval; nothing where that is not predicted.

    nearest: the share of the steps after which the mean distance to it is smallest, in [0, 1]. there: the distance then; start,
    end: the distances of noise and sample; nearer: start - there; of predictions, too, beyond nearest and beyond there: by how
    much more the model's are.
    """
    if "by" not in rows:  # of an older run, without intervals
        to_latent = mean_distances(rows).iloc[:, -1].to_numpy()
        there, start, end = (float(value) for value in (to_latent.min(), to_latent[0], to_latent[-1]))
        values = {"nearest": float(to_latent.argmin()) / (len(to_latent) - 1), "there": there, "start": start, "end": end}
        return {
            name: (value, math.nan, math.nan) for name, value in (values | {"nearer": start - there}).items() if by == MODEL
        }
    own = rows[(rows.by == by) & rows.measure.notna()]
    return {r.measure: (r.value, r.low, r.high) for r in own.itertuples()}


def _page(run: Run, rows: pd.DataFrame) -> bytes:
    shown = sorted((run.folder / "images" / "block-000000").glob("noise-*.png"))
    return render(
        "trajectory/page.html",
        run,
        figure=save_figure(_heatmap(mean_distances(rows), mean_distances(rows, DATA)), run.folder / "figures" / "distances"),
        pictures=[[data_url(p.with_name(p.name.replace("noise", n))) for n in ("noise", "latent", "sample")] for p in shown],
        headline=headline(rows),
        theory=second_moments(run.config, rows),
        told=told(run.config, rows),
    )


def _heatmap(distances: pd.DataFrame, predicted: pd.DataFrame) -> Figure:
    """Figure 5: distance of each step to each point between noise and latent, with the nearest point of every step.

    Dashed: what second moments of the data predict, where they are known.
    """
    import numpy as np
    from matplotlib import pyplot as plt

    values = distances.to_numpy()
    steps, points = values.shape
    nearest = values.argmin(1)
    with plt.rc_context(style()):
        figure, (ax, line) = plt.subplots(
            1, 2, figsize=(9.4, 4.2), layout="constrained", gridspec_kw={"width_ratios": [1.35, 1]}
        )
        drawn = ax.imshow(values.T, origin="lower", aspect="auto", cmap="magma_r", extent=(0, 100, -2, 102))
        progress = 100 * (np.arange(steps) + 0.5) / steps
        ax.plot(progress, 100 * nearest / (points - 1), color="#fff", lw=3)
        ax.plot(progress, 100 * nearest / (points - 1), color="#26251f", lw=1.4, label="nearest point")
        if len(predicted):
            normal = 100 * predicted.to_numpy().argmin(1) / (points - 1)
            ax.plot(progress, normal, color="#fff", lw=2.6)
            ax.plot(progress, normal, color="#2f6db5", lw=1.4, ls=(0, (3, 2)), label="by second moments")
        ax.set(xlabel="sampling steps done, %", ylabel="way from noise (0) to latent (100), %")
        ax.legend(loc="upper left", frameon=True, framealpha=0.85)
        figure.colorbar(drawn, ax=ax, label="mean L2 distance", pad=0.02)
        line.plot(100 * np.arange(steps) / (steps - 1), values[:, -1], color="#c0504d", label="to the latent")
        line.plot(100 * np.arange(steps) / (steps - 1), values[:, 0], color="#4c78a8", label="to the noise")
        if len(predicted):
            for points, colour in ((-1, "#c0504d"), (0, "#4c78a8")):
                told = "to the latent, second moments" if points == -1 else "to the noise, second moments"
                expected = predicted.to_numpy()[:, points]
                line.plot(100 * np.arange(steps) / (steps - 1), expected, color=colour, lw=1.2, ls=(0, (3, 2)), label=told)
        line.axvline(100 * int(values[:, -1].argmin()) / (steps - 1), color="#8a8880", ls=":", lw=1)
        line.set(xlabel="sampling steps done, %", ylabel="mean L2 distance", ylim=(0, None))
        line.legend(frameon=False, fontsize=8)
        plt.close(figure)
    return figure

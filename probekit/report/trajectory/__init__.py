"""The report of a trajectory: how near the way from noise to sample comes to the latent (Hidden Relations, figure 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probekit.report.figures import data_url, render, save_figure, style
from probekit.report.findings import Findings

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probekit.runs.folder import Run


def findings(run: Run, rows: pd.DataFrame) -> Findings:
    """What a run's rows come to: where the way passes the latent."""
    return Findings(run, rows, [], lambda: _page(run, rows), ("distances",), headline(rows))


def headline(rows: pd.DataFrame) -> str:
    """The finding in numbers."""
    found = passing(mean_distances(rows))
    return (
        f"The way is nearest to the latent after {found['nearest']:.0%} of the steps, at a distance of {found['there']:.2f}; "
        f"it started {found['start']:.2f} away from it and ends {found['end']:.2f} away. The paper found 50 to 70%."
    )


def mean_distances(rows: pd.DataFrame) -> pd.DataFrame:
    """(steps + 1) x points: the mean distance over all samples, blocks weighted by their size."""
    weighted = rows.assign(total=rows.distance * rows.n).groupby(["step", "point"])[["total", "n"]].sum()
    return (weighted.total / weighted.n).unstack()


def passing(distances: pd.DataFrame) -> dict[str, float]:
    """Where the way passes the latent: the share of the steps at which a state is nearest to it, and the nearest points.

    nearest: that share, in [0, 1]. there: the distance then; start, end: the distances of noise and sample to the latent.
    """
    import numpy as np

    to_latent = distances.iloc[:, -1].to_numpy()
    nearest = int(np.argmin(to_latent))
    return {
        "nearest": nearest / (len(distances) - 1),
        "there": float(to_latent[nearest]),
        "start": float(to_latent[0]),
        "end": float(to_latent[-1]),
    }


def _page(run: Run, rows: pd.DataFrame) -> bytes:
    shown = sorted((run.folder / "images" / "block-000000").glob("noise-*.png"))
    return render(
        "trajectory/page.html",
        run,
        figure=save_figure(_heatmap(mean_distances(rows)), run.folder / "figures" / "distances"),
        pictures=[[data_url(p.with_name(p.name.replace("noise", n))) for n in ("noise", "latent", "sample")] for p in shown],
        headline=headline(rows),
    )


def _heatmap(distances: pd.DataFrame) -> Figure:
    """Figure 5: distance of each step to each point between noise and latent, with the nearest point of every step."""
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
        ax.set(xlabel="sampling steps done, %", ylabel="way from noise (0) to latent (100), %")
        ax.legend(loc="lower right", frameon=True, framealpha=0.85)
        figure.colorbar(drawn, ax=ax, label="mean L2 distance", pad=0.02)
        line.plot(100 * np.arange(steps) / (steps - 1), values[:, -1], color="#c0504d", label="to the latent")
        line.plot(100 * np.arange(steps) / (steps - 1), values[:, 0], color="#4c78a8", label="to the noise")
        line.axvline(100 * int(values[:, -1].argmin()) / (steps - 1), color="#8a8880", ls=":", lw=1)
        line.set(xlabel="sampling steps done, %", ylabel="mean L2 distance", ylim=(0, None))
        line.legend(frameon=False)
        plt.close(figure)
    return figure

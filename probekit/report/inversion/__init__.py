"""The reports of the inversion experiments: latents beside noise and sample, the way past the latent, interpolations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probekit.report.figures import command_line, data_url, render, save_figure, style
from probekit.files import write_whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_ENDS = ("noise", "sample", "white noise, expected")
_COLOURS = {"noise": "#4c78a8", "sample": "#b07a2a", "plain": "#c0504d", "fixed-point": "#3d8f6f", "renoised": "#8064a2",
            "edict": "#26251f", "white noise, expected": "#8a8880"}  # fmt: skip
_MAIN = ("round-trip error", "network calls", "error to the noise", "error to the noise, plain areas",
         "error to the noise, textured areas", "std of values", "excess kurtosis", "distance to normal (KS)",
         "top-10 correlation", "top-20 correlation, patches")  # fmt: skip
_EXACT = 1e-7  # of values around 1 in float32
PAPER = (
    ("DDPM, CIFAR-10", (0.159, 0.003), (0.462, 0.009), (0.986, 0.001)),
    ("DDPM, ImageNet", (0.177, 0.007), (0.219, 0.006), (0.966, 0.001)),
    ("LDM, CelebA", None, (0.179, 0.008), (0.904, 0.005)),
)
"""Table 1 of the poster: top-10 correlation, mean and std, of noise, latent and sample; the last two share the noise's."""


# --- run ---------------------------------------------------------------------------------------------------------------


def print_measures(rows: pd.DataFrame) -> None:
    """One line a measure, one column a method."""
    from rich.table import Table

    from probekit.report.terminal import console

    wide = rows.pivot(index="measure", columns="method", values="value")
    columns = [m for m in rows.method.unique() if m in wide]
    table = Table(title="noise, latents by method, samples", title_justify="left")
    table.add_column("measure")
    for name in columns:
        table.add_column(name, justify="right")
    for measure in [m for m in _MAIN if m in wide.index] + [
        m for m in wide.index if m.startswith(("angle", "distance n", "distance l"))
    ]:
        table.add_row(measure, *(_number(wide.loc[measure, name]) for name in columns))
    console().print(table)


def write_report(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> Path:
    """Write figures/ (PNG and SVG) and report.html; returns the page's path."""
    (folder / "figures").mkdir(exist_ok=True)
    methods = [m for m in rows.method.unique() if m not in _ENDS]
    figures = {"triptychs": save_figure(_triptychs(folder, methods), folder / "figures" / "triptychs")}
    figures["round_trip"] = save_figure(_round_trip(rows, methods), folder / "figures" / "round-trip")
    if (rows.measure == "top-10 correlation").any():
        figures["correlation"] = save_figure(_correlation(rows, methods), folder / "figures" / "correlation")
    if (rows.measure == "distance noise-latent").any():
        figures["triangles"] = save_figure(_triangles(rows, methods), folder / "figures" / "triangles")
    wide = rows.pivot(index="measure", columns="method", values="value")
    spread = rows.pivot(index="measure", columns="method", values="std")
    columns = [m for m in rows.method.unique() if m in wide]
    table = [
        (measure, [(_number(wide.loc[measure, m]), _number(spread.loc[measure, m])) for m in columns])
        for measure in rows.measure.unique()
    ]
    page = render(
        "inversion.html",
        config=config, options=config["options"], command=command_line(config["command"]), figures=figures, columns=columns,
        table=table, paper=PAPER, finding=_finding(rows, methods),
    )  # fmt: skip
    report = folder / "report.html"
    write_whole(report, page)
    return report


def _finding(rows: pd.DataFrame, methods: list[str]) -> dict[str, Any]:
    """What the page says first: the best round trip, and whether plain areas differ more from the noise than textured ones."""
    value = rows.set_index(["method", "measure"]).value
    errors = {m: value[m, "round-trip error"] for m in methods}
    best = min(errors, key=lambda m: errors[m])
    found: dict[str, Any] = {"best": best, "errors": {m: f"{e:.2g}" for m, e in errors.items()}}
    first = methods[0]
    if (first, "top-10 correlation") in value.index:
        found["correlated"] = (
            first,
            f"{value[first, 'top-10 correlation']:.3f}",
            f"{value['noise', 'top-10 correlation']:.3f}",
        )
    if (first, "error to the noise, plain areas") in value.index:
        plain, textured = (value[first, f"error to the noise, {area} areas"] for area in ("plain", "textured"))
        if math.isfinite(plain) and math.isfinite(textured):
            found["areas"] = (first, f"{plain:.3f}", f"{textured:.3f}", bool(plain > textured))
    return found


def _triptychs(folder: Path, methods: list[str]) -> Figure:
    """Rows: noise, then for every method its latent and what it differs from the noise by; samples, and sampled back."""
    from matplotlib import pyplot as plt
    from PIL import Image

    lines = [("noise $x^T$", methods[0], "noise")]
    for m in methods:
        lines += [(f"latent, {m}", m, "latent"), ("noise − latent", m, "difference")]
    lines += [("sample $x^0$", methods[0], "sample")]
    lines = [line for line in lines if (folder / "images" / line[1] / f"{line[2]}-0.png").exists()]
    count = len(list((folder / "images" / methods[0]).glob("sample-*.png")))
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            len(lines), count, figsize=(1.15 * count + 1.6, 1.15 * len(lines)), squeeze=False, layout="constrained"
        )
        for line, (title, method, name) in zip(axes, lines, strict=True):
            for i, ax in enumerate(line):
                ax.imshow(np.asarray(Image.open(folder / "images" / method / f"{name}-{i}.png")), interpolation="nearest")
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            line[0].set_ylabel(title, rotation=0, ha="right", va="center", labelpad=8)
        plt.close(figure)
    return figure


def _round_trip(rows: pd.DataFrame, methods: list[str]) -> Figure:
    """Round-trip error against what it costs in calls of the network."""
    from matplotlib import pyplot as plt

    value = rows.set_index(["method", "measure"])
    with plt.rc_context(style()):
        figure, ax = plt.subplots(figsize=(6.4, 3.3), layout="constrained")
        # the best below its point, the next above, and so on: those of nearly equal calls are neighbours in error
        for i, m in enumerate(sorted(methods, key=lambda m: value.loc[(m, "round-trip error"), "value"])):
            error, calls = value.loc[(m, "round-trip error")], value.loc[(m, "network calls"), "value"]
            shown = max(error.value, _EXACT)
            bar = [[max(0.0, shown - max(error.low, _EXACT))], [max(0.0, error.high - shown)]]
            ax.errorbar(calls, shown, yerr=bar, fmt="o", ms=7, color=_COLOURS[m], capsize=3)
            name = f"{m}, exact to rounding" if error.value <= _EXACT else m
            ax.annotate(name, (calls, shown), xytext=(8, 5 if i % 2 else -12), textcoords="offset points", color=_COLOURS[m])
        ax.set_yscale("log")
        ax.set(xlabel="calls of the network for an inversion", ylabel="round-trip error (RMS)")
        ax.margins(x=0.18, y=0.15)
        plt.close(figure)
    return figure


def _correlation(rows: pd.DataFrame, methods: list[str]) -> Figure:
    """Table 1 as bars: the strongest correlations of pixels, against what white noise has at the same N."""
    from matplotlib import pyplot as plt

    measures = [m for m in ("top-10 correlation", "top-20 correlation, patches") if (rows.measure == m).any()]
    order = ["noise", *methods, "sample"]
    with plt.rc_context(style()):
        figure, axes = plt.subplots(1, len(measures), figsize=(4.6 * len(measures), 3.2), squeeze=False, layout="constrained")
        for ax, measure in zip(axes[0], measures, strict=True):
            of = rows[rows.measure == measure].set_index("method")
            ax.bar(order, [of.value[m] for m in order], yerr=[of["std"][m] for m in order], capsize=3, width=0.62,
                   color=[_COLOURS[m] for m in order])  # fmt: skip
            if "white noise, expected" in of.index:
                expected = of.value["white noise, expected"]
                ax.axhline(expected, color="#8a8880", ls="--", lw=1, label="white noise at this N")
                ax.legend(loc="upper left", frameon=False, fontsize=8)
            ax.set(title=measure, ylim=(0, 1.15), ylabel="|Pearson r|")
            ax.tick_params(axis="x", rotation=25)
        plt.close(figure)
    return figure


def _triangles(rows: pd.DataFrame, methods: list[str]) -> Figure:
    """Noise, latent and sample of every method as the triangle that their mean distances make, each to its own scale."""
    from matplotlib import pyplot as plt

    value = rows.set_index(["method", "measure"]).value
    with plt.rc_context(style()):
        figure, axes = plt.subplots(1, len(methods), figsize=(3.1 * len(methods), 3.3), squeeze=False, layout="constrained")
        for ax, m in zip(axes[0], methods, strict=True):
            across, from_noise, to_sample = (
                value[m, f"distance {pair}"] for pair in ("noise-sample", "noise-latent", "latent-sample")
            )
            x = (from_noise**2 + across**2 - to_sample**2) / (2 * across)
            y = math.sqrt(max(0.0, from_noise**2 - x**2))
            ax.plot([0, across, x, 0], [0, 0, y, 0], color="#c9c7bd", lw=1.2, zorder=1)
            for name, at, side in (("noise", (0, 0), "right"), ("sample", (across, 0), "left"), ("latent", (x, y), "center")):
                colour = _COLOURS[m if name == "latent" else name]
                ax.plot(*at, "o", ms=7, color=colour)
                angle = value[m, f"angle at {name}"]
                label = f"{name}\n{angle:.0f}°" if math.isfinite(angle) else name
                below = name != "latent"
                ax.annotate(label, at, textcoords="offset points", xytext=(0, -9 if below else 9), ha=side,
                            va="top" if below else "bottom", color=colour, fontsize=8.5)  # fmt: skip
            ax.set_title(m, color=_COLOURS[m], pad=20)
            lengths = f"{from_noise:.3g} to the noise, {to_sample:.3g} to the sample"
            ax.text(0.5, 1.04, lengths, transform=ax.transAxes, ha="center", va="bottom", fontsize=8, color="#6b6a63")
            ax.set_aspect("equal", adjustable="datalim")
            ax.margins(0.35)
            ax.set_axis_off()
        plt.close(figure)
    return figure


# --- trajectory --------------------------------------------------------------------------------------------------------


def mean_distances(rows: pd.DataFrame) -> pd.DataFrame:
    """(steps + 1) x points: the mean distance over all samples, blocks weighted by their size."""
    weighted = rows.assign(total=rows.distance * rows.n).groupby(["step", "point"])[["total", "n"]].sum()
    return (weighted.total / weighted.n).unstack()


def passing(distances: pd.DataFrame) -> dict[str, float]:
    """Where the way passes the latent: the share of the steps at which a state is nearest to it, and the nearest points.

    nearest: that share, in [0, 1]. there: the distance then; start, end: the distances of noise and sample to the latent.
    """
    to_latent = distances.iloc[:, -1].to_numpy()
    nearest = int(np.argmin(to_latent))
    return {"nearest": nearest / (len(distances) - 1), "there": float(to_latent[nearest]), "start": float(to_latent[0]),
            "end": float(to_latent[-1])}  # fmt: skip


def print_passing(rows: pd.DataFrame) -> None:
    """Where the way passes the latent, in one line."""
    from probekit.report.terminal import console

    found = passing(mean_distances(rows))
    console().print(
        f"nearest to the latent after {found['nearest']:.0%} of the steps, at a distance of {found['there']:.2f}; the noise is "
        f"{found['start']:.2f} from it, the sample {found['end']:.2f}  (Hidden Relations: 50-70 %)"
    )


def write_trajectory_report(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> Path:
    """Write figures/ (PNG and SVG) and report.html; returns the page's path."""
    (folder / "figures").mkdir(exist_ok=True)
    distances = mean_distances(rows)
    figure = save_figure(_heatmap(distances), folder / "figures" / "distances")
    shown = sorted((folder / "images" / "block-000000").glob("noise-*.png"))
    pictures = [[data_url(p.with_name(p.name.replace("noise", n))) for n in ("noise", "latent", "sample")] for p in shown]
    page = render(
        "trajectory.html",
        config=config, options=config["options"], command=command_line(config["command"]), figure=figure, pictures=pictures,
        found=passing(distances),
    )  # fmt: skip
    report = folder / "report.html"
    write_whole(report, page)
    return report


def _heatmap(distances: pd.DataFrame) -> Figure:
    """Figure 5: distance of each step to each point between noise and latent, with the nearest point of every step."""
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


# --- interpolate -------------------------------------------------------------------------------------------------------


def print_changes(rows: pd.DataFrame) -> None:
    """One line a method: how far the way is, how even, and how exact its ends."""
    from rich.table import Table

    from probekit.report.terminal import console

    table = Table(title="from one picture to the other", title_justify="left")
    for heading in ("method", "length (LPIPS)", "largest change of a frame", "error at the ends (RMS)"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for line in _changes(rows):
        table.add_row(line["method"], f"{line['length']:.3f}", f"{line['largest']:.3f}", f"{line['error']:.2g}")
    console().print(table)


def _changes(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {"method": method, "length": float(group.lpips.sum()), "largest": float(group.lpips.max()),
         "error": float(group.end_error.iloc[0])}
        for method, group in rows.groupby("method", sort=False)
    ]  # fmt: skip


def write_interpolation_report(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> Path:
    """Write report.html; returns its path. The strips are the pictures in images/."""
    changes = _changes(rows)
    for line in changes:
        pictures = folder / "images" / str(line["method"])
        names = ["from", *(f"frame-{i}" for i in range(config["options"]["frames"])), "to"]
        line["frames"] = [data_url(pictures / f"{name}.png") for name in names]
    page = render(
        "interpolation.html", config=config, options=config["options"], command=command_line(config["command"]), changes=changes
    )
    report = folder / "report.html"
    write_whole(report, page)
    return report


def _number(value: float) -> str:
    return "" if not math.isfinite(value) else f"{value:.3g}"

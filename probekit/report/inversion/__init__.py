"""The report of inversions: latents beside noise and sample, where they lie, and what an exact way back costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.report.figures import render, save_figure, style
from probekit.report.findings import Findings, Table
from probekit.report.verdicts import either, foremost, interval, side

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probekit.runs.folder import Run

_ENDS = ("noise", "sample", "white noise, expected")
_COLOURS = {
    "noise": "#4c78a8",
    "sample": "#b07a2a",
    "plain": "#c0504d",
    "fixed-point": "#3d8f6f",
    "renoised": "#8064a2",
    "edict": "#26251f",
    "newton": "#2f6f9f",
    "renoise": "#c77fb0",
    "bdia": "#7d5a3c",
    "belm": "#5f7d2f",
    "edit-friendly": "#d9822b",
    "rf-solver": "#2a9d9d",
    "fireflow": "#a03a5c",
    "white noise, expected": "#8a8880",
}
_MAIN = (
    "round-trip error",
    "network calls",
    "steps unsolved",
    "steps that fold",
    "error to the noise",
    "error to the noise, plain areas",
    "error to the noise, textured areas",
    "error to the noise, plain less textured areas",
    "std of values",
    "excess kurtosis",
    "distance to normal (KS)",
    "top-10 correlation",
    "top-20 correlation, patches",
)
_AREAS = "error to the noise, plain less textured areas"
_NAMES = {
    "std of values": "a standard deviation of",
    "top-10 correlation": "a top-10 |r| of",
    "error to the noise": "a distance (RMS) to the noise of",
    "round-trip error": "a round-trip error of",
}
"""What is said of measures that second moments predict."""
_EXACT = 1e-7  # of values around 1 in float32
PAPER = (
    ("DDPM, CIFAR-10", (0.159, 0.003), (0.462, 0.009), (0.986, 0.001)),
    ("DDPM, ImageNet", (0.177, 0.007), (0.219, 0.006), (0.966, 0.001)),
    ("LDM, CelebA", None, (0.179, 0.008), (0.904, 0.005)),
)
"""Table 1 of the poster: top-10 correlation, mean and std, of noise, latent and sample; the last two share the noise's."""


def findings(run: Run, rows: pd.DataFrame) -> Findings:
    """What a run's rows come to: one line a measure, one column a method."""
    wide = rows.pivot(index="measure", columns="method", values="value")
    columns = [m for m in rows.method.unique() if m in wide]
    lines = [m for m in _MAIN if m in wide.index]
    lines += [m for m in wide.index if m.startswith(("angle", "distance n", "distance l"))]
    told = [(measure, *(_number(wide.loc[measure, name]) for name in columns)) for measure in lines]
    tables = [Table("noise, latents by method, samples", ("measure", *columns), told, text=("measure",))]
    if predicted := beside(rows):
        title = f"what second moments alone predict, of {run.config['inputs']['theory_data']} and of what is inverted"
        headings = ("latents", "measure", "measured", "predicted", "of the images'", "beyond (95%)")
        tables.append(Table(title, headings, [tuple(line.values()) for line in predicted], text=headings[:2]))
    says = " ".join(filter(None, (headline(rows), second_moments(run.config, rows))))
    return Findings(run, rows, tables, lambda: _page(run, rows), tuple(_figures(rows)), says)


def headline(rows: pd.DataFrame) -> str:
    """The finding in numbers: the round trips, how correlated latents are, and whether plain areas are worse than textured."""
    by = rows.set_index(["method", "measure"])
    value, methods = by.value, _methods(rows)
    errors = {m: _bounded(by, m, "round-trip error") for m in methods}
    said = f"The round trip errs by {', '.join(f'{e:.2g} ({m})' for m, (e, *_) in errors.items())}."
    if len(errors) > 1:
        # errors that are rounding's tell no method from another
        clear = foremost({m: tuple(max(each, _EXACT) for each in e) for m, e in errors.items()}, most=False)  # type: ignore[misc]
        best = clear[0] if len(clear) == 1 else f"{either(clear)}, which cannot be told apart"
        said = f"The most faithful way there and back is {best}; the round trips err by {said.split(' by ', 1)[1]}"
    if ("newton", "steps that fold") in value.index and (folds := value["newton", "steps that fold"]) > 0:
        said += f" Steps fold, {folds:.2g} a picture: there newton's latents are each one of several that lead to the same."
    first = methods[0]
    if (first, "top-10 correlation") in value.index:
        latents, noise = (value[name, "top-10 correlation"] for name in (first, "noise"))
        said += f" The most correlated pixels of the {first} latents have |r| = {latents:.3f}; noise has {noise:.3f} at this N."
    if (first, _AREAS) in value.index and math.isfinite(value[first, _AREAS]):
        plain, textured = (value[first, f"error to the noise, {area} areas"] for area in ("plain", "textured"))
        difference, low, high = _bounded(by, first, _AREAS)
        which = {
            1: "it is the plain areas that inversion gets wrong",
            -1: "it is the textured areas that inversion gets wrong",
            0: "which of them inversion gets more wrong cannot be told",
        }[side(low, high)]
        said += (
            f" The {first} latents differ from the noise by {plain:.3f} in plain areas and {textured:.3f} in textured ones: "
            f"{which} (difference {difference:.3f}, 95% interval {interval(low, high, '.3f')})."
        )
    return said


def second_moments(config: dict[str, Any], rows: pd.DataFrame) -> str:
    """What the covariance of the data predicts of the first method's latents, and what the network does beyond it.

    Nothing where it is not known. The two are told apart where the interval of their difference is clear of 0.
    """
    lines = [line for line in _predicted(rows) if line["method"] == _methods(rows)[0]]
    if not lines:
        return ""
    first, told = (
        lines[0]["method"],
        [f"{_NAMES[r['measure']]} {r['predicted']:.3g} (measured {r['value']:.3g})" for r in lines],
    )
    sides = {r["measure"]: side(r["beyond_low"], r["beyond_high"]) for r in lines}
    beyond = [
        f"{_NAMES[r['measure']]} {r['value'] - r['predicted']:+.2g} ({interval(r['beyond_low'], r['beyond_high'], '+.2g')})"
        for r in lines
        if sides[r["measure"]]
    ]
    within = [_NAMES[measure] for measure, way in sides.items() if not way]
    parts = [f"the network does beyond them: {', '.join(beyond)}"] if beyond else []
    parts += [f"of {either(within)} it cannot be told that there is any"] if within else []
    return (
        f"If {config['inputs']['theory_data']} were normal with their mean and covariance, the {first} latents of the best "
        f"denoiser would have {', '.join(told)}. What second moments leave unexplained, {'; '.join(parts)}."
    )


def beside(rows: pd.DataFrame) -> list[dict[str, str]]:
    """Every method's measured and predicted values as they are read; none where nothing is predicted."""
    return [
        {
            "method": r["method"],
            "measure": r["measure"],
            "measured": _number(r["value"]),
            "predicted": _number(r["predicted"]),
            "of_images": _number(r["predicted_of_samples"]),
            "beyond": f"{r['value'] - r['predicted']:+.2g} ({interval(r['beyond_low'], r['beyond_high'], '+.2g')})",
        }
        for r in _predicted(rows)
    ]


def _predicted(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of `_NAMES` that have a prediction, by method."""
    if "predicted" not in rows:
        return []
    known = rows[rows.measure.isin(_NAMES) & rows.predicted.notna()]
    return [{str(key): value for key, value in row.items()} for row in known.to_dict("records")]


def _bounded(by: pd.DataFrame, method: str, measure: str) -> tuple[float, float, float]:
    value, low, high = by.loc[(method, measure), ["value", "low", "high"]].tolist()
    return value, low, high


def _methods(rows: pd.DataFrame) -> list[str]:
    return [m for m in rows.method.unique() if m not in _ENDS]


def _figures(rows: pd.DataFrame) -> list[str]:
    """Which figures there are: images of one's own have no noise, and tokens no pixels."""
    measured = set(rows.measure)
    triangles = ["triangles"] if "distance noise-latent" in measured else []
    return ["triptychs", *triangles, *(["correlation"] if "top-10 correlation" in measured else []), "round-trip"]


def _page(run: Run, rows: pd.DataFrame) -> bytes:
    methods, wanted = _methods(rows), _figures(rows)
    drawn = {"triptychs": lambda: _triptychs(run.folder / "images", methods)}
    drawn |= {"round-trip": lambda: _round_trip(rows, methods), "correlation": lambda: _correlation(rows, methods)}
    drawn |= {"triangles": lambda: _triangles(rows, methods)}
    wide, spread = (rows.pivot(index="measure", columns="method", values=column) for column in ("value", "std"))
    columns = [m for m in rows.method.unique() if m in wide]
    table = [
        (measure, [(_number(wide.loc[measure, m]), _number(spread.loc[measure, m])) for m in columns])
        for measure in rows.measure.unique()
    ]
    return render(
        "inversion/page.html",
        run,
        figures={name: save_figure(drawn[name](), run.folder / "figures" / name) for name in wanted},
        columns=columns,
        table=table,
        paper=PAPER,
        headline=headline(rows),
        theory=second_moments(run.config, rows),
        beside=beside(rows),
    )


def _triptychs(images: Path, methods: list[str]) -> Figure:
    """Rows: noise, then for every method its latent and what it differs from the noise by; samples, and sampled back."""
    import numpy as np
    from matplotlib import pyplot as plt
    from PIL import Image

    lines = [("noise $x^T$", methods[0], "noise")]
    for m in methods:
        lines += [(f"latent, {m}", m, "latent"), ("noise − latent", m, "difference")]
    lines += [("sample $x^0$", methods[0], "sample")]
    lines = [line for line in lines if (images / line[1] / f"{line[2]}-0.png").exists()]
    count = len(list((images / methods[0]).glob("sample-*.png")))
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            len(lines), count, figsize=(1.15 * count + 1.6, 1.15 * len(lines)), squeeze=False, layout="constrained"
        )
        for line, (title, method, name) in zip(axes, lines, strict=True):
            for i, ax in enumerate(line):
                ax.imshow(np.asarray(Image.open(images / method / f"{name}-{i}.png")), interpolation="nearest")
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
    """Standard deviations, and table 1 as bars: the strongest correlations of pixels, against white noise at the same N.

    Crosses: what second moments of the data predict.
    """
    from matplotlib import pyplot as plt

    wanted = ("std of values", "top-10 correlation", "top-20 correlation, patches")
    measures = [m for m in wanted if (rows.measure == m).any()]
    order = ["noise", *methods, "sample"]
    with plt.rc_context(style()):
        figure, axes = plt.subplots(1, len(measures), figsize=(4.2 * len(measures), 3.4), squeeze=False, layout="constrained")
        for ax, measure in zip(axes[0], measures, strict=True):
            of = rows[rows.measure == measure].set_index("method")
            correlated = measure != "std of values"
            ax.bar(
                order,
                [of.value[m] for m in order],
                yerr=[of["std"][m] for m in order] if correlated else None,
                capsize=3,
                width=0.62,
                color=[_COLOURS[m] for m in order],
            )
            if "predicted" in of and of.predicted.notna().any():
                crosses = of.predicted.reindex(order)
                ax.plot(order, crosses, "x", ms=7, mew=2.6, color="#fff")
                ax.plot(order, crosses, "x", ms=6, mew=1.4, color="#14213d", label="second moments of the data")
            if "white noise, expected" in of.index:
                expected = of.value["white noise, expected"]
                ax.axhline(expected, color="#8a8880", ls="--", lw=1, label="white noise at this N")
            elif not correlated:
                ax.axhline(1, color="#8a8880", ls="--", lw=1, label="normal noise")
                if of.value[order].max() > 4:  # coupled states may lie far out
                    ax.set_yscale("log")
            handles, labels = ax.get_legend_handles_labels()
            if labels:
                ax.legend(handles, labels, loc="lower left", bbox_to_anchor=(-0.02, 1.0), frameon=False, fontsize=8, ncols=2)
            ax.set_title(measure, pad=24, loc="left", fontweight="bold", fontsize=10)
            if correlated:
                ax.set(ylim=(0, 1.05), ylabel="|Pearson r|")
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
            left, right = min(0.0, x), max(across, x)
            whole = max(right - left, y)
            ax.plot([0, across, x, 0], [0, 0, y, 0], color="#c9c7bd", lw=1.2, zorder=1)
            for name, at, side in (("noise", (0, 0), "right"), ("sample", (across, 0), "left"), ("latent", (x, y), "center")):
                colour = _COLOURS[m if name == "latent" else name]
                ax.plot(*at, "o", ms=7, color=colour)
                angle = value[m, f"angle at {name}"]
                label = f"{name}\n{angle:.0f}°" if math.isfinite(angle) else name
                below = name != "latent"
                ax.annotate(
                    label,
                    at,
                    textcoords="offset points",
                    xytext=(0, -9 if below else 9),
                    ha=side,
                    va="top" if below else "bottom",
                    color=colour,
                    fontsize=8.5,
                )
            ax.set_title(m, color=_COLOURS[m], pad=20)
            lengths = f"{from_noise:.3g} to the noise, {to_sample:.3g} to the sample"
            ax.text(0.5, 1.04, lengths, transform=ax.transAxes, ha="center", va="bottom", fontsize=8, color="#6b6a63")
            # room for the corners' labels on every side, whatever the triangle's form
            middle, height = (left + right) / 2, y / 2
            ax.set(xlim=(middle - 0.9 * whole, middle + 0.9 * whole), ylim=(height - 0.95 * whole, height + 0.95 * whole))
            ax.set_aspect("equal", adjustable="box")
            ax.set_axis_off()
        plt.close(figure)
    return figure


def _number(value: float) -> str:
    return "" if not math.isfinite(value) else f"{value:.3g}"

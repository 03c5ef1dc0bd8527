"""The report of the same noises through every checkpoint: when what they become stands, and how the pictures form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from probekit.report.figures import render, save_figure, style
from probekit.report.findings import Findings, Table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probekit.runs.folder import Run

TOLERANCE = 0.05
"""How far from where it ends a measure that stands may be, as a share of the way there from chance."""
COLUMNS = 12
"""Checkpoints that the strip of pictures shows; of more it shows the first, the last, and some between."""

_MAPPING = ("sample to noise", "noise to sample")
_SETS = ("CKA", "SVCCA", "k-NN overlap")
_PANELS = {  # title, label of the axis, its measures
    "Sample and noise find each other by L2": ("found, %", _MAPPING),
    "Samples as a set beside the last ones": ("similarity", _SETS),
    "SSIM to the last picture": ("mean SSIM", ("SSIM",)),
    "PSNR to the last picture": ("mean PSNR, dB", ("PSNR",)),
    "L2 to the last picture": ("mean distance", ("L2",)),
}
_COLOURS = {
    "sample to noise": "#2f6db5",
    "noise to sample": "#c8445b",
    "CKA": "#2f6db5",
    "SVCCA": "#d08a2c",
    "k-NN overlap": "#5b8c5a",
    "SSIM": "#8a5aa8",
    "PSNR": "#8a5aa8",
    "L2": "#8a5aa8",
}
_UNITS = {"sample to noise": "%", "noise to sample": "%", "PSNR": "dB"}


class Standing(NamedTuple):
    """A measure over a training: its value and what it is by chance at the first, the last but one and the last checkpoint.

    step: from which on it stays where it ends; None where that is not clear of chance, or no measure of itself (PSNR).
    """

    measure: str
    first: tuple[float, float]
    before: tuple[float, float]
    last: tuple[float, float]
    step: int | None


def standings(rows: pd.DataFrame) -> list[Standing]:
    """When each measure stands: from the first checkpoint from which on it stays where it ends.

    That is within `TOLERANCE` of the last checkpoint's value, as a share of the way there from chance, or in its 95% interval.
    What compares with the last checkpoint is 1 there, or 0 for L2, by construction.
    """
    found = []
    for measure, group in rows.sort_values("step", kind="stable").groupby("measure", sort=False):
        last = group.iloc[-1]
        inside = (group.value - last.value).abs() <= TOLERANCE * (last.value - group.chance).abs()
        inside |= (group.value >= last.low) & (group.value <= last.high)
        stays = group.step[inside[::-1].cummin()[::-1].to_numpy()]
        clear = abs(last.value - last.chance) > 0 and not last.low <= last.chance <= last.high
        first, before, end = ((float(group.value.iloc[i]), float(group.chance.iloc[i])) for i in (0, -2, -1))
        found.append(Standing(str(measure), first, before, end, int(stays.iloc[0]) if clear and len(stays) else None))
    return found


def headline(rows: pd.DataFrame) -> str:
    """The result in two sentences of numbers: the mapping between noise and sample, and the samples beside the last ones."""
    by = {standing.measure: standing for standing in standings(rows)}
    value = rows.set_index(["measure", "step"]).value
    steps = sorted(rows.step.unique().tolist())
    *_, before, end = steps

    def when(step: int) -> str:
        return f"after {100 * step / end:.0f} % of the training" if step < end else "only at the end of the training"

    def finds(way: str, step: int) -> str:
        share = f"{value[way, step]:.1f} %"
        return f"the noise of {share} of the samples" if way == "sample to noise" else f"the sample of {share} of the noises"

    stood = {way: step for way in _MAPPING if (step := by[way].step) is not None}
    at = max(stood.values(), default=end)
    both = " and ".join(finds(way, at) for way in _MAPPING)
    if len(stood) == 2:
        said = f"The mapping between noise and sample stands {when(at)}: L2 finds {both}."
    elif stood:
        (way,) = stood
        (lost,) = set(_MAPPING) - {way}
        other = f"the other way it is {shown(lost, by[lost].last[0])} at the end, not clear of chance"
        said = f"The mapping between noise and sample stands one way, {when(at)}: L2 finds {finds(way, at)}; {other}."
    else:
        said = "Whether there is a mapping between noise and sample cannot be told: "
        said += f"at the end L2 finds {both}, not clear of chance."
    there = at if at < end else before  # the last checkpoint says nothing of itself
    later = [f"{name} stands {when(step)}" for name in ("CKA", "SSIM") if (step := by[name].step) is not None]
    alike = f"CKA to the last samples is {value['CKA', there]:.2f}, SSIM {value['SSIM', there]:.2f}"
    return f"{said} {'; '.join([f'At step {there:,} {alike}', *later])}."


def shown(measure: str, value: float) -> str:
    """A value as it is written in tables."""
    if math.isnan(value):
        return "–"
    digits = 1 if measure in _UNITS else 3 if abs(value) < 10 else 1
    return f"{value:.{digits}f} {_UNITS.get(measure, '')}".rstrip()


def findings(run: Run, rows: pd.DataFrame, neighbours: int) -> Findings:
    """What a run's rows come to: a line a measure; neighbours are those of the k-NN overlap."""
    columns = ("measure", "first", "last but one", "last", "stands from step")
    told = []
    for row in standings(rows):
        cells = (f"{shown(row.measure, v)} ({shown(row.measure, chance)})" for v, chance in (row.first, row.before, row.last))
        told.append((row.measure, *cells, "–" if row.step is None else f"{row.step:,}"))
    table = Table("the same noises through every checkpoint (in brackets: by chance)", columns, told, text=("measure",))
    return Findings(run, rows, [table], lambda: _page(run, rows, neighbours), ("measures", "pictures"), headline(rows))


def unit(step: int) -> str:
    """The name of the unit of a checkpoint's measures and pictures."""
    return f"step-{step:09d}"


def _page(run: Run, rows: pd.DataFrame, neighbours: int) -> bytes:
    steps = sorted(rows.step.unique().tolist())
    columns = _columns(steps)
    return render(
        "dynamics_diffusion/page.html",
        run,
        lines=save_figure(_lines(rows), run.folder / "figures" / "measures"),
        strip=save_figure(_strip(run, columns), run.folder / "figures" / "pictures"),
        steps=steps,
        columns=len(columns),
        standings={standing.measure: standing for standing in standings(rows)},
        shown=shown,
        headline=headline(rows),
        tolerance=TOLERANCE,
        neighbours=neighbours,
    )


def _lines(rows: pd.DataFrame) -> Figure:
    """Figure 6, right, and its like for the other measures: over training steps, with intervals and what chance gives.

    Rings: from there on it stands. What compares with the last checkpoint is drawn dashed to the last, its own value.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    steps = sorted(rows.step.unique().tolist())
    rings = {s.measure: s.step for s in standings(rows)}
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(9.6, 6.3), layout="constrained")
        grid = figure.add_gridspec(2, 6, height_ratios=(1.25, 1))
        places = (grid[0, :3], grid[0, 3:], grid[1, :2], grid[1, 2:4], grid[1, 4:])
        for place, (title, (label, measures)) in zip(places, _PANELS.items(), strict=True):
            ax = figure.add_subplot(place)
            for measure in measures:
                own, colour = rows[rows.measure == measure].sort_values("step"), _COLOURS[measure]
                solid = own if measure in _MAPPING else own.iloc[:-1]
                ax.fill_between(solid.step, solid.low, solid.high, color=colour, alpha=0.18, lw=0)
                ax.plot(solid.step, solid.value, "o-", ms=3.8, lw=1.7, color=colour, label=measure)
                if measure not in _MAPPING:
                    ax.plot(own.step.iloc[-2:], own.value.iloc[-2:], "--", lw=1, color=colour)
                    ax.plot(own.step.iloc[-1:], own.value.iloc[-1:], "o", ms=3.8, mfc="white", color=colour)
                if (step := rings[measure]) is not None:
                    at = own[own.step == step].value
                    ax.plot([step], at, "o", ms=9, mfc="none", mew=1.3, color=colour, clip_on=False)
                # both ways, chance is the same: one line
                if measure != "noise to sample":
                    ax.plot(own.step, own.chance, ":", lw=1.1, color="#8a8880" if measure in _MAPPING else colour)
            if steps[0] > 0:
                ax.set_xscale("log")
            else:  # an untrained network has a place, too
                ax.set_xscale("symlog", linthresh=steps[1])
            narrow = len(measures) == 1
            ticks = _ticks(steps, apart=0.13 if narrow else 0.08)
            ax.set_xticks(ticks, [f"{s:,}" for s in ticks], rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=6 if narrow else 22)
            ax.set(xlabel="training steps", ylabel=label)
            if measures == _MAPPING:
                ax.set_ylim(-3, 105)
            elif measures != ("PSNR",):
                ax.set_ylim(bottom=min(0, ax.get_ylim()[0]), top=max(1.04, ax.get_ylim()[1]))
            if not narrow:
                above = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": len(measures), "borderpad": 0.2}
                ax.legend(**above, frameon=False, fontsize=8.5)
    return figure


def _ticks(steps: list[int], apart: float) -> list[int]:
    """The steps that are labelled: the last, the first, and of the others those that leave room, as a share of the axis."""
    place = {s: math.log(max(s, steps[1] / 3 if steps[0] == 0 else 1)) for s in steps}
    room = apart * (place[steps[-1]] - place[steps[0]])
    kept = [steps[-1], steps[0]]
    for step in reversed(steps[1:-1]):
        if all(abs(place[step] - place[other]) >= room for other in kept):
            kept.append(step)
    return sorted(kept)


def _columns(steps: list[int]) -> list[int]:
    """The checkpoints that the strip shows."""
    if len(steps) <= COLUMNS:
        return steps
    return [steps[round(i * (len(steps) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]


def _strip(run: Run, columns: list[int]) -> Figure:
    """A row a noise, a column a checkpoint: what the noise becomes. Pictures that are gone leave their places empty."""
    import matplotlib
    from matplotlib.figure import Figure
    from PIL import Image

    folders = {step: run.picture(unit(step), "0").parent for step in columns}
    kept = {int(file.stem) for folder in folders.values() for file in folder.glob("*.png")}
    lines = sorted(kept | {0})
    left, top, size = 0.75, 0.46, 0.78  # inches
    with matplotlib.rc_context(style()):
        width, height = left + size * len(columns), top + size * len(lines)
        figure = Figure(figsize=(width, height))
        axes = figure.subplots(len(lines), len(columns), squeeze=False, gridspec_kw={"wspace": 0.05, "hspace": 0.05})
        for i, line in enumerate(lines):
            for j, step in enumerate(columns):
                ax = axes[i, j]
                ax.set(xticks=[], yticks=[])
                for spine in ax.spines.values():  # white pictures on white
                    spine.set(visible=True, color="#dedcd3", linewidth=0.6)
                file = folders[step] / f"{line}.png"
                if file.exists():
                    ax.imshow(Image.open(file), interpolation="none")
                if i == 0:
                    ax.set_title(f"{step:,}", fontsize=8.5, pad=4)
                if j == 0:
                    ax.text(-0.08, 0.5, f"noise {line}", transform=ax.transAxes, ha="right", va="center", fontsize=8)
        figure.text(
            (left + size * len(columns) / 2) / width,
            1 - 0.03 / height,
            "training steps",
            ha="center",
            va="top",
            fontsize=9,
            fontweight="bold",
        )
        figure.subplots_adjust(left=left / width, right=1 - 0.02 / width, bottom=0.02 / height, top=1 - top / height)
    return figure

"""The report of a probing run: what can be read off each space, and what of it survives a map from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probekit.metrics.distributions import bootstrap
from probekit.report.figures import render, save_figure, style
from probekit.report.findings import Findings, Table
from probekit.report.verdicts import either, side

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probekit.runs.folder import Run

_COLOURS = ("#2f6db5", "#b0722a", "#5b8c5a", "#8a5fa8", "#c8445b", "#3b8f95", "#c9a227", "#6b7280")


@dataclass(frozen=True)
class _Kind:
    """What labels of one kind are told by. figures: the two heatmaps' names; low, reach: where their shades begin and end."""

    name: str
    measure: str
    figures: tuple[str, str]
    low: float
    reach: float


_ATTRIBUTES = _Kind("attributes", "accuracy", ("match", "change"), 50, 50)
_CLASSES = _Kind("classes", "accuracy of classes", ("match-classes", "change-classes"), 0, 100)
_KINDS = (_CLASSES, _ATTRIBUTES)


def findings(run: Run, rows: pd.DataFrame) -> Findings:
    """What a run's rows come to."""
    says = "\n".join([*headline(rows), *(f"{told['attribute']}: {told['note']}." for told in notes(rows))])
    figures = []
    for kind in _KINDS:
        if len(_wide(rows, kind.measure)):
            figures += ["classes" if kind is _CLASSES else "accuracy", *(kind.figures if len(ranking(rows, kind)) else ())]
    return Findings(run, rows, [*_tables(rows)], lambda: _page(run, rows), figures, says)


def headline(rows: pd.DataFrame) -> list[str]:
    """For each kind of labels, the space that shows them best, and how much of it maps keep."""
    said = []
    for kind in _KINDS:
        accuracy, alike = _wide(rows, kind.measure).drop(columns="random", errors="ignore"), ranking(rows, kind)
        if accuracy.size:
            means = accuracy.mean()
            best = means.idxmax()
            which = either([best, *(s for s in means.sort_values(ascending=False).index if not _clear(rows, kind, best, s))])
            told = f"{kind.name.capitalize()} are read best from {which}"
            told += (
                f": {means[best]:.1f} % right on average"
                if which == best
                else (f", which of them cannot be told: from {best} {means[best]:.1f} % are right on average")
            )
            told += f", where chance is {_chance(rows, kind).mean():.0f} %."
            if alike.match.notna().any():
                told += f" Latents that a map brought over are read the same in {alike.match.mean():.1f} % of cases"
                told += f", where the random encoder's are in {alike.random.mean():.1f} %."
            said.append(told)
    return said


def _clear(rows: pd.DataFrame, kind: _Kind, best: str, other: str) -> bool:
    """Whether labels are read better from a space than from another one: the interval of the mean difference is above 0.

    By bootstrap over the labels; of fewer than three each label's own intervals must be apart. A space is told from itself.
    """
    if best == other:
        return True
    value, low, high = (_wide(rows, kind.measure, column) for column in ("value", "low", "high"))
    if len(value) < 3:
        return bool((low[best] > high[other]).all())
    return side(*bootstrap((value[best] - value[other]).dropna().to_numpy())[1:]) > 0


def notes(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The labels that were not probed, or whose solver stopped early, and why; one a note."""
    told = rows[rows.note != ""]
    return [
        {"attribute": attribute, "note": note if measure == "skipped" else f"{note} in {', '.join(group.target)}"}
        for (attribute, measure, note), group in told.groupby(["attribute", "measure", "note"], sort=False)
    ]


def ranking(rows: pd.DataFrame, kind: _Kind | None = None) -> pd.DataFrame:
    """Labels, those first that are represented most alike: one column `match` over the pairs of models, one `random`.

    The mean percentage of images of which a probe says the same of a space's own latents and of latents mapped into it; a probe
    that nearly always says no is easily matched, and `random`, the same from the random encoder, shows by how much. kind:
    attributes or classes alone.
    """
    import pandas as pd

    match = rows[rows.measure == "match"]
    if kind is not None:
        match = match[match.attribute.isin(rows[rows.measure == kind.measure].attribute)]
    found = pd.DataFrame(
        {
            "match": match[match.source != "random"].groupby("attribute").value.mean(),
            "random": match[match.source == "random"].groupby("attribute").value.mean(),
        }
    )
    found["above"] = found.match - found.random
    return found.sort_values("above", ascending=False, kind="stable")


def _tables(rows: pd.DataFrame) -> list[Table]:
    tables = []
    for kind in _KINDS:
        accuracy, alike, chance = _wide(rows, kind.measure), ranking(rows, kind), _chance(rows, kind)
        if accuracy.empty:
            continue
        title = f"{kind.name}: probe accuracy in percent, by space; match: probes say the same of mapped latents, in percent"
        classes, compared = kind is _CLASSES, alike.match.notna().any()  # with one space there is no pair of models
        told = []
        for label, values in accuracy.reindex(alike.index if len(alike) else accuracy.index).iterrows():
            match = [f"{alike.match[label]:.0f}"] if compared else []
            told.append([str(label), *(f"{v:.0f}" for v in values), *([f"{chance[label]:.0f}"] if classes else []), *match])
        means = [*accuracy.mean(), *([chance.mean()] if classes else []), *([alike.match.mean()] if compared else [])]
        told.append(["mean", *(f"{mean:.1f}" for mean in means)])
        columns = (kind.name, *accuracy.columns, *(["chance"] if classes else []), *(["match"] if compared else []))
        tables.append(Table(title, columns, told, text=(kind.name,)))
    if len(numbers := _numbers(rows)):
        cells = [
            (str(label), *row) for label, row in zip(numbers.index, numbers.itertuples(index=False, name=None), strict=True)
        ]
        title = "numbers: r2, by space; in brackets what always the same answer scores"
        tables.append(Table(title, ("numbers", *numbers.columns), cells, text=("numbers",)))
    return tables


def _chance(rows: pd.DataFrame, kind: _Kind) -> pd.Series:
    """What always the same answer scores, in percent, by label."""
    labels = _wide(rows, kind.measure)
    baseline = _wide(rows, f"{kind.measure}, baseline")
    return baseline.mean(axis=1) if len(baseline) else labels.mean(axis=1) * 0 + 50


def _numbers(rows: pd.DataFrame) -> pd.DataFrame:
    """r2, labels by spaces, each cell as it is shown."""
    import pandas as pd

    score, baseline = _wide(rows, "r2"), _wide(rows, "r2, baseline")
    cells = {space: [*map("{:.2f} ({:.2f})".format, score[space], baseline[space])] for space in score}
    return pd.DataFrame(cells, index=score.index)


def _wide(rows: pd.DataFrame, measure: str, value: str = "value") -> pd.DataFrame:
    """Labels by spaces, in the order of the run."""
    own = rows[rows.measure == measure]
    return own.pivot(index="attribute", columns="target", values=value).reindex(
        index=own.attribute.unique(), columns=own.target.unique()
    )


def _page(run: Run, rows: pd.DataFrame) -> bytes:
    folder = run.folder / "figures"
    kinds = []
    for kind in _KINDS:
        alike = ranking(rows, kind)
        accuracy = _wide(rows, kind.measure)
        accuracy = accuracy.reindex(alike.index) if len(alike) else accuracy
        if accuracy.empty:
            continue
        figure = _bars(rows, accuracy) if kind is _CLASSES else _heatmap(accuracy, 50, 100, "Greens")
        svg = save_figure(figure, folder / ("classes" if kind is _CLASSES else "accuracy"))
        told = {"name": kind.name, "accuracy": svg, "alike": alike.dropna().reset_index().to_dict("records")}
        told |= {"means": accuracy.mean().round(1).to_dict(), "chance": _chance(rows, kind).mean()}
        if len(alike):
            match, change = (_pairs(rows, measure, alike.index.tolist()) for measure in ("match", "change"))
            told["match"] = save_figure(_heatmap(match, kind.low, 100, "Blues"), folder / kind.figures[0])
            told["change"] = save_figure(_heatmap(change, -kind.reach, kind.reach, "RdBu"), folder / kind.figures[1])
        kinds.append(told)
    numbers = _numbers(rows)
    return render(
        "probing/page.html",
        run,
        headline=headline(rows),
        kinds=kinds,
        numbers=(list(numbers.columns), list(numbers.itertuples(name=None))),
        rows=rows.to_dict("records"),
        notes=notes(rows),
    )


def _pairs(rows: pd.DataFrame, measure: str, order: list[str]) -> pd.DataFrame:
    """Labels by pairs, `source -> target`, the random encoder's last."""
    found = rows[rows.measure == measure].copy()
    found["pair"] = found.source + " → " + found.target
    pairs = [p for p in found.pair.unique() if not p.startswith("random")] + [
        p for p in found.pair.unique() if p.startswith("random")
    ]
    return found.pivot(index="attribute", columns="pair", values="value").reindex(index=order, columns=pairs)


def _bars(rows: pd.DataFrame, accuracy: pd.DataFrame) -> Figure:
    """For each label a bar a space with its interval, and chance as a line across them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    low, high = (_wide(rows, _CLASSES.measure, bound).reindex(accuracy.index) for bound in ("low", "high"))
    chance = _chance(rows, _CLASSES).reindex(accuracy.index)
    spaces, step = list(accuracy.columns), 1.0 / (accuracy.shape[1] + 1)
    coloured = iter(_COLOURS * (1 + len(spaces) // len(_COLOURS)))
    with plt.rc_context(style()):
        width = max(5.5, 0.9 + len(accuracy) * (0.28 * len(spaces) + 0.3))
        figure, ax = plt.subplots(figsize=(width, 3.2), layout="constrained")
        for i, space in enumerate(spaces):
            at = np.arange(len(accuracy)) + (i - (len(spaces) - 1) / 2) * step
            values = accuracy[space].to_numpy()
            spread = np.clip([values - low[space], high[space] - values], 0, None)
            colour = "#c9c7be" if space == "random" else next(coloured)
            ax.bar(at, values, step * 0.92, color=colour, label=space, zorder=2)
            ax.errorbar(at, values, spread, fmt="none", ecolor="#3b3a36", elinewidth=0.9, capsize=1.5, zorder=3)
            for x, value, top in zip(at, values, high[space], strict=True):
                if not np.isnan(value):
                    ax.text(x, top + 1.5, f"{value:.0f}", ha="center", va="bottom", fontsize=6.5)
        for i, value in enumerate(chance):
            ax.hlines(value, i - 0.5 + step / 3, i + 0.5 - step / 3, color="#c8445b", lw=1.4, ls=(0, (3, 2)), zorder=4)
        ax.plot([], [], color="#c8445b", lw=1.4, ls=(0, (3, 2)), label="chance")
        ax.set_xticks(range(len(accuracy)), [str(label).replace("_", " ") for label in accuracy.index])
        ax.tick_params(axis="x", length=0)
        ax.set(ylim=(0, 108), ylabel="read right, %", xlim=(-0.55, len(accuracy) - 0.45))
        ax.set_yticks(range(0, 101, 25))
        ax.grid(axis="y", color="#eeece4", zorder=0)
        figure.legend(loc="outside upper left", ncols=min(5, len(spaces) + 1), frameon=False, fontsize=8)
        plt.close(figure)
    return figure


def _heatmap(grid: pd.DataFrame, low: float, high: float, shades: str) -> Figure:
    """Rows of `grid` across, columns down, each cell with its number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    values = grid.to_numpy(dtype=float).T
    with plt.rc_context(style()):
        left = max(2.6, 0.4 + 0.062 * max(map(len, grid.columns)))
        size = (left + 0.3 * values.shape[1], 1.35 + 0.24 * values.shape[0])
        figure, ax = plt.subplots(figsize=size, layout="constrained")
        image = ax.imshow(values, cmap=shades, vmin=low, vmax=high, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            if not np.isnan(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.55
                ax.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=6.5, color="white" if dark else "#26251f")
        labels = [str(label).replace("_", " ") for label in grid.index]
        ax.set_xticks(range(values.shape[1]), labels, rotation=55, ha="right", rotation_mode="anchor", fontsize=7.5)
        ax.set_yticks(range(values.shape[0]), list(grid.columns), fontsize=7.5)
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
        plt.close(figure)
    return figure

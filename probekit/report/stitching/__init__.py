"""The report of a stitching run: the grids of stitched reconstructions, and the measures as heatmaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from probekit.report.figures import render, save_figure, style
from probekit.report.findings import Findings, Table
from probekit.report.verdicts import Bounded, either, foremost

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probekit.runs.folder import Run

# what is told first: latents differ in scale from space to space, so the error is taken in parts of the target's variance
_MAIN = ("latent error over variance, test", "RMSE", "LPIPS", "FID, 64 features", "fd-alexnet")
_ALIKE = ("CKA", "mutual 10-NN")
_LATENT = ("latent MSE, train", "latent MSE, test")
_SHADES = "YlGnBu"


def findings(run: Run, rows: pd.DataFrame) -> Findings:
    """What a run's rows come to."""
    rows = _in_order(run, rows)
    measures = _present(rows, _MAIN)
    told = []
    for (source, target), group in rows.groupby(["source", "target"], sort=False):
        by = group.set_index("measure")
        alpha = by.alpha.iloc[0]
        cells = [f"{r.value:.3g} {r.low:.3g}-{r.high:.3g}" if (r := _row(by, m)) is not None else "" for m in measures]
        told.append((source, target, "" if np.isnan(alpha) else f"{alpha:.3g}", *cells))
    table = Table(
        "stitched: encoder of the source, linear map, decoder of the target; 95% intervals",
        ("source", "target", "alpha", *measures),
        told,
        text=("source", "target"),
    )
    figures = [name for name, *_ in _grids(run, rows)]
    return Findings(
        run, rows, [table], lambda: _page(run, rows), (*figures, "measures", "similarity", "latent-mse"), headline(rows)
    )


def headline(rows: pd.DataFrame) -> str:
    """Into which decoders maps carry most and least, by LPIPS between that of their own encoder and chance's.

    Several that cannot be told apart, their intervals overlapping, are named together.
    """
    found = [b for b in _best(rows) if not np.isnan([b["own"], b["random"]]).any()]
    if not found:
        return ""
    dead = [b["target"] for b in found if b["random_high"] - b["own_low"] < _LITTLE * b["random"]]
    by = {b["target"]: b for b in found if b["target"] not in dead and b["random"] - b["own"] >= _LITTLE * b["random"]}
    kept = {target: _kept(b) for target, b in by.items()}
    said: list[str] = []
    if kept:
        most, least = (foremost(kept, most=way) for way in (True, False))
        ways = {"most": most} | ({"least": least} if not set(most) & set(least) else {})
        parts = [f"{word} into {_into(by[targets[0]], targets)}" for word, targets in ways.items()]
        said.append(f"A linear map carries {'; '.join(parts)}.")
    said += [f"{target} shows little of a picture, even from its own latents." for target in dead]
    return " ".join(said)


_LITTLE = 0.05
"""A share of chance's LPIPS: a decoder whose own encoder is no nearer than that shows little of a picture."""


def _kept(best: dict[str, Any]) -> Bounded:
    """Of what is lost from the decoder's own encoder to the random one, the share that the best map keeps, and its interval."""
    value, high, low = ((best["random"] - best[of]) / (best["random"] - best["own"]) for of in ("value", "low", "high"))
    return value, low, high


def _into(best: dict[str, Any], targets: Sequence[str]) -> str:
    """`avatar-flow, from avatar-vae: LPIPS …`: of the first of the targets that cannot be told apart."""
    which = f"{either(targets)}, which cannot be told apart; into {targets[0]}" if len(targets) > 1 else targets[0]
    numbers = f"LPIPS {best['value']:.3f}, {best['own']:.3f} from its own encoder, {best['random']:.3f} from random"
    return f"{which}, from {best['source']}: {numbers}"


def _in_order(run: Run, rows: pd.DataFrame) -> pd.DataFrame:
    """By source and target, as the spaces were named."""
    order = list(run.config["inputs"]["spaces"])
    return rows.sort_values(["source", "target"], key=lambda column: column.map(order.index), kind="stable", ignore_index=True)


def _grids(run: Run, rows: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame, range]]:
    """The grids of pictures: name, title, their pairs' rows, and which examples."""
    kept = min(8, run.config["options"]["test"])
    found: list[tuple[str, str, pd.DataFrame, range]] = []
    for number, (images, group) in enumerate(rows.groupby("images", sort=False)):
        drawn_by = group.drawn_by.iloc[0]
        if drawn_by:  # of a model's own samples, what other encoders and its decoder make of them (figure 2), and the reverse
            own = group[group.target == drawn_by]
            found.append((f"samples-{number}", f"Stitched reconstructions of {images}", own, range(kept)))
            others = group[(group.source == drawn_by) & (group.target != drawn_by)]
            found.append((f"from-{number}", f"What other decoders make of {images}", others, range(min(3, kept))))
        else:  # figures 1 and 9
            found.append(("reconstructions", f"Stitched reconstructions of {images}", group, range(min(3, kept))))
            found.append(("more-reconstructions", f"More of {images}", group, range(3, min(6, kept))))
    return [grid for grid in found if len(grid[2]) and grid[3]]


def _page(run: Run, rows: pd.DataFrame) -> bytes:
    folder = run.folder / "figures"
    grids = [
        {"title": title, "svg": save_figure(_grid(run, shown, examples), folder / name)}
        for name, title, shown, examples in _grids(run, rows)
    ]
    heat = save_figure(_heatmaps(rows, _present(rows, _MAIN)), folder / "measures")
    alike, latent = (
        save_figure(_heatmaps(rows, measures), folder / name) if _present(rows, measures) else ""
        for measures, name in ((_ALIKE, "similarity"), (_LATENT, "latent-mse"))
    )
    return render(
        "stitching/page.html",
        run,
        headline=headline(rows),
        figures=grids,
        heat=heat,
        alike=alike,
        latent=latent,
        best=_best(rows),
        rows=rows.to_dict("records"),
        n=run.config["options"]["test"],
    )


def _present(rows: pd.DataFrame, measures: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(m for m in measures if (rows.measure == m).any())


def _row(by: pd.DataFrame, measure: str) -> Any:
    return by.loc[measure] if measure in by.index else None


def _best(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """For every target, the source whose stitched pictures are nearest in LPIPS, and its own decoder's and chance's value."""
    found = []
    # on the same pictures only: a decoder's own samples where it cannot encode, else the data set
    lpips = rows[(rows.measure == "LPIPS") & ((rows.drawn_by == "") | (rows.drawn_by == rows.target))]
    for target, group in lpips.groupby("target", sort=False):
        by = group.set_index("source")
        others = by.drop([target, "random"], errors="ignore")
        if len(others):
            beside = by.reindex([target, "random"])
            (own, random), own_low, random_high = beside.value, beside.low.iloc[0], beside.high.iloc[1]
            first, *level = foremost({s: (r.value, r.low, r.high) for s, r in others.iterrows()}, most=False)
            best = others.loc[first]
            found.append(
                {"target": target, "source": first, "level": level, "value": best.value, "low": best.low, "high": best.high}
                | {"own": own, "own_low": own_low, "random": random, "random_high": random_high}
            )
    return found


def _grid(run: Run, rows: pd.DataFrame, examples: range) -> Figure:
    """Figures 1 and 2: a row a source, a column a target, for each example; the true picture on the left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sources, targets = rows.source.unique().tolist(), rows.target.unique().tolist()
    several = len(targets) > 1
    columns = [(e, t) for e in examples for t in ([None, *targets] if several else targets)]
    lines = sources if several else [None, *sources]
    with plt.rc_context(style()):
        # inches; titles stand at 60 degrees
        size, top = 0.62, 0.2 + 0.052 * max(map(len, targets)) if several else 0.05
        left = max(1.5, 0.2 + 0.066 * max(len(source) for source in sources))
        right = 0.2 + 0.03 * max(map(len, targets)) if several else 0.05
        figure, axes = plt.subplots(
            len(lines),
            len(columns),
            figsize=(left + right + size * len(columns), 0.1 + top + size * len(lines)),
            squeeze=False,
            gridspec_kw={"wspace": 0.06, "hspace": 0.06},
        )
        for i, source in enumerate(lines):
            for j, (example, target) in enumerate(columns):
                ax = axes[i, j]
                ax.set_xticks([])
                ax.set_yticks([])
                truth = target is None or source is None
                # a true picture lies with every pair
                unit = f"{sources[0] if source is None else source}--{targets[0] if target is None else target}"
                file = run.picture(unit, f"{'true-' if truth else ''}{example}")
                blank = truth and several and i != len(lines) // 2
                if file.exists() and not blank:
                    ax.imshow(Image.open(file), interpolation="nearest")
                own = source is not None and source == target
                for spine in ax.spines.values():
                    spine.set_visible(own)
                    spine.set_color("#c8445b")
                    spine.set_linewidth(2)
                if i == 0 and several:
                    ax.set_title("true" if target is None else target, rotation=60, ha="left", va="bottom", fontsize=7.5)
                if j == 0:
                    ax.set_ylabel("true" if source is None else source, rotation=0, ha="right", va="center", fontsize=8)
        width, height = figure.get_size_inches()
        figure.subplots_adjust(left=left / width, right=1 - right / width, bottom=0.01, top=1 - top / height)
        plt.close(figure)
    return figure


def _heatmaps(rows: pd.DataFrame, measures: tuple[str, ...]) -> Figure:
    """Each measure of every pair. Figure 1, right, and figure 5."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm, Normalize

    sources, targets = rows.source.unique().tolist(), rows.target.unique().tolist()
    with plt.rc_context(style()):
        longest = 0.055 * max(map(len, [*sources, *targets]))
        width, height = max(1.5, 0.4 + longest) + 0.66 * len(targets), max(1.35, 0.6 + 0.6 * longest) + 0.36 * len(sources)
        across = 2
        down = -(-len(measures) // across)
        figure, axes = plt.subplots(down, across, figsize=(across * width, down * height), squeeze=False, layout="constrained")
        for ax, measure in zip(axes.flat, measures, strict=False):
            grid = rows[rows.measure == measure].pivot(index="source", columns="target", values="value")
            grid = grid.reindex(index=sources, columns=targets)
            values = grid.to_numpy()
            low, high = np.nanmin(values), np.nanmax(values)
            wide = low > 0 and high / low > 30 and measure not in _ALIKE
            # what is exact would take all shades for itself
            norm = LogNorm(max(low, high / 1000), high, clip=True) if wide else Normalize(0, 1 if measure in _ALIKE else high)
            ax.imshow(values, cmap=_SHADES, norm=norm, aspect="auto")
            for (y, x), value in np.ndenumerate(values):
                if not np.isnan(value):
                    ax.text(
                        x,
                        y,
                        f"{value:.2g}" if value < 100 else f"{value:.0f}",
                        ha="center",
                        va="center",
                        fontsize=7.5,
                        color="white" if norm(value) > 0.55 else "#26251f",
                        fontweight="bold" if sources[y] == targets[x] else "normal",
                    )
            ax.set_title(measure, loc="left", fontsize=10, fontweight="bold")
            ax.set_xticks(range(len(targets)), targets, rotation=35, ha="right", rotation_mode="anchor")
            ax.set_yticks(range(len(sources)), sources)
            ax.tick_params(length=0)
            for spine in ax.spines.values():
                spine.set_visible(False)
        figure.supylabel("encoder", fontsize=9)
        figure.supxlabel("decoder (bold: the model's own)", fontsize=9)
        plt.close(figure)
    return figure

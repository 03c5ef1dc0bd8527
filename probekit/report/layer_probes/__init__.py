"""The report of probed layers: maps of layer and time for every label, and what knows a factor beside what carries it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.report.figures import data_url, render, save_figure, style
from probekit.report.findings import Findings, Table
from probekit.report.injection import COLOURS, colour
from probekit.report.network import short

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probekit.runs.folder import Run

UNDER = {
    "with": "told the caption",
    "without": "told no caption",
    "sampling": "while sampling",
}
"""The conditions, as they are told."""
PIXELS, INPUT, UNTRAINED = "pixels", "input", "untrained, best layer"

BOTH, KNOWS, CARRIES, NEITHER = "knows and carries", "knows, does not carry", "carries, does not know", "neither"
VERDICTS = {BOTH: "#4b4b52", KNOWS: "#2f6db5", CARRIES: "#c8445b", NEITHER: "#c9c7be"}
"""What a layer is for a factor, and its colour."""

_NAMED = 4  # layers that a sentence names; the table has them all


def findings(run: Run, rows: pd.DataFrame) -> Findings:
    """What a run's rows come to."""
    conditions, swept = run.config["inputs"]["conditions"], run.config["inputs"].get("swept")
    told = known(rows)
    judged = {c: verdicts(rows, swept, c) for c in conditions} if swept else {}
    tables = [_table(told, run.config)]
    says = [headline(told, c) for c in conditions]
    figures = [f"layers-{c}" for c in conditions]
    if swept:
        tables += [_named_table(judged[c], swept, c) for c in conditions]
        says += [knows_against_carries(judged[c], swept, c) for c in conditions]
        figures += [f"against-{c}" for c in conditions]
    says += [f"{name} is not probed: {why}." for name, why in run.config["inputs"]["skipped"].items()]
    return Findings(run, rows, tables, lambda: _page(run, rows, told, judged, says), figures, "\n".join(says))


# --- what is known -----------------------------------------------------------------------------------------------------


def better(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each layer, time, network and label the row of the positions, grid or mean, that it is read better from."""
    keys = ["network", "condition", "t", "layer", "factor"]
    order = rows.sort_values("value", ascending=False, kind="stable").drop_duplicates(keys).index
    return rows.loc[sorted(order)]


def skill(values: pd.Series, chance: pd.Series) -> pd.Series:
    """(value - chance) / (1 - chance): 0 at chance, 1 where all is read right; labels of any number of classes compare."""
    return (values - chance) / (1 - chance)


def known(rows: pd.DataFrame) -> pd.DataFrame:
    """For every condition and label what is known of it: one row each.

    best, t, value, low, high, control, selectivity: the trained network's best layer and time, and what it reads there; clear:
    whether that interval lies above chance; level: how many other layers cannot be told from it at that time, their intervals
    overlapping; first: the earliest of all these, in the order of execution; since: the noisiest timestep at which some layer
    has half of the best's skill (`skill`); chance; pixels, input, untrained: what the picture's own pixels, what the network is
    given at that time, and the untrained network's best layer at that time tell.
    """
    import pandas as pd

    best_of = better(rows)
    layers = best_of[~best_of.layer.isin([PIXELS, INPUT])]
    found = []
    asked = [(condition, factor) for condition in layers.condition.unique() for factor in rows.factor.unique()]
    for condition, factor in asked:
        group = layers[(layers.condition == condition) & (layers.factor == factor)]
        trained = group[group.network == "trained"]
        best = trained.loc[trained.value.idxmax()]
        at = trained[trained.t == best.t].sort_values("order")
        strong = trained[skill(trained.value, trained.chance) >= 0.5 * (best.value - best.chance) / (1 - best.chance)]
        untrained = group[(group.network == "untrained") & (group.t == best.t)]
        beside = best_of[best_of.factor == factor]
        given = beside[(beside.layer == INPUT) & (beside.condition == condition) & (beside.t == best.t)]
        found.append(
            {
                "condition": condition,
                "factor": factor,
                "best": best.layer,
                "clear": bool(best.low > best.chance),
                "level": int((at.high >= best.low).sum()) - 1,
                "first": at[at.high >= best.low].iloc[0].layer,
                "since": strong.t.max(),
                **{key: best[key] for key in ("t", "value", "low", "high", "chance", "control", "selectivity", "measure")},
                "pixels": float(beside[beside.layer == PIXELS].value.iloc[0]),
                "input": float(given.value.iloc[0]),
                "untrained": float(untrained.value.max()),
            }
        )
    return pd.DataFrame(found)


def headline(told: pd.DataFrame, condition: str) -> str:
    """Which layer knows each label best and when, under a condition."""
    parts = [
        f"{r.factor} by {r.best} at t = {r.t:g} ({_number(r.value)}, untrained {_number(r.untrained)}"
        + (f"; {r.level} other{'s' if r.level > 1 else ''} cannot be told from it)" if r.level else ")")
        if r.clear
        else f"{r.factor} by no layer that can be told from chance"
        for r in told[told.condition == condition].itertuples()
    ]
    shown = parts if len(parts) <= 6 else [*parts[:6], f"{len(parts) - 6} more are in the table"]
    return f"Known best, {UNDER[condition]}: {'; '.join(shown)}."


def _table(told: pd.DataFrame, config: dict[str, Any]) -> Table:
    name = Path(config["options"]["model"]).name
    columns = ["", "label", "best", "t", "read right", "95%", "chance", "selectivity", "untrained", "input", "pixels"]
    columns += ["first by", "half of it since t"]
    rows = [
        (
            UNDER[r.condition],
            r.factor,
            r.best if r.clear else "no layer",
            f"{r.t:g}" if r.clear else "",
            _number(r.value),
            f"{_number(r.low)}-{_number(r.high)}",
            _number(r.chance),
            _number(r.selectivity),
            _number(r.untrained),
            _number(r.input),
            _number(r.pixels),
            r.first if r.clear else "",
            f"{r.since:g}" if r.clear else "",
        )
        for r in told.itertuples()
    ]
    title = f"{name}: which layer knows a label best, by balanced accuracy of held-out images (of numbers R²)"
    return Table(title, columns, rows, text=("", "label", "best", "first by"))


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


# --- knows against carries ---------------------------------------------------------------------------------------------


def verdicts(rows: pd.DataFrame, swept: dict[str, Any], condition: str) -> pd.DataFrame:
    """For every window, layer and factor of a sweep: what the layer knows, what it carries, and what follows.

    knows: the mean skill (`skill`), over the factor's labels and the probed times in the window, of the trained network's
    layer, with the mean ends of its intervals (wider than the mean's own); untrained: the same of the untrained network's.
    carries: transfer less the null, with the transfer's interval less the null. A layer *knows* where its interval lies above
    chance and above the untrained one's; it *carries* where the transfer's interval lies above the null's.
    """
    import pandas as pd

    best_of = better(rows[rows.condition == condition])
    best_of = best_of.assign(**{k: skill(best_of[v], best_of.chance) for k, v in (("s", "value"), ("l", "low"), ("h", "high"))})
    numbers = pd.DataFrame(swept["numbers"])
    found = []
    for window, times in swept["windows"].items():
        for factor, labels in swept["factors"].items():
            mine = best_of[best_of.t.isin(times) & best_of.factor.isin(labels)]
            means = mine.groupby(["network", "layer"])[["s", "l", "h", "order"]].mean()
            carried = numbers[(numbers.window == window) & (numbers.factor == factor)].set_index("layer")
            trained, untrained = means.loc["trained"], means.loc["untrained"]
            for layer in trained.sort_values("order").index.intersection(carried.index, sort=False):
                k, u, c = trained.loc[layer], untrained.loc[layer], carried.loc[layer]
                knows, carries = k.l > max(0.0, u.h), c.low > c.null_high
                verdict = (BOTH if carries else KNOWS) if knows else CARRIES if carries else NEITHER
                found.append(
                    {"window": window, "factor": factor, "layer": layer, "verdict": verdict}
                    | {"knows": k.s, "knows_low": k.l, "knows_high": k.h, "untrained": u.s, "untrained_high": u.h}
                    | {"carries": c.transfer - c.null, "carries_low": c.low - c.null, "carries_high": c.high - c.null}
                )
    columns = ["window", "factor", "layer", "verdict", "knows", "knows_low", "knows_high", "untrained", "untrained_high"]
    return pd.DataFrame(found, columns=[*columns, "carries", "carries_low", "carries_high"])


def knows_against_carries(judged: pd.DataFrame, swept: dict[str, Any], condition: str) -> str:
    """Which layers know without carrying and carry without knowing, in the sweep's first window."""
    window, said = next(iter(swept["windows"])), []
    ways = {KNOWS: "known and not shown to be carried by", CARRIES: "carried and not shown to be known by", BOTH: "both by"}
    for factor in swept["factors"]:
        by = _layers_by_verdict(judged, window, factor)
        parts = [f"{way} {_listed(by[verdict])}" for verdict, way in ways.items() if by[verdict]]
        said.append(f"{factor} is {', '.join(parts)}" if parts else f"{factor} is shown to be known or carried by no layer")
    when = "at all steps" if window == "all" else f"at steps {window}"
    return f"Knows against carries, {UNDER[condition]}, {when}: {'; '.join(said)}."


def _layers_by_verdict(judged: pd.DataFrame, window: str, factor: str) -> dict[str, list[str]]:
    """Layers of each verdict: those that carry the most first, then those that know the most."""
    mine = judged[(judged.window == window) & (judged.factor == factor)]
    return {
        verdict: mine[mine.verdict == verdict]
        .sort_values("knows" if verdict == KNOWS else "carries", ascending=False, kind="stable")
        .layer.tolist()
        for verdict in VERDICTS
    }


def _listed(layers: Sequence[str]) -> str:
    more = len(layers) - _NAMED
    return ", ".join(layers[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _named_table(judged: pd.DataFrame, swept: dict[str, Any], condition: str) -> Table:
    rows = [
        (window, factor, *(str(len(by[v])) for v in (KNOWS, CARRIES, BOTH, NEITHER)), ", ".join(by[CARRIES]) or "–")
        for window in swept["windows"]
        for factor in swept["factors"]
        for by in [_layers_by_verdict(judged, window, factor)]
    ]
    title = f"knows against carries, {UNDER[condition]}: how many layers"
    columns = ("steps", "factor", "only know", "only carry", "both", "neither", "carry without knowing")
    return Table(title, columns, rows, text=("steps", "factor", "carry without knowing"))


# --- the page ----------------------------------------------------------------------------------------------------------


def _page(run: Run, rows: pd.DataFrame, told: pd.DataFrame, judged: dict[str, pd.DataFrame], says: Sequence[str]) -> bytes:
    figures, inputs = run.folder / "figures", run.config["inputs"]
    swept = inputs.get("swept")
    conditions = []
    for c in inputs["conditions"]:
        shown = {"name": c, "under": UNDER[c], "map": save_figure(_maps(rows, c), figures / f"layers-{c}")}
        shown["told"] = _records(told[told.condition == c])
        if swept:
            window = next(iter(swept["windows"]))
            shown["against"] = save_figure(_scatter(judged[c], swept, [window]), figures / f"against-{c}")
            if len(swept["windows"]) > 1:
                later = list(swept["windows"])[1:]
                shown["by_time"] = save_figure(_scatter(judged[c], swept, later), figures / f"against-{c}-time")
            shown["named"] = [
                {"window": w, "factor": f} | {k: _layers_by_verdict(judged[c], w, f)[v] for k, v in _KEYS.items()}
                for w in swept["windows"]
                for f in swept["factors"]
            ]
        conditions.append(shown)
    return render(
        "layer_probes/page.html",
        run,
        name=Path(run.config["options"]["model"]).name,
        says=says,
        conditions=conditions,
        swept=swept,
        given=_given(run),
        rows=_records(rows),
        verdicts=VERDICTS,
    )


_KEYS = {"knows": KNOWS, "carries": CARRIES, "both": BOTH, "neither": NEITHER}


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return frame.to_dict("records")


def _given(run: Run) -> list[dict[str, Any]]:
    """Pictures of what the network was given: for each of the first images the picture itself, then by time."""
    shown = []
    condition = run.config["inputs"]["conditions"][0]
    times = [f"{t:g}" for t in run.config["inputs"]["probed_timesteps"]]
    for number in range(4):
        own = run.picture("pixels", f"image-{number}")
        unit = f"trained-{condition}" if condition == "sampling" else f"trained-{condition}-{{}}"
        pictures = [(f"t = {t}", run.picture(unit.format(t), f"given-{number}-{t}")) for t in times]
        every = [*pictures, *([] if condition == "sampling" else [("picture", own)])]
        if all(path.exists() for _, path in every):  # a run may have been kept without its pictures
            shown.append({"pictures": [{"told": told, "url": data_url(path)} for told, path in every]})
    return shown


# --- figures -----------------------------------------------------------------------------------------------------------


def _colour_of(label: str, number: int) -> str:
    """A label's colour: its factor's, of scenes; else one of four."""
    from probekit.data.scenes import FACTORS

    factor = next((factor for factor, labels in FACTORS.items() if label in labels), None)
    spare = ("#2f6db5", "#b0722a", "#5b8c5a", "#8a5fa8")
    return COLOURS[factor] if factor else spare[number % len(spare)]


def _maps(rows: pd.DataFrame, condition: str) -> Figure:
    """A layer x time map for every label: what the trained network's layers read, beside pixels, input and untrained best.

    Bold: the interval lies above that of the same layer, untrained.
    """
    import pandas as pd
    from matplotlib import pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    best_of = better(rows)
    mine = best_of[best_of.condition == condition]
    trained, untrained = (mine[mine.network == network] for network in ("trained", "untrained"))
    of_layers = trained[trained.layer != INPUT].sort_values("order", kind="stable")
    layers, factors = of_layers.layer.unique().tolist(), rows.factor.unique().tolist()
    times = sorted(trained.t.unique(), reverse=True)
    names = [PIXELS, INPUT, *layers, UNTRAINED]
    # a gap between what is no trained layer and what is one
    at = {name: i + (0.35 if i > 1 else 0) + (0.35 if name == UNTRAINED else 0) for i, name in enumerate(names)}
    columns = min(6, len(factors))
    lines = math.ceil(len(factors) / columns)
    wide = max(1.36, 0.34 * len(times))
    with plt.rc_context(style()):
        size = (1.7 + (wide + 0.12) * columns, lines * (0.215 * len(names) + 0.55) + 0.45)
        figure, axes = plt.subplots(lines, columns, figsize=size, sharey=True, layout="constrained", squeeze=False)
        for ax in axes.flat[len(factors) :]:
            ax.set_visible(False)
        for number, (ax, factor) in enumerate(zip(axes.flat, factors, strict=False)):
            own = _colour_of(factor, number)
            shades = LinearSegmentedColormap.from_list(factor, ["#faf9f5", own])
            by = {n: f[f.factor == factor].set_index(["layer", "t"]) for n, f in (("t", trained), ("u", untrained))}
            pixels = float(best_of[(best_of.layer == PIXELS) & (best_of.factor == factor)].value.iloc[0])
            chance = float(by["t"].chance.iloc[0])
            for name, y in at.items():
                for x, t in enumerate(times):
                    clear = True
                    if name == PIXELS:
                        value = pixels
                    elif name == UNTRAINED:
                        value = float(by["u"].xs(t, level="t").value.max())
                    else:
                        row = by["t"].loc[name, t]
                        value = float(row.value)
                        clear = name == INPUT or row.low > by["u"].loc[name, t].high
                    part = min(max((value - chance) / (1 - chance), 0.0), 1.0)
                    ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, color=shades(part), lw=0))
                    told = f"{value:.2f}".removeprefix("0") if value < 0.995 else "1"
                    bold = "bold" if clear and name in layers else "normal"
                    ink = "white" if part > 0.62 else "#26251f"
                    ax.text(x, y, told, ha="center", va="center", fontsize=6.6, color=ink, fontweight=bold)
            ax.set_title(factor.replace("_", " "), color=own, fontsize=9.5, fontweight="bold", pad=3, loc="left")
            ax.text(
                1, 1.002, f"chance {chance:.2f}".replace("0.", "."), transform=ax.transAxes, fontsize=6, ha="right", va="bottom"
            )
            ax.set(xlim=(-0.5, len(times) - 0.5), ylim=(max(at.values()) + 0.5, -0.5))
            ax.set_xticks(range(len(times)), [f"{t:g}" for t in times], fontsize=7.5)
            ax.set_yticks(list(at.values()), [_row_name(name) for name in names], fontsize=7.5)
            ax.tick_params(length=0)
            for spine in ax.spines.values():
                spine.set_visible(False)
        under = pd.Series(UNDER)[condition]
        figure.supxlabel(f"timestep: noise at the left, picture at the right; {under}", fontsize=9)
        plt.close(figure)
    return figure


def _row_name(name: str) -> str:
    return {PIXELS: "the picture's pixels", INPUT: "the network's input"}.get(name, name if name == UNTRAINED else short(name))


def _scatter(judged: pd.DataFrame, swept: dict[str, Any], windows: Sequence[str]) -> Figure:
    """What layers know against what they carry: a panel a window and factor, a point a layer, coloured by its verdict."""
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    factors = list(swept["factors"])
    one = len(windows) == 1
    width, height = (3.6, 3.5) if one else (2.9, 2.2)
    low, high = float(judged.carries_low.min()), float(judged.carries_high.max())
    left, right = min(-0.05, float(judged.knows_low.min())), max(1.02, float(judged.knows_high.max()))
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            len(windows),
            len(factors),
            figsize=(width * len(factors) + 0.5, height * len(windows) + 0.8),
            sharex=True,
            sharey=True,
            layout="constrained",
            squeeze=False,
        )
        for row, window in zip(axes, windows, strict=True):
            for ax, factor in zip(row, factors, strict=True):
                mine = judged[(judged.window == window) & (judged.factor == factor)]
                ax.axhline(0, color="#8a8880", lw=0.8, ls=(0, (4, 3)), zorder=0)
                ax.axvline(0, color="#8a8880", lw=0.8, ls=(0, (4, 3)), zorder=0)
                for p in mine.itertuples():
                    c = VERDICTS[p.verdict]
                    ax.plot([p.knows_low, p.knows_high], [p.carries] * 2, color=c, lw=0.7, alpha=0.55, zorder=1)
                    ax.plot([p.knows] * 2, [p.carries_low, p.carries_high], color=c, lw=0.7, alpha=0.55, zorder=1)
                    ax.plot(p.untrained, p.carries, "o", ms=2.6, mfc="none", mec=c, mew=0.6, alpha=0.7, zorder=1)
                    ax.plot(p.knows, p.carries, "o", ms=6.2 if one else 4.6, mfc=c, mec="white", mew=0.7, zorder=3)
                if window == windows[0]:
                    ax.set_title(factor, color=colour(factor, factors), fontsize=10.5, fontweight="bold", loc="left")
                ax.set(xlim=(left - 0.03, right + 0.03), ylim=(low - (0.2 if one else 0.06), high + 0.06))
                ax.tick_params(length=2)
                if one:
                    _name_points(ax, mine)
            if not one:
                row[0].set_ylabel(f"steps {window}", fontsize=8.5)
        figure.supxlabel(
            "knows: probe accuracy over chance (0 chance, 1 all right); small rings: the layer untrained", fontsize=9
        )
        figure.supylabel("carries: transfer over null", fontsize=9)
        handles = [Line2D([], [], marker="o", ls="", ms=6, mfc=c, mec="white") for c in VERDICTS.values()]
        figure.legend(
            handles, list(VERDICTS), loc="outside upper left", ncols=4, frameon=False, handletextpad=0.2, fontsize=8.5
        )
        plt.close(figure)
    return figure


def _name_points(ax: Any, mine: pd.DataFrame) -> None:
    """Names beside the points that carry the most, and under the two that know the most and carry nothing."""
    from matplotlib.patheffects import withStroke

    carrying = mine[mine.verdict.isin([BOTH, CARRIES])].nlargest(5, "carries")
    only = mine[mine.verdict == KNOWS].nlargest(2, "knows")
    low, high = ax.get_ylim()
    line = 0.06 * (high - low)
    named, lowest = [], high
    for p in sorted(carrying.itertuples(), key=lambda p: -p.carries):
        lowest = min(p.carries, lowest - line)
        named.append((p, lowest))
    # below what is drawn near zero
    named += [(p, min(-1.5 * line, lowest - line) - i * line) for i, p in enumerate(only.itertuples())]
    for p, y in named:
        side = -1 if p.knows > 0.45 else 1
        ax.annotate(
            short(p.layer),
            (p.knows, p.carries),
            xytext=(p.knows + side * 0.05, y),
            ha="right" if side < 0 else "left",
            va="center",
            fontsize=7,
            color=VERDICTS[p.verdict],
            zorder=4,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": VERDICTS[p.verdict], "shrinkA": 0, "shrinkB": 2},
        )

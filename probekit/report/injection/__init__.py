"""The report of an injection sweep: what came over with each layer, drawn and told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from probekit.hooks.errors import ProbekitError
from probekit.metrics.descriptors import CLIP
from probekit.metrics.roles import EVERYTHING, NO_ROLE, roles, summarise
from probekit.models.given import FAR
from probekit.report.figures import data_url, render, save_figure, style
from probekit.report.findings import Findings, Table
from probekit.report.injection import given
from probekit.report.network import drawn_by_name, form_by_name, part_of, short
from probekit.report.verdicts import foremost

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probekit.runs.folder import Run

COLOURS = {
    "structure": "#2f6db5",
    "content": "#c8445b",
    "surface": "#e0a021",
    "own": "#2f6db5",
    EVERYTHING: "#4b4b52",
    NO_ROLE: "#d5d4cf",
}
_SPARE = ("#5b8c5a", "#8a5aa8", "#3aa0a0", "#a86b3c")
DESCRIPTORS = {
    "reader": "the scene reader",
    "lpips": "LPIPS",
    "ssim": "SSIM",
    "sift": "SIFT keypoints",
    "hsv": "HSV histogram",
    "lbp": "local binary patterns",
    "clip": "CLIP similarity",
}


_NAMED = 3
"""Carriers of a role that the sentence names; the page has them all."""


@dataclass(frozen=True)
class Summary:
    """What a sweep's rows come to: for every descriptor, and (`main`) for the one that is told first.

    That is the scene reader where it applies to every pair, else LPIPS.
    """

    descriptor: str
    factors: list[str]
    windows: list[str]
    layers: list[str]
    summary: pd.DataFrame
    roles: pd.DataFrame
    main: pd.DataFrame
    role_of: dict[tuple[str, str], str]
    """The role by (window, layer), of the main descriptor."""

    @classmethod
    def of(cls, windows: Sequence[str], rows: pd.DataFrame) -> Summary:
        """Summarise the rows of a sweep, whose windows are told in that order."""
        read = rows[rows.descriptor == "reader"].pair.nunique()
        descriptor = "reader" if read == rows.pair.nunique() else "lpips"
        summary = summarise(rows)
        found = roles(summary)
        main, own = summary[summary.descriptor == descriptor], found[found.descriptor == descriptor]
        factors = [f for f in COLOURS if f in set(main.factor)]
        factors += [f for f in main.factor.unique() if f not in factors]
        layers = main.drop_duplicates("layer").sort_values("order").layer.tolist()
        role_of = {(w, la): NO_ROLE for w in windows for la in layers}
        role_of |= {(r.window, r.layer): r.role for r in own.itertuples()}
        return cls(descriptor, factors, list(windows), layers, summary, found, main, role_of)

    @property
    def fewest_pairs(self) -> int:
        """The number of pairs of the factor that has the fewest."""
        return int(min(self.main.pairs))

    def numbers(self, window: str, layer: str) -> pd.DataFrame:
        """The main descriptor's row of every factor."""
        return self.main[(self.main.window == window) & (self.main.layer == layer)].set_index("factor").reindex(self.factors)

    def carriers(self) -> list[dict[str, Any]]:
        """For each role, in the first window: its layers, strongest first, with the weakest transfer that makes it theirs."""
        told: list[dict[str, Any]] = []
        for role in [*self.factors, EVERYTHING]:
            layers = [la for la in self.layers if self.role_of[self.windows[0], la] == role]
            numbers = [self.numbers(self.windows[0], la) for la in layers]
            decisive = [n.loc[n.transfer.idxmin() if role == EVERYTHING else role] for n in numbers]
            carriers: list[dict[str, Any]] = [{"layer": la, **d.to_dict()} for la, d in zip(layers, decisive, strict=True)]
            told.append({"role": role, "carriers": sorted(carriers, key=lambda c: -c["transfer"])})
        return told


def findings(run: Run, rows: pd.DataFrame) -> Findings:
    """What a run's rows come to."""
    inputs = run.config["inputs"]
    summary = Summary.of(inputs["swept_windows"], rows)
    said = says(summary)
    if "clip" not in inputs["descriptors"]:
        said += f" CLIP similarity is left out: {CLIP} is not in the local cache (hf download {CLIP})."
    pictures = given.of_rows(inputs["swept_pairs"], rows)
    tables = [_table(summary)]
    if pictures:
        tables.insert(0, given.table(pictures))
        said += f"\n{given.says(pictures)}"
    figures = ("layers", "roles", *(["time"] if len(summary.windows) > 1 else []))
    return Findings(run, rows, tables, lambda: _page(run, summary, pictures, said), figures, said)


def says(summary: Summary) -> str:
    """Which layers carry what in the first window, by the main descriptor, and what no layer carries."""
    window, by = summary.windows[0], DESCRIPTORS[summary.descriptor]
    when = "" if len(summary.windows) == 1 else "at all steps, " if window == "all" else f"at steps {window}, "
    if len(summary.factors) == 1:
        return _of_one_factor(summary, f"{when}by {by}, ")
    if summary.fewest_pairs < 3:
        fewest = "one pair" if summary.fewest_pairs == 1 else "two pairs"
        return f"No layer can have a role: {fewest} of a factor say nothing of the next. At least three are needed."
    carried, nowhere = [], []
    for told in summary.carriers():
        role, carriers = told["role"], told["carriers"]
        if not carriers:
            nowhere += [role] if role != EVERYTHING else []
            continue
        named = [f"{c['layer']} ({c['transfer']:.2f})" for c in carriers[:_NAMED]]
        more = len(carriers) - len(named)
        listed = _listed([*named, *([f"{more} other{'s' if more > 1 else ''}"] if more else [])])
        carried.append(f"{role} comes over with {listed}")
    if nowhere:
        carried.append(f"no layer is shown to carry {_listed(nowhere, 'or')} alone")
    said = f"{when}by {by}, {'; '.join(carried)}."
    return said[0].upper() + said[1:] + _few(summary)


def _of_one_factor(summary: Summary, by: str) -> str:
    """The layer with which most came over: a factor alone has nothing to be clear of."""
    known = summary.main[summary.main.window == summary.windows[0]].dropna(subset=["transfer"])
    if known.empty:
        said = f"{by}O and E do not differ: nothing could come over."
    else:
        first, *others = foremost({r.layer: (r.transfer, r.low, r.high) for r in known.itertuples()})
        most = known.set_index("layer").loc[first]
        interval = f"95% interval {most.low:.2f}–{most.high:.2f}, null {most.null:.2f}"
        said = f"{by}most comes over with {first} ({most.transfer:.2f}, {interval})"
        said += f", from which {len(others)} other{'s' if len(others) > 1 else ''} cannot be told." if others else "."
    return f"{said[0].upper()}{said[1:]} One factor alone gives no roles: there is no other to be clear of.{_few(summary)}"


def _few(summary: Summary) -> str:
    pairs = summary.fewest_pairs
    return "" if pairs >= 6 else f" With only {pairs} pair{'s' if pairs > 1 else ''} a factor, intervals are coarse."


def _listed(parts: Sequence[str], last: str = "and") -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {last} {parts[-1]}"


def _table(summary: Summary) -> Table:
    """Layers with transfer and interval, null, damage and role."""
    several = len(summary.windows) > 1
    by = DESCRIPTORS[summary.descriptor]
    title = f"transfer by {by} (0 nothing, 1 all of it), 95% interval, (null: an unrelated donor)"
    columns = [*(["steps"] if several else []), "layer", *summary.factors, "damage", "role"]
    rows: list[tuple[str, ...]] = []
    styles: dict[int, str] = {}
    for window in summary.windows:
        for layer in summary.layers:
            numbers, role = summary.numbers(window, layer), summary.role_of[window, layer]
            cells = [f"{n.transfer:.2f} {n.low:.2f}-{n.high:.2f} ({n.null:.2f})" for n in numbers.itertuples()]
            styles[len(rows)] = (
                "dim" if role == NO_ROLE else "bold" if role == EVERYTHING else f"bold {colour(role, summary.factors)}"
            )
            rows.append((*([window] if several else []), layer, *cells, f"{numbers.damage.mean():.2f}", role))
    return Table(title, columns, rows, text=("steps", "layer", "role"), styles=styles)


def colour(name: str, factors: Sequence[str]) -> str:
    """A factor's or role's colour; factors of the user's own take spare ones."""
    return COLOURS[name] if name in COLOURS else _SPARE[factors.index(name) % len(_SPARE)]


def _page(run: Run, summary: Summary, pictures: Sequence[given.MadeAgain], said: str) -> bytes:
    """The figures, drawn into figures/, and the page."""
    windows, layers, factors = summary.windows, summary.layers, summary.factors
    config, figures = run.config, run.folder / "figures"
    save_figure(_layers_figure(run, summary), figures / "layers")
    drawn = {"roles": save_figure(_roles_figure(summary), figures / "roles")}
    if len(windows) > 1:
        drawn["time"] = save_figure(_time_figure(summary), figures / "time")
    shown = seen(run, summary)
    descriptors = [d for d in DESCRIPTORS if (summary.summary.descriptor == d).any()]
    return render(
        "injection/page.html",
        run,
        name=shown["name"],
        headline=said,
        conclusions=summary.carriers(),
        descriptor=DESCRIPTORS[summary.descriptor],
        factors=factors,
        controlled=all(f in COLOURS and f != "own" for f in factors) and summary.descriptor == "reader",
        colours=shown["colours"],
        windows=windows,
        layers=layers,
        pairs=shown["pairs"],
        roles=shown["roles"][windows[0]],
        data={"model": None, "runs": [shown]},
        figures=drawn,
        far=FAR,
        given=[_given(run, picture, config["inputs"]["swept_pairs"]) for picture in pictures],
        table=_cells(summary, descriptors),
        descriptors=[DESCRIPTORS[d] for d in descriptors],
        everything=EVERYTHING,
        no_role=NO_ROLE,
    )


def seen(run: Run, summary: Summary) -> dict[str, Any]:
    """A sweep's run as the inspector shows it: its network, its pairs with their pictures, its numbers and its roles."""
    inputs, options, windows, layers = run.config["inputs"], run.config["options"], summary.windows, summary.layers
    name, carrying = Path(options["model"]).name, inputs.get("carry_text", ())
    pairs = []
    for pair in inputs["swept_pairs"]:
        told = {key: pair[key] for key in ("name", "factor", "original", "edit", "noise")}
        ends = {end: data_url(_picture(run, pair, end)) for end in ("O", "E")}
        pictures = {w: {la: data_url(_picture(run, pair, picture_name(w, la))) for la in layers} for w in windows}
        pairs.append({**told, **ends, "given": any(key.startswith("image_") for key in pair), "pictures": pictures})
    count = f"{len(pairs)} pair{'s' * (len(pairs) > 1)}"
    return {
        "title": f"{name}: {count}, {options['num_steps']} steps",
        "name": name,
        "form": form_by_name(layers, carrying),
        "layers": drawn_by_name(layers, carrying),
        "windows": windows,
        "pairs": pairs,
        "factors": summary.factors,
        "colours": {f: colour(f, summary.factors) for f in [*summary.factors, EVERYTHING, NO_ROLE]},
        "descriptor": DESCRIPTORS[summary.descriptor],
        "fewest_pairs": summary.fewest_pairs,
        "numbers": {w: {la: _records(summary.numbers(w, la)) for la in layers} for w in windows},
        "roles": {w: {la: summary.role_of[w, la] for la in layers} for w in windows},
        "everything": EVERYTHING,
        "no_role": NO_ROLE,
        "question": {"seed": options["seed"], "num_steps": options["num_steps"], "guidance": inputs["guidance_scale"]},
        "lazy": None,
    }


def picture_name(window: str, layer: str) -> str:
    """What the picture of O with E's layer is called among a pair's pictures."""
    return f"{window}_{layer}".replace("%", "pct")


def given_name(side: str) -> str:
    """What a given picture is called among a pair's pictures, by `original` or `edit`."""
    return f"{'O' if side == 'original' else 'E'}_given"


def _given(run: Run, picture: given.MadeAgain, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A given picture for the page: as it was given and as it was made again, with its caption."""
    pair = next(pair for pair in pairs if pair["name"] == picture.pair)
    side = "original" if picture.end == "O" else "edit"
    urls = {
        "url": data_url(_picture(run, pair, given_name(side))),
        "again": data_url(_picture(run, pair, picture.end)),
    }
    return {"told": picture, "warning": picture.warning, "caption": pair[side], **urls}


def _picture(run: Run, pair: Mapping[str, Any], name: str) -> Path:
    """Where a pair's picture lies. Raises ProbekitError where it does not."""
    path = run.picture(pair["name"], name)
    if not path.exists():
        raise ProbekitError(
            f"run {str(run.folder)!r}: {path.name} of {pair['name']} is missing; the same command makes it again"
        )
    return path


def _records(numbers: pd.DataFrame) -> list[dict[str, Any]]:
    """The factors' numbers for the page, which knows null but no NaN."""
    columns = ["factor", "transfer", "low", "high", "null", "null_low", "null_high", "damage"]
    records = numbers.reset_index()[columns].to_dict("records")
    return [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in r.items()} for r in records]


def _cells(summary: Summary, descriptors: Sequence[str]) -> list[dict[str, Any]]:
    """For every window and layer: by each descriptor the role, and each factor's numbers."""
    numbers = {(r.descriptor, r.window, r.layer, r.factor): r for r in summary.summary.itertuples()}
    role_of = {(r.descriptor, r.window, r.layer): r.role for r in summary.roles.itertuples()}

    def cell(descriptor: str, window: str, layer: str) -> dict[str, Any]:
        place = (descriptor, window, layer)
        return {"role": role_of.get(place, NO_ROLE), "numbers": [numbers.get((*place, f)) for f in summary.factors]}

    return [
        {"window": w, "layer": la, "cells": [cell(d, w, la) for d in descriptors]}
        for w in summary.windows
        for la in summary.layers
    ]


# --- figures -----------------------------------------------------------------------------------------------------------


def _roles_figure(summary: Summary) -> Figure:
    """Transfer of every factor at every layer, with intervals, nulls and the role that follows, in the first window."""
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    layers, factors = summary.layers, summary.factors
    shown = summary.main[summary.main.window == summary.windows[0]]
    with plt.rc_context(style()):
        figure, (ax, harm) = plt.subplots(
            2, 1, figsize=(max(7.5, 0.56 * len(layers) + 1.6), 5.4), height_ratios=(4.2, 1), sharex=True, layout="constrained"
        )
        width = 0.8 / max(len(factors), 1)
        role_of = {la: summary.role_of[summary.windows[0], la] for la in layers}
        for x, la in enumerate(layers):
            role = role_of[la]
            if role != NO_ROLE:
                ax.add_patch(Rectangle((x - 0.48, -0.02), 0.96, 1.04, color=colour(role, factors), alpha=0.13, lw=0))
            ax.add_patch(Rectangle((x - 0.48, 1.045), 0.96, 0.045, color=colour(role, factors), lw=0, clip_on=False))
        for k, factor in enumerate(factors):
            by = shown[shown.factor == factor].set_index("layer").reindex(layers)
            at = np.arange(len(layers)) + (k - (len(factors) - 1) / 2) * width
            c = colour(factor, factors)
            ax.bar(at, by.transfer, width * 0.86, color=c, alpha=0.88, lw=0)
            spread = np.abs(np.vstack([by.transfer - by.low, by.high - by.transfer]))
            ax.errorbar(at, by.transfer, yerr=spread, fmt="none", ecolor="#26251f", elinewidth=1, capsize=2)
            ax.hlines(by.null, at - width * 0.43, at + width * 0.43, color="white", lw=2.6, zorder=3)
            ax.hlines(
                by.null, at - width * 0.43, at + width * 0.43, color="#26251f", lw=1.1, zorder=4, linestyles=(0, (1.2, 0.8))
            )
            harm.plot(at, by.damage, "o", ms=3.5, color=c)
        ax.set(ylim=(0, 1.1), xlim=(-0.6, len(layers) - 0.4), ylabel=f"transfer, by {DESCRIPTORS[summary.descriptor]}")
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
        harm.set(ylim=(-0.05, max(1.05, float(np.nanmax(shown.damage)) * 1.05)), ylabel="damage")
        harm.set_xticks(range(len(layers)), [short(la) for la in layers], rotation=48, ha="right", rotation_mode="anchor")
        harm.axhline(0, color="#c9c7bf", lw=0.8, zorder=0)
        for axis in (ax, harm):
            axis.tick_params(length=0)
            for x in range(1, len(layers)):
                if part_of(layers[x]) != part_of(layers[x - 1]):
                    axis.axvline(x - 0.5, color="#8a8880", lw=0.8, ls=(0, (4, 3)))
        handles: list[Any] = [Rectangle((0, 0), 1, 1, color=colour(f, factors)) for f in factors]
        handles.append(Line2D([], [], color="#26251f", lw=1.1, ls=(0, (1.2, 0.8))))
        if EVERYTHING in role_of.values():
            handles.append(Rectangle((0, 0), 1, 1, color=COLOURS[EVERYTHING]))
        names = [*factors, "null: unrelated donor", *(["carries everything"] if EVERYTHING in role_of.values() else [])]
        figure.legend(handles, names, loc="outside upper left", ncols=len(names), frameon=False, handlelength=1.3)
        plt.close(figure)
    return figure


def _layers_figure(run: Run, summary: Summary) -> Figure:
    """O, E and O with each layer taken from E, for the first pair of every factor (figure 5 of the paper).

    Before O and E made again, the pictures that were given.
    """
    from matplotlib import pyplot as plt

    window, layers, factors = summary.windows[0], summary.layers, summary.factors
    first = {pair["factor"]: pair for pair in reversed(run.config["inputs"]["swept_pairs"])}
    ends = {"O_given": "image_original", "O": "", "E_given": "image_edit", "E": ""}
    columns = [*(name for name, key in ends.items() if not key or any(key in pair for pair in first.values())), *layers]
    height, left, right = 0.66 * len(factors) + 1.1, 0.2 + 0.085 * max(map(len, factors)), 0.35  # inches
    width = left + 0.56 * len(columns) + right
    sides = {"left": left / width, "right": 1 - right / width, "bottom": 0.02, "top": 1 - 1.05 / height}
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            len(factors),
            len(columns),
            figsize=(width, height),
            squeeze=False,
            gridspec_kw={"wspace": 0.06, "hspace": 0.06} | sides,
        )
        for row, factor in zip(axes, factors, strict=True):
            for ax, name in zip(row, columns, strict=True):
                file = name if name in ends else picture_name(window, name)
                ax.set(xticks=[], yticks=[])
                if ends.get(name, "") and ends[name] not in first[factor]:  # this one is of prompts
                    ax.spines[:].set_visible(False)
                    continue
                ax.imshow(Image.open(_picture(run, first[factor], file)))
                for spine in ax.spines.values():
                    spine.set_visible(True)
                    spine.set_linewidth(2)
                    spine.set_color("white" if name in ends else colour(summary.role_of[window, name], factors))
            row[0].set_ylabel(factor, color=colour(factor, factors), fontweight="bold", rotation=0, ha="right", va="center")
        for ax, name in zip(axes[0], columns, strict=True):
            label = name.replace("_", ", ") if name in ends else short(name)
            ax.set_title(label, rotation=55, ha="left", va="bottom", fontsize=8, rotation_mode="anchor", pad=3)
        plt.close(figure)
    return figure


def _time_figure(summary: Summary) -> Figure:
    """A layer x time map for every factor."""
    from matplotlib import pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    windows, layers, factors = summary.windows[1:], summary.layers, summary.factors
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            1,
            len(factors),
            figsize=(2.2 + 2.1 * len(factors) * max(1, len(windows) / 4), 0.27 * len(layers) + 1.5),
            sharey=True,
            layout="constrained",
            squeeze=False,
        )
        for ax, factor in zip(axes[0], factors, strict=True):
            grid = (
                summary.main[summary.main.factor == factor]
                .pivot(index="layer", columns="window", values="transfer")
                .reindex(layers)[windows]
            )
            shades = LinearSegmentedColormap.from_list(factor, ["#faf9f5", colour(factor, factors)])
            ax.imshow(grid, vmin=0, vmax=1, cmap=shades, aspect="auto")
            for (y, x), value in np.ndenumerate(grid.to_numpy()):
                if not math.isnan(value):
                    ink = "white" if value > 0.62 else "#26251f"
                    told = f"{value:.2f}".removeprefix("0")
                    ax.text(x, y, told, ha="center", va="center", fontsize=7, color=ink)
            ax.set_title(factor, color=colour(factor, factors), fontsize=10, fontweight="bold")
            ax.set_xticks(range(len(windows)), [w.replace("%", "") for w in windows])
            ax.set_yticks(range(len(layers)), [short(la) for la in layers])
            ax.tick_params(length=0)
            for spine in ax.spines.values():
                spine.set_visible(False)
        figure.supxlabel(f"steps injected, in percent (0 is noise); transfer by {DESCRIPTORS[summary.descriptor]}", fontsize=9)
        plt.close(figure)
    return figure

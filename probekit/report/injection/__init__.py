"""The report of an injection sweep: what came over with each layer, drawn and told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from probekit.metrics.roles import EVERYTHING, NO_ROLE, roles, summarise
from probekit.report.figures import command_line, data_url, render, save_figure, style
from probekit.files import write_whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLOURS = {
    "structure": "#2f6db5",
    "content": "#c8445b",
    "surface": "#e0a021",
    "own": "#2f6db5",
    EVERYTHING: "#4b4b52",
    NO_ROLE: "#d5d4cf",
}
_SPARE = ("#5b8c5a", "#8a5aa8", "#3aa0a0", "#a86b3c")
_DESCRIPTORS = {
    "reader": "the scene reader",
    "lpips": "LPIPS",
    "ssim": "SSIM",
    "sift": "SIFT keypoints",
    "hsv": "HSV histogram",
    "lbp": "local binary patterns",
    "clip": "CLIP similarity",
}


@dataclass(frozen=True)
class Findings:
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
    def of(cls, config: dict[str, Any], rows: pd.DataFrame) -> Findings:
        """Summarise the rows of a sweep."""
        read = rows[rows.descriptor == "reader"].pair.nunique()
        descriptor = "reader" if read == rows.pair.nunique() else "lpips"
        summary = summarise(rows)
        found = roles(summary)
        main, own = summary[summary.descriptor == descriptor], found[found.descriptor == descriptor]
        factors = [f for f in COLOURS if f in set(main.factor)]
        factors += [f for f in main.factor.unique() if f not in factors]
        layers = main.drop_duplicates("layer").sort_values("order").layer.tolist()
        role_of = {(w, la): NO_ROLE for w in config["options"]["windows"] for la in layers}
        role_of |= {(r.window, r.layer): r.role for r in own.itertuples()}
        return cls(descriptor, factors, list(config["options"]["windows"]), layers, summary, found, main, role_of)

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


def colour(name: str, factors: list[str]) -> str:
    """A factor's or role's colour; factors of the user's own take spare ones."""
    return COLOURS[name] if name in COLOURS else _SPARE[factors.index(name) % len(_SPARE)]


def short(layer: str) -> str:
    """A layer's name as figures label it: down_blocks.1.attentions.0 becomes down 1 attn 0."""
    for long, brief in (("_blocks", ""), ("_block", ""), ("attentions", "attn"), ("resnets", "res"), ("transformer", "block"),
                        ("downsamplers", "downsample"), ("upsamplers", "upsample"), (".", " "), ("_", " ")):  # fmt: skip
        layer = layer.replace(long, brief)
    return layer


def print_roles(findings: Findings) -> None:
    """The table of layers with transfer and interval, null, damage and role."""
    from rich.table import Table

    from probekit.report.terminal import console

    several = len(findings.windows) > 1
    title = (
        f"transfer by {_DESCRIPTORS[findings.descriptor]} (0 nothing, 1 all of it), 95% interval, (null: an unrelated donor)"
    )
    table = Table(title=title, title_justify="left")
    for heading in (["steps"] if several else []) + ["layer", *findings.factors, "damage", "role"]:
        table.add_column(heading, no_wrap=heading in ("layer", "role"))
    for window in findings.windows:
        for layer in findings.layers:
            numbers, role = findings.numbers(window, layer), findings.role_of[window, layer]
            cells = [f"{n.transfer:.2f} {n.low:.2f}-{n.high:.2f} ({n.null:.2f})" for n in numbers.itertuples()]
            style = "dim" if role == NO_ROLE else f"bold {colour(role, findings.factors)}" if role != EVERYTHING else "bold"
            damage = f"{numbers.damage.mean():.2f}"
            table.add_row(*([window] if several else []), layer, *cells, damage, f"[{style}]{role}[/]")
    console().print(table)


def write_report(folder: Path, config: dict[str, Any], findings: Findings) -> Path:
    """Write figures/ (PNG and SVG) and report.html; returns the page's path."""
    windows, layers, factors = findings.windows, findings.layers, findings.factors
    (folder / "figures").mkdir(exist_ok=True)
    save_figure(_layers_figure(folder, config, findings), folder / "figures" / "layers")
    figures = {"roles": save_figure(_roles_figure(findings), folder / "figures" / "roles")}
    if len(windows) > 1:
        figures["time"] = save_figure(_time_figure(findings), folder / "figures" / "time")
    pairs = [
        {**pair, "O": _data_uri(folder, pair, "O"), "E": _data_uri(folder, pair, "E"),
         "layers": {w: {la: _data_uri(folder, pair, f"{w}_{la}") for la in layers} for w in windows}}
        for pair in config["options"]["pairs"]
    ]  # fmt: skip
    tiles = [
        {
            "name": la,
            "short": short(la),
            "role": findings.role_of[windows[0], la],
            "part": part_of(la),
            "level": _level(la, layers),
        }
        for la in layers
    ]
    descriptors = [d for d in _DESCRIPTORS if (findings.summary.descriptor == d).any()]
    data = {
        "pairs": pairs,
        "numbers": {w: {la: _records(findings.numbers(w, la)) for la in layers} for w in windows},
        "roles": {w: {la: findings.role_of[w, la] for la in layers} for w in windows},
    }
    page = render(
        "injection.html",
        name=Path(config["options"]["model"]).name,
        config=config,
        options=config["options"],
        command=command_line(config["command"]),
        conclusions=findings.carriers(),
        descriptor=_DESCRIPTORS[findings.descriptor],
        factors=factors,
        controlled=all(f in COLOURS and f != "own" for f in factors) and findings.descriptor == "reader",
        colours={f: colour(f, factors) for f in [*factors, EVERYTHING, NO_ROLE]},
        windows=windows,
        layers=tiles,
        pairs=pairs,
        data=data,
        figures=figures,
        table=_table(findings, descriptors),
        descriptors=[_DESCRIPTORS[d] for d in descriptors],
        everything=EVERYTHING,
        no_role=NO_ROLE,
        fewest_pairs=min(findings.main.pairs),
    )
    report = folder / "report.html"
    write_whole(report, page)
    return report


def part_of(layer: str) -> str:
    """Where a layer stands: encoder, middle, decoder, or stack for transformers."""
    starts = {"conv_in": "encoder", "down": "encoder", "mid": "middle", "up": "decoder", "conv_out": "decoder"}
    return next((part for start, part in starts.items() if layer.startswith(start)), "stack")


def _level(layer: str, layers: list[str]) -> int:
    """The row of the U a layer stands in, from the top; transformers have one row."""
    decoders = max((int(la.split(".")[1]) for la in layers if la.startswith("up_blocks.")), default=0)
    parts = layer.split(".")
    if parts[0] == "down_blocks":
        return int(parts[1])
    if parts[0] == "up_blocks":
        return decoders - int(parts[1])
    return 99 if layer.startswith("mid") else 0


def _records(numbers: pd.DataFrame) -> list[dict[str, Any]]:
    """The factors' numbers for the page, which knows null but no NaN."""
    columns = ["factor", "transfer", "low", "high", "null", "null_low", "null_high", "damage"]
    records = numbers.reset_index()[columns].to_dict("records")
    return [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in r.items()} for r in records]


def _table(findings: Findings, descriptors: list[str]) -> list[dict[str, Any]]:
    """For every window and layer: by each descriptor the role, and each factor's numbers."""
    numbers = {(r.descriptor, r.window, r.layer, r.factor): r for r in findings.summary.itertuples()}
    role_of = {(r.descriptor, r.window, r.layer): r.role for r in findings.roles.itertuples()}
    return [
        {"window": w, "layer": la, "cells": [
            {"role": role_of.get((d, w, la), NO_ROLE), "numbers": [numbers.get((d, w, la, f)) for f in findings.factors]}
            for d in descriptors]}
        for w in findings.windows for la in findings.layers
    ]  # fmt: skip


def _data_uri(folder: Path, pair: dict[str, Any], name: str) -> str:
    return data_url(folder / "images" / pair["name"] / f"{name.replace('%', 'pct')}.png")


# --- figures -----------------------------------------------------------------------------------------------------------


def _roles_figure(findings: Findings) -> Figure:
    """Transfer of every factor at every layer, with intervals, nulls and the role that follows, in the first window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    layers, factors = findings.layers, findings.factors
    summary = findings.main[findings.main.window == findings.windows[0]]
    with plt.rc_context(style()):
        figure, (ax, harm) = plt.subplots(
            2, 1, figsize=(max(7.5, 0.56 * len(layers) + 1.6), 5.4), height_ratios=(4.2, 1), sharex=True, layout="constrained"
        )
        width = 0.8 / max(len(factors), 1)
        role_of = {la: findings.role_of[findings.windows[0], la] for la in layers}
        for x, la in enumerate(layers):
            role = role_of[la]
            if role != NO_ROLE:
                ax.add_patch(Rectangle((x - 0.48, -0.02), 0.96, 1.04, color=colour(role, factors), alpha=0.13, lw=0))
            ax.add_patch(Rectangle((x - 0.48, 1.045), 0.96, 0.045, color=colour(role, factors), lw=0, clip_on=False))
        for k, factor in enumerate(factors):
            by = summary[summary.factor == factor].set_index("layer").reindex(layers)
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
        ax.set(ylim=(0, 1.1), xlim=(-0.6, len(layers) - 0.4), ylabel=f"transfer, by {_DESCRIPTORS[findings.descriptor]}")
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
        harm.set(ylim=(-0.05, max(1.05, float(np.nanmax(summary.damage)) * 1.05)), ylabel="damage")
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


def _layers_figure(folder: Path, config: dict[str, Any], findings: Findings) -> Figure:
    """O, E and O with each layer taken from E, for the first pair of every factor (figure 5 of the paper)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    window, layers, factors = findings.windows[0], findings.layers, findings.factors
    first = {pair["factor"]: pair for pair in reversed(config["options"]["pairs"])}
    columns = ["O", "E", *layers]
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            len(factors), len(columns), figsize=(0.62 * len(columns), 0.66 * len(factors) + 1.1), squeeze=False,
            gridspec_kw={"wspace": 0.06, "hspace": 0.06, "left": 0.075, "right": 0.972, "bottom": 0.02,
                         "top": 1 - 1.05 / (0.66 * len(factors) + 1.1)},
        )  # fmt: skip
        for row, factor in zip(axes, factors, strict=True):
            for ax, name in zip(row, columns, strict=True):
                file = name if name in ("O", "E") else f"{window}_{name}".replace("%", "pct")
                ax.imshow(Image.open(folder / "images" / first[factor]["name"] / f"{file}.png"))
                ax.set(xticks=[], yticks=[])
                for spine in ax.spines.values():
                    spine.set_visible(True)
                    spine.set_linewidth(2)
                    spine.set_color("white" if name in ("O", "E") else colour(findings.role_of[window, name], factors))
            row[0].set_ylabel(factor, color=colour(factor, factors), fontweight="bold", rotation=0, ha="right", va="center")
        for ax, name in zip(axes[0], columns, strict=True):
            label = name if name in ("O", "E") else short(name)
            ax.set_title(label, rotation=55, ha="left", va="bottom", fontsize=8, rotation_mode="anchor", pad=3)
        plt.close(figure)
    return figure


def _time_figure(findings: Findings) -> Figure:
    """A layer x time map for every factor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    windows, layers, factors = findings.windows[1:], findings.layers, findings.factors
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
                findings.main[findings.main.factor == factor]
                .pivot(index="layer", columns="window", values="transfer")
                .reindex(layers)[windows]
            )
            shades = LinearSegmentedColormap.from_list(factor, ["#faf9f5", colour(factor, factors)])
            ax.imshow(grid, vmin=0, vmax=1, cmap=shades, aspect="auto")
            for (y, x), value in np.ndenumerate(grid.to_numpy()):
                if not math.isnan(value):
                    ax.text(x, y, f"{value:.2f}".removeprefix("0"), ha="center", va="center", fontsize=7,
                            color="white" if value > 0.62 else "#26251f")  # fmt: skip
            ax.set_title(factor, color=colour(factor, factors), fontsize=10, fontweight="bold")
            ax.set_xticks(range(len(windows)), [w.replace("%", "") for w in windows])
            ax.set_yticks(range(len(layers)), [short(la) for la in layers])
            ax.tick_params(length=0)
            for spine in ax.spines.values():
                spine.set_visible(False)
        figure.supxlabel(
            f"steps injected, in percent (0 is noise); transfer by {_DESCRIPTORS[findings.descriptor]}", fontsize=9
        )
        plt.close(figure)
    return figure

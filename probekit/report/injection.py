"""The report of an injection sweep: what came over with each layer, drawn and told."""

from __future__ import annotations

import base64
import io
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from probekit.metrics.roles import EVERYTHING, NO_ROLE, roles, summarise
from probekit.runs import write_whole

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


def main_descriptor(rows: pd.DataFrame) -> str:
    """The scene reader where it applies, else LPIPS."""
    return "reader" if (rows.descriptor == "reader").any() else "lpips"


def colour(name: str, factors: list[str]) -> str:
    """A factor's or role's colour; factors of the user's own take spare ones."""
    return COLOURS[name] if name in COLOURS else _SPARE[factors.index(name) % len(_SPARE)]


def short(layer: str) -> str:
    """A layer's name as figures label it: down_blocks.1.attentions.0 becomes down 1 attn 0."""
    for long, brief in (("_blocks", ""), ("_block", ""), ("attentions", "attn"), ("resnets", "res"), ("transformer", "block"),
                        ("downsamplers", "downsample"), ("upsamplers", "upsample"), (".", " "), ("_", " ")):  # fmt: skip
        layer = layer.replace(long, brief)
    return layer


def conclusions(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """For each role that some layer has: the layers, strongest first, with the factor's transfer and interval."""
    summary = summarise(rows[rows.descriptor == main_descriptor(rows)])
    found = roles(summary)
    factors = _factors(summary)
    told: list[dict[str, Any]] = []
    for role in [*factors, EVERYTHING]:
        carriers: list[dict[str, Any]] = []
        for _, r in found[found.role == role].iterrows():
            of_layer = summary[(summary.layer == r.layer) & (summary.window == r.window)]
            worst = (
                of_layer.loc[of_layer.transfer.idxmin()] if role == EVERYTHING else of_layer[of_layer.factor == role].iloc[0]
            )
            carriers.append({"layer": r.layer, "window": r.window, **worst[["transfer", "low", "high", "damage"]].to_dict()})
        told.append({"role": role, "carriers": sorted(carriers, key=lambda c: -c["transfer"])})
    return told


def print_roles(config: dict[str, Any], rows: pd.DataFrame) -> None:
    """The table of layers with transfer, interval, damage and role."""
    from rich.console import Console
    from rich.table import Table

    descriptor = main_descriptor(rows)
    summary = summarise(rows[rows.descriptor == descriptor])
    found = roles(summary)
    factors = _factors(summary)
    several = summary.window.nunique() > 1
    title = f"transfer by {_DESCRIPTORS[descriptor]} (0 nothing, 1 all of it), 95% interval; null: an unrelated donor"
    table = Table(title=title, title_justify="left")
    for heading in (["steps"] if several else []) + ["layer", *factors, "null", "damage", "role"]:
        table.add_column(heading, no_wrap=heading in ("layer", "role"))
    for (window, _, layer), group in summary.groupby(["window", "order", "layer"], sort=True):
        role = found[(found.layer == layer) & (found.window == window)].role
        by = group.set_index("factor")
        cells = [f"{by.transfer[f]:.2f}  {by.low[f]:.2f}-{by.high[f]:.2f}" if f in by.index else "" for f in factors]
        role_name = role.iloc[0] if len(role) else NO_ROLE
        style = (
            f"bold {colour(role_name, factors)}"
            if role_name not in (NO_ROLE, EVERYTHING)
            else "dim"
            if role_name == NO_ROLE
            else "bold"
        )
        numbers = [f"{group.null.mean():.2f}", f"{group.damage.mean():.2f}"]
        table.add_row(*([str(window)] if several else []), str(layer), *cells, *numbers, f"[{style}]{role_name}[/]")
    Console().print(table)


def write_report(folder: Path, config: dict[str, Any], rows: pd.DataFrame) -> Path:
    """Write figures/ (PNG and SVG) and report.html; returns the page's path."""
    import jinja2

    descriptor = main_descriptor(rows)
    summary = summarise(rows)
    found = roles(summary)
    main, main_roles = summary[summary.descriptor == descriptor], found[found.descriptor == descriptor]
    factors = _factors(main)
    windows = list(config["options"]["windows"])
    layers = main.drop_duplicates("layer").sort_values("order").layer.tolist()
    figures = {}
    drawn = {
        "roles": _roles_figure(
            main[main.window == windows[0]], main_roles[main_roles.window == windows[0]], factors, descriptor
        )
    }
    if len(windows) > 1:
        drawn = {"time": _time_figure(main, windows, factors, layers, descriptor)}
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in drawn.items():
        figures[name] = _save(figure, folder / "figures" / name)

    role_of = {r.layer: r.role for r in main_roles[main_roles.window == windows[0]].itertuples()}
    pairs = [
        {**pair, "O": _data_uri(folder, pair, "O"), "E": _data_uri(folder, pair, "E"),
         "layers": {w: {la: _data_uri(folder, pair, f"{w}_{la}") for la in layers} for w in windows}}
        for pair in config["options"]["pairs"]
    ]  # fmt: skip
    tiles = [
        {"name": la, "short": short(la), "role": role_of.get(la, NO_ROLE), "part": part_of(la), "level": _level(la, layers)}
        for la in layers
    ]
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = templates.get_template("injection.html").render(
        name=Path(config["options"]["model"]).name,
        config=config,
        options=config["options"],
        command=command_line(config["command"]),
        conclusions=conclusions(rows),
        descriptor=_DESCRIPTORS[descriptor],
        factors=factors,
        colours={f: colour(f, factors) for f in [*factors, EVERYTHING, NO_ROLE]},
        windows=windows,
        layers=tiles,
        pairs=pairs,
        data={"pairs": pairs, "numbers": {w: {la: _numbers(main, la, w) for la in layers} for w in windows}},
        figures=figures,
        table=_table(summary, found, factors, layers, windows),
        descriptors=[_DESCRIPTORS[d] for d in _DESCRIPTORS if (summary.descriptor == d).any()],
        everything=EVERYTHING,
        no_role=NO_ROLE,
        fewest_pairs=min(main.pairs),
    )
    report = folder / "report.html"
    write_whole(report, page.encode())
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


def command_line(command: list[str]) -> str:
    """The command as one would type it."""
    return shlex.join([Path(command[0]).name, *command[1:]])


def _factors(summary: pd.DataFrame) -> list[str]:
    known = [f for f in COLOURS if f in set(summary.factor)]
    return known + [f for f in summary.factor.unique() if f not in known]


def _numbers(main: pd.DataFrame, layer: str, window: str) -> list[dict[str, Any]]:
    chosen = main[(main.layer == layer) & (main.window == window)]
    records = chosen[["factor", "transfer", "low", "high", "null", "damage"]].to_dict("records")
    return [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in r.items()} for r in records]


def _table(
    summary: pd.DataFrame, found: pd.DataFrame, factors: list[str], layers: list[str], windows: list[str]
) -> list[dict[str, Any]]:
    """For every window and layer: by each descriptor the role, and each factor's numbers."""
    table = []
    numbers = {(r.descriptor, r.window, r.layer, r.factor): r for r in summary.itertuples()}
    role_of = {(r.descriptor, r.window, r.layer): r.role for r in found.itertuples()}
    names = [d for d in _DESCRIPTORS if (summary.descriptor == d).any()]
    for window in windows:
        for la in layers:
            cells = [
                {"role": role_of.get((d, window, la), NO_ROLE), "numbers": [numbers.get((d, window, la, f)) for f in factors]}
                for d in names
            ]
            table.append({"window": window, "layer": la, "cells": cells})
    return table


def _data_uri(folder: Path, pair: dict[str, Any], name: str) -> str:
    """A picture for the page: pictures above 192 pixels are made smaller, as JPEG."""
    path = folder / "images" / pair["name"] / f"{name.replace('%', 'pct')}.png"
    content, kind = path.read_bytes(), "png"
    picture = Image.open(io.BytesIO(content))
    if max(picture.size) > 192:
        picture.thumbnail((192, 192))
        buffer, kind = io.BytesIO(), "jpeg"
        picture.save(buffer, "JPEG", quality=88)
        content = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# --- figures -----------------------------------------------------------------------------------------------------------


def _style() -> dict[str, Any]:
    return {
        "font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": "#8a8880",
        "xtick.color": "#3b3a36", "ytick.color": "#3b3a36", "text.color": "#26251f", "axes.labelcolor": "#26251f",
        "svg.fonttype": "path", "svg.hashsalt": "probekit",
    }  # fmt: skip


def _save(figure: Figure, path: Path) -> str:
    """Write PNG and SVG; returns the SVG's markup. Nothing in either depends on the time of writing."""
    figure.savefig(path.with_suffix(".png"), dpi=160, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    svg = path.with_suffix(".svg").read_text()
    return svg[svg.index("<svg") :]


def _roles_figure(summary: pd.DataFrame, found: pd.DataFrame, factors: list[str], descriptor: str) -> Figure:
    """Transfer of every factor at every layer, with intervals, nulls and the role that follows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    layers = summary.drop_duplicates("layer").sort_values("order").layer.tolist()
    with plt.rc_context(_style()):
        figure, (ax, harm) = plt.subplots(
            2, 1, figsize=(max(7.5, 0.56 * len(layers) + 1.6), 5.4), height_ratios=(4.2, 1), sharex=True, layout="constrained"
        )
        width = 0.8 / max(len(factors), 1)
        role_of = dict(zip(found.layer, found.role, strict=True))
        for x, la in enumerate(layers):
            role = role_of.get(la, NO_ROLE)
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
        ax.set(ylim=(0, 1.1), xlim=(-0.6, len(layers) - 0.4), ylabel=f"transfer, by {_DESCRIPTORS[descriptor]}")
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


def _time_figure(summary: pd.DataFrame, windows: list[str], factors: list[str], layers: list[str], descriptor: str) -> Figure:
    """A layer x time map for every factor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    with plt.rc_context(_style()):
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
                summary[summary.factor == factor]
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
            ax.set_xticks(range(len(windows)), windows)
            ax.set_yticks(range(len(layers)), [short(la) for la in layers])
            ax.tick_params(length=0)
            for spine in ax.spines.values():
                spine.set_visible(False)
        figure.supxlabel(f"steps injected (0 is noise); transfer by {_DESCRIPTORS[descriptor]}", fontsize=9)
        plt.close(figure)
    return figure

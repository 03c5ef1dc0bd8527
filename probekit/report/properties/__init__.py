"""The report of properties: figure 4 of The Evolving Nature of Latent Spaces, measured, and the pictures it was read from."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.files import file_name
from probekit.latents.properties import POINTS, STRENGTHS
from probekit.report.figures import render, save_figure, style
from probekit.report.findings import Findings, Table
from probekit.report.properties.claims import (
    DOES_NOT,
    HOLDS,
    OPEN,
    PAPER,
    PARTLY,
    PROPERTIES,
    Cell,
    Rows,
    V,
    X,
    cell,
    judged,
    kind,
    number,
    verdict,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probekit.runs.folder import Run

_COLOURS = {V: "#3f7d4e", X: "#b8394f", PARTLY: "#a87a1f"}
_ASKS = {
    "density": "are new points pictures?",
    "smoothness": "does it change evenly?",
    "organization": "is near alike?",
    "relevance": "what changes with it?",
}


def findings(run: Run, rows: pd.DataFrame) -> Findings:
    """What a run's rows come to."""
    asked, spaces = Rows(rows), run.config["inputs"]["spaces"]
    measured = {
        space: {prop: cell(asked, space, told.split()[1], prop) for prop in PROPERTIES} for space, told in spaces.items()
    }
    told = judged(asked, spaces)
    tables = [
        Table(
            "density: precision; smoothness: jump, 1 is even; organization: correlation with LPIPS; relevance: total index",
            ("space", *PROPERTIES),
            [(space, *(number(cells[prop]) for prop in PROPERTIES)) for space, cells in measured.items()],
            text=("space",),
        )
    ]
    if told:
        tables.append(
            Table(
                "what the paper says",
                ("sentence", "space", "verdict"),
                [(each.sentence, each.space, each.verdict) for each in told],
                text=("sentence", "space", "verdict"),
                styles={i: {HOLDS: "green", DOES_NOT: "red"}.get(each.verdict, "dim") for i, each in enumerate(told)},
            )
        )
    says = headline(measured, told)
    return Findings(run, rows, tables, lambda: _page(run, rows, measured, told, says), ("figure-4",), says)


def headline(measured: dict[str, dict[str, Cell]], told: list[Any]) -> str:
    """Which spaces have all four, and how many sentences hold."""
    whole = [space for space, cells in measured.items() if all(verdict(prop, V, each) == HOLDS for prop, each in cells.items())]
    said = f"Shown to be dense, smooth, organized and relevant, all four: {', '.join(whole) or 'none'}."
    if told:
        count = {each: sum(one.verdict == each for one in told) for each in (HOLDS, DOES_NOT, OPEN)}
        said += (
            f" Of the paper's sentences, each held against every space it speaks of, {count[HOLDS]} hold, "
            f"{count[DOES_NOT]} do not, {count[OPEN]} cannot be told."
        )
    return said


def _page(run: Run, rows: pd.DataFrame, measured: dict[str, dict[str, Cell]], told: list[Any], says: str) -> bytes:
    spaces = run.config["inputs"]["spaces"]
    figure = save_figure(_figure(measured, spaces), run.folder / "figures" / "figure-4")
    asked = Rows(rows)
    looked = []
    for space, about in spaces.items():
        name = about.split()[1]
        swaps = _inputs(rows, space)
        unit = run.config["inputs"]["swaps"].get(space, "")
        looked.append(
            {
                "space": space,
                "noise": _sheet(run, space, "noise", len(STRENGTHS)),
                "path": _sheet(run, space, "path", POINTS + 1),
                "swap": _sheet(run, unit, "swap", 0, ["a", *map(str, range(len(swaps))), "b"] if len(swaps) > 1 else []),
                "inputs": swaps,
                "density": [
                    (of, asked.get(space, "density", "precision", of, "alexnet"))
                    for of in (f"noise {strength:g}" for strength in STRENGTHS)
                ],
                "numbers": _numbers(asked, space, name, swaps),
            }
        )
    return render(
        "properties/page.html",
        run,
        says=says,
        figure=figure,
        told=told,
        looked=looked,
        rows=rows[rows.value.notna()].to_dict("records"),
        notes=rows[rows.note != ""].drop_duplicates(["space", "note"])[["space", "note"]].to_dict("records"),
        steps=POINTS,
    )


def _inputs(rows: pd.DataFrame, space: str) -> list[str]:
    """What a space's model makes its pictures of, in their order."""
    own = rows[(rows.space == space) & (rows.property == "relevance") & (rows.by == "picture")]
    return list(dict.fromkeys(own.of))


def _numbers(asked: Rows, space: str, name: str, inputs: list[str]) -> list[tuple[str, str]]:
    """What beside figure 4 was measured of a space, in words."""
    told: list[tuple[str, str]] = []

    def add(what: str, found: tuple[float, float, float, int], form: str = ".2f") -> None:
        value, low, high, _ = found
        if not math.isnan(value):
            told.append((what, f"{value:{form}}" + ("" if math.isnan(low) else f" ({low:{form}} to {high:{form}})")))

    for of, said in (
        ("prior", "from the prior"),
        ("gaussian", "from a Gaussian of the codes' covariance"),
        ("own", "own pictures"),
    ):
        add(f"precision, {said}", asked.get(space, "density", "precision", of, "alexnet"))
        add(f"density, {said}", asked.get(space, "density", "density", of, "alexnet"))
    for of in ("real", "patches", "pixel noise"):
        add(
            f"precision, {of} pictures" if of == "real" else f"precision, {of}",
            asked.get(space, "density", "precision", of, "alexnet"),
        )
    add("largest step over an even path's (leap)", asked.get(space, "smoothness", "leap", "path", asked.path(space)))
    add("the same of a cross-fade", asked.get(space, "smoothness", "leap", "cross-fade"))
    add("path length over the ends' distance", asked.get(space, "smoothness", "path length", "path", asked.path(space)), ".1f")
    add("precision along the paths", asked.get(space, "smoothness", "precision", "path", "alexnet"))
    add("correlation with factors that differ", asked.get(space, "organization", "correlation", "codes", "factors"))
    add("chance reaches", asked.get(space, "organization", "null", "codes", "factors"))
    add("LPIPS and factors with each other", asked.get(space, "organization", "correlation", "lpips", "factors"))
    for share in ("the one", "the other", "neither"):
        add(f"midpoint reads as {share}", asked.get(space, "organization", share, "midpoints", "all factors"))
    add("precision of midpoints", asked.get(space, "organization", "precision", "midpoints", "alexnet"))
    add("detour over the midpoint", asked.get(space, "organization", "detour", "midpoints", "lpips"))
    for of in inputs:
        add(f"{of}: total index", asked.get(space, "relevance", "total", of, "picture"))
        add(f"{of}: alone", asked.get(space, "relevance", "first", of, "picture"))
        add(f"{of}: total index of all factors", asked.get(space, "relevance", "total", of, "all factors"))
    return told


def _sheet(run: Run, unit: str, prefix: str, columns: int, named: list[str] | None = None) -> str:
    """The pictures of a unit side by side, a row a code, as a picture inside the page; nothing where there are none."""
    from PIL import Image

    folder = run.folder / "images" / file_name(unit) if unit else run.folder / "none"
    parts = named if named is not None else list(map(str, range(columns)))
    files = [[folder / f"{prefix}-{row}-{part}.png" for part in parts] for row in range(4)]
    if not parts or not all(file.is_file() for line in files for file in line):  # a run may have been kept without its pictures
        return ""
    first = Image.open(files[0][0])
    side, gap = first.size[0], max(2, first.size[0] // 16)
    sheet = Image.new("RGB", (len(parts) * (side + gap) - gap, len(files) * (side + gap) - gap), "white")
    for y, line in enumerate(files):
        for x, file in enumerate(line):
            sheet.paste(Image.open(file), (x * (side + gap), y * (side + gap)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(measured: dict[str, dict[str, Cell]], spaces: dict[str, str]) -> Figure:
    """Figure 4: a row a space, a column a property; each cell from its worst at the left to its best at the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ends = {"density": (0.0, 1.0), "smoothness": (float(POINTS), 1.0), "organization": (-0.25, 1.0), "relevance": (0.0, 1.0)}
    with plt.rc_context(style()):
        height = 1.25 + 0.46 * len(measured)
        figure, axes = plt.subplots(1, 4, figsize=(11.2, height), sharey=True, gridspec_kw={"wspace": 0.06})
        label = 0.078 * max(map(len, measured)) + 0.15
        figure.subplots_adjust(left=label / 11.2, right=0.995, top=1 - 0.62 / height, bottom=0.5 / height)
        for ax, prop in zip(axes, PROPERTIES, strict=True):
            left, right = ends[prop]
            reach = right - left
            for y, (space, cells) in enumerate(measured.items()):
                found = cells[prop]
                mark = PAPER.get(kind(spaces[space]) or "", {}).get(prop)
                if y % 2 == 0:
                    ax.axhspan(y - 0.5, y + 0.5, color="#f5f3ec", zorder=0, lw=0)
                if math.isnan(found.value):
                    ax.text(left + 0.5 * reach, y, "–", ha="center", va="center", color="#8a8880")
                    continue
                if not math.isnan(found.worst) and not math.isnan(found.best):
                    ax.plot([found.worst, found.best], [y, y], color="#d3d0c4", lw=5, solid_capstyle="butt", zorder=1)
                low, high = (found.value if math.isnan(each) else each for each in (found.low, found.high))
                ax.plot([low, high], [y, y], color="#2f6db5", lw=1.6, zorder=3)
                ax.plot(found.value, y, "o", color="#2f6db5", ms=5.5, zorder=4)
                ax.text(left + 1.09 * reach, y, f"{found.value:.2f}" + "*" * found.broken, ha="left", va="center", fontsize=9)
                if mark:
                    agrees = verdict(prop, mark, found)
                    sign = {HOLDS: "=", DOES_NOT: "≠", OPEN: "?"}[agrees]
                    said = {V: "V", X: "X", PARTLY: "V/X"}[mark]
                    ax.text(
                        left + 1.60 * reach, y, said, ha="center", va="center", fontsize=9, weight="bold", color=_COLOURS[mark]
                    )
                    ax.text(left + 1.43 * reach, y, sign, ha="center", va="center", fontsize=9, color="#6d6b62")
            ax.set_xlim(left - 0.04 * reach, left + 1.72 * reach)
            ax.set_ylim(len(measured) - 0.5, -0.5)
            ax.set_title(f"{prop}\n", loc="left", fontsize=10.5, weight="bold", pad=2)
            ax.text(0, 1, _ASKS[prop], transform=ax.transAxes, fontsize=8.5, color="#6d6b62", va="bottom")
            ticks = {"smoothness": [POINTS, (POINTS + 1) / 2, 1], "organization": [0, 0.5, 1]}.get(prop, [0, 0.5, 1])
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
            names = {"density": "precision", "smoothness": "jump", "organization": "correlation", "relevance": "total index"}
            ax.set_xlabel(names[prop], fontsize=8.5, loc="left")
            ax.tick_params(length=0)
            for spine in ax.spines.values():
                spine.set_visible(False)
        axes[0].set_yticks(range(len(measured)), [_short(space) for space in measured], fontsize=9)
        plt.close(figure)
    return figure


def _short(space: str) -> str:
    """A label without the folder of a file of one's own."""
    return Path(space).name if ".py:" in space else space

"""The report of a custom injection: O, E and O with layers of E, and in words what came over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from probekit.data.scenes import FACTORS
from probekit.hooks.errors import ProbekitError
from probekit.metrics.roles import EVERYTHING
from probekit.report.figures import data_url, render, save_figure, style
from probekit.report.findings import Findings, Table
from probekit.report.injection import COLOURS, DESCRIPTORS, given, picture_name
from probekit.report.network import drawn_by_name, form_by_name, short

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probekit.runs.folder import Run

NOTHING, MIXED = "nothing", "mixed"
TOGETHER = "together"
"""The layer, in the rows, of layers that are injected together, and their unit."""
CAME = {factor: COLOURS[factor] for factor in FACTORS} | {
    EVERYTHING: COLOURS[EVERYTHING],
    NOTHING: COLOURS["no role"],
    MIXED: "#8a6d5b",
}
"""What came over with a layer into one picture, and its colour."""

_VERDICTS = {"E": "E's", "O": "O's", "neither": "neither's", "both": "as in both"}


# --- what came over, of one picture --------------------------------------------------------------------------------------


def read(rows: pd.DataFrame) -> list[dict[str, str]]:
    """Of each attribute that a reader reads: its values in O, E and the picture, and from whom it is: O, E, both or neither."""
    found = []
    for row in rows[rows.attribute != ""].itertuples():
        if row.original == row.edit:
            whose = "both" if row.seen == row.original else "neither"
        else:
            whose = "E" if row.seen == row.edit else "O" if row.seen == row.original else "neither"
        told = {"attribute": row.attribute, "original": row.original, "edit": row.edit, "seen": row.seen, "from": whose}
        found.append({key: str(value) for key, value in told.items()})
    return found


def measures(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """By each descriptor of whole pictures, transfer and damage; None where it cannot tell."""
    of_whole = rows[rows.attribute == ""]
    return [
        {"name": DESCRIPTORS[row.descriptor], "transfer": _or_none(row.transfer), "damage": _or_none(row.damage)}
        for row in of_whole.itertuples()
    ]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def says(rows: pd.DataFrame) -> str:
    """What came over into one picture, in words: of a scene by its attributes, else by LPIPS."""
    seen = read(rows)
    if not seen:
        by = rows[rows.descriptor == "lpips"].iloc[0]
        if math.isnan(by.transfer):
            return "O and E are the same picture: nothing could come over."
        whose = "nearer to O" if by.transfer < 0.5 else "nearer to E"
        return f"By LPIPS the picture is {whose}: transfer {by.transfer:.2f}, damage {by.damage:.2f}."
    differing = [one for one in seen if one["original"] != one["edit"]]
    changed = [one for one in seen if one["original"] == one["edit"] and one["from"] == "neither"]
    parts = []
    for whose in ("E", "O"):
        if names := [one["attribute"] for one in differing if one["from"] == whose]:
            parts.append(f"{_the(names)} {_are(names)} {_VERDICTS[whose]}")
    parts += [
        f"the {one['attribute']} is {_VERDICTS['neither']}: {one['seen']}" for one in differing if one["from"] == "neither"
    ]
    parts += [f"the {one['attribute']}, {one['original']} in both, has become {one['seen']}" for one in changed]
    if not parts:
        return "O and E show the same, and so does the picture."
    said = "; ".join(parts)
    return f"{said[0].upper()}{said[1:]}."


def _the(names: Sequence[str]) -> str:
    each = [f"the {name}" for name in names]
    return each[0] if len(each) == 1 else f"{', '.join(each[:-1])} and {each[-1]}"


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def came(rows: pd.DataFrame) -> str | None:
    """The factor that came over whole, alone; `everything` that differs; `nothing`; or `mixed`. None where no reader reads."""
    differing = [one for one in read(rows) if one["original"] != one["edit"]]
    if not differing:
        return None
    share = by_factor(rows)
    if all(value == 1 for value in share.values()):
        return next(iter(share)) if len(share) == 1 else EVERYTHING
    if all(one["from"] == "O" for one in differing):
        return NOTHING
    whole = [factor for factor, value in share.items() if value == 1]
    others = [value for factor, value in share.items() if factor not in whole]
    return whole[0] if len(whole) == 1 and all(value == 0 for value in others) else MIXED


def by_factor(rows: pd.DataFrame) -> dict[str, float]:
    """Of each factor in which O and E differ: the share of its differing attributes that are E's."""
    differing = [one for one in read(rows) if one["original"] != one["edit"]]
    shares = {}
    for factor, attributes in FACTORS.items():
        if own := [one["from"] == "E" for one in differing if one["attribute"] in attributes]:
            shares[factor] = sum(own) / len(own)
    return shares


def shade(rows: pd.DataFrame) -> str:
    """The colour of a picture's tile: what came over, else LPIPS's transfer from light (0) to dark (1)."""
    if (what := came(rows)) is not None:
        return CAME[what]
    value = rows[rows.descriptor == "lpips"].transfer.iloc[0]
    share = 0.0 if math.isnan(value) else float(value)
    light, dark = (0xD5, 0xD4, 0xCF), (0x4B, 0x4B, 0x52)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(light, dark, strict=True))


# --- a run -------------------------------------------------------------------------------------------------------------


def findings(run: Run, rows: pd.DataFrame) -> Findings:
    """What a run's rows come to."""
    inputs, options = run.config["inputs"], run.config["options"]
    apart = bool(options["apart"])
    pictures = _given(options, rows)
    said = of_layers(rows, inputs["swept_windows"], inputs["chosen"]) if apart else says(rows)
    if pictures:
        said += f"\n{given.says(pictures)}"
    tables = [_layers_table(_of_run(run, rows))] if apart else _tables(rows)
    figures = ("layers",) if apart else ("picture",)
    return Findings(run, rows, tables, lambda: _page(run, rows, said), figures, said)


def _given(options: Mapping[str, Any], rows: pd.DataFrame) -> list[given.MadeAgain]:
    files = {side: options[f"image_{side}"] for side in ("original", "edit") if options[f"image_{side}"] is not None}
    return given.made_again("the result", files, rows.iloc[0]) if files else []


def _tables(rows: pd.DataFrame) -> list[Table]:
    told = []
    if seen := read(rows):
        values = [(one["attribute"], one["original"], one["edit"], one["seen"], _VERDICTS[one["from"]]) for one in seen]
        columns = ["attribute", "in O", "in E", "in the picture", "whose"]
        told.append(Table("what the scene reader reads", columns, values, text=columns))
    cells = [(one["name"], _number(one["transfer"]), _number(one["damage"])) for one in measures(rows)]
    title = "transfer (0: O, 1: E) and damage (0: O or E, 1: neither), by descriptor"
    return [*told, Table(title, ["by", "transfer", "damage"], cells, text=("by",))]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _each(rows: pd.DataFrame, windows: Sequence[str], layers: Sequence[str]) -> list[tuple[str, str, pd.DataFrame]]:
    """Every window and layer with its rows, in order."""
    by = dict(list(rows.groupby(["window", "layer"], sort=False)))
    return [(window, layer, by[window, layer]) for window in windows for layer in layers]


def _of_run(run: Run, rows: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """`_each` of a run, whose pictures may be of layers together."""
    inputs = run.config["inputs"]
    return _each(rows, inputs["swept_windows"], inputs["chosen"] if run.config["options"]["apart"] else [TOGETHER])


def of_layers(rows: pd.DataFrame, windows: Sequence[str], layers: Sequence[str]) -> str:
    """With which layers, each by itself in the first window, what came over."""
    first = [(layer, part) for window, layer, part in _each(rows, windows, layers) if window == windows[0]]
    told = []
    for what in (*FACTORS, EVERYTHING):
        if found := [layer for layer, part in first if came(part) == what]:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            told.append(f"{what} came over with {', '.join(found[:3])}{more}")
    if not told:
        if all(came(part) is None for _, part in first):
            far = {layer: part[part.descriptor == "lpips"].transfer.iloc[0] for layer, part in first}
            known = {layer: value for layer, value in far.items() if not math.isnan(value)}
            if not known:
                return "O and E are the same picture: nothing could come over."
            most = max(known, key=lambda layer: known[layer])
            return f"By LPIPS most came over with {most} ({known[most]:.2f}). One pair tells no role."
        told.append("no layer brought one factor over, whole and alone")
    said = "; ".join(told)
    return f"In this pair {said}. One pair tells no role: probekit inject sweep measures roles over many."


def _layers_table(each: Sequence[tuple[str, str, pd.DataFrame]]) -> Table:
    cells = []
    for window, layer, part in each:
        by = part[part.descriptor == "lpips"].iloc[0]
        cells.append((window, layer, f"{by.transfer:.2f}", f"{by.damage:.2f}", says(part)))
    columns = ["steps", "layer", "LPIPS transfer", "damage", "what came over"]
    return Table("each layer by itself", columns, cells, text=("steps", "layer", "what came over"))


def seen(run: Run, rows: pd.DataFrame) -> dict[str, Any]:
    """The run for the inspector: its layers, pictures, and what came over with each."""
    inputs, options = run.config["inputs"], run.config["options"]
    names, windows = inputs["chosen"], inputs["swept_windows"]
    each = _of_run(run, rows)
    ends = {name: data_url(_picture(run, each[0][0], each[0][1], name)) for name in ("O", "E")}
    pictures: dict[str, dict[str, str]] = {window: {} for window in windows}
    roles: dict[str, dict[str, str]] = {window: {} for window in windows}
    numbers: dict[str, dict[str, list[dict[str, Any]]]] = {window: {} for window in windows}
    unknown = dict.fromkeys(("low", "high", "null", "null_low", "null_high"))
    factors = list(by_factor(each[0][2])) or ["own"]
    for window, layer, part in each:
        pictures[window][layer] = data_url(_picture(run, window, layer, "result"))
        roles[window][layer] = came(part) or MIXED
        whole = next(one for one in measures(part) if one["name"] == DESCRIPTORS["lpips"])
        shares = by_factor(part) or {"own": whole["transfer"]}
        numbers[window][layer] = [
            {"factor": factor, "transfer": share, "damage": whole["damage"]} | unknown for factor, share in shares.items()
        ]
    pair = {"name": "this pair", "factor": "own", "original": options["prompt_original"], "edit": options["prompt_edit"]}
    return {
        "title": f"{options['model']}, each layer by itself",
        "name": options["model"],
        "form": form_by_name(names, inputs.get("carry_text", ())),
        "layers": drawn_by_name(names, inputs.get("carry_text", ())),
        "windows": windows,
        "pairs": [pair | ends | {"pictures": pictures}],
        "factors": factors,
        "colours": CAME | {"own": COLOURS["own"]},
        "descriptor": DESCRIPTORS["reader"] if factors != ["own"] else DESCRIPTORS["lpips"],
        "fewest_pairs": 1,
        "one_pair": True,
        "numbers": numbers,
        "roles": roles,
        "everything": EVERYTHING,
        "no_role": NOTHING,
        "lazy": None,
    }


def _picture(run: Run, window: str, layer: str, name: str) -> Any:
    """Where a picture lies. Raises ProbekitError where it does not."""
    unit = TOGETHER if layer == TOGETHER else picture_name(window, layer)
    path = run.picture(unit, name)
    if not path.exists():
        raise ProbekitError(f"run {str(run.folder)!r}: {path.name} of {unit} is missing; delete its unit and start it again")
    return path


def _page(run: Run, rows: pd.DataFrame, said: str) -> bytes:
    """The figure, drawn into figures/, and the page."""
    options, inputs = run.config["options"], run.config["inputs"]
    apart = options["apart"]
    save_figure(_figure(run, rows), run.folder / "figures" / ("layers" if apart else "picture"))
    told: dict[str, Any] = {"said": said, "apart": apart, "read": read(rows) if not apart else []}
    if apart:
        return render("picture/page.html", run, data={"model": None, "runs": [seen(run, rows)]}, **told)
    window = inputs["swept_windows"][0]
    images = {name: data_url(_picture(run, window, TOGETHER, name)) for name in ("O", "result", "E")}
    return render("picture/page.html", run, images=images, measures=measures(rows), verdicts=_VERDICTS, window=window, **told)


def _figure(run: Run, rows: pd.DataFrame) -> Figure:
    """O, the picture and E; or O, E and the picture of every layer."""
    from matplotlib import pyplot as plt

    each = _of_run(run, rows)
    first = [one for one in each if one[0] == each[0][0]]
    if run.config["options"]["apart"]:
        shown = [("O", first[0][1], "O"), ("E", first[0][1], "E"), *((short(layer), layer, "result") for _, layer, _ in first)]
        colours = ["white", "white", *(shade(part) for _, _, part in first)]
    else:
        shown = [("O", TOGETHER, "O"), ("O with layers of E", TOGETHER, "result"), ("E", TOGETHER, "E")]
        colours = ["white"] * 3
    columns = min(10, len(shown))
    lines = -(-len(shown) // columns)
    with plt.rc_context(style()):
        size = (1.1 * columns + 0.3, 1.35 * lines + 0.1)
        figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for ax, (title, layer, name), colour in zip(axes.flat, shown, colours, strict=False):
            ax.imshow(Image.open(_picture(run, first[0][0], layer, name)))
            ax.set_title(title, fontsize=7 if columns > 3 else 9)
            for spine in ax.spines.values():
                spine.set(visible=True, linewidth=2.5, color=colour)
        plt.close(figure)
    return figure

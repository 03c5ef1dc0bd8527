"""The report of a noise map: how often the nearest is the own one, both ways, beside the paper's numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.report.figures import render, save_figure, style
from probekit.report.findings import Findings, Table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probekit.runs.folder import Run

TO_NOISE = "x0 -> xT"
"""For each sample the nearest noise."""
TO_SAMPLE = "xT -> x0"
"""For each noise the nearest sample."""

PAPER: dict[str, dict[str, dict[int, tuple[float, float]]]] = {
    "ImageNet DDPM": {
        TO_NOISE: {10: (99.4, 0.0), 100: (100, 0.0), 1000: (99.8, 0.2), 4000: (99.5, 0.3)},
        TO_SAMPLE: {10: (100, 0.0), 100: (59.0, 7.1), 1000: (44.6, 6.3), 4000: (43.3, 6.7)},
    },
    "CelebA LDM": {
        TO_NOISE: {10: (100, 0.0), 100: (100, 0.0), 1000: (100, 0.0)},
        TO_SAMPLE: {10: (100, 0.0), 100: (100, 0.0), 1000: (100, 0.0)},
    },
}
"""Percent and std of the paper's models: direction, then number of steps. Source: Hidden Relations, poster, figure 6."""

_KINDS = {
    "epsilon": "a diffusion model of {} that predicts the noise",
    "v_prediction": "a diffusion model of {} that predicts velocities",
    "flow": "a rectified flow of {}",
}

_LARGEST = 192  # pixels of an example's side on the page


def unit(steps: int) -> str:
    """The name of the unit of a number of steps."""
    return f"steps-{steps:06d}"


def headline(config: dict[str, Any], rows: pd.DataFrame) -> str:
    """The finding in numbers."""
    options, n, chance = config["options"] | config["inputs"], rows.n.iloc[0], rows.chance.iloc[0]
    back, forth = (rows[rows.direction == direction].set_index("steps") for direction in (TO_NOISE, TO_SAMPLE))
    name, kind = Path(options["model"]).name, _KINDS[options["prediction"]].format(options["space"])
    said = (
        f"{name} is {kind}. Of {n:,} noises, the nearest to a sample is the one it was made from in {_shares(back.accuracy)}. "
        f"Of {n:,} samples, the nearest to a noise is its own in {_shares(forth.accuracy)}. Chance is {chance:.2g} %."
    )
    surer = {"sample to noise": back.low > forth.high, "noise to sample": forth.low > back.high}
    for way, clear in surer.items():
        if clear.any():
            at = _listed([f"{steps:,}" for steps in back.index[clear]])
            said += f" From {way} is the surer way at {at} step{'' if at == '1' else 's'}."
    return said if any(clear.any() for clear in surer.values()) else f"{said} Neither way is clearly the surer one."


def second_moments(config: dict[str, Any], rows: pd.DataFrame) -> str:
    """What the covariance of the data predicts, and what the network does beyond it; nothing where it is not known.

    The two are told apart where their 95% intervals are.
    """
    from probekit.metrics.distributions import share_interval

    if "predicted" not in rows or rows.predicted.isna().all():
        return ""
    data, parts = config["inputs"]["theory_data"], []
    for direction, way in ((TO_NOISE, "from sample to noise"), (TO_SAMPLE, "from noise to sample")):
        own = rows[rows.direction == direction]
        shares = [f"{_percent(r.predicted)} % (measured {_percent(r.accuracy)} %)" for r in own.itertuples()]
        steps = [f"at {r.steps:,}" for r in own.itertuples()]
        parts.append(f"{way} in {_listed([' '.join(both) for both in zip(shares, steps, strict=True)])} steps")
    beyond = []
    for r in rows.itertuples():
        low, high = (100 * share for share in share_interval(round(r.predicted * r.n / 100), r.n))
        if r.low > high or r.high < low:
            beyond.append(f"{r.accuracy - r.predicted:+.0f} points ({r.direction}, {r.steps:,} steps)")
    rest = f"What second moments leave unexplained, the network does beyond them: {_listed(beyond)}." if beyond else ""
    return (
        f"If {data} were normal with their mean and covariance, the best denoiser would make the map linear, and the nearest "
        f"would be the own one {'; '.join(parts)}. {rest or 'No measured share can be told from the predicted one.'}"
    )


def findings(run: Run, rows: pd.DataFrame) -> Findings:
    """What a run's rows come to."""
    options = run.config["options"]
    found = f"the nearest of {options['n']:,} by L2 is the own one, in percent ± std of {options['splits']} splits"
    columns = (
        *("steps", "direction", "accuracy", "95% interval", "second moments", "of samples", "chance"),
        *("to own", "to nearest other", *_headings()),
    )
    told = [
        (
            *(f"{r['steps']:,}", r["direction"], r["accuracy"], r["interval"], r["predicted"], r["of_samples"], r["chance"]),
            *(r["own"], r["other"], *r["paper"]),
        )
        for r in _told(rows)
    ]
    table = Table(f"{Path(options['model']).name}: {found}", columns, told, text=("direction",))
    says = " ".join(filter(None, (headline(run.config, rows), second_moments(run.config, rows))))
    return Findings(run, rows, [table], lambda: _page(run, rows), ("accuracy",), says)


def _page(run: Run, rows: pd.DataFrame) -> bytes:
    folder, config = run.folder, run.config
    accuracy = save_figure(_lines(config, rows), folder / "figures" / "accuracy")
    examples = []
    for steps, group in rows.groupby("steps", sort=False):
        drawn = _numbers(folder / "images" / unit(int(steps)), "found")  # a run may have been kept without its pictures
        svg = save_figure(_examples(folder, int(steps)), folder / "figures" / f"nearest-{steps}") if drawn else ""
        told = " ".join(_mistakes(row) for row in group.itertuples())
        examples.append({"steps": steps, "svg": svg, "told": told, "wide": group[group.direction == TO_SAMPLE].wrong.any()})
    return render(
        "noise_map/page.html",
        run,
        name=Path(config["options"]["model"]).name,
        headline=headline(config, rows),
        theory=second_moments(config, rows),
        accuracy=accuracy,
        examples=examples,
        rows=_told(rows),
        headings=_headings(),
        to_noise=TO_NOISE,
    )


def _told(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as they are read."""
    return [
        {
            "steps": r.steps,
            "direction": r.direction,
            "accuracy": f"{_percent(r.accuracy)} ± {r.std:.1f}",
            "interval": f"{_percent(r.low)}–{_percent(r.high)}",
            **{
                key: _percent(value) if (value := getattr(r, column, math.nan)) == value else ""
                for key, column in {"predicted": "predicted", "of_samples": "predicted_of_samples"}.items()
            },
            "chance": f"{r.chance:.2g}",
            "own": f"{r.own:.4g}",
            "other": f"{r.other:.4g}",
            "wrong": r.wrong,
            "named": r.named,
            "paper": [
                f"{_percent(by[r.steps][0])} ± {by[r.steps][1]:.1f}" if r.steps in (by := ways[r.direction]) else ""
                for ways in PAPER.values()
            ],
        }
        for r in rows.itertuples()
    ]


def _mistakes(row: Any) -> str:
    """How many of a row's answers are wrong, and how many candidates they name."""
    asked, named = ("sample", "noise") if row.direction == TO_NOISE else ("noise", "sample")
    if not row.wrong:
        return f"Every {asked} is nearest to its own {named}."
    are, their = ("is", "its") if row.wrong == 1 else ("are", "their")
    said = f"{row.wrong:,} of {row.n:,} {asked}s {are} nearer to another {named} than to {their} own"
    if row.wrong == 1:
        return f"{said}."
    return f"{said}, all to the same one." if row.named == 1 else f"{said}, to {row.named:,} different ones in all."


def _headings() -> list[str]:
    return [f"paper, {name}" for name in PAPER]


def _percent(value: float) -> str:
    """100 only where it is 100."""
    return "100" if value == 100 else f"{value:.2g}" if value < 1 else f"{min(value, 99.9):.1f}"


def _shares(accuracy: pd.Series) -> str:
    """Accuracies by their numbers of steps."""
    first, *others = [(f"{_percent(value)} %", f"at {steps:,}") for steps, value in accuracy.items()]
    return _listed([f"{first[0]} of cases {first[1]} step{'s' if accuracy.index[0] > 1 else ''}", *map(" ".join, others)])


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _lines(config: dict[str, Any], rows: pd.DataFrame) -> Figure:
    """Figure 6, left, as a picture: accuracy against the number of steps, a panel a direction, the paper's points hollow."""
    from matplotlib import pyplot as plt

    titles = {TO_NOISE: "given a sample, its noise:  $x^0 \\to x^T$", TO_SAMPLE: "given a noise, its sample:  $x^T \\to x^0$"}
    # a little to either side, so that no point hides another
    papers = dict(zip(PAPER, (("o", "#b0722a", 1 / 1.17), ("s", "#5b8c5a", 1.17)), strict=True))
    everywhere = sorted({*rows.steps.tolist(), *(s for ways in PAPER.values() for by in ways.values() for s in by)})
    ticks = everywhere[:1]
    for steps in everywhere[1:]:
        ticks += [steps] if steps >= 1.6 * ticks[-1] else []
    with plt.rc_context(style()):
        figure, axes = plt.subplots(1, 2, figsize=(9.4, 3.7), layout="constrained", sharey=True)
        for ax, (direction, title) in zip(axes, titles.items(), strict=True):
            for name, (marker, colour, aside) in papers.items():
                by = PAPER[name][direction]
                ax.errorbar(
                    [s * aside for s in by],
                    [a for a, _ in by.values()],
                    yerr=[std for _, std in by.values()],
                    fmt=marker,
                    ms=6,
                    mfc="white",
                    mec=colour,
                    mew=1.4,
                    color=colour,
                    elinewidth=0.9,
                    capsize=2,
                    ls=":",
                    lw=0.9,
                    label=f"paper, {name}",
                    zorder=2,
                )
            own = rows[rows.direction == direction].sort_values("steps")
            spread = [(own.accuracy - own.low).clip(lower=0), (own.high - own.accuracy).clip(lower=0)]
            ax.errorbar(
                own.steps,
                own.accuracy,
                yerr=spread,
                fmt="o-",
                ms=6,
                lw=1.8,
                color="#2f6db5",
                ecolor="#2f6db5",
                elinewidth=1.4,
                capsize=3,
                label=Path(config["options"]["model"]).name,
                zorder=3,
            )
            if "predicted" in own and own.predicted.notna().any():
                ax.plot(
                    own.steps,
                    own.predicted,
                    color="#14213d",
                    lw=1.3,
                    ls=(0, (5, 2)),
                    marker="x",
                    ms=6,
                    label="second moments of the data",
                    zorder=2.5,
                )
            ax.axhline(rows.chance.iloc[0], color="#8a8880", lw=0.9, ls=(0, (4, 3)), zorder=1, label="chance")
            ax.set_xscale("log")
            ax.set_xticks(ticks, [f"{s:,}" for s in ticks])
            ax.minorticks_off()
            ax.set_xlim(everywhere[0] / 1.6, everywhere[-1] * 1.6)
            ax.set_title(title, loc="left", fontsize=10)
            ax.set(xlabel="sampling steps", ylim=(-3, 105))
            ax.grid(axis="y", color="#eeece4", zorder=0)
        axes[0].set_ylabel("nearest is the own one, %")
        handles, labels = axes[1].get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: (labels[i] == "chance", labels[i].startswith("paper")))
        axes[1].legend(
            [handles[i] for i in order],
            [labels[i] for i in order],
            loc="center left",
            bbox_to_anchor=(1.02, 0.5),
            frameon=False,
        )
        plt.close(figure)
    return figure


def _examples(folder: Path, steps: int) -> Figure:
    """Samples with their own and their nearest noise; beside them, noises whose nearest sample is another's."""
    from matplotlib import pyplot as plt
    from PIL import Image

    images = folder / "images" / unit(steps)
    blocks = [
        ("found", "samples", {"sample": "sample", "own": "its noise", "nearest": "nearest noise"}),
        (
            "missed",
            "noises that are nearer to another sample",
            {"noise": "noise", "own": "its sample", "nearest": "nearest sample"},
        ),
    ]
    shown = [(kind, title, parts, _numbers(images, kind)) for kind, title, parts in blocks]
    shown = [block for block in shown if block[3]]
    side, label, top, gap = 0.86, 1.05, 0.34, 0.2  # inches
    columns = sum(len(numbers) for *_, numbers in shown)
    width, height = columns * side + len(shown) * (label + 0.1), top + 3 * (side + gap)
    with plt.rc_context(style()):
        figure, left = plt.figure(figsize=(width, height)), 0.0
        for kind, title, parts, numbers in shown:
            left += label
            figure.text(left / width, 1 - 0.6 * top / height, title, fontsize=10, fontweight="bold", va="center")
            for i, (part, said) in enumerate(parts.items()):
                bottom = height - top - (i + 1) * (side + gap) + gap
                figure.text((left - 0.1) / width, (bottom + side / 2) / height, said, ha="right", va="center", fontsize=9)
                for j, (row, answer) in enumerate(numbers):
                    number = answer if part == "nearest" else row
                    wrong = part == "nearest" and answer != row
                    ax = figure.add_axes(
                        ((left + j * side + 0.03) / width, bottom / height, (side - 0.06) / width, (side - 0.06) / height)
                    )
                    picture = Image.open(images / f"{kind}-{row}-{answer}-{part}.png")
                    picture.thumbnail((_LARGEST, _LARGEST))
                    ax.imshow(picture, interpolation="none")  # the SVG then holds its pixels
                    ax.set_xticks([])
                    ax.set_yticks([])
                    ax.set_xlabel(f"{number:,}", fontsize=8, labelpad=2, color="#c8445b" if wrong else "#6d6b62")
                    for spine in ax.spines.values():
                        spine.set_visible(part == "nearest")
                        spine.set_color("#c8445b" if wrong else "#5b8c5a")
                        spine.set_linewidth(2)
            left += len(numbers) * side + 0.1
        plt.close(figure)
    return figure


def _numbers(images: Path, kind: str) -> list[tuple[int, int]]:
    """Row and answer of the examples that were drawn, in order."""
    names = (picture.name.split("-") for picture in images.glob(f"{kind}-*-nearest.png"))
    return sorted((int(row), int(answer)) for _, row, answer, _ in names)

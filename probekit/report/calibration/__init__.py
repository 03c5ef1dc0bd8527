"""The report of a calibration: the roles that a measure finds, held against the plan."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probekit.hooks.errors import ProbekitError
from probekit.metrics.distributions import share_interval
from probekit.report.figures import render, save_figure, style
from probekit.report.findings import Findings, Table
from probekit.report.verdicts import side

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probekit.runs.folder import Run

TITLES = {
    "outputs": "cross-attentions' outputs",
    "text": "text of cross-attentions",
    "layers": "whole layers around cross-attentions",
}

Role = tuple[str, str]
"""A site and an attribute."""


@dataclass(frozen=True)
class Agreement:
    """How many roles are found, how many of these are planted, and how many are planted in all."""

    found: int
    right: int
    planted: int

    @classmethod
    def of(cls, found: set[Role], planted: set[Role]) -> Agreement:
        """Of two sets of roles."""
        return cls(len(found), len(found & planted), len(planted))

    @property
    def precision(self) -> float:
        """The share of the found that are planted; NaN where none is found."""
        return self.right / self.found if self.found else float("nan")

    @property
    def recall(self) -> float:
        """The share of the planted that are found."""
        return self.right / self.planted

    @property
    def f1(self) -> float:
        """The harmonic mean of both; 0 where none is found."""
        return 2 * self.right / (self.found + self.planted)


@dataclass(frozen=True)
class Chance:
    """The agreement of the same roles with permuted plans. p: the share of all plans, the true one too, that agree as well."""

    plans: int
    precision: tuple[float, float]
    """Mean and largest of the permuted plans."""
    recall: tuple[float, float]
    p: float


def permuted(planted: set[Role], sites: Sequence[str], attributes: Sequence[str]) -> list[set[Role]]:
    """Every plan in which as many sites have as many attributes, the true one among them.

    That is each attribute at one site, with the numbers of attributes dealt to any sites: of 3, 2, 1 and 0 attributes at four
    sites, 1,440 plans.
    """
    shape = sorted(Counter(site for site, _ in planted).values())
    plans = []
    for chosen in itertools.product(sites, repeat=len(attributes)):
        if sorted(Counter(chosen).values()) == shape:
            plans.append(set(zip(chosen, attributes, strict=True)))
    return plans


def chance(found: set[Role], planted: set[Role], sites: Sequence[str], attributes: Sequence[str]) -> Chance:
    """How well roles agree with plans that are not the true one."""
    plans, own = permuted(planted, sites, attributes), Agreement.of(found, planted)
    against = [Agreement.of(found, plan) for plan in plans]
    others = [a for a, plan in zip(against, plans, strict=True) if plan != planted]
    precision, recall = ([getattr(a, key) for a in others] for key in ("precision", "recall"))
    return Chance(
        len(plans),
        (float(np.mean(precision)), max(precision)),
        (float(np.mean(recall)), max(recall)),
        sum(a.f1 >= own.f1 for a in against) / len(plans),
    )


def summarise(rows: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """One row a (measure, site, attribute): transfer and null, their 95% Wilson intervals, and whether it is a role.

    transfer: the share of pairs in which the site brings E's value; null: the share in which an unrelated donor, which does
    not have it, brings it. Pairs of which nothing can be told are left out; `pairs` are the others. role: transfer - null is
    at least `threshold`; sure: whether the 95% interval of that difference is clear of it (Newcombe 1998, method 10). kept: the
    mean share of the other attributes that stay.
    """
    import pandas as pd

    told = rows.dropna(subset=["transfer"])
    found = []
    keys = ["measure", "order", "site", "attribute"]
    for key, group in told.groupby(keys, sort=False):
        by = {donor: group[group.donor == donor] for donor in ("edit", "unrelated")}
        shares = {donor: float(part.transfer.mean()) for donor, part in by.items()}
        intervals = {donor: share_interval(int(part.transfer.sum()), len(part)) for donor, part in by.items()}
        found.append(
            dict(zip(keys, key, strict=True))
            | {"transfer": shares["edit"], "low": intervals["edit"][0], "high": intervals["edit"][1]}
            | {"null": shares["unrelated"], "null_low": intervals["unrelated"][0], "null_high": intervals["unrelated"][1]}
            | {"pairs": len(by["edit"]), "kept": float(by["edit"].kept.mean())}
            | {"role": shares["edit"] - shares["unrelated"] >= threshold - 1e-9}
            | {"sure": side(*_difference(shares, intervals), of=threshold) != 0}
        )
    return pd.DataFrame(found)


def _difference(shares: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """The interval of transfer - null, from those of both."""
    (a, low_a, high_a), (b, low_b, high_b) = ((shares[donor], *intervals[donor]) for donor in ("edit", "unrelated"))
    return a - b - math.hypot(a - low_a, high_b - b), a - b + math.hypot(high_a - a, b - low_b)


@dataclass(frozen=True)
class Calibration:
    """What a run's rows come to."""

    told: pd.DataFrame
    """The rows of pairs of which something can be told."""
    summary: pd.DataFrame
    measures: list[str]
    sites: list[str]
    attributes: list[str]
    planted: set[Role]
    threshold: float

    @classmethod
    def of(cls, config: Mapping[str, Any], rows: pd.DataFrame) -> Calibration:
        """Raises ProbekitError where no pair of an attribute can be told."""
        plan, threshold = config["inputs"]["planted"], config["options"]["threshold"]
        attributes = list(dict.fromkeys(rows.attribute))
        summary = summarise(rows, threshold)
        if unknown := [a for a in attributes if summary.empty or a not in set(summary.attribute)]:
            raise ProbekitError(
                f"{unknown[0]}: the scene reader sees in no pair what the captions say; give more --pairs or --num-steps"
            )
        planted = {(site, a) for site, found in plan.items() for a in found}
        told = rows.dropna(subset=["transfer"])
        return cls(told, summary, list(dict.fromkeys(rows.measure)), list(plan), attributes, planted, threshold)

    def cell(self, measure: str, site: str, attribute: str) -> Any:
        """The row of the summary."""
        s = self.summary
        return s[(s.measure == measure) & (s.site == site) & (s.attribute == attribute)].iloc[0]

    def found(self, measure: str) -> set[Role]:
        """The roles that a measure finds."""
        s = self.summary[(self.summary.measure == measure) & self.summary.role]
        return set(zip(s.site, s.attribute, strict=True))

    def agreement(self, measure: str) -> Agreement:
        """Of a measure's roles with the plan."""
        return Agreement.of(self.found(measure), self.planted)

    @functools.cached_property
    def chance(self) -> dict[str, Chance]:
        """Of each measure's roles with permuted plans."""
        return {m: chance(self.found(m), self.planted, self.sites, self.attributes) for m in self.measures}

    def carried(self, measure: str, site: str) -> list[str]:
        """The attributes of which a site has the role."""
        return [a for a in self.attributes if (site, a) in self.found(measure)]


def findings(run: Run, rows: pd.DataFrame) -> Findings:
    """What a run's rows come to."""
    told = Calibration.of(run.config, rows)
    figures = ("roles", "pictures") if (run.folder / "images").exists() else ("roles",)
    tables = [_agreements(told), *(_grid(told, measure) for measure in told.measures)]
    return Findings(run, rows, tables, lambda: _page(run, told), figures, says(told))


def says(told: Calibration) -> str:
    """The finding, a sentence or two a measure."""
    said = []
    for measure in told.measures:
        own, by = told.agreement(measure), told.chance[measure]
        if not own.found:
            said.append(f"By {TITLES[measure]}, no role is found.")
            continue
        wrong = own.found - own.right
        said.append(
            f"By {TITLES[measure]}, {own.right} of {own.planted} planted roles are found, and {wrong} that "
            f"{'is' if wrong == 1 else 'are'} not planted: precision {own.precision:.2f}, recall {own.recall:.2f} (permuted "
            f"plans: {by.precision[0]:.2f} and {by.recall[0]:.2f}, at most {by.precision[1]:.2f} and {by.recall[1]:.2f}; "
            f"p = {by.p:.2g})."
        )
        if unsure := int((~told.summary[told.summary.measure == measure].sure).sum()):
            said[-1] += f" Of {unsure} roles, found or not, it cannot be told on which side of the threshold they are."
    return " ".join(said)


def _agreements(told: Calibration) -> Table:
    rows = []
    for measure in told.measures:
        own, by = told.agreement(measure), told.chance[measure]
        shares = (f"{own.precision:.2f}", f"{own.recall:.2f}")
        null = (f"{m:.2f}, {most:.2f}" for m, most in (by.precision, by.recall))
        rows.append((TITLES[measure], str(own.found), str(own.right), *shares, *null, f"{by.p:.2g}"))
    first = told.chance[told.measures[0]]
    columns = ("swapped", "roles", "planted", "precision", "recall", "precision, permuted", "recall, permuted", "p")
    title = (
        f"roles against the plan ({len(told.planted)} planted; permuted: mean and maximum of {first.plans - 1:,} other plans)"
    )
    return Table(title, columns, rows, text=("swapped",))


def _grid(told: Calibration, measure: str) -> Table:
    rows = []
    for site in told.sites:
        cells = [told.cell(measure, site, a) for a in told.attributes]
        planted = ", ".join(a for a in told.attributes if (site, a) in told.planted) or "nothing"
        numbers = (f"{c.transfer:.2f} ({c.null:.2f})" for c in cells)
        rows.append((_short(site), *numbers, planted, ", ".join(told.carried(measure, site)) or "nothing"))
    pairs = min(told.summary[told.summary.measure == measure].pairs)
    title = (
        f"{TITLES[measure]}: transfer (and null), at least {pairs} pairs an attribute; a role stands {told.threshold:g} above"
    )
    return Table(title, ("site", *told.attributes, "planted", "found"), rows, text=("site", "planted", "found"))


def _short(site: str) -> str:
    """The attention layer that a cross-attention stands in."""
    return site.partition(".transformer_blocks")[0]


def _page(run: Run, told: Calibration) -> bytes:
    folder = run.folder
    roles = save_figure(_roles(told), folder / "figures" / "roles")
    shown = _examples(run, told)
    pictures = save_figure(_pictures(folder, told, shown), folder / "figures" / "pictures") if shown else ""
    captions = {pair["name"]: pair for pair in run.config["inputs"]["swept_pairs"]}
    return render(
        "calibration/page.html",
        run,
        headline=says(told),
        roles=roles,
        pictures=pictures,
        examples=[captions[name] for name in shown],
        tables=[_agreements(told), *(_grid(told, measure) for measure in told.measures)],
        threshold=f"{told.threshold:g}",
    )


def _roles(told: Calibration) -> Figure:
    """Sites by attributes, a panel a measure: transfer as colour, the plan outlined, roles in bold."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    rows, columns, count = len(told.sites), len(told.attributes), len(told.measures)
    with plt.rc_context(style()):
        figure, grid = plt.subplots(
            1, count, figsize=(2.3 + 3.9 * count, 1.1 + 0.62 * rows), layout="constrained", sharey=True, squeeze=False
        )
        for ax, measure in zip(grid[0], told.measures, strict=True):
            cells = [[told.cell(measure, site, a) for a in told.attributes] for site in told.sites]
            values = np.array([[cell.transfer for cell in row] for row in cells])
            image = ax.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for i, j in itertools.product(range(rows), range(columns)):
                cell, ink = cells[i][j], "white" if values[i, j] > 0.6 else "#26251f"
                weight = "bold" if cell.role else "normal"
                ax.text(j, i - 0.1, f"{cell.transfer:.2f}", ha="center", va="center", color=ink, fontweight=weight)
                ax.text(j, i + 0.28, f"null {cell.null:.2f}", ha="center", va="center", color=ink, fontsize=6)
                if (told.sites[i], told.attributes[j]) in told.planted:
                    # a little inside, so that neighbours' outlines do not cover each other
                    box = Rectangle((j - 0.45, i - 0.45), 0.9, 0.9, fill=False, ec="#e0a021", lw=2.6)
                    ax.add_patch(box)
            own = told.agreement(measure)
            title = f"{TITLES[measure]}\nprecision {own.precision:.2f}, recall {own.recall:.2f}"
            ax.set_title(title, loc="left", fontsize=9.5)
            ax.set_xticks(range(columns), told.attributes)
            ax.set_yticks(range(rows), [_short(site) for site in told.sites])
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=grid[0].tolist(), shrink=0.9, pad=0.01)
        bar.set_label("transfer")
        bar.outline.set_visible(False)
        plt.close(figure)
    return figure


def _examples(run: Run, told: Calibration) -> list[str]:
    """The first pair of every attribute that can be told and whose pictures are there; a run may have been kept without."""
    first = told.told.drop_duplicates("attribute").pair
    return [name for name in first if (run.folder / "images" / name / "O.png").exists()]


def _pictures(folder: Path, told: Calibration, shown: Sequence[str]) -> Figure:
    """A row a pair: O, E, and O with each site taken from E."""
    from matplotlib import pyplot as plt
    from PIL import Image

    columns = [("", "O", "O"), ("", "E", "E")]
    columns += [
        (TITLES[m], _short(site).replace(".attentions", "\n.attentions"), f"{m}_{site}")
        for m in told.measures
        for site in told.sites
    ]
    side, label, top = 0.82, 0.8, 0.62  # inches
    width, height = label + side * len(columns) + 0.12 * (1 + len(told.measures)), top + side * len(shown)
    with plt.rc_context(style()):
        figure = plt.figure(figsize=(width, height))
        left, group = label, ""
        for title, said, name in columns:
            if title != group:
                left, group = left + 0.12, title
                figure.text((left + 0.02) / width, 1 - 0.14 / height, title, fontsize=9, fontweight="bold", va="center")
            figure.text((left + side / 2) / width, 1 - 0.42 / height, said, fontsize=6, ha="center", va="center")
            for i, pair in enumerate(shown):
                bottom = height - top - (i + 1) * side
                ax = figure.add_axes(
                    ((left + 0.03) / width, (bottom + 0.03) / height, (side - 0.06) / width, (side - 0.06) / height)
                )
                ax.imshow(Image.open(folder / "images" / pair / f"{name}.png"), interpolation="nearest")
                ax.set_axis_off()
            left += side
        for i, pair in enumerate(shown):
            bottom = height - top - (i + 0.5) * side
            figure.text((label - 0.06) / width, bottom / height, pair.rpartition("-")[0], ha="right", va="center")
        plt.close(figure)
    return figure

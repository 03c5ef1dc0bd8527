"""What the paper says of each kind of space, and whether what was measured bears it out (The Evolving Nature, 2.1, 3, 3.1).

Figure 4 itself is a picture; its V and X stand here as the paper's text gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from probekit.latents.properties import EPSILON, POINTS

if TYPE_CHECKING:
    import pandas as pd

V, X, PARTLY = "V", "X", "partly"
HOLDS, DOES_NOT, OPEN = "holds", "does not", "cannot be told"

PROPERTIES = ("density", "smoothness", "organization", "relevance")

ENCODED, NOISE, TEXT, EOS, CODE, LAYER = "GAN, VAE", "noise", "text", "text-eos", "code", "layer"

PAPER: dict[str, dict[str, str]] = {
    ENCODED: dict.fromkeys(PROPERTIES, V),
    NOISE: {"density": V, "smoothness": PARTLY, "organization": X, "relevance": PARTLY},
    TEXT: {"density": V, "smoothness": V, "organization": X, "relevance": V},
    EOS: {"density": V, "smoothness": V, "organization": X, "relevance": X},
    CODE: {"density": X, "smoothness": X, "organization": X},
    LAYER: {"relevance": PARTLY},
}
"""V: full compliance, X: complete absence, of each kind of space; what the paper leaves open is not there."""


def kind(told: str) -> str | None:
    """Of which kind a space is, from its family and name as a run's config has them; None where the paper names none."""
    family, name, *_ = told.split()
    if family in ("stylegan2", "vae"):
        return ENCODED
    return {"noise": NOISE, "text": TEXT, "text-eos": EOS, "code": CODE, "h": LAYER}.get(name)


@dataclass(frozen=True)
class Cell:
    """One number of a space, with what bounds it.

    low, high: NaN where it has no interval. worst, best: the floor and the ceiling measured beside it. what: in words.
    broken: of a space in which every point has a picture of its own, so that even steps say nothing.
    """

    value: float
    low: float
    high: float
    worst: float
    best: float
    what: str = ""
    broken: bool = False

    @property
    def share(self) -> tuple[float, float, float]:
        """Value and interval from 0, the floor, to 1, the ceiling; an interval that is turned round is turned back."""
        reach = self.best - self.worst
        if not reach or math.isnan(reach):
            return math.nan, math.nan, math.nan
        low, high = sorted((each - self.worst) / reach for each in (self.low, self.high))
        return (self.value - self.worst) / reach, low, high


class Rows:
    """The rows of a run, asked one number at a time."""

    def __init__(self, rows: pd.DataFrame) -> None:
        keys = zip(rows.space, rows.property, rows.measure, rows.of, rows.by, strict=True)
        told = zip(rows.value, rows.low, rows.high, rows.n, strict=True)
        self._rows: dict[tuple[str, ...], tuple[float, float, float, int]] = dict(zip(keys, told, strict=True))

    def get(self, space: str, prop: str, measure: str, of: str, by: str = "") -> tuple[float, float, float, int]:
        """Value, low, high and n; NaN where there is no such row."""
        return self._rows.get((space, prop, measure, of, by), (math.nan, math.nan, math.nan, 0))

    def drawn(self, space: str) -> str:
        """What a space's new codes are drawn from: its prior, or a Gaussian."""
        return "prior" if (space, "density", "precision", "prior", "alexnet") in self._rows else "gaussian"

    def path(self, space: str) -> str:
        """How its paths go."""
        spherical = (space, "smoothness", "jump", "path", "great circle") in self._rows
        return "great circle" if spherical else "straight"


def cell(rows: Rows, space: str, name: str, prop: str) -> Cell:
    """The number that stands for a property of a space, beside its floor and ceiling.

    Density: the precision of what decodes from the prior or, without one, from a Gaussian of the codes' mean and covariance,
    between that of shuffled patches and of the model's own pictures. Smoothness: the jump, between all at once and that of a
    cross-fade; a path length whose interval is nearer to 1 / ε² than to 1, by logarithms, means that every point has a picture
    of its own.
    Organization: the correlation with LPIPS, from what chance reaches to 1. Relevance: the total index, 0 to 1.
    """
    if prop == "density":
        drawn = rows.drawn(space)
        value, low, high, _ = rows.get(space, prop, "precision", drawn, "alexnet")
        worst, best = (rows.get(space, prop, "precision", of, "alexnet")[0] for of in ("patches", "own"))
        return Cell(value, low, high, worst, best, f"precision, {drawn}")
    if prop == "smoothness":
        value, low, high, _ = rows.get(space, prop, "jump", "path", rows.path(space))
        broken = rows.get(space, prop, "path length", "path", rows.path(space))[1] > 1 / EPSILON
        return Cell(value, low, high, float(POINTS), rows.get(space, prop, "jump", "cross-fade")[0], "jump", broken)
    if prop == "organization":
        by = "lpips" if not math.isnan(rows.get(space, prop, "correlation", "codes", "lpips")[0]) else "factors"
        value, low, high, _ = rows.get(space, prop, "correlation", "codes", by)
        return Cell(value, low, high, rows.get(space, prop, "null", "codes", by)[0], 1.0, "correlation")
    value, low, high, _ = rows.get(space, prop, "total", name, "picture")
    return Cell(value, low, high, 0.0, 1.0, "total index")


# --- verdicts ----------------------------------------------------------------------------------------------------------

_LITTLE = 0.1
"""A share below which there is nothing to speak of: of what pictures vary by, of the way from chance to a correlation of 1."""


def verdict(prop: str, mark: str, found: Cell) -> str:
    """Whether a mark of the paper's is borne out by a number.

    V: the interval lies in the better half between floor and ceiling, X: in the worse half; partly: inside, clear of both by a
    tenth. Of organization: V above what chance reaches, X less than a tenth of the way from there to 1. Of relevance, X is less
    than a tenth.
    """
    _, low, high = found.share
    if math.isnan(low) or math.isnan(high):
        return OPEN
    if found.broken:
        return HOLDS if mark == X else DOES_NOT
    if prop == "organization":
        clear, none = low > 0, low <= 0 and high < _LITTLE
        yes, no = (clear, none) if mark == V else (none, clear)
    elif mark == PARTLY:
        yes, no = low > _LITTLE and high < 1 - _LITTLE, low >= 1 - _LITTLE or high <= _LITTLE
    elif prop == "relevance" and mark == X:
        yes, no = high < _LITTLE, low > _LITTLE
    else:
        yes, no = (low >= 0.5, high < 0.5) if mark == V else (high < 0.5, low >= 0.5)
    return HOLDS if yes else DOES_NOT if no else OPEN


@dataclass(frozen=True)
class Told:
    """A sentence of the paper's about one space: what was measured, and the verdict."""

    sentence: str
    space: str
    measured: str
    verdict: str


@dataclass(frozen=True)
class _Sentence:
    words: str
    kind: str
    judge: Callable[[Rows, str, str], tuple[str, str]]


def _marked(prop: str, mark: str) -> Callable[[Rows, str, str], tuple[str, str]]:
    def judge(rows: Rows, space: str, name: str) -> tuple[str, str]:
        found = cell(rows, space, name, prop)
        beside = {
            "density": f"{found.best:.2f} of its own pictures, {found.worst:.2f} of shuffled patches",
            "smoothness": f"{found.best:.2f} of a cross-fade, {found.worst:g} is all at once",
            "organization": f"chance reaches {found.worst:.2f}",
            "relevance": "",
        }[prop]
        return f"{found.what} {number(found)}" + (f"; {beside}" if beside else ""), verdict(prop, mark, found)

    return judge


def _all_of(*marks: tuple[str, str]) -> Callable[[Rows, str, str], tuple[str, str]]:
    """Of a sentence that says several things: it holds where all do, and does not where one does not."""

    def judge(rows: Rows, space: str, name: str) -> tuple[str, str]:
        told = [(prop, *_marked(prop, mark)(rows, space, name)) for prop, mark in marks]
        verdicts = [each for _, _, each in told]
        whole = HOLDS if set(verdicts) == {HOLDS} else DOES_NOT if DOES_NOT in verdicts else OPEN
        return "; ".join(f"{measured.split(';')[0]}: {each}" for _, measured, each in told), whole

    return judge


def _jumps(rows: Rows, space: str, name: str) -> tuple[str, str]:
    # by the leap: a path that is all jumps has even steps, but each goes as far as the ends are apart
    value, low, high, _ = rows.get(space, "smoothness", "leap", "path", rows.path(space))
    found = Cell(value, low, high, float(POINTS), rows.get(space, "smoothness", "leap", "cross-fade")[0])
    said = (
        f"largest step {number(found)} times an even path's, {POINTS} is as far as the ends; {found.best:.2f} in a cross-fade"
    )
    _, least, most = found.share
    return said, HOLDS if most < 0.5 else DOES_NOT if least >= 0.5 else OPEN


def _composition(rows: Rows, space: str, name: str) -> tuple[str, str]:
    structure, others = ("place", "size"), ("kind", "colour", "ground", "texture")
    index = {factor: rows.get(space, "relevance", "total", name, factor) for factor in (*structure, *others)}
    if all(math.isnan(index[factor][0]) for factor in structure):
        return "no factors of composition are read", OPEN
    said = ", ".join(f"{factor} {value[0]:.2f}" for factor, value in index.items() if not math.isnan(value[0]))
    affects = any(index[factor][1] > _LITTLE for factor in structure)
    spared = all(not index[factor][2] >= _LITTLE for factor in structure)
    beyond = any(index[factor][1] > _LITTLE for factor in others)
    alone = all(not index[factor][2] >= _LITTLE for factor in others)
    answer = HOLDS if affects and alone else DOES_NOT if beyond or spared else OPEN
    return f"total index of {said}", answer


def _interpolates_badly(rows: Rows, space: str, name: str) -> tuple[str, str]:
    neither = rows.get(space, "organization", "neither", "midpoints", "all factors")
    inside = rows.get(space, "organization", "precision", "midpoints", "alexnet")
    ends = rows.get(space, "organization", "precision", "ends", "alexnet")
    if math.isnan(neither[0]):
        return "no factors are read", OPEN
    said = f"midpoints show neither's in {neither[0]:.0%} of the factors ({neither[1]:.0%}–{neither[2]:.0%})"
    said += f"; precision {inside[0]:.2f}, of the ends {ends[0]:.2f}"
    return said, HOLDS if neither[1] > 0.5 else DOES_NOT if neither[2] < 0.5 else OPEN


def _whole(rows: Rows, space: str, name: str) -> tuple[str, str]:
    value, low, high, _ = rows.get(space, "relevance", "first", name, "picture")
    said = f"first-order index {value:.2f}, by construction: it is the decoder's only input" if low == high == 1 else ""
    if math.isnan(low):
        return "", OPEN
    return said or f"first-order index {_interval(value, low, high)}", (
        HOLDS if low > 1 - _LITTLE else DOES_NOT if high < 1 - _LITTLE else OPEN
    )


def _split(rows: Rows, space: str, name: str) -> tuple[str, str]:
    total, first = (rows.get(space, "relevance", measure, name, "picture") for measure in ("total", "first"))
    if math.isnan(total[1]):
        return "", OPEN
    said = f"total index {_interval(*total[:3])}, alone {_interval(*first[:3])}"
    partly = total[1] > _LITTLE and first[2] < 1 - _LITTLE
    return said, HOLDS if partly else DOES_NOT if total[2] < _LITTLE or first[1] > 1 - _LITTLE else OPEN


SENTENCES = (
    _Sentence("GANs' and VAEs' spaces are dense, smooth, organized", ENCODED, _all_of(*((p, V) for p in PROPERTIES[:3]))),
    _Sentence("GANs' and VAEs' spaces “determine the entire image”", ENCODED, _whole),
    _Sentence("noise “is certainly dense”", NOISE, _marked("density", V)),
    _Sentence("noise “quickly jumps to a completely different representation”", NOISE, _jumps),
    _Sentence("noise “only affects the image's composition”", NOISE, _composition),
    _Sentence("noise “is not organized in any way”", NOISE, _marked("organization", X)),
    _Sentence("text is “rather dense and smooth”", TEXT, _all_of(("density", V), ("smoothness", V))),
    _Sentence("text “is not visually organized”", TEXT, _marked("organization", X)),
    _Sentence("text interpolates badly (“an interior of a room”)", TEXT, _interpolates_badly),
    _Sentence("text “has a remarkable influence”", TEXT, _marked("relevance", V)),
    _Sentence("the end of the text, “especially”, is dense and smooth", EOS, _all_of(("density", V), ("smoothness", V))),
    _Sentence("the end of the text “is not relevant to the final image”", EOS, _marked("relevance", X)),
    _Sentence("the code “is neither dense, smooth, nor organized”", CODE, _all_of(*((prop, X) for prop in PROPERTIES[:3]))),
    _Sentence("diffusion models “split the representational burden across layers”", LAYER, _split),
)
"""Of section 3, of 2.1 (the first) and 3.1 (the second and the last)."""


def judged(rows: Rows, spaces: dict[str, str]) -> list[Told]:
    """Every sentence about every space of its kind. spaces: family and name by label, as a run's config has them."""
    told = []
    for sentence in SENTENCES:
        for space, about in spaces.items():
            if kind(about) == sentence.kind:
                told.append(Told(sentence.words, space, *sentence.judge(rows, space, about.split()[1])))
    return told


def number(found: Cell) -> str:
    """Value and interval, as they are read."""
    return _interval(found.value, found.low, found.high) if not math.isnan(found.value) else "–"


def _interval(value: float, low: float, high: float) -> str:
    if math.isnan(low):
        return f"{value:.2f}"
    return f"{value:.2f} ({low:.2f} to {high:.2f})"

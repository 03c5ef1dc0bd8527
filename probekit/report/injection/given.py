"""The pictures that were given, and how well they were made again: told by terminal and page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.models.given import FAR
from probekit.report.findings import Table

if TYPE_CHECKING:
    import pandas as pd

_ENDS = {"original": "O", "edit": "E"}


@dataclass(frozen=True)
class MadeAgain:
    """One given picture: of which pair, O or E, its file, and `Given.errors` of what was made again."""

    pair: str
    end: str
    file: str
    psnr: float
    lpips: float
    coded_psnr: float
    coded_lpips: float
    spread: float

    @property
    def warning(self) -> str:
        """What is wrong with it and what would help; nothing where it is made again."""
        if self.lpips <= FAR:
            return ""
        name, coded = Path(self.file).name, f"{self.coded_lpips:.2f}"
        said = f"{self.end} of {self.pair} is not {name} but another picture: LPIPS {self.lpips:.2f}, above {FAR:g}"
        if self.coded_lpips > FAR:
            return f"{said}; the model's autoencoder alone is as far from it ({coded}): it knows no such pictures"
        return f"{said}, and by the autoencoder alone {coded}; guidance 1, --inversion fixed-point and more steps help"


def made_again(pair: str, images: Mapping[str, str], errors: Mapping[str, float]) -> list[MadeAgain]:
    """Of one pair: files by `original` and `edit`, and errors by `original_psnr`, …"""
    names = ("psnr", "lpips", "coded_psnr", "coded_lpips", "spread")
    return [MadeAgain(pair, _ENDS[s], file, *(float(errors[f"{s}_{name}"]) for name in names)) for s, file in images.items()]


def of_rows(pairs: Sequence[Mapping[str, Any]], rows: pd.DataFrame) -> list[MadeAgain]:
    """Of all pairs of a run; nothing where none has a given picture."""
    found = []
    for pair in pairs:
        images = {side: pair[f"image_{side}"] for side in _ENDS if f"image_{side}" in pair}
        if images:
            found += made_again(pair["name"], images, rows[rows.pair == pair["name"]].iloc[0])
    return found


def says(given: Sequence[MadeAgain]) -> str:
    """How near they are, in a sentence, and a line for each that is another picture."""
    if len(given) <= 2:
        each = [f"{g.end} at {g.psnr:.1f} dB of {Path(g.file).name} (LPIPS {g.lpips:.3f}, {_coded(g)})" for g in given]
        said = f"Made again: {' and '.join(each)}."
    else:
        mean = {name: math.fsum(getattr(g, name) for g in given) / len(given) for name in ("psnr", "lpips", "coded_psnr")}
        said = (
            f"The {len(given)} given pictures are made again at {mean['psnr']:.1f} dB on average "
            f"(LPIPS {mean['lpips']:.3f}; by the autoencoder alone {mean['coded_psnr']:.1f} dB)."
        )
    return "\n".join([said, *(f"Warning: {g.warning}." for g in given if g.warning)])


def _coded(given: MadeAgain) -> str:
    return f"by the autoencoder alone {given.coded_psnr:.1f} dB"


def table(given: Sequence[MadeAgain]) -> Table:
    """A line a given picture."""
    columns = ["pair", "", "file", "PSNR, dB", "LPIPS", "by the autoencoder alone", "latent's std (noise: 1)"]
    rows = [
        (
            g.pair,
            g.end,
            g.file,
            f"{g.psnr:.1f}",
            f"{g.lpips:.3f}",
            f"{g.coded_psnr:.1f} dB, {g.coded_lpips:.3f}",
            f"{g.spread:.2f}",
        )
        for g in given
    ]
    return Table("given pictures, made again from what they are inverted to", columns, rows, text=("pair", "", "file"))

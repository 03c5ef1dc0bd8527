"""What words may follow from numbers."""

from __future__ import annotations

import math

import pandas as pd

from probekit.report import probing, stitching
from probekit.report.verdicts import either, foremost, side

NAN = math.nan


def test_a_side_is_told_where_the_interval_is_clear_and_nowhere_else() -> None:
    assert (side(0.1, 0.3), side(-0.3, -0.1), side(-0.1, 0.3), side(0.0, 0.3)) == (1, -1, 0, 0)
    assert (side(0.6, 0.8, 0.5), side(0.3, 0.4, 0.5), side(0.4, 0.6, 0.5)) == (1, -1, 0)
    assert side(NAN, NAN) == 0


def test_the_foremost_are_all_that_the_first_is_not_clear_of() -> None:
    found = {"a": (0.5, 0.4, 0.6), "b": (0.9, 0.8, 1.0), "c": (0.85, 0.75, 0.95), "d": (0.1, 0.0, 0.45)}
    assert foremost(found) == ["b", "c"]
    assert foremost(found, most=False) == ["d", "a"]
    assert foremost({"a": (1.0, NAN, NAN), "b": (2.0, 1.9, 2.1)}) == ["b", "a"]  # nobody knows how sure a is
    assert foremost({"a": (1.0, NAN, NAN)}) == ["a"]
    assert either(["a"]) == "a" and either(["a", "b", "c"]) == "a, b or c"


def read(accuracies: dict[str, list[float]], reach: float = 1.0) -> pd.DataFrame:
    """Rows of a probing run: the accuracy of every attribute in every space."""
    found = [
        {"source": "", "target": space, "attribute": f"a{i}", "measure": "accuracy", "value": value, "note": ""}
        for space, values in accuracies.items()
        for i, value in enumerate(values)
    ]
    rows = pd.DataFrame(found)
    return rows.assign(low=rows.value - reach, high=rows.value + reach)


def test_the_space_that_labels_are_read_best_from_is_named_where_it_can_be_told() -> None:
    clear = {"x": [90.0, 95, 85, 99], "y": [70.0, 71, 72, 73], "random": [50.0, 50, 50, 50]}
    (said,) = probing.headline(read(clear))
    assert said.startswith("Attributes are read best from x: 92.2 % right on average")
    (said,) = probing.headline(read(clear | {"y": [70.0, 99, 99, 97]}))
    assert said.startswith("Attributes are read best from x or y, which of them cannot be told: from x 92.2 %")
    # one or two labels have their own intervals alone
    (said,) = probing.headline(read({"x": [90.0], "y": [80.0]}))
    assert "best from x:" in said
    (said,) = probing.headline(read({"x": [90.0], "y": [80.0]}, reach=6))
    assert "best from x or y, which" in said


def stitched(kept: dict[str, tuple[float, float]]) -> pd.DataFrame:
    """Rows of a stitching run: into each target from two sources, the LPIPS of the best and how far its interval reaches."""
    rows = []
    for target, (value, reach) in kept.items():
        for source, lpips in {target: 0.1, "a": value, "b": value + 0.3, "random": 0.9}.items():
            told = {"source": source, "target": target, "measure": "LPIPS", "drawn_by": "", "value": lpips}
            rows.append(told | {"low": lpips - reach, "high": lpips + reach})
    return pd.DataFrame(rows)


def test_decoders_that_maps_carry_most_into_are_named_together_where_they_cannot_be_told_apart() -> None:
    said = stitching.headline(stitched({"x": (0.12, 0.01), "y": (0.5, 0.01)}))
    assert said == (
        "A linear map carries most into x, from a: LPIPS 0.120, 0.100 from its own encoder, 0.900 from random; "
        "least into y, from a: LPIPS 0.500, 0.100 from its own encoder, 0.900 from random."
    )
    said = stitching.headline(stitched({"x": (0.3, 0.2), "y": (0.4, 0.2), "z": (0.85, 0.01)}))
    assert "most into x or y, which cannot be told apart; into x, from a" in said and "least into z" in said
    assert "least" not in stitching.headline(stitched({"x": (0.3, 0.2), "y": (0.4, 0.2)}))
    own = stitched({"x": (0.3, 0.01)}).assign(value=lambda rows: rows.value.where(rows.source != "x", 0.88))
    assert stitching.headline(own.assign(low=own.value - 0.01, high=own.value + 0.01)) == (
        "x shows little of a picture, even from its own latents."
    )

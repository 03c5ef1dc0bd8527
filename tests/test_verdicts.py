"""What words may follow from numbers."""

from __future__ import annotations

import math

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

"""What words may follow from numbers: a difference is asserted where its 95% interval is clear, else it cannot be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Bounded = tuple[float, float, float]
"""A value and its interval: (value, low, high); NaN where it has none."""


def side(low: float, high: float, of: float = 0.0) -> int:
    """On which side of a number an interval lies: 1 above, -1 below, 0 where that cannot be told, as without an interval."""
    return 1 if low > of else -1 if high < of else 0


def foremost(found: Mapping[str, Bounded], *, most: bool = True) -> list[str]:
    """The names that may have the largest value (most=False: the least): the first, then all that it is not clear of.

    One is clear of another where their intervals do not overlap, which asks for more than a difference of 5% significance. A
    value without an interval is clear of none.
    """
    sign = 1 if most else -1
    first, *others = sorted(found, key=lambda name: -sign * found[name][0])
    bound = found[first][1 if most else 2]
    return [first, *(name for name in others if side(*found[name][1:], of=bound) != -sign)]


def either(names: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`: which of them cannot be told."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def interval(low: float, high: float, form: str = ".2f") -> str:
    """`0.12 to 0.34`, as it stands in brackets."""
    return f"{low:{form}} to {high:{form}}"

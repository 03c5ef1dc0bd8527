"""One line of a model's measurement."""

from __future__ import annotations

from typing import NamedTuple


class Measured(NamedTuple):
    """What was measured, its value, the bar it should reach if any, and the unit.

    The unit `share` is of [0, 1], shown in percent. The value is NaN where the model cannot do it.
    """

    what: str
    value: float
    bar: float | None = None
    unit: str = "share"

"""Roles, measured: how much of a factor came over with a layer, how sure that is, and which role follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

NO_ROLE = "no role"
EVERYTHING = "everything"


def transfer(to_original: float, to_edit: float, between: float) -> float:
    """d(O, I) / (d(O, I) + d(E, I)): 0 where the injected picture I equals O, 1 where it equals E.

    NaN where O and E are equal (`between`, d(O, E), is 0): nothing could come over. And where I equals both though they are
    not equal, which no metric allows, but matched SIFT points and rounded cosines do: then the descriptor cannot tell.
    """
    both = to_original + to_edit
    return to_original / both if between > 0 and both > 0 else math.nan


def damage(to_original: float, to_edit: float, between: float) -> float:
    """min(d(O, I), d(E, I)) / d(O, E): 0 for a picture that is O or E, 1 and more for one that is neither."""
    return min(to_original, to_edit) / between if between > 0 else math.nan


def interval(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean and 95% bootstrap percentile interval of scores in [0, 1], NaNs left out; (nan, nan, nan) of nothing.

    Fewer than three values give the interval (0, 1).
    """
    from probekit.metrics.distributions import bootstrap

    kept = np.asarray([v for v in values if not math.isnan(v)], dtype=float)
    if len(kept) == 0:
        return math.nan, math.nan, math.nan
    if len(kept) < 3:  # one or two pairs tell nothing of the next
        return float(kept.mean()), 0.0, 1.0
    return bootstrap(kept, seed=seed, resamples=resamples)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a (descriptor, window, layer, factor): transfer and null with their intervals over the pairs, and damage.

    rows: the tidy results of a sweep, with columns descriptor, window, layer, order, factor, pair, donor (`edit` or
    `unrelated`), transfer, damage. Values are averaged over seeds within a pair first, since those are not independent.
    """
    import pandas as pd

    keys = ["descriptor", "window", "order", "layer", "factor"]
    per_pair = rows.groupby([*keys, "pair", "donor"], sort=True, observed=True)[["transfer", "damage"]].mean().reset_index()
    summary = []
    for key, group in per_pair.groupby(keys, sort=True, observed=True):
        by = {donor: group[group.donor == donor] for donor in ("edit", "unrelated")}
        mean, low, high = interval(by["edit"].transfer.tolist())
        null, null_low, null_high = interval(by["unrelated"].transfer.tolist())
        summary.append(
            dict(zip(keys, key, strict=True))
            | {"transfer": mean, "low": low, "high": high, "null": null, "null_low": null_low, "null_high": null_high}
            | {"damage": float(by["edit"].damage.mean()), "pairs": by["edit"].pair.nunique()}
        )
    return pd.DataFrame(summary)


def roles(summary: pd.DataFrame) -> pd.DataFrame:
    """One row a (descriptor, window, layer) with its `role`.

    A layer has a factor's role where the factor's interval lies above the intervals of every other factor and of its own
    null. It carries `everything` where every factor's interval lies above one half and above its null. Otherwise it has
    no role. Layers of which nothing is known (all NaN) are left out.
    """
    import pandas as pd

    found = []
    keys = ["descriptor", "window", "order", "layer"]
    for key, group in summary.groupby(keys, sort=True, observed=True):
        group = group.dropna(subset=["transfer"])
        if group.empty:
            continue
        lead = group.loc[group.transfer.idxmax()]
        others = group[group.factor != lead.factor]
        bar = max([*others.high, lead.null_high if not math.isnan(lead.null_high) else 0.0])
        above_null = (group.low > group.null_high.fillna(0.0)).all()
        role = NO_ROLE
        if len(group) > 1 and lead.low > bar:
            role = str(lead.factor)
        elif len(group) > 1 and above_null and (group.low > 0.5).all():
            role = EVERYTHING
        found.append(dict(zip(keys, key, strict=True)) | {"role": role})
    return pd.DataFrame(found, columns=[*keys, "role"])

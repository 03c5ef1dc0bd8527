"""Ridge probes in closed form: every label read off one set of activations, from one factorization, beside a control task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from jaxtyping import Float, Int64, Shaped

from probekit.hooks.errors import ProbekitError
from probekit.latents.maps import LinearMap
from probekit.latents.probes import LEAST, is_attribute, is_class
from probekit.latents.ridge import RidgeSolver

if TYPE_CHECKING:
    import pandas as pd

IMAGES_OF_A_TYPE = 6
"""The control task has as many types as leave each so many training images on average."""


class RidgeClassifier:
    """Least squares with an L2 penalty on targets of 1 for the class and -1 for the others; the largest prediction is said.

    As scikit-learn's `RidgeClassifierCV`: one target where there are two classes; the penalty is the one of `alphas` whose
    squared error when each row is left out and predicted from the others is the smallest over all targets, in closed form.

    alphas: penalties to choose from, or "auto": `RidgeSolver.grid`, ten that follow from the activations' own scale. midway: of
    two classes, says the one whose mean prediction is nearer, the means being those of the training rows when each is left out;
    without, as in scikit-learn, of a rare class next to nothing would be said.

    Fitted: classes_, in numpy's order; coef_ (targets, d), intercept_ (targets,), alpha_.
    """

    def __init__(self, alphas: Sequence[float] | str = "auto", *, midway: bool = False) -> None:
        self.alphas, self.midway = alphas, midway

    def fit(self, x: Float[np.ndarray, "n d"] | RidgeSolver, labels: Shaped[np.ndarray, " n"]) -> Self:
        """x: activations, or a solver made from them, which further labels may share.

        Raises ValueError for activations that are not finite or all the same, and for fewer than two classes.
        """
        self.classes_ = np.unique(labels)
        if len(self.classes_) < 2:
            raise ValueError(f"labels: {len(self.classes_)} class, two are needed")
        right = np.asarray(labels)[:, None] == (self.classes_ if len(self.classes_) > 2 else self.classes_[1:])
        solver, targets = x if isinstance(x, RidgeSolver) else RidgeSolver(x), np.where(right, 1.0, -1.0)
        fitted = LinearMap(alpha=self.alphas).fit(solver, targets)  # type: ignore[arg-type]
        self.coef_, self.intercept_, self.alpha_ = fitted.coef_, fitted.intercept_, fitted.alpha_
        if self.midway and len(self.classes_) == 2:
            said, first = solver.left_out(targets, self.alpha_)[:, 0], right[:, 0]
            self.intercept_ = self.intercept_ - (said[first].mean() + said[~first].mean()) / 2
        return self

    def decide(self, x: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m targets"]:
        """The predictions of the targets."""
        return x @ self.coef_.T + self.intercept_

    def predict(self, x: Float[np.ndarray, "m d"]) -> Shaped[np.ndarray, " m"]:
        """The class of each row."""
        decided = self.decide(x)
        return self.classes_[decided.argmax(1) if decided.shape[1] > 1 else (decided[:, 0] > 0).astype(int)]


@dataclass(frozen=True, eq=False)
class Task:
    """A label as a probe reads it, and its control task.

    name: the label. known: which rows have it. values: of those rows, the class as text or the number. control: of those rows,
    what the control task has in place of them. number: whether it is one; else it is a class.
    """

    name: str
    known: Shaped[np.ndarray, " n"]
    values: Shaped[np.ndarray, " k"]
    control: Shaped[np.ndarray, " k"]
    number: bool


@dataclass(frozen=True)
class Read:
    """How well a label is read off held-out activations.

    value: balanced accuracy in [0, 1] of a class, R² (at most 1) of a number. low, high: its 95% bootstrap interval over the
    held-out images. chance: what answers that do not depend on the image score, one over the number of classes, 0 of a number.
    control: the value of the same probe on the control task; selectivity: value - control. alpha: the chosen penalty, NaN where
    the activations are all the same. train, test: images.
    """

    value: float
    low: float
    high: float
    chance: float
    control: float
    selectivity: float
    alpha: float
    train: int
    test: int


def tasks(labels: pd.DataFrame, train: int, seed: int = 0) -> tuple[list[Task], dict[str, str]]:
    """Every label as a task, whose first `train` rows are fitted on; and the labels that cannot be probed, with the reason.

    The control task (Hewitt and Liang 2019, section 2) has a random answer for every *type* of input, which a probe can only
    learn by heart: with them a type is a word, here it is what an image shows in some of its other labels, those with the most
    values first, as long as `IMAGES_OF_A_TYPE` training images are left for each. Where an image has no other label every image
    is a type of its own, and nothing can be learned. Random answers are drawn from the label's own.
    """
    found: list[Task] = []
    skipped: dict[str, str] = {}
    for name in map(str, labels):
        column, number = labels[name], not (is_attribute(labels[name]) or is_class(labels[name]))
        known = column.notna().to_numpy()
        values = column.to_numpy(dtype=np.float64) if number else column.astype(object).map(str).to_numpy(dtype=str)
        fitted, held = values[:train][known[:train]], values[train:][known[train:]]
        if min(len(fitted), len(held)) < LEAST:
            skipped[name] = f"{len(fitted)} labels to fit and {len(held)} to test are known, {LEAST} of each are needed"
        elif len(np.unique(fitted)) < 2 or len(np.unique(held)) < 2:
            skipped[name] = "the images to fit or to test all have the same"
        elif not number and 2 * len(np.unique(fitted)) > len(fitted):
            skipped[name] = f"{len(np.unique(fitted))} classes among {len(fitted)} images, of which 2 a class are needed"
        else:
            types = _types(labels.drop(columns=name), train)
            drawn = np.random.default_rng([seed, len(found)])
            answers = drawn.choice(fitted if number else np.unique(fitted), int(types.max()) + 1)
            found.append(Task(name, known, values[known], answers[types][known], number))
    return found, skipped


def _types(others: pd.DataFrame, train: int) -> Int64[np.ndarray, " n"]:
    """The type of each row, a number, by as many of the columns that are no numbers as `tasks` says."""
    import pandas as pd

    columns = [others[name].astype(object).map(str) for name in others if is_attribute(others[name]) or is_class(others[name])]
    types = np.zeros(len(others), dtype=np.int64)
    for column in sorted(columns, key=lambda c: -c.nunique()):
        finer = pd.factorize(pd.Series(types).astype(str) + "\0" + column.reset_index(drop=True))[0].astype(np.int64)
        if (finer.max() + 1) * IMAGES_OF_A_TYPE <= train:
            types = finer
    return types if types.max() > 0 else np.arange(len(others), dtype=np.int64)


class Reader:
    """Reads the same tasks off any activations of the same images.

    train: how many of the rows are fitted on; the rest is held out. The bootstrap draws the same images for every probe, so
    that two intervals differ by what was read alone.
    """

    def __init__(self, asked: Sequence[Task], train: int, seed: int = 0, resamples: int = 1000) -> None:
        self.tasks, self.train = list(asked), train
        self._drawn: dict[int, Int64[np.ndarray, "b m"]] = {}
        self._seed, self._resamples = seed, resamples

    def read(self, x: Float[np.ndarray, "n d"]) -> dict[str, Read]:
        """How well each task is read off the rows. Raises ProbekitError where some are not finite."""
        if not np.isfinite(x).all():
            raise ProbekitError("activations: some are not finite; use --dtype float32")
        solvers: dict[bytes, RidgeSolver | None] = {}  # labels that the same rows have share one
        found = {}
        for task in self.tasks:
            rows = np.flatnonzero(task.known)
            cut = int((rows < self.train).sum())
            key = task.known.tobytes()
            if key not in solvers:
                solvers[key] = _solver(x[rows[:cut]])
            solver, held = solvers[key], x[rows[cut:]]
            said, alpha = _answers(solver, held, task.values[:cut], task.number)
            controlled, _ = _answers(solver, held, task.control[:cut], task.number)
            score = _r2 if task.number else _balanced
            weights = self._weights(len(held))
            value, low, high = score(said, task.values[cut:], weights)
            control, *_ = score(controlled, task.control[cut:], weights[:0])
            chance = 0.0 if task.number else 1 / len(np.unique(task.values[cut:]))
            found[task.name] = Read(value, low, high, chance, control, value - control, alpha, cut, len(held))
        return found

    def _weights(self, n: int) -> Int64[np.ndarray, "b m"]:
        """How often each of n rows is drawn, in every resample."""
        if n not in self._drawn:
            draw = np.random.default_rng(self._seed)
            self._drawn[n] = draw.multinomial(n, np.full(n, 1 / n), self._resamples)
        return self._drawn[n]


def _solver(x: Float[np.ndarray, "n d"]) -> RidgeSolver | None:
    """The factorization of the training rows; None where they are all the same, and tell nothing."""
    try:
        return RidgeSolver(x)
    except ValueError:
        return None


def _answers(
    solver: RidgeSolver | None, held: Float[np.ndarray, "m d"], values: Shaped[np.ndarray, " n"], number: bool
) -> tuple[Any, float]:
    """What the probe says of the held-out rows, and its penalty; without activations always the mean, or the commonest."""
    names, counts = np.unique(values, return_counts=True)
    if solver is None or len(names) < 2:
        return np.full(len(held), values.mean() if number else names[counts.argmax()]), float("nan")
    if number:
        fitted = LinearMap(alpha="auto").fit(solver, values[:, None])
        return (held @ fitted.coef_.T + fitted.intercept_)[:, 0], fitted.alpha_
    probe = RidgeClassifier(midway=True).fit(solver, values)
    return probe.predict(held), probe.alpha_


def _balanced(said: Any, real: Any, weights: Int64[np.ndarray, "b m"]) -> tuple[float, float, float]:
    """The mean over the classes of the share of their rows that is read right, with its interval over the weights."""
    of_class = (real[:, None] == np.unique(real)).astype(np.float64)
    right = of_class * (said == real)[:, None]
    value = float((right.sum(0) / of_class.sum(0)).mean())
    if len(weights) == 0:
        return value, float("nan"), float("nan")
    drawn = weights @ of_class
    with np.errstate(invalid="ignore"):
        resampled = np.nanmean(np.where(drawn > 0, (weights @ right) / drawn, np.nan), axis=1)
    return value, *_interval(resampled)


def _r2(said: Any, real: Any, weights: Int64[np.ndarray, "b m"]) -> tuple[float, float, float]:
    """R², 1 - the squared error over that of always saying the mean, with its interval over the weights."""
    every = np.concatenate([np.ones((1, len(real)), dtype=np.int64), weights])
    error = every @ (said - real) ** 2
    about = every @ real**2 - (every @ real) ** 2 / every.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        value, *resampled = 1 - error / about
    return (float(value), *_interval(np.array(resampled))) if resampled else (float(value), float("nan"), float("nan"))


def _interval(resampled: Float[np.ndarray, " b"]) -> tuple[float, float]:
    low, high = np.nanpercentile(resampled, (2.5, 97.5))
    return float(low), float(high)

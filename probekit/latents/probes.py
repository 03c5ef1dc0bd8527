"""Linear probes: what can be read off the latents of a space by hyperplanes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped

from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    import pandas as pd

LASSO_ALPHA = {"vae": 0.005, "vqvae": 0.005, "ddpm": 0.02, "glow": 0.1}
"""Lasso's alpha for each family, of All Roads (appendix A.5), which leaves latents at their scale, as probekit does."""

DEFAULT_LASSO_ALPHA = 0.005
"""For the families that the paper does not probe, stylegan2 among them: its least."""

C_OF_CLASSES = 0.1
"""1 over the weight of the L2 penalty of probes of classes, of latents whose values have unit variance."""

LEAST = 10
"""An attribute with fewer examples of either kind is not probed: of these, 8 would train and 2 test."""

HELD_OUT = 100
"""Test examples with and without an attribute, where there are as many."""

Kind = Literal["lasso", "logistic", "ridge"]
KINDS: tuple[Kind, ...] = ("lasso", "logistic", "ridge")


@dataclass(frozen=True, eq=False)
class Probes:
    """One probe for each label of one space that has examples enough: of attributes, which are there or not, and of classes.

    kind, alpha: of the attributes' probes, as fitted. attributes: the a labels, in order. classes: of those that are classes,
    the names that a probe may say, in the order of its numbers.
    scores: one row a label: `attribute`, `accuracy` in [0, 1] on `test` held-out latents, `baseline` (what always the same
    answer scores there: 0.5 for attributes, half of whose test latents have it), `train` latents, how many coefficients are
    not 0 (`nonzero`; a Lasso of too large an alpha has none and stays at chance), and whether the solver `converged`.
    coefficients, intercepts: one row an attribute, of the regression on labels 0 and 1 or of the logit; a row a class, of the
    logit, for classes.
    held_out: for each label the rows that were its test latents.
    skipped: the labels without a probe, and why.
    """

    kind: Kind
    alpha: float
    attributes: list[str]
    classes: dict[str, list[str]]
    scores: pd.DataFrame
    coefficients: Float[np.ndarray, "rows d"]
    intercepts: Float[np.ndarray, " rows"]
    held_out: list[np.ndarray]
    skipped: dict[str, str]

    def predict(self, latents: Float[np.ndarray, "n d"]) -> Int64[np.ndarray, "n a"]:
        """What the probes say: 1 or 0 of an attribute, the number in `classes` of a class. Raises ProbekitError for another d.

        The regressions say yes above one half: the paper rounds, by which a prediction above 1.5 would be neither.
        """
        latents = _checked(latents, len(latents))
        if latents.shape[1] != self.coefficients.shape[1]:
            raise ProbekitError(f"latents of {latents.shape[1]} values: the probes read {self.coefficients.shape[1]}")
        values = latents @ self.coefficients.T + self.intercepts
        said, first = np.empty((len(latents), len(self.attributes)), dtype=np.int64), 0
        for column, name in enumerate(self.attributes):
            if name in self.classes:
                last = first + len(self.classes[name])
                said[:, column] = values[:, first:last].argmax(1)
            else:
                last = first + 1
                said[:, column] = values[:, first] > (0 if self.kind == "logistic" else 0.5)
            first = last
        return said

    def truth(self, labels: pd.DataFrame) -> Int64[np.ndarray, "n a"]:
        """What `predict` should say of images with these labels; -1 where it is not known, or a class not trained on."""
        real = np.empty((len(labels), len(self.attributes)), dtype=np.int64)
        for column, name in enumerate(self.attributes):
            if name in self.classes:
                number = {known: i for i, known in enumerate(self.classes[name])}
                real[:, column] = [number.get(str(value), -1) for value in labels[name]]
            else:
                real[:, column] = labels[name]
        return real

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All of it as arrays by name, as a run's folder keeps them."""
        told = {
            "kind": self.kind,
            "alpha": self.alpha,
            "attributes": self.attributes,
            "classes": self.classes,
            "skipped": self.skipped,
            "scores": self.scores.to_dict("list"),
            "held_out": [len(rows) for rows in self.held_out],
        }
        return {
            "coefficients": self.coefficients,
            "intercepts": self.intercepts,
            "held_out": np.concatenate([np.empty(0, dtype=np.int64), *self.held_out]),
            "told": np.frombuffer(json.dumps(told).encode(), dtype=np.uint8),
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Probes:
        """The probes that `to_arrays` gave. Raises ProbekitError for arrays of something else."""
        import pandas as pd

        try:
            told = json.loads(np.asarray(arrays["told"]).tobytes())
            held_out = np.split(np.asarray(arrays["held_out"]), np.cumsum(told.pop("held_out"))[:-1].astype(int))
            return cls(
                **told | {"scores": pd.DataFrame(told["scores"])},
                coefficients=np.asarray(arrays["coefficients"]),
                intercepts=np.asarray(arrays["intercepts"]),
                held_out=held_out[: len(told["attributes"])],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ProbekitError(f"probes: the arrays {', '.join(sorted(arrays))} are of something else, or damaged") from error

    @property
    def directions(self) -> Float[np.ndarray, "rows d"]:
        """Unit vectors along which each attribute, or class, grows; zeros for a probe without coefficients."""
        length = np.linalg.norm(self.coefficients, axis=1, keepdims=True)
        return self.coefficients / np.where(length > 0, length, 1)


def fit_probes(
    latents: Float[np.ndarray, "n d"],
    labels: pd.DataFrame,
    kind: Kind = "lasso",
    alpha: float | None = None,
    seed: int = 0,
    jobs: int | None = None,
    on_probe: Callable[[str], None] = lambda label: None,
) -> Probes:
    """Fit and test a linear probe for every label that is an attribute (bool) or a class (category, object or str).

    Attributes as All Roads does (section 3.2, appendix A.5): trained on as many latents with as without the attribute, 80 % of
    the smaller class each, and tested on 100 of either class that are left, or on as many as are left of the smaller. Classes
    by multinomial logistic regression (scikit-learn's, C = `C_OF_CLASSES`, each value less its mean and over its standard
    deviation), trained on four fifths of the latents whose class is known and tested on the last fifth, as they come. Which,
    the seed draws for each label by itself, from the labels alone: two spaces are probed on the same images, whatever else is
    probed (the paper takes the first and the last).

    labels: n rows. kind: of the attributes' probes: scikit-learn's Lasso or Ridge on labels 0 and 1, or LogisticRegression with
    an L2 penalty. alpha: its penalty's weight: Lasso's (`LASSO_ALPHA` has the paper's), Ridge's, or 1 / C;
    `DEFAULT_LASSO_ALPHA`, 1, 1.
    jobs: labels at a time, each on one thread and on two copies of its training latents; as many as cores if None.
    on_probe: called with each label's name when its probe is done.

    Raises ProbekitError for latents that are not finite (n, d), labels of another length or of numbers, and an unknown kind or
    negative alpha.
    """
    import pandas as pd
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    latents, labels = _checked(latents, len(labels)), labels.rename(columns=str)
    for name in labels:
        if not is_attribute(labels[name]) and not is_class(labels[name]):
            raise ProbekitError(
                f"label {name!r}: of {labels[name].dtype}; a probe takes bool or classes, probe_numbers the rest"
            )
    if alpha is None:
        alpha = DEFAULT_LASSO_ALPHA if kind == "lasso" else 1.0
    make = _maker(kind, alpha)
    splits: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    skipped: dict[str, str] = {}
    for name in labels:
        reason = _too_rare(labels[name].to_numpy()) if is_attribute(labels[name]) else _too_many(labels[name], seed)
        if reason:
            skipped[name] = reason
        else:
            splits[name] = (
                _balanced(labels[name].to_numpy(), seed) if is_attribute(labels[name]) else _fifth(labels[name], seed)
            )

    def fit(name: str) -> tuple[dict[str, Any], np.ndarray, np.ndarray, list[str]]:
        train, test = splits[name]
        row: dict[str, Any] = {"attribute": name}
        if is_attribute(labels[name]):
            has, known = labels[name].to_numpy(), []
            model = make().fit(latents[train], has[train].astype(np.float32))
            coefficients, intercepts = np.reshape(model.coef_, (1, -1)), np.ravel(model.intercept_)
            row |= {"accuracy": float(np.mean((model.predict(latents[test]) > 0.5) == has[test])), "baseline": 0.5}
            converged = kind == "ridge" or bool(np.max(model.n_iter_) < model.max_iter)
        else:
            said = labels[name].astype(object).to_numpy()
            trained, tested = ([str(value) for value in said[rows]] for rows in (train, test))
            # latents as they are would take some spaces beyond a thousand iterations, and penalise each space differently
            scaler = StandardScaler().fit(latents[train])
            model = LogisticRegression(C=C_OF_CLASSES, max_iter=1000).fit(scaler.transform(latents[train]), trained)
            coefficients, known = model.coef_ / scaler.scale_, model.classes_.tolist()
            intercepts = model.intercept_ - coefficients @ scaler.mean_
            if len(known) == 2:  # scikit-learn's is then the second's logit alone
                coefficients, intercepts = (np.concatenate([np.zeros_like(v), v]) for v in (coefficients, intercepts))
            commonest = max(known, key=trained.count)
            row |= {
                "accuracy": float(model.score(scaler.transform(latents[test]), tested)),
                "baseline": tested.count(commonest) / len(tested),
            }
            converged = bool(np.max(model.n_iter_) < model.max_iter)
        row |= {"train": len(train), "test": len(test), "nonzero": np.count_nonzero(coefficients), "converged": converged}
        return row, coefficients, intercepts, known

    done = dict(_each(fit, list(splits), jobs, on_probe))
    fitted = [done[name] for name in splits]
    columns = ["attribute", "accuracy", "baseline", "train", "test", "nonzero", "converged"]
    return Probes(
        kind=kind,
        alpha=alpha,
        attributes=list(splits),
        classes={name: done[name][3] for name in splits if is_class(labels[name])},
        scores=pd.DataFrame([row for row, *_ in fitted], columns=columns),
        coefficients=np.concatenate([np.empty((0, latents.shape[1])), *(c for _, c, _, _ in fitted)]).astype(np.float32),
        intercepts=np.concatenate([np.empty(0), *(i for _, _, i, _ in fitted)]).astype(np.float32),
        held_out=[test for _, test in splits.values()],
        skipped=skipped,
    )


def is_attribute(values: pd.Series) -> bool:
    """Whether a label is there or not."""
    return bool(values.dtype == bool)


def is_class(values: pd.Series) -> bool:
    """Whether a label is one of several names; what is neither this nor an attribute is a number."""
    import pandas as pd

    return not pd.api.types.is_numeric_dtype(values)


def probe_numbers(
    latents: Float[np.ndarray, "n d"],
    labels: pd.DataFrame,
    alpha: float = 100.0,
    seed: int = 0,
    jobs: int | None = None,
    on_probe: Callable[[str], None] = lambda label: None,
) -> pd.DataFrame:
    """How well labels that are numbers can be read off linearly, by Ridge with that alpha, on a random fifth that is held out.

    labels: n rows, columns of numbers; missing ones are left out.

    Returns one row a label: `label`, `score`, R² (at most 1, 0 for its mean, less for worse), `baseline` (what always answering
    the training latents' mean scores), `train`, `test`, and why it was `skipped`, "" where it was not.
    Raises ProbekitError as fit_probes does, and for a column of bool or classes.
    """
    import pandas as pd
    from sklearn.dummy import DummyRegressor
    from sklearn.linear_model import Ridge

    latents, labels = _checked(latents, len(labels)), labels.rename(columns=str)
    for name in labels:
        if is_attribute(labels[name]) or is_class(labels[name]):
            raise ProbekitError(f"label {name!r}: of {labels[name].dtype}, which fit_probes takes")

    def fit(name: str) -> dict[str, Any]:
        train, test = _fifth(labels[name], seed)
        values = labels[name].to_numpy(dtype=np.float32)
        row = {"label": name, "score": np.nan, "baseline": np.nan, "train": len(train), "test": len(test), "skipped": ""}
        if reason := _too_few(labels[name], seed):
            return row | {"skipped": reason}
        models = (Ridge(alpha=alpha), DummyRegressor())
        scores = [m.fit(latents[train], values[train]).score(latents[test], values[test]) for m in models]
        return row | dict(zip(("score", "baseline"), map(float, scores), strict=True))

    done = dict(_each(fit, list(labels), jobs, on_probe))
    columns = ["label", "score", "baseline", "train", "test", "skipped"]
    return pd.DataFrame([done[name] for name in labels], columns=columns)


def percent_match(own: Shaped[np.ndarray, "n *a"], mapped: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, " *a"] | float:
    """How many of 100 predictions are the same, for each label: those of a space's probe on its own latents and on latents
    of the same images mapped into it from another space (All Roads, section 3.2; higher is better).

    Raises ProbekitError for predictions of different shapes, or of none.
    """
    if np.shape(own) != np.shape(mapped) or len(own) == 0:
        raise ProbekitError(f"predictions of shapes {np.shape(own)} and {np.shape(mapped)}: the same images both, at least one")
    return 100 * np.mean(np.equal(own, mapped), axis=0)


def percent_change(
    own: Float[np.ndarray, " *a"] | float, mapped: Float[np.ndarray, " *a"] | float
) -> Float[np.ndarray, " *a"] | float:
    """100 (mapped - own) / own for a probe's accuracies on its own latents and on mapped ones; near 0 is better.

    Relative, as the paper's code has it (section 3.2 does not say): 80 % that become 60 % are a change of -25. NaN of 0.
    """
    before, after = np.asarray(own, dtype=np.float64), np.asarray(mapped, dtype=np.float64)
    return 100 * (after - before) / np.where(before == 0, np.nan, before)


def balanced_accuracy(said: Int64[np.ndarray, "n a"], real: Int64[np.ndarray, "n a"]) -> Float[np.ndarray, " a"]:
    """For each label the mean, over the answers that are right of some image, of the share of these that is read right.

    said, real: as `Probes.predict` and `Probes.truth` give them. Images need not be balanced then. NaN where not at least two
    answers are right of some.
    """
    found = np.full(real.shape[1], np.nan)
    for column in range(real.shape[1]):
        there = np.unique(real[real[:, column] >= 0, column])
        if len(there) > 1:
            right = said[:, column] == real[:, column]
            found[column] = np.mean([right[real[:, column] == answer].mean() for answer in there])
    return found


def _maker(kind: str, alpha: float) -> Callable[[], Any]:
    from sklearn.linear_model import Lasso, LogisticRegression, Ridge

    if not 0 <= alpha < float("inf") or (alpha == 0 and kind != "ridge"):
        raise ProbekitError(f"alpha {alpha}: a penalty's weight is above 0")
    makers: dict[str, Callable[[], Any]] = {
        # No precomputed Gram matrix: 4,000 isotropic latents of 3,072 values take 0.6 s with it, 0.2 s without. As many
        # images as pixels take 0.8 s and 2.2 s, but at Glow's 12,288 it is 600 MB a job.
        "lasso": lambda: Lasso(alpha=alpha),
        "ridge": lambda: Ridge(alpha=alpha),
        "logistic": lambda: LogisticRegression(C=1 / alpha, max_iter=1000),
    }
    if kind not in makers:
        raise ProbekitError(f"probe kind {kind!r}: choose {', '.join(makers)}")
    return makers[kind]


def _too_rare(has: Bool[np.ndarray, " n"]) -> str:
    """Why an attribute cannot be probed, "" where it can."""
    rarer = min(has.sum(), (~has).sum())
    word = "with" if has.sum() == rarer else "without"
    return f"{rarer} of {len(has)} images are {word} it, {LEAST} are needed" if rarer < LEAST else ""


def _too_few(values: pd.Series, seed: int) -> str:
    """Why a class or a number cannot be probed, "" where it can."""
    if (known := int(values.notna().sum())) < LEAST:
        return f"{known} labels are known, {LEAST} are needed"
    return "the training latents all have the same" if values.iloc[_fifth(values, seed)[0]].nunique() < 2 else ""


def _too_many(values: pd.Series, seed: int) -> str:
    """The same of a class, which may also be a name of nearly every image's own."""
    classes, known = values.nunique(), int(values.notna().sum())
    reason = _too_few(values, seed)
    return reason or (f"{classes} classes among {known} images, of which 2 a class are needed" if 2 * classes > known else "")


def _fifth(values: pd.Series, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to test on, a fifth, of those whose label is known."""
    known = np.random.default_rng(seed).permutation(np.flatnonzero(values.notna()))
    test, train = np.split(known, [len(known) // 5])
    return train, test


def _balanced(has: Bool[np.ndarray, " n"], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to test on, disjoint, each half with and half without."""
    draw = np.random.default_rng(seed)
    classes = [draw.permutation(np.flatnonzero(has == value)) for value in (True, False)]
    rarer = min(map(len, classes))
    train = rarer * 8 // 10
    test = min(HELD_OUT, rarer - train)
    rows = (np.concatenate([c[part] for c in classes]) for part in (slice(train), slice(train, train + test)))
    return next(rows), next(rows)


def _checked(latents: Any, n: int) -> Float[np.ndarray, "n d"]:
    latents = np.asarray(latents, dtype=np.float32)
    if latents.ndim != 2 or len(latents) != n:
        raise ProbekitError(f"latents of shape {latents.shape}: (n, d), with a row for each of {n} labels")
    if not np.isfinite(latents).all():
        raise ProbekitError("latents: some are not finite")
    return latents


def _each(
    fit: Callable[[str], Any], names: Sequence[str], jobs: int | None, on_done: Callable[[str], None]
) -> Iterator[tuple[str, Any]]:
    """(name, fit(name)) as they finish, in threads, which share the latents; the solvers let others run.

    BLAS keeps to one thread in each: jobs and threads would multiply otherwise, and results would depend on their number.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils.parallel import Parallel, delayed
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    def named(name: str) -> tuple[str, Any]:
        return name, fit(name)

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the scores say so
        parallel = Parallel(n_jobs=jobs or -1, prefer="threads", return_as="generator_unordered")
        for name, found in parallel(delayed(named)(name) for name in names):
            on_done(name)
            yield name, found

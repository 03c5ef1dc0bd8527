"""Linear probes: what can be read off the latents of a space by a hyperplane."""

from __future__ import annotations

import io
import json
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Bool, Float

from probekit.errors import ProbekitError
from probekit.runs import write_whole

if TYPE_CHECKING:
    import pandas as pd

LASSO_ALPHA = {"vae": 0.005, "vqvae": 0.005, "ddpm": 0.02, "glow": 0.1}
"""Lasso's alpha for each family, of All Roads (appendix A.5), which leaves latents at their scale, as probekit does."""

DEFAULT_LASSO_ALPHA = 0.005
"""For the families that the paper does not probe, stylegan2 among them: its least."""

LEAST = 10
"""A class of fewer examples is not probed: of these, 8 would train and 2 test."""

HELD_OUT = 100
"""Test examples of each class, where there are as many."""

Kind = Literal["lasso", "logistic", "ridge"]
KINDS: tuple[Kind, ...] = ("lasso", "logistic", "ridge")


@dataclass(frozen=True, eq=False)
class Probes:
    """One probe for each binary attribute that has examples enough, all of one space.

    kind, alpha: as fitted. attributes: the a names, which are the columns and rows of all else.
    scores: one row an attribute: `attribute`, `accuracy` in [0, 1] on `test` latents, half of which have the attribute, `train`
    latents, how many coefficients are not 0 (`nonzero`; a Lasso of too large an alpha has none and stays at chance), and
    whether the solver `converged`.
    coefficients, intercepts: of the regression on labels 0 and 1, or of the logit.
    held_out: for each attribute the rows that were its test latents.
    skipped: the attributes without a probe, and why.
    """

    kind: Kind
    alpha: float
    attributes: list[str]
    scores: pd.DataFrame
    coefficients: Float[np.ndarray, "a d"]
    intercepts: Float[np.ndarray, " a"]
    held_out: list[np.ndarray]
    skipped: dict[str, str]

    def predict(self, latents: Float[np.ndarray, "n d"]) -> Bool[np.ndarray, "n a"]:
        """Which latents have which attribute, as the probes see it. Raises ProbekitError for another d.

        The regressions say yes above one half: the paper rounds, by which a prediction above 1.5 would be neither.
        """
        latents = _checked(latents, len(latents))
        if latents.shape[1] != self.coefficients.shape[1]:
            raise ProbekitError(f"latents of {latents.shape[1]} values: the probes read {self.coefficients.shape[1]}")
        return latents @ self.coefficients.T + self.intercepts > (0 if self.kind == "logistic" else 0.5)

    def save(self, file: Path) -> None:
        """Write to a .npz file, whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        told = {"kind": self.kind, "alpha": self.alpha, "attributes": self.attributes, "skipped": self.skipped,
                "scores": self.scores.to_dict("list")}  # fmt: skip
        arrays: dict[str, Any] = {f"held_out_{i}": rows for i, rows in enumerate(self.held_out)}
        arrays |= {"told": np.array(json.dumps(told)), "coefficients": self.coefficients, "intercepts": self.intercepts}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_whole(file, buffer.getvalue())

    @classmethod
    def load(cls, file: Path) -> Probes:
        """Read what `save` wrote. Raises ProbekitError for a file that is damaged."""
        import pandas as pd

        try:
            with np.load(file) as kept:
                told = json.loads(str(kept["told"]))
                held_out = [kept[f"held_out_{i}"] for i in range(len(told["attributes"]))]
                scores = pd.DataFrame(told.pop("scores"))
                return cls(
                    **told, scores=scores, coefficients=kept["coefficients"], intercepts=kept["intercepts"], held_out=held_out
                )
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error) as error:
            raise ProbekitError(f"probes {str(file)!r}: damaged; delete the file and its run") from error

    @property
    def directions(self) -> Float[np.ndarray, "a d"]:
        """Unit vectors along which each attribute grows; zeros for a probe without coefficients."""
        length = np.linalg.norm(self.coefficients, axis=1, keepdims=True)
        return self.coefficients / np.where(length > 0, length, 1)


def fit_probes(
    latents: Float[np.ndarray, "n d"],
    labels: pd.DataFrame,
    kind: Kind = "lasso",
    alpha: float | None = None,
    seed: int = 0,
    jobs: int | None = None,
    on_probe: Callable[[str], None] = lambda attribute: None,
) -> Probes:
    """Fit and test a linear probe for every attribute, as All Roads does (section 3.2, appendix A.5).

    Trained on as many latents with as without the attribute, 80 % of the smaller class each, and tested on 100 of either class
    that are left, or on as many as are left of the smaller. Which, the seed draws for each attribute by itself, from the labels
    alone: two spaces are probed on the same images, whatever else is probed (the paper takes the first and the last).

    labels: n rows, a column of bool an attribute.
    kind: scikit-learn's Lasso or Ridge on labels 0 and 1, or LogisticRegression with an L2 penalty.
    alpha: the penalty's weight: Lasso's (`LASSO_ALPHA` has the paper's), Ridge's, or 1 / C; `DEFAULT_LASSO_ALPHA`, 1, 1.
    jobs: attributes at a time, each on one thread and on two copies of its training latents; as many as cores if None.
    on_probe: called with each attribute's name when its probe is done.

    Raises ProbekitError for latents that are not finite (n, d), labels of another length or not of bool, and an
    unknown kind or negative alpha.
    """
    import pandas as pd

    latents, labels = _checked(latents, len(labels)), labels.rename(columns=str)
    for name in labels:
        if labels[name].dtype != bool:
            raise ProbekitError(f"label {name!r}: of {labels[name].dtype}; a probe takes bool, probe_values the rest")
    if alpha is None:
        alpha = DEFAULT_LASSO_ALPHA if kind == "lasso" else 1.0
    make = _maker(kind, alpha)
    splits, skipped = {}, {}
    for name in labels:
        has = labels[name].to_numpy()
        if (rarer := min(has.sum(), (~has).sum())) < LEAST:
            word = "with" if has.sum() == rarer else "without"
            skipped[name] = f"{rarer} of {len(has)} images are {word} it, {LEAST} are needed"
        else:
            splits[name] = _balanced(has, seed)

    def fit(name: str) -> tuple[dict[str, Any], np.ndarray, float]:
        (train, test), has = splits[name], labels[name].to_numpy()
        model = make().fit(latents[train], has[train].astype(np.float32))
        coefficients, intercept = np.ravel(model.coef_), float(np.ravel(model.intercept_)[0])
        score = float(np.mean((model.predict(latents[test]) > 0.5) == has[test]))
        converged = kind == "ridge" or bool(np.max(model.n_iter_) < model.max_iter)
        row = {"attribute": name, "accuracy": score, "train": len(train), "test": len(test)}
        return row | {"nonzero": np.count_nonzero(coefficients), "converged": converged}, coefficients, intercept

    done = dict(_each(fit, list(splits), jobs, on_probe))
    fitted = [done[name] for name in splits]
    columns = ["attribute", "accuracy", "train", "test", "nonzero", "converged"]
    return Probes(
        kind=kind,
        alpha=alpha,
        attributes=list(splits),
        scores=pd.DataFrame([row for row, _, _ in fitted], columns=columns),
        coefficients=np.array([c for _, c, _ in fitted], dtype=np.float32).reshape(-1, latents.shape[1]),
        intercepts=np.array([i for _, _, i in fitted], dtype=np.float32),
        held_out=[test for _, test in splits.values()],
        skipped=skipped,
    )


def probe_values(
    latents: Float[np.ndarray, "n d"],
    labels: pd.DataFrame,
    alpha: float = 100.0,
    seed: int = 0,
    jobs: int | None = None,
    on_probe: Callable[[str], None] = lambda label: None,
) -> pd.DataFrame:
    """How well labels that are not binary can be read off linearly, on a random fifth of the latents that is held out.

    labels: n rows; a column of numbers is read by Ridge with that alpha and scored by R² (at most 1, 0 for its mean, less for
    worse), a column of category, object or str by LogisticRegression and scored by accuracy. Missing labels are left out.

    Returns one row a label: `label`, `measure` (`r2` or `accuracy`), `score`, `baseline` (what always answering the
    training latents' mean or commonest class scores), `train`, `test`, and why it was `skipped`, "" where it was not.
    Raises ProbekitError as fit_probes does, and for a column of bool.
    """
    import pandas as pd
    from sklearn.dummy import DummyClassifier, DummyRegressor
    from sklearn.linear_model import LogisticRegression, Ridge

    latents, labels = _checked(latents, len(labels)), labels.rename(columns=str)
    for name in labels:
        if labels[name].dtype == bool:
            raise ProbekitError(f"label {name!r}: of bool, which fit_probes takes")

    def fit(name: str) -> dict[str, Any]:
        number = pd.api.types.is_numeric_dtype(labels[name])
        known = np.random.default_rng(seed).permutation(np.flatnonzero(labels[name].notna()))
        test, train = np.split(known, [len(known) // 5])
        values = labels[name].to_numpy(dtype=np.float32) if number else labels[name].astype(object).to_numpy()
        row = {"label": name, "measure": "r2" if number else "accuracy", "score": np.nan, "baseline": np.nan}
        row |= {"train": len(train), "test": len(test), "skipped": ""}
        if len(known) < LEAST:
            return row | {"skipped": f"{len(known)} labels are known, {LEAST} are needed"}
        if len(set(values[train])) < 2:
            return row | {"skipped": "the training latents all have the same"}
        model, dull = (
            (Ridge(alpha=alpha), DummyRegressor()) if number else (LogisticRegression(max_iter=1000), DummyClassifier())
        )
        scores = [m.fit(latents[train], values[train]).score(latents[test], values[test]) for m in (model, dull)]
        return row | dict(zip(("score", "baseline"), map(float, scores), strict=True))

    done = dict(_each(fit, list(labels), jobs, on_probe))
    return pd.DataFrame([done[name] for name in labels])


def percent_match(own: Bool[np.ndarray, "n *a"], mapped: Bool[np.ndarray, "..."]) -> Float[np.ndarray, " *a"] | Any:
    """How many of 100 predictions are the same, for each attribute: those of a space's probe on its own latents and on latents
    of the same images mapped into it from another space (All Roads, section 3.2; higher is better).

    Raises ProbekitError for predictions of different shapes, or of none.
    """
    if np.shape(own) != np.shape(mapped) or len(own) == 0:
        raise ProbekitError(f"predictions of shapes {np.shape(own)} and {np.shape(mapped)}: the same images both, at least one")
    return 100 * np.mean(np.equal(own, mapped), axis=0)


def percent_change(
    own: Float[np.ndarray, " *a"] | float, mapped: Float[np.ndarray, " *a"] | float
) -> Float[np.ndarray, " *a"] | Any:
    """100 (mapped - own) / own for a probe's accuracies on its own latents and on mapped ones; near 0 is better.

    Relative, as the paper's code has it (section 3.2 does not say): 80 % that become 60 % are a change of -25. NaN of 0.
    """
    before, after = np.asarray(own, dtype=np.float64), np.asarray(mapped, dtype=np.float64)
    return 100 * (after - before) / np.where(before == 0, np.nan, before)


def _maker(kind: str, alpha: float) -> Callable[[], Any]:
    from sklearn.linear_model import Lasso, LogisticRegression, Ridge

    if alpha < 0 or (alpha == 0 and kind != "ridge"):
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

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Lasso, LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from probekit.hooks.errors import ProbekitError
from probekit.latents.probes import (
    C_OF_CLASSES,
    DEFAULT_LASSO_ALPHA,
    HELD_OUT,
    LASSO_ALPHA,
    LEAST,
    Probes,
    balanced_accuracy,
    fit_probes,
    percent_change,
    percent_match,
    probe_numbers,
)

N, D = 1200, 24
DRAW = np.random.default_rng(0)
LATENTS = DRAW.standard_normal((N, D)).astype(np.float32)
DIRECTIONS = np.linalg.qr(DRAW.standard_normal((D, 3)))[0].T.astype(np.float32)
LATENTS += np.outer(np.sign(LATENTS @ DIRECTIONS[0]), DIRECTIONS[0])  # a gap between Even and not
LABELS = pd.DataFrame(
    {
        "Even": LATENTS @ DIRECTIONS[0] > 0,
        "Rare": LATENTS @ DIRECTIONS[1] > 1.3,
        "Common": LATENTS @ DIRECTIONS[2] > -1.0,
        "Coin": DRAW.random(N) < 0.5,
        "Never": np.zeros(N, dtype=bool),
        "Hardly_Lacking": np.arange(N) >= LEAST - 1,
    }
)
KINDS = ("lasso", "logistic", "ridge")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_linear_is_read_and_what_is_random_is_not(kind: str) -> None:
    probes = fit_probes(LATENTS, LABELS, kind)
    scores = probes.scores.set_index("attribute")
    assert scores.accuracy["Even"] >= 0.99
    assert scores.accuracy[["Rare", "Common"]].min() > 0.8
    assert abs(scores.accuracy["Coin"] - 0.5) < 0.12
    assert scores.converged.all()
    noise = fit_probes(DRAW.standard_normal((N, D)), LABELS, kind).scores.set_index("attribute").accuracy
    assert (noise - 0.5).abs().max() < 0.15 and abs(noise.mean() - 0.5) < 0.08


@pytest.mark.parametrize("kind", KINDS)
def test_directions_are_unit_vectors_along_which_the_attribute_grows(kind: str) -> None:
    probes = fit_probes(LATENTS, LABELS, kind)
    assert probes.attributes == ["Even", "Rare", "Common", "Coin"]
    np.testing.assert_allclose(np.linalg.norm(probes.directions, axis=1), 1, atol=1e-5)
    assert (np.sum(probes.directions[:3] * DIRECTIONS, axis=1) > 0.93).all()
    moved = probes.predict(LATENTS + 9 * probes.directions[0])
    assert moved[:, 0].all() and probes.predict(LATENTS - 9 * probes.directions[0])[:, 0].sum() == 0


def test_train_and_test_are_balanced_disjoint_and_as_large_as_the_paper_says() -> None:
    probes = fit_probes(LATENTS, LABELS)
    for attribute, rows, (_, score) in zip(probes.attributes, probes.held_out, probes.scores.iterrows(), strict=True):
        has = LABELS[attribute].to_numpy()
        rarer = min(has.sum(), (~has).sum())
        assert score.attribute == attribute
        assert score.train == 2 * int(0.8 * rarer)
        assert score.test == len(rows) == len(set(rows)) == 2 * min(HELD_OUT, rarer - int(0.8 * rarer))
        assert has[rows].mean() == 0.5
        column = probes.attributes.index(attribute)
        assert (probes.predict(LATENTS)[rows, column] == has[rows]).mean() == pytest.approx(score.accuracy)
    assert probes.scores.test.max() == 2 * HELD_OUT > probes.scores.test.min()


def test_nothing_that_was_tested_was_trained_on() -> None:
    """Latents that are noise and a mark on each held-out row: a probe that had seen those rows would read the mark."""
    labels = LABELS[["Coin"]]
    rows = fit_probes(LATENTS, labels).held_out[0]
    marked = LATENTS.copy()
    marked[rows, 0] += np.where(labels.Coin.to_numpy()[rows], -1000, 1000)
    before, after = fit_probes(LATENTS, labels), fit_probes(marked, labels)
    np.testing.assert_array_equal(before.held_out[0], after.held_out[0])
    np.testing.assert_array_equal(before.coefficients, after.coefficients)


def test_a_small_class_is_skipped_with_the_reason() -> None:
    probes = fit_probes(LATENTS, LABELS)
    assert probes.skipped == {
        "Never": f"0 of {N} images are with it, {LEAST} are needed",
        "Hardly_Lacking": f"{LEAST - 1} of {N} images are without it, {LEAST} are needed",
    }
    alone = fit_probes(LATENTS, LABELS[["Never"]])
    assert alone.attributes == [] and alone.scores.empty and alone.predict(LATENTS).shape == (N, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_jobs_and_other_attributes_change_nothing(kind: str) -> None:
    one, three = fit_probes(LATENTS, LABELS, kind, jobs=1), fit_probes(LATENTS, LABELS, kind, jobs=3)
    pd.testing.assert_frame_equal(one.scores, three.scores)
    np.testing.assert_array_equal(one.coefficients, three.coefficients)
    alone = fit_probes(LATENTS, LABELS[["Common"]], kind)
    np.testing.assert_array_equal(alone.coefficients[0], one.coefficients[2])
    other = fit_probes(LATENTS, LABELS, kind, seed=1)
    assert not np.array_equal(other.held_out[0], one.held_out[0])


@pytest.mark.parametrize(
    "kind, alpha, peer",
    [
        ("lasso", None, Lasso(alpha=DEFAULT_LASSO_ALPHA)),
        ("lasso", LASSO_ALPHA["glow"], Lasso(alpha=0.1)),
        ("ridge", 50, Ridge(alpha=50)),
        ("logistic", 2, LogisticRegression(C=0.5)),
    ],
)
def test_a_probe_is_scikit_learns(kind: str, alpha: float | None, peer) -> None:
    """On the rows that the paper's recipe leaves to train: for a class of even size, all but those held out."""
    has = np.arange(400) % 2 == 0
    latents = LATENTS[:400] + 0.3 * has[:, None]
    probes = fit_probes(latents, pd.DataFrame({"Male": has}), kind, alpha)
    test = probes.held_out[0]
    train = np.setdiff1d(np.arange(400), test)
    peer.fit(latents[train], has[train].astype(np.float32))
    np.testing.assert_allclose(probes.coefficients[0], np.ravel(peer.coef_), atol=2e-4)
    np.testing.assert_allclose(probes.intercepts[0], np.ravel(peer.intercept_)[0], atol=2e-4)
    predicted = np.round(peer.predict(latents[test])) == 1
    np.testing.assert_array_equal(probes.predict(latents[test])[:, 0], predicted)
    assert probes.scores.accuracy[0] == pytest.approx((predicted == has[test]).mean())


def test_a_lasso_of_too_large_an_alpha_says_that_it_is_empty() -> None:
    probes = fit_probes(LATENTS, LABELS, alpha=10)
    assert (probes.scores.nonzero == 0).all() and (probes.scores.accuracy == 0.5).all()
    assert (probes.directions == 0).all()


def test_progress_tells_every_attribute() -> None:
    seen: list[str] = []
    probes = fit_probes(LATENTS, LABELS, jobs=2, on_probe=seen.append)
    assert sorted(seen) == sorted(probes.attributes)


def test_probes_refuse_bad_input() -> None:
    with pytest.raises(ProbekitError, match=r"latents of shape \(1200, 24\)"):
        fit_probes(LATENTS, LABELS[:5])
    with pytest.raises(ProbekitError, match="not finite"):
        fit_probes(np.where(LATENTS > 3, np.nan, LATENTS), LABELS)
    with pytest.raises(ProbekitError, match="label 'Age': of float64"):
        fit_probes(LATENTS, pd.DataFrame({"Age": np.zeros(N)}))
    with pytest.raises(ProbekitError, match="choose lasso, ridge, logistic"):
        fit_probes(LATENTS, LABELS, "svm")
    with pytest.raises(ProbekitError, match="alpha -1"):
        fit_probes(LATENTS, LABELS, alpha=-1)
    with pytest.raises(ProbekitError, match="latents of 3 values: the probes read 24"):
        fit_probes(LATENTS, LABELS).predict(LATENTS[:, :3])
    with pytest.raises(ProbekitError, match="label 'Even': of bool"):
        probe_numbers(LATENTS, LABELS)
    with pytest.raises(ProbekitError, match="of something else, or damaged"):
        Probes.of_arrays({"coefficients": np.zeros((1, 2)), "told": np.frombuffer(b"{", np.uint8)})


# --- numbers and classes -----------------------------------------------------------------------------------------------

LINE = LATENTS @ DIRECTIONS[1]
CLASSES = pd.DataFrame(
    {
        "Third": pd.Categorical(np.select([LINE < -0.4, LINE > 0.4], ["left", "right"], "middle")),
        "Side": pd.Series(np.where(LINE > 0, "up", "down"), dtype=object).where(np.arange(N) % 4 > 0),
        "Lot": DRAW.choice(["a", "b", "c"], p=[0.6, 0.2, 0.2], size=N),
        "Same": pd.Categorical(["x"] * N),
        "Name": [f"image {i}" for i in range(N)],
        "Unknown": pd.Series([None] * N, dtype=object),
    }
)


def test_numbers_are_read_where_they_are_linear() -> None:
    known = np.where(np.arange(N) % 6 == 0, np.nan, 30 + 10 * LINE)
    dice = DRAW.integers(6, size=N).astype(float)
    labels = pd.DataFrame({"Age": known, "Dice": dice, "One": np.ones(N), "Unknown": np.full(N, np.nan)})
    scores = probe_numbers(LATENTS, labels).set_index("label")
    assert list(scores.index) == list(labels)
    assert scores.score["Age"] > 0.95 and abs(scores.baseline["Age"]) < 0.05
    assert scores.train["Age"] + scores.test["Age"] == np.isfinite(known).sum() and scores.test["Age"] == 200
    assert scores.score["Dice"] < 0.1
    assert scores.skipped["One"] == "the training latents all have the same"
    assert scores.skipped["Unknown"] == f"0 labels are known, {LEAST} are needed"
    assert (scores.skipped[["Age", "Dice"]] == "").all()
    pd.testing.assert_frame_equal(scores, probe_numbers(LATENTS, labels, jobs=1).set_index("label"))


def test_classes_are_read_where_they_are_linear() -> None:
    probes = fit_probes(LATENTS, CLASSES)
    scores = probes.scores.set_index("attribute")
    assert probes.attributes == ["Third", "Side", "Lot"] and scores.converged.all()
    assert probes.classes == {"Third": ["left", "middle", "right"], "Side": ["down", "up"], "Lot": ["a", "b", "c"]}
    assert scores.accuracy["Third"] > 0.75 > 0.5 > scores.baseline["Third"]
    assert scores.accuracy["Side"] > 0.9 and scores.test["Side"] == N * 3 // 4 // 5
    assert scores.baseline["Lot"] == pytest.approx(0.6, abs=0.1)
    assert scores.accuracy["Lot"] == pytest.approx(scores.baseline["Lot"], abs=0.1)
    assert probes.skipped == {
        "Same": "the training latents all have the same",
        "Name": f"{N} classes among {N} images, of which 2 a class are needed",
        "Unknown": f"0 labels are known, {LEAST} are needed",
    }


@pytest.mark.parametrize("label", ["Third", "Side"])
def test_a_class_s_probe_is_scikit_learns(label: str) -> None:
    both = pd.concat([LABELS[["Even"]], CLASSES[["Lot", label]], LABELS[["Coin"]]], axis=1)
    probes = fit_probes(LATENTS, both)
    column = probes.attributes.index(label)
    test, known = probes.held_out[column], np.flatnonzero(CLASSES[label].notna())
    train = np.setdiff1d(known, test)
    assert len(train) + len(test) == len(known) and set(test) <= set(known)
    peer = make_pipeline(StandardScaler(), LogisticRegression(C=C_OF_CLASSES, max_iter=1000))
    peer.fit(LATENTS[train], CLASSES[label].to_numpy()[train].astype(str))
    said = probes.predict(LATENTS)[:, column]
    assert (np.array(probes.classes[label])[said] == peer.predict(LATENTS)).mean() > 0.999
    right = said[test] == probes.truth(both)[test, column]
    assert probes.scores.accuracy[column] == pytest.approx(right.mean())
    # and the attributes beside it are read as if they were alone
    alone = fit_probes(LATENTS, LABELS[["Even", "Coin"]])
    assert np.array_equal(probes.predict(LATENTS)[:, [0, 3]], alone.predict(LATENTS))


def test_classes_have_directions_too() -> None:
    probes = fit_probes(LATENTS, CLASSES[["Third"]])
    assert probes.directions.shape == (3, D)
    for number in (0, 2):  # whichever way one goes from the middle, it ends
        assert (probes.predict(LATENTS[:20] + 50 * probes.directions[number])[:, 0] == number).all()


def test_what_is_right_of_an_image_is_not_known_where_its_class_is_new() -> None:
    labels = pd.concat([LABELS[["Even"]], CLASSES[["Third", "Side"]]], axis=1)
    probes = fit_probes(LATENTS, labels)
    shown = pd.DataFrame({"Even": [True, False], "Third": ["right", "below"], "Side": [None, "up"]})
    assert probes.truth(shown).tolist() == [[1, 2, -1], [0, -1, 1]]


def test_probes_are_kept_as_arrays() -> None:
    labels = pd.concat([LABELS, CLASSES], axis=1)
    for some in (labels, LABELS[["Never"]], LABELS[["Even"]]):
        probes = fit_probes(LATENTS, some)
        again = Probes.of_arrays(probes.to_arrays())
        for name in ("kind", "alpha", "attributes", "classes", "skipped"):
            assert getattr(again, name) == getattr(probes, name), name
        assert again.scores.to_dict("list") == probes.scores.to_dict("list")
        assert np.array_equal(again.predict(LATENTS), probes.predict(LATENTS))
        assert [rows.tolist() for rows in again.held_out] == [rows.tolist() for rows in probes.held_out]


def test_balanced_accuracy_is_scikit_learns_over_what_is_known() -> None:
    from sklearn.metrics import balanced_accuracy_score

    real, said = DRAW.integers(-1, 4, size=(300, 2)), DRAW.integers(0, 4, size=(300, 2))
    real[:, 1] = np.where(real[:, 1] < 0, -1, 0)  # all the same
    known = real[:, 0] >= 0
    measured = balanced_accuracy(said, real)
    assert measured[0] == pytest.approx(balanced_accuracy_score(real[known, 0], said[known, 0])) and np.isnan(measured[1])


# --- the paper's two measures ------------------------------------------------------------------------------------------


def test_percent_match_counts_equal_predictions() -> None:
    own = np.array([[True, True], [False, True], [True, False], [False, False]])
    np.testing.assert_allclose(percent_match(own, own), [100, 100])
    np.testing.assert_allclose(percent_match(own, ~own), [0, 0])
    np.testing.assert_allclose(percent_match(own, np.ones_like(own)), [50, 50])
    assert percent_match(own[:, 0], np.array([True, False, True, True])) == 75
    for other in (own[:3], own[:, 0]):
        with pytest.raises(ProbekitError, match="predictions of shapes"):
            percent_match(own, other)


def test_percent_change_is_relative_to_the_accuracy_before() -> None:
    np.testing.assert_allclose(percent_change(np.array([0.8, 0.5, 0.9]), np.array([0.6, 0.6, 0.9])), [-25, 20, 0], atol=1e-9)
    assert percent_change(0.8, 0.6) == pytest.approx(-25)
    assert np.isnan(percent_change(np.array([0.0]), np.array([0.5]))).all()

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from probekit import ProbekitError, hooks, load
from probekit.checksums import sealed, unsealed
from probekit.data import load_data
from probekit.experiments.probe_layers import INPUT, PIXELS, ProbeLayers, Spool
from probekit.latents.positions import at_positions
from probekit.latents.ridge import RidgeSolver
from probekit.latents.ridge_probes import IMAGES_OF_A_TYPE, Reader, RidgeClassifier, Task, tasks
from probekit.models.untrained import untrained
from probekit.report.layer_probes import BOTH, CARRIES, KNOWS, NEITHER, headline, known, knows_against_carries, verdicts
from tests.conftest import killed_once, probekit, refused, tiny

LAYERS = ["--layers", "down_blocks.0.attentions.0", "--layers", "up_blocks.1.resnets.0"]
SMALL = ["--train", 60, "--test", 40, "--timesteps", "700,100", "--device", "cpu", *LAYERS]
RUN = ["probe", "layers", "--model", "sd", *SMALL]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_sd: Any) -> Path:
    tiny_sd.save_pretrained(tmp_path / "sd")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- the probe ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("width", [12, 300])
def test_the_classifier_is_scikit_learns_with_the_same_penalty(width: int, classes: int) -> None:
    from sklearn.linear_model import RidgeClassifierCV

    draw = np.random.default_rng(width + classes)
    x = draw.standard_normal((120, width)) * draw.uniform(0.1, 3, width) + 2
    labels = np.array([f"class {i}" for i in (x[:, :classes] + draw.standard_normal((120, classes))).argmax(1)])
    alphas = [0.01, 1.0, 30.0, 1000.0, 30000.0]
    ours, theirs = RidgeClassifier(alphas).fit(x[:80], labels[:80]), RidgeClassifierCV(alphas).fit(x[:80], labels[:80])
    assert ours.alpha_ == theirs.alpha_ and np.array_equal(ours.classes_, theirs.classes_)
    np.testing.assert_allclose(np.squeeze(ours.coef_), np.squeeze(theirs.coef_), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(np.squeeze(ours.decide(x[80:])), theirs.decision_function(x[80:]), rtol=1e-6, atol=1e-9)
    assert np.array_equal(ours.predict(x[80:]), theirs.predict(x[80:]))


def test_what_is_read_off_a_layer_is_what_scikit_learn_reads_off_the_same_activations(tiny_sd: Any) -> None:
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.metrics import balanced_accuracy_score

    data, generator = load_data("scenes", 32), torch.Generator().manual_seed(0)
    numbers = data.split("test")[:150]
    states = torch.nn.functional.avg_pool2d(data.images(numbers), 2).mean(1, keepdim=True).repeat(1, 4, 1, 1)
    layer = "up_blocks.1.resnets.0"
    with torch.no_grad(), hooks.capture(tiny_sd.unet, [layer], schedule=[100.0], rows=150) as captured:
        tiny_sd.unet(states, torch.tensor(100.0), torch.randn(150, 5, 16, generator=generator))
    asked, skipped = tasks(data.labels(numbers), 100)
    assert not skipped and [task.name for task in asked] == ["place", "size", "kind", "colour", "ground", "texture"]
    for x in at_positions(captured[layer, 0][0]).values():
        read = Reader(asked, 100).read(x.numpy())
        for task in asked:
            grid = RidgeSolver(x.numpy()[:100]).grid()
            probe = RidgeClassifierCV(grid).fit(x.double().numpy()[:100], task.values[:100])
            # scikit-learn scores a class that was not trained on by its own rules: 0, as here
            said = probe.predict(x.double().numpy()[100:])
            if task.name == "size":  # of two classes the nearer one, see the next test
                said = RidgeClassifier(grid, midway=True).fit(x.numpy()[:100], task.values[:100]).predict(x.numpy()[100:])
            real = balanced_accuracy_score(task.values[100:], said)
            assert read[task.name].value == pytest.approx(real) and read[task.name].alpha == pytest.approx(probe.alpha_)


@pytest.mark.parametrize("width", [12, 300])
def test_a_rare_class_is_told_by_the_nearer_mean_of_rows_that_were_left_out(width: int) -> None:
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import LeaveOneOut, cross_val_predict

    draw = np.random.default_rng(width)
    x = draw.standard_normal((400, width))
    rare = x[:, :3].sum(1) > 2.6  # 7 of 100
    signs, train = np.where(rare, 1.0, -1.0), slice(150)
    solver, alpha = RidgeSolver(x[train]), 40.0
    left_out = cross_val_predict(Ridge(alpha), x[train], signs[train], cv=LeaveOneOut())
    np.testing.assert_allclose(solver.left_out(signs[train, None], alpha)[:, 0], left_out, rtol=1e-7, atol=1e-9)
    plain, nearer = (RidgeClassifier([alpha], midway=m).fit(x[train], rare[train]) for m in (False, True))
    means = [left_out[rare[train] == which].mean() for which in (False, True)]
    assert np.array_equal(nearer.predict(x[150:]), plain.decide(x[150:])[:, 0] > np.mean(means))
    found = {probe: probe.predict(x[150:])[rare[150:]].mean() for probe in (plain, nearer)}
    assert found[nearer] > found[plain] + 0.4  # of those that are there


def class_of(values: Any) -> Task:
    """A task whose control is the same."""
    values = np.asarray(values)
    return Task("it", np.ones(len(values), dtype=bool), values, values, values.dtype.kind == "f")


def test_pixels_know_what_a_linear_map_of_the_image_can_and_not_what_none_can() -> None:
    draw = np.random.default_rng(0)
    pictures = draw.uniform(-1, 1, (900, 3, 6, 6))
    left, right = pictures[..., :3].mean((1, 2, 3)), pictures[..., 3:].mean((1, 2, 3))
    asked = {
        "side": np.where(left > right, "left", "right"),
        "brightness": left + right,
        "pattern": np.where(left * right > 0, "same", "other"),  # no linear map of the pixels tells it
    }
    read = {name: Reader([class_of(v)], 600).read(pictures.reshape(900, -1))["it"] for name, v in asked.items()}
    assert read["side"].value > 0.9 and read["side"].low > 0.85
    number = read["brightness"]
    assert number.value > 0.9999 and number.chance == 0 and number.low <= number.value <= number.high
    assert read["pattern"].low <= 0.5 <= read["pattern"].high and read["pattern"].chance == 0.5


def test_shuffled_labels_are_read_at_chance_and_so_is_a_control_task_without_types() -> None:
    draw = np.random.default_rng(1)
    x = draw.standard_normal((1600, 20))
    labels = pd.DataFrame({"it": pd.Categorical(draw.permutation(np.repeat(list("abcd"), 400)))})
    ((task,), _) = tasks(labels, 1200)
    shuffled = Reader([task], 1200).read(x)["it"]
    assert shuffled.low < shuffled.chance < shuffled.high and shuffled.chance == 0.25
    clear = x.copy()
    clear[:, 0] = 4 * (labels.it == "a")
    clear[:, 1] = 4 * (labels.it == "b")
    clear[:, 2] = 4 * (labels.it == "c")
    read = Reader([task], 1200).read(clear)["it"]
    assert read.value == 1 and abs(read.control - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 400)  # every image is its own type
    assert read.selectivity == read.value - read.control > 0.65
    same = Reader([task], 1200).read(np.ones((1600, 3)))["it"]  # a dead layer
    assert same.value == same.chance == same.low == same.high and np.isnan(same.alpha)


def test_a_control_task_has_one_answer_for_each_type_which_a_probe_of_types_learns_by_heart() -> None:
    data = load_data("scenes", 32)
    labels = data.labels(data.split("test")[:900])
    asked, _ = tasks(labels, 600)
    place = asked[0]
    types = labels.kind.astype(str) + labels.colour.astype(str)  # 80 types: more values would leave too few images of each
    assert types.nunique() * IMAGES_OF_A_TYPE <= 600
    answers = pd.Series(place.control).groupby(types.to_numpy()).nunique()
    assert (answers == 1).all() and set(place.control) <= set(place.values) and len(set(place.control)) == 9
    heart = pd.get_dummies(types).to_numpy(dtype=np.float64)
    read = Reader([place], 600).read(heart)["place"]
    assert read.control > 0.95 and read.value < 0.2 and read.selectivity < -0.75
    again, _ = tasks(labels, 600)
    other, _ = tasks(labels, 600, seed=1)
    assert np.array_equal(again[0].control, place.control) and not np.array_equal(other[0].control, place.control)


def test_scores_are_scikit_learns_and_intervals_those_of_a_bootstrap_one_by_one() -> None:
    from sklearn.metrics import balanced_accuracy_score, r2_score

    draw = np.random.default_rng(2)
    x, noise = draw.standard_normal((500, 6)), draw.standard_normal(500)
    number = x[:, 0] + noise
    kind = np.array(["low", "mid", "high"])[np.digitize(number, (-0.5, 1.5))]
    reader = Reader([class_of(kind)], 300)
    found, weights = reader.read(x)["it"], reader._weights(200)
    said = RidgeClassifier(midway=True).fit(x[:300], kind[:300]).predict(x[300:])
    assert found.value == pytest.approx(balanced_accuracy_score(kind[300:], said))
    every = [np.repeat(np.arange(200), w) for w in weights]
    slow = [balanced_accuracy_score(kind[300:][rows], said[rows]) for rows in every]
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(slow, (2.5, 97.5))))
    of_number = Reader([class_of(number)], 300).read(x)["it"]
    from sklearn.linear_model import RidgeCV

    line = RidgeCV(RidgeSolver(x[:300]).grid()).fit(x[:300], number[:300]).predict(x[300:])
    assert of_number.value == pytest.approx(r2_score(number[300:], line))
    slow = [r2_score(number[300:][rows], line[rows]) for rows in every]
    assert (of_number.low, of_number.high) == pytest.approx(tuple(np.percentile(slow, (2.5, 97.5))))


def test_labels_that_are_not_known_of_every_image_and_those_that_cannot_be_probed() -> None:
    draw = np.random.default_rng(3)
    x = draw.standard_normal((200, 5))
    values = pd.Series(np.where(x[:, 0] > 0, "yes", "no"), dtype=object)
    values[::3] = None
    labels = pd.DataFrame({"some": values, "one": "same", "own": [str(i) for i in range(200)], "size": x[:, 1]})
    labels["few"] = pd.Series(["a", "b"] * 4 + [None] * 192, dtype=object)
    asked, skipped = tasks(labels, 140)
    assert [task.name for task in asked] == ["some", "size"] and asked[1].number
    assert set(skipped) == {"one", "own", "few"} and "140 classes among 140 images" in skipped["own"]
    read = Reader(asked, 140).read(x)
    known = np.arange(200) % 3 != 0
    assert (read["some"].train, read["some"].test) == (known[:140].sum(), known[140:].sum()) and read["some"].value > 0.9
    assert (read["size"].train, read["size"].test) == (140, 60) and read["size"].value > 0.99
    with pytest.raises(ProbekitError, match="not finite"):
        Reader(asked, 140).read(np.full((200, 5), np.nan))


# --- what probes are given ---------------------------------------------------------------------------------------------


def test_positions_are_a_fixed_grid_and_the_mean_of_pictures_tokens_and_vectors() -> None:
    picture = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    found = at_positions(picture, 4)
    assert torch.equal(found["grid"].reshape(2, 3, 4, 4), picture[:, :, 1::2, 1::2])
    assert torch.allclose(found["mean"], picture.mean((2, 3)))
    tokens = picture.flatten(2).mT  # row by row
    assert all(torch.equal(at_positions(tokens, 4)[name], found[name]) for name in found)
    whole = at_positions(picture[..., :3, :3], 4)
    assert torch.equal(whole["grid"], picture[..., :3, :3].flatten(1))  # smaller than the grid
    line = torch.arange(2 * 10 * 3.0).reshape(2, 10, 3)
    assert torch.equal(at_positions(line, 2)["grid"], line[:, [1, 3, 6, 8]].flatten(1))
    vectors = torch.randn(2, 7)
    assert all(torch.equal(found, vectors) for found in at_positions(vectors).values())


def test_the_spool_gives_back_what_batches_were_added_and_holds_one_layer(tmp_path: Path) -> None:
    spool, x = Spool(tmp_path, 5), torch.randn(5, 6)
    for part in (slice(0, 3), slice(3, 5)):
        for layer in ("a", "b"):
            spool.add(layer, 7.0, {"grid": x[part], "mean": x[part, :2]})
    found = list(spool.each())
    assert [key for *key, _ in found] == [[la, 7.0, p] for la in ("a", "b") for p in ("grid", "mean")]
    assert np.array_equal(found[0][3], x.numpy()) and np.array_equal(found[3][3], x[:, :2].numpy())
    assert not any(tmp_path.iterdir())  # what was read is forgotten


def test_an_untrained_network_has_its_own_weights_back(tiny_sd: Any) -> None:
    network = copy.deepcopy(tiny_sd.unet)
    own, state = copy.deepcopy(network.state_dict()), torch.random.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        with untrained(network, seed):
            drawn.append(network.conv_in.weight.clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], own["conv_in.weight"])
    with pytest.raises(KeyError), untrained(network):
        raise KeyError
    assert all(torch.equal(value, own[key]) for key, value in network.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's randomness is touched
    with pytest.raises(ProbekitError, match="Linear is not built from a config"), untrained(torch.nn.Linear(1, 1)):
        pass


def test_layers_are_captured_for_the_noised_image_under_its_own_caption(folder: Path) -> None:
    """Held against the U-Net called by itself, with a plain hook."""

    class Quiet:
        def advance(self, count: int) -> None: ...

    experiment = ProbeLayers(model="sd", train=20, test=10, timesteps="300", layers=LAYERS[1::2], device="cpu", batch_size=8)
    states = experiment.work(experiment.plan()[0], Quiet()).arrays["states"]  # type: ignore[arg-type]
    model, data, numbers = experiment.loaded, experiment.images, experiment.numbers
    scheduler = model.pipeline.scheduler
    row, kept = 13, {}
    module = model.denoiser.get_submodule("up_blocks.1.resnets.0")
    handle = module.register_forward_hook(lambda _m, _i, output: kept.update(it=output))
    clean = model.diffusion.encode(data.images(numbers[row : row + 1]))
    noised = scheduler.add_noise(clean, model.diffusion.noise([row], 0), torch.tensor([300]))
    caption = data.captions(numbers[row : row + 1])[0]

    for condition, prompt in (("with", caption), ("without", "")):
        with torch.no_grad():
            model.denoiser(noised, torch.tensor(300.0), model.painter.embedded(prompt)["prompt_embeds"])
        (folder / condition).mkdir()
        spool = Spool(folder / condition, 30)
        plain = at_positions(kept["it"])
        pictures = experiment._activations(condition, [300.0], states, spool, Quiet())  # type: ignore[arg-type]
        found = {(layer, positions): x[row] for layer, _, positions, x in spool.each()}
        for positions, x in plain.items():
            np.testing.assert_allclose(found["up_blocks.1.resnets.0", positions], x[0].numpy(), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found[INPUT, "grid"], noised.flatten().numpy(), rtol=1e-4, atol=1e-5)
        assert list(pictures) == [f"given-{i}-300" for i in range(4)]
    handle.remove()


# --- what follows ------------------------------------------------------------------------------------------------------


def made(values: dict[tuple[str, str, str, float], float], chance: float = 0.2) -> pd.DataFrame:
    """Rows as a run's of one label, by network, layer, positions and time; intervals of 0.05 to either side."""
    rows = []
    for (network, layer, positions, t), value in values.items():
        at = {"network": network, "condition": "with", "t": t, "layer": layer, "positions": positions, "measure": "accuracy"}
        at |= {"order": {"a": 1.0, "b": 2.0, "c": 3.0}.get(layer, -1.0), "factor": "kind", "value": value, "chance": chance}
        rows.append(at | {"low": value - 0.05, "high": value + 0.05, "control": 0.2, "selectivity": value - 0.2})
    return pd.DataFrame(rows)


def planted() -> pd.DataFrame:
    """Layer a knows a little, b all at t 100 and its grid more than its mean, c as much as untrained."""
    values = {("", PIXELS, "grid", float("nan")): 0.3, ("", PIXELS, "mean", float("nan")): 0.2}
    for t, (a, b, c) in {800.0: (0.3, 0.45, 0.62), 400.0: (0.4, 0.7, 0.6), 100.0: (0.4, 1.0, 0.97)}.items():
        for layer, value in zip("abc", (a, b, c), strict=True):
            values["trained", layer, "grid", t], values["trained", layer, "mean", t] = value, value - 0.1
            values["untrained", layer, "grid", t], values["untrained", layer, "mean", t] = 0.2, 0.15
        values["untrained", "c", "mean", t] = c
        values["trained", INPUT, "grid", t] = 0.25
    found = made(values)
    return found.assign(condition=np.where(found.layer == PIXELS, "", found.condition))


def test_first_best_and_when_are_told() -> None:
    (told,) = known(planted()).itertuples()
    assert (told.best, told.t, told.value, told.first, told.since) == ("b", 100.0, 1.0, "b", 800.0)
    assert (told.pixels, told.input, told.untrained) == (0.3, 0.25, 0.97)
    assert headline(known(planted()), "with") == (
        "Known best, told the caption: kind by b at t = 100 (1.00, untrained 0.97; 1 other cannot be told from it)."
    )
    apart = planted()
    apart.loc[apart.layer == "c", "high"] -= 0.1
    assert headline(known(apart), "with").endswith("(1.00, untrained 0.97).")


def test_a_layer_knows_above_its_untrained_self_and_carries_above_the_null() -> None:
    carried = {"a": (0.5, 0.4, 0.1, 0.2), "b": (0.5, 0.1, 0.1, 0.2), "c": (0.9, 0.8, 0.1, 0.2)}
    keys = ("transfer", "low", "null", "null_high")
    numbers: list[dict[str, Any]] = [
        {"window": window, "layer": layer, "factor": "content", "high": 1.0, "null_low": 0.0}
        | dict(zip(keys, told, strict=True))
        for layer, told in carried.items()
        for window in ("all", "50%-100%")
    ]
    windows = {"all": [800.0, 400.0, 100.0], "50%-100%": [400.0, 100.0]}
    swept = {"factors": {"content": ["kind"]}, "windows": windows, "numbers": numbers}
    judged = verdicts(planted(), swept, "with")
    assert judged[judged.window == "all"].set_index("layer").verdict.to_dict() == {"a": BOTH, "b": KNOWS, "c": CARRIES}
    b = judged[(judged.window == "50%-100%") & (judged.layer == "b")].iloc[0]
    assert b.knows == pytest.approx((0.85 - 0.2) / 0.8) and b.knows_low == pytest.approx((0.8 - 0.2) / 0.8)
    assert b.untrained == pytest.approx(0) and b.carries == pytest.approx(0.4)
    assert knows_against_carries(judged, swept, "with") == (
        "Knows against carries, told the caption, at all steps: content is known and not shown to be carried by b, carried "
        "and not shown to be known by c, both by a."
    )
    for record in numbers:
        record["low"] = 0.1
    nothing = verdicts(planted(), swept, "with")
    assert nothing[nothing.window == "all"].verdict.tolist() == [KNOWS, KNOWS, NEITHER]


# --- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_layer_is_read_at_every_time_and_held_against_what_it_carries(folder: Path) -> None:
    sweep = ["inject", "sweep", "--model", "sd", "--pairs", 3, "--num-steps", 4, "--by-time", "--windows", 2, "--device", "cpu"]
    done = probekit(*sweep, *LAYERS, "--out", "swept")
    assert done.returncode == 0, done.stderr
    done = probekit(*RUN, "--against", "swept", "--out", "run")
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(folder / "run" / "results.parquet")
    of_layers = rows[~rows.layer.isin([PIXELS, INPUT])]
    # networks, conditions, times, layers, positions, labels
    assert (
        len(of_layers) == 2 * 2 * 2 * 2 * 2 * 6
        and not of_layers.duplicated(["network", "condition", "t", "layer", "positions", "factor"]).any()
    )
    assert len(rows[rows.layer == PIXELS]) == 12 and len(rows[rows.layer == INPUT]) == 2 * 2 * 2 * 6
    assert ((rows.low - 1e-9 <= rows.value) & (rows.value <= rows.high + 1e-9)).mean() > 0.97
    assert (rows.selectivity == rows.value - rows.control).all() and set(rows.train) == {60} and set(rows.test) == {40}
    text = of_layers[of_layers.layer == "down_blocks.0.attentions.0"]
    read = text[(text.network == "trained") & (text.positions == "mean")].groupby("condition").value.mean()
    assert read["with"] > read["without"] + 0.1  # the words enter there
    page = (folder / "run" / "report.html").read_text()
    assert "Layer by time, told no caption" in page and "Knows against carries, told the caption" in page
    figures = {path.name for path in (folder / "run" / "figures").glob("*.svg")}
    assert figures == {f"{name}-{c}.svg" for name in ("layers", "against") for c in ("with", "without")} | {
        "against-with-time.svg",
        "against-without-time.svg",
    }
    assert "only know" in done.stdout and "Known best, told the caption: place by" in done.stdout
    shutil.rmtree(folder / "swept")  # what it carries is in the run's config
    (folder / "run" / "report.html").unlink()
    assert probekit("describe", "run").returncode == 0
    assert (folder / "run" / "report.html").read_text() == page


@pytest.mark.slow
def test_a_sweep_that_is_none_or_of_something_else_is_refused(folder: Path) -> None:
    sweep = ["inject", "sweep", "--num-steps", 2, "--device", "cpu", "--layers", "mid_block", "--out", "swept", "--model"]
    prompts = ["--prompt-original", "a cat", "--prompt-edit", "a dog"]
    assert probekit(*sweep, "sd", *prompts).returncode == 0
    assert "varies own, of which the data's labels say nothing" in refused(*RUN, "--against", "swept", "--out", "run")
    assert "--against 'nowhere': no run folder" in refused(*RUN, "--against", "nowhere", "--out", "run")
    (folder / "swept" / "results.parquet").unlink()
    assert "--against 'swept': not finished" in refused(*RUN, "--against", "swept", "--out", "run")
    config = folder / "swept" / "config.json"
    config.write_bytes(sealed(unsealed(config.read_bytes()) | {"experiment": "stitch-run"}))
    assert "--against 'swept': of stitch-run" in refused(*RUN, "--against", "swept", "--out", "run")
    shutil.rmtree(folder / "swept")
    assert probekit(*sweep, "sd", "--pairs", 1).returncode == 0
    digest = load("sd", device="cpu").digest
    told = unsealed(config.read_bytes())
    config.write_bytes(sealed(told | {"inputs": told["inputs"] | {"model_digest": "0123456789ab"}}))
    said = refused(*RUN, "--against", "swept", "--out", "run")
    assert "is of another model (0123456789ab" in said and digest in said
    assert not (folder / "run").exists()


@pytest.mark.slow
def test_while_sampling_what_is_read_is_what_the_caption_says(folder: Path) -> None:
    asked = {"model": "sd", "train": 40, "test": 20, "during": "sampling", "num_steps": 4, "timesteps": "700,100"}
    found = ProbeLayers(**asked, layers=LAYERS[1::2], device="cpu").run(out="run")
    rows = found.rows[~found.rows.layer.isin([PIXELS])]
    assert set(rows.condition) == {"sampling"} and len(set(rows.t)) == 2
    assert len(rows[rows.layer != INPUT]) == 2 * 2 * 2 * 2 * 6
    # the state of the first step is noise alone: that of the third is not
    experiment = ProbeLayers(**asked, guidance=2.0, layers=["mid_block"], device="cpu")
    told = experiment.diffusion.schedule(4).timesteps
    assert list(experiment.probed_timesteps) == [told[step] for step in experiment.probed_timesteps.values()]
    assert experiment.diffusion.condition["guidance"] == 2.0
    assert "while sampling" in (folder / "run" / "report.html").read_text()


@pytest.mark.slow
def test_a_model_of_pixels_and_a_folder_with_numbers_and_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDIMScheduler, DDPMPipeline

    monkeypatch.chdir(tmp_path)
    DDPMPipeline(tiny(), DDIMScheduler(clip_sample=False)).save_pretrained("ddpm")
    (tmp_path / "images").mkdir()
    draw, lines = np.random.default_rng(0), ["image,light,left,seldom"]
    for i in range(90):
        light, left = int(draw.integers(40, 216)), bool(draw.integers(2))
        pixels = np.full((8, 8, 3), light, dtype=np.uint8)
        pixels[:, :4] = pixels[:, :4] // 2 if left else pixels[:, :4]
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02d}.png")
        lines.append(f"{i:02d}.png,{light / 255:.3f},{left:d},0")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    run = ["probe", "layers", "--model", "ddpm", "--data", "folder:images,labels=labels.csv", "--train", 60, "--test", 30]
    done = probekit(*run, "--timesteps", "500,0", "--device", "cpu", "--out", "run")
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(tmp_path / "run" / "results.parquet")
    assert set(rows.condition) == {"", "without"}
    read = rows[(rows.layer == INPUT) & (rows.t == 0)].set_index(["factor", "positions"])
    assert read.measure["light", "grid"] == "r2" and read.value["light", "grid"] > 0.97 and read.chance["light", "grid"] == 0
    assert read.measure["left", "grid"] == "accuracy" and read.value["left", "grid"] > 0.9
    pixels = rows[rows.layer == PIXELS].set_index(["factor", "positions"]).value
    assert pixels["light", "grid"] > 0.97 and pixels["left", "grid"] > 0.9
    assert "seldom is not probed: the images to fit or to test all have the same" in done.stdout
    for options, said in (
        (["--captions", "with"], "--captions with: model 'ddpm' takes none"),
        (["--while", "sampling"], "--while sampling: model 'ddpm' takes no captions"),
    ):
        assert said in refused(*run, *options, "--out", "other")


@pytest.mark.slow
def test_killed_and_started_again_the_result_is_that_of_an_uninterrupted_run(folder: Path) -> None:
    run = [*RUN, "--captions", "without"]
    assert probekit(*run, "--out", "whole").returncode == 0
    killed_once(run, folder, "killed")
    for name in ("results.parquet", "figures/layers-without.svg", "report.html"):
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_shards_give_the_results_of_one_run_and_another_seed_others(folder: Path) -> None:
    asked: Callable[..., ProbeLayers] = lambda **more: ProbeLayers(  # noqa: E731
        model="sd", train=40, test=20, timesteps="500", captions="with", layers=["mid_block"], device="cpu", **more
    )
    whole = asked().run(out="whole")
    assert asked().run(out="parts", shard="2/2") is None
    assert asked().run(out="parts", shard="1/2") is not None
    assert (folder / "parts" / "results.parquet").read_bytes() == (folder / "whole" / "results.parquet").read_bytes()
    other = asked(seed=1).run(out="other")
    assert not np.allclose(other.rows.value, whole.rows.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--timesteps", "1000"], "--timesteps 1000: the schedule has timesteps 0 to 999"),
        (["--timesteps", "many"], "--timesteps 'many': write timesteps, as 875,625,375,125"),
        (["--captions", "some"], "--captions 'some': choose with, without or both"),
        (["--while", "asleep"], "--while 'asleep': choose noised or sampling"),
        (["--num-steps", "5"], "--num-steps 5: goes with --while sampling"),
        (["--while", "sampling", "--captions", "with"], "--while sampling pictures are made from their captions"),
        (["--layers", "nothing"], "nothing"),
        (["--train", "40000"], "--train 40000 and --test 40: scenes has 30240 images"),
        (["--data", "folder:bare"], "nothing to probe for (it has no labels)"),
        (["--data", "avatars", "--captions", "with"], "--captions with: data 'avatars': has no captions"),
        (["--model", "avatar-vae"], "makes no images from noise step by step"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder: Path, options: list[str], said: str) -> None:
    (folder / "bare").mkdir()
    for i in range(100):
        (folder / "bare" / f"{i}.png").write_bytes(b"")
    assert said in refused(*RUN, *options, "--out", "run")
    assert not (folder / "run").exists()

"""planted-sd, whose truth is known, and the calibration that holds measures of roles against it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn

from probekit import ProbekitError, hooks, load
from probekit.bundled import borrowed, weights
from probekit.data.scenes import FACTORS, VALUES, Scene, all_scenes
from probekit.experiments import InjectCalibrate
from probekit.experiments.inject_calibrate import MODEL, attribute_pairs
from probekit.models import Model
from probekit.report.calibration import Agreement, chance, permuted, summarise
from probekit.zoo import planted_sd
from probekit.zoo.training import Schedule, train
from tests.conftest import probekit, refused

PLANTED = {(site, a) for site, attributes in planted_sd.PLAN.items() for a in attributes}
SITES, ATTRIBUTES = list(planted_sd.PLAN), list(VALUES)
RUN = ["inject", "calibrate", "--pairs", "1", "--num-steps", "4", "--seed", "1", "--measure", "outputs,layers"]


@pytest.fixture(scope="module")
def model() -> Model:
    return load(MODEL, device="cpu")


def embedded(model: Model, captions: list[str]) -> Tensor:
    """(n, 12, 96), each caption encoded alone: a batch may be rounded by row."""
    encoder, words = model.painter.pipeline.text_encoder, model.painter.pipeline.tokenizer
    tokens = words(captions, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        return torch.cat([encoder(row[None])[0] for row in tokens])


def twins(factor: str, seed: int, count: int) -> Iterator[tuple[Scene, Scene]]:
    """Two scenes that are alike in one factor, and are drawn independently in all others."""
    scenes, generator = all_scenes(), torch.Generator().manual_seed(seed)
    while count:
        one, two = (scenes[int(torch.randint(len(scenes), (), generator=generator))] for _ in range(2))
        merged = asdict(two) | {a: getattr(one, a) for a in FACTORS[factor]}
        if merged["colour"] != merged["ground"]:
            yield one, Scene(**merged)
            count -= 1


# --- the model ---------------------------------------------------------------------------------------------------------


def test_it_is_a_stable_diffusion_that_diffusers_loads_unmodified_beside_the_autoencoder_that_it_borrows(model: Model) -> None:
    vae = AutoencoderKL.from_pretrained(borrowed(weights(MODEL))["vae"], torch_dtype=torch.float32)
    pipeline = DiffusionPipeline.from_pretrained(weights(MODEL), vae=vae, torch_dtype=torch.float32)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    pipeline.set_progress_bar_config(disable=True)
    caption = "a large red fish at the top left on a striped blue ground"
    row = model.painter.row(caption, 3)
    plain = pipeline(caption, generator=row["generator"], num_inference_steps=2, guidance_scale=3.0, output_type="pt").images
    assert torch.allclose(plain * 2 - 1, model.generate([caption], [3], num_inference_steps=2), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_factors_dimensions_hold_its_own_words_alone_bit_for_bit(model: Model, dtype: torch.dtype) -> None:
    model.painter.pipeline.text_encoder.to(dtype)
    try:
        for factor, dims in planted_sd.sets().items():
            pairs = list(twins(factor, 0, 40))
            one, two = (embedded(model, [pair[i].caption for pair in pairs]) for i in range(2))
            assert one.dtype == dtype and torch.equal(one[..., dims], two[..., dims])
            assert not torch.equal(one, two)
    finally:
        model.painter.pipeline.text_encoder.float()


def test_every_value_has_a_code_of_its_own_and_what_is_no_word_has_none(model: Model) -> None:
    base = asdict(Scene("top left", "small", "circle", "red", "blue", "plain"))
    absent = embedded(model, [""])[0, 0]
    assert (embedded(model, ["", "ground at the", "a dog in the park"]) == absent).all()
    for factor, dims in planted_sd.sets().items():
        for attribute in FACTORS[factor]:
            others = {"colour": "blue", "ground": "red"}
            values = [value for value in VALUES[attribute] if value != others.get(attribute)]
            codes = embedded(model, [Scene(**base | {attribute: value}).caption for value in values])[..., dims]
            present = (codes != absent[dims]).any(-1).sum(1)
            assert (present == len(FACTORS[factor])).all(), attribute
            assert len({tuple(code.flatten().tolist()) for code in codes}) == len(values), attribute


def test_the_bundled_weights_are_exactly_zero_where_they_read_nothing(model: Model) -> None:
    for linear, reads in planted_sd.readers(model.denoiser):
        assert (linear.weight[:, ~reads] == 0).all() and (linear.weight[:, reads] != 0).any(0).all()
    assert all((norm.weight == 0).all() for norm in planted_sd.norms(model.denoiser))
    read = torch.stack([planted_sd.read_by(site) for site in SITES])
    assert read.sum(1).tolist() == [32, 32, 32, 0] and (read.sum(0) == 1).all()
    assert [la.name for la in hooks.select(model.layers, ["@cross-attention"])] == SITES


def outputs(model: Model, latents: Tensor, timestep: int, text: Tensor) -> dict[str, Tensor]:
    """What every cross-attention adds in one call, by plain hooks."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.denoiser.get_submodule(site).register_forward_hook(lambda _, __, out, site=site: seen.update({site: out}))
        for site in SITES
    ]
    with torch.no_grad():
        model.denoiser(latents, timestep, text)
    for handle in handles:
        handle.remove()
    return seen


def test_a_cross_attention_adds_the_same_bits_unless_its_own_words_differ(model: Model) -> None:
    generator = torch.Generator().manual_seed(1)
    latents, others = torch.randn(2, 1, 4, 16, 16, generator=generator)
    for attribute in ATTRIBUTES:
        (pair,) = attribute_pairs(attribute, 1, 0)
        o, e = embedded(model, [pair.original, pair.edit]).chunk(2)
        of_o, of_e, elsewhere = (outputs(model, *call) for call in ((latents, 801, o), (latents, 801, e), (others, 41, o)))
        for site in SITES:
            assert torch.equal(of_o[site], of_e[site]) == ((site, attribute) not in PLANTED), (site, attribute)
            # nor does it depend on the picture so far, on the time, or on the cell
            assert torch.equal(of_o[site], elsewhere[site]), site
            assert torch.equal(of_o[site], of_o[site][:, :1].expand_as(of_o[site])), site


def test_other_text_at_a_site_is_the_same_as_the_output_that_it_gives(model: Model) -> None:
    (pair,) = attribute_pairs("kind", 1, 0)
    rules = [[hooks.Injection(site, stream=stream)] for stream in (None, "text") for site in SITES]
    swept = model.painter.sweep((pair.original, 0), (pair.edit, 0), [[], *rules], num_inference_steps=3)
    plain, by_output, by_text = swept.images[0], swept.images[1:5], swept.images[5:]
    assert torch.allclose(by_output, by_text, atol=1e-5)
    moved = [(image - plain).abs().max().item() for image in by_text]
    assert [change > 1e-3 for change in moved] == [(site, "kind") in PLANTED for site in SITES], moved


def small_loss(unet: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    dtype = next(unet.parameters()).dtype
    latents, text = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 4, 16, 16), (2, 12, 96)))
    return unet(latents, torch.tensor([10, 900]), text.sign())[0].float().square().mean(), {}


@pytest.mark.parametrize("kept", [True, False])
def test_training_leaves_the_zeros_zero_and_would_not_without_its_hooks(kept: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    denoiser = planted_sd.unet()
    handles = list(planted_sd.keep_planted(denoiser)) if kept else []
    before = next(planted_sd.readers(denoiser))[0].weight.detach().clone()
    schedule = Schedule(steps=3, learning_rate=1e-3, warmup=1, weight_decay=0.1, bfloat16=True)
    train(denoiser, small_loss, schedule, checkpoint=tmp_path / "c.pt")
    for handle in handles:
        handle.remove()
    assert all((linear.weight[:, ~reads] == 0).all() for linear, reads in planted_sd.readers(denoiser)) == kept
    saved = torch.load(tmp_path / "c.pt", weights_only=True)["module"]  # what is averaged
    reads = planted_sd.read_by(SITES[0])
    assert bool((saved[f"{SITES[0]}.to_v.weight"][:, ~reads] == 0).all()) == kept
    first, _ = next(planted_sd.readers(denoiser))
    assert not torch.equal(first.weight, before)  # it did train
    assert all((norm.weight == 0).all() for norm in planted_sd.norms(denoiser))


# --- pairs and agreement -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_pair_differs_in_one_attribute_and_the_unrelated_donor_has_nothing_of_e(attribute: str) -> None:
    pairs = attribute_pairs(attribute, 20, 3)
    assert pairs == attribute_pairs(attribute, 20, 3) != attribute_pairs(attribute, 20, 4)
    assert pairs[:5] == attribute_pairs(attribute, 5, 3)  # more pairs are more of the same
    for pair in pairs:
        o, e, u = (asdict(Scene.parse(caption)) for caption in (pair.original, pair.edit, pair.unrelated))
        assert [a for a in VALUES if o[a] != e[a]] == [attribute]
        assert u[attribute] != e[attribute]
        assert all(u[a] not in (o[a], e[a]) for a in VALUES if a != "size")


def test_permuted_plans_are_all_that_deal_the_attributes_alike() -> None:
    plans = permuted(PLANTED, SITES, ATTRIBUTES)
    assert len(plans) == len({frozenset(plan) for plan in plans}) == math.factorial(4) * 60
    assert PLANTED in plans
    assert all(len({site for site, _ in plan}) == 3 and {a for _, a in plan} == set(ATTRIBUTES) for plan in plans)


def test_chance_is_that_of_plans_drawn_blindly() -> None:
    own = Agreement.of(PLANTED, PLANTED)
    assert (own.precision, own.recall, own.f1) == (1, 1, 1)
    by = chance(PLANTED, PLANTED, SITES, ATTRIBUTES)
    # every attribute is at its own site in a quarter of all plans; the true plan is left out
    assert by.precision[0] == by.recall[0] == pytest.approx((0.25 * 1440 - 1) / 1439)
    assert by.precision[1] == 5 / 6 or by.precision[1] == 4 / 6
    assert by.p == 1 / 1440
    everything = set(itertools.product(SITES, ATTRIBUTES))
    all_found = Agreement.of(everything, PLANTED)
    assert (all_found.precision, all_found.recall) == (6 / 24, 1)
    assert chance(everything, PLANTED, SITES, ATTRIBUTES).p == 1
    none = Agreement.of(set(), PLANTED)
    assert math.isnan(none.precision) and (none.recall, none.f1) == (0, 0)


def test_a_role_stands_above_the_null_and_untold_pairs_do_not_count() -> None:
    def rows(donor: str, transfers: list[float]) -> list[dict[str, Any]]:
        at = {"measure": "outputs", "order": 1.0, "site": "s", "attribute": "kind", "donor": donor, "kept": 0.5}
        return [at | {"pair": f"kind-{i}", "transfer": value} for i, value in enumerate(transfers)]

    table = pd.DataFrame([*rows("edit", [1, 1, 1, 0, math.nan]), *rows("unrelated", [0, 1, 0, 0, math.nan])])
    told: Any
    (told,) = summarise(table, 0.5).to_dict("records")
    assert (told["transfer"], told["null"], told["pairs"], told["role"], told["kept"]) == (0.75, 0.25, 4, True, 0.5)
    assert told["low"] < 0.75 < told["high"]
    assert not summarise(table, 0.51).role.item()
    # four pairs tell of no threshold near a half; eighty tell that it is above a fifth
    many = pd.concat([table] * 20)
    assert not told["sure"] and not summarise(many, 0.5).sure.item() and summarise(many, 0.2).sure.item()


# --- the experiment ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `whole` lies, a small run."""
    folder = tmp_path_factory.mktemp("calibrate")
    done = probekit(*RUN, "--out", "whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "precision 1.00, recall 1.00" in done.stdout and "p = 0.00069" in done.stdout
    return folder


@pytest.mark.slow
def test_planted_roles_are_found_and_no_others(folder: Path) -> None:
    rows = pd.read_parquet(folder / "whole" / "results.parquet")
    assert len(rows) == len(ATTRIBUTES) * 2 * len(SITES) * 2 and not rows.transfer.isna().any()
    outputs = rows[rows.measure == "outputs"]
    of_e, null = (outputs[outputs.donor == donor] for donor in ("edit", "unrelated"))
    assert {(r.site, r.attribute) for r in of_e.itertuples() if r.transfer} == PLANTED
    elsewhere = [(site, a) not in PLANTED for site, a in zip(of_e.site, of_e.attribute, strict=True)]
    assert (of_e[elsewhere].kept == 1).all()  # the picture is still O
    assert not null.transfer.any()
    by_layer = rows[(rows.measure == "layers") & (rows.donor == "edit")]
    assert {(r.site, r.attribute) for r in by_layer.itertuples() if r.transfer} != PLANTED


@pytest.mark.slow
def test_the_page_shows_the_plan_and_shards_give_the_bytes_of_one_run(folder: Path) -> None:
    page = (folder / "whole" / "report.html").read_text()
    assert "Are planted roles found?" in page and "inject calibrate --pairs 1" in page
    assert not re.search(r'(src|href)="(?!data:|#|\$)|url\((?!#)|@import|fetch\(', page)
    figures = {f"{name}.{kind}" for name in ("roles", "pictures") for kind in ("png", "svg")}
    assert {path.name for path in (folder / "whole" / "figures").iterdir()} == figures
    assert "this part is done" in probekit(*RUN, "--out", "parts", "--shard", "1/2", cwd=folder).stdout
    assert "precision 1.00" in probekit(*RUN, "--out", "parts", "--shard", "2/2", cwd=folder).stdout
    for name in ("results.parquet", "figures/roles.svg"):
        assert (folder / "parts" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--measure", "heads"], "--measure 'heads': choose from outputs, text, layers"),
        (["--measure", "text,text"], "--measure 'text,text': 'text' stands there twice"),
        (["--measure", ""], "--measure ''"),
        (["--pairs", "0"], "--pairs"),
        (["--threshold", "0"], "--threshold"),
        (["--threshold", "nan"], "--threshold"),
        (["--steps", "20"], "step"),
        (["--num-steps", "0"], "--num-steps"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(options: list[str], said: str, tmp_path: Path) -> None:
    assert said in refused("inject", "calibrate", "--out", "refused", *options, cwd=tmp_path)
    assert not (tmp_path / "refused").exists()


def test_bad_options_are_refused_from_python_as_from_the_command_line() -> None:
    with pytest.raises(ProbekitError, match="--measure 'heads': choose from"):
        InjectCalibrate(measure="heads")
    with pytest.raises(ProbekitError, match="--threshold 2"):
        InjectCalibrate(threshold=2.0)

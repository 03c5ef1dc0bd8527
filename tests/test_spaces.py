"""Latent spaces of any model: what they hold, how they are spelled, and how a newcomer adds a family of models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import probekit.models
from probekit import ProbekitError, hooks, load, load_space
from probekit.bundled import MODELS
from probekit.data import load_data
from probekit.latents import LatentSpace
from probekit.latents.codes import code_sets
from probekit.latents.store import LatentStore
from probekit.models import Model, load_spaces
from probekit.models.families import text_to_image
from probekit.sampling import sample
from probekit.sampling.inversions import INVERSIONS
from tests.conftest import quick_spaces
from tests.pipelines import MOON, RED, flux, pixart, sd3, sdxl

STEPS = 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def mini_sd() -> Model:
    return load("mini-sd", device="cpu")


def tiny_pipeline(build: Callable[[], Any]) -> Model:
    """As a model whose images are of 32 pixels; a PixArt's would be made 256 pixels wide, which its VAE is not for."""
    torch.manual_seed(0)
    pipeline = build()
    if build is flux:
        pipeline.default_sample_size = 16
    model = text_to_image.as_model(pipeline, build.__name__)
    if build is pixart:
        model.painter.defaults["use_resolution_binning"] = False
        model = model.conditioned(prompt="")
    return model


PIPELINES = {build.__name__: build for build in (sdxl, sd3, flux, pixart)}


@pytest.fixture(scope="module")
def tiny_pipelines() -> dict[str, Model]:
    return {name: tiny_pipeline(build) for name, build in PIPELINES.items()}


def pictures(model: Model, n: int = 2) -> Tensor:
    size = model.image_size or 16
    return torch.nn.functional.interpolate(torch.rand(n, 3, 4, 4, generator=seeded()) * 2 - 1, (size, size), mode="bilinear")


def said(error: pytest.ExceptionInfo[ProbekitError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- mini-sd -----------------------------------------------------------------------------------------------------------


def test_code_is_the_autoencoder_s(mini_sd: Model) -> None:
    data = load_data("scenes", 64)
    images, space, vae = data.images(data.split("test")[:3]), mini_sd.space("code"), mini_sd.pipeline.vae
    assert mini_sd.space().name == "code" and space.shape == (4, 16, 16)
    with torch.no_grad():
        mean = vae.encode(images).latent_dist.mean
        expected = vae.decode(mean * vae.config.scaling_factor / vae.config.scaling_factor).sample.clamp(-1, 1)
    codes = space.encode(images)
    assert torch.equal(codes, mean * vae.config.scaling_factor)
    assert torch.equal(space.decode(codes), expected)
    assert (expected - images).square().mean() < 0.01


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_noise_decodes_to_what_the_pipeline_paints_from_it(mini_sd: Model, guidance: float) -> None:
    space = mini_sd.conditioned(prompt=RED, guidance=guidance).space("noise", steps=STEPS)
    noise = space.sample(2, seeded(3))
    options = {"num_inference_steps": STEPS, "guidance_scale": guidance, "latents": noise, "output_type": "pt"}
    with torch.no_grad():
        expected = mini_sd.pipeline([RED, RED], **options).images * 2 - 1
    assert torch.allclose(space.decode(noise), expected, atol=1e-5)
    # numbered noise is the same noise in the space, in the model's pictures and in every experiment
    numbered = mini_sd.diffusion.noise([5], 2)
    painted = mini_sd.generate([RED], [5], seed=2, num_inference_steps=STEPS, guidance_scale=guidance)
    assert torch.allclose(space.decode(numbered), painted, atol=1e-5)


@pytest.mark.parametrize("guidance", [None, 1.0])
def test_text_decodes_to_what_the_pipeline_paints_from_the_caption(mini_sd: Model, guidance: float | None) -> None:
    model = mini_sd.conditioned(guidance=guidance)
    space = model.space("text", seed=1, steps=STEPS)
    latents = space.encode([RED, MOON])
    assert space.takes == "captions" and latents.shape == (2, 20, 96)
    options = {} if guidance is None else {"guidance_scale": guidance}  # None is the pipeline's own
    expected = mini_sd.generate([RED, MOON], [0, 0], seed=1, num_inference_steps=STEPS, **options)
    assert torch.equal(space.decode(latents), expected)
    assert torch.equal(mini_sd.space("text", steps=1).encode([MOON]), latents[1:])
    with pytest.raises(ProbekitError, match="space 'mini-sd:text': encodes captions, not images") as error:
        mini_sd.space("text").encode(pictures(mini_sd))
    said(error)


def test_text_eos_is_the_embedding_of_the_caption_s_end(mini_sd: Model) -> None:
    space, whole = mini_sd.space("text-eos", steps=STEPS), mini_sd.space("text").encode([RED, "a"])
    latents = space.encode([RED, "a"])
    words = mini_sd.pipeline.tokenizer(RED).input_ids
    assert words[-1] == mini_sd.pipeline.tokenizer.eos_token_id
    assert torch.equal(latents[0], whole[0, len(words) - 1]) and torch.equal(latents[1], whole[1, 2])
    made = space.decode(latents)
    tokens = mini_sd.painter.embedded("")["prompt_embeds"].clone()
    tokens[:, 1:] = latents[0]
    row = mini_sd.painter.row("", 0) | {"prompt_embeds": tokens}
    expected = mini_sd.painter.paint([row], num_inference_steps=STEPS)
    assert torch.allclose(made[:1], expected, atol=1e-5) and not torch.allclose(made[0], made[1], atol=0.1)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("layer", [None, "down_blocks.1.attentions.0"])
def test_an_activation_in_its_own_picture_gives_the_picture(mini_sd: Model, guidance: float, layer: str | None) -> None:
    model = mini_sd.conditioned(prompt=RED, guidance=guidance)
    space = model.space("h", layer=layer, t=500, steps=STEPS)
    diffusion, schedule = model.diffusion, model.diffusion.schedule(STEPS)
    first = min(range(STEPS), key=lambda step: abs(schedule.timesteps[step] - 500))
    noise, name = diffusion.noise([0], 0), layer or "mid_block"
    with hooks.capture(diffusion.network, [name], schedule=schedule.timesteps) as captured:
        picture = diffusion.decode(sample(diffusion.denoiser(1), noise, schedule).end)
    branches = captured[name, first]
    own = branches[0] if guidance == 1 else branches.transpose(0, 1)
    assert tuple(own.shape[1:]) == space.shape
    assert torch.equal(space.decode(own), picture)
    assert torch.equal(picture, model.space("noise", steps=STEPS).decode(noise))
    # another changes the picture, the more the farther it is from its own
    other = own + torch.randn(own.shape, generator=seeded()) * own.std()
    near, far = ((space.decode(torch.lerp(own, other, weight)) - picture).abs().mean() for weight in (0.1, 1.0))
    assert 2e-6 < near < far / 2


def test_another_activation_is_added_at_every_step_that_is_left_as_by_a_plain_hook(mini_sd: Model) -> None:
    model = mini_sd.conditioned(prompt=RED, guidance=2.0)
    space, diffusion = model.space("h", t=999, steps=STEPS), model.diffusion  # the first step: all are left
    noise, schedule = diffusion.noise([0], 0), diffusion.schedule(STEPS)
    with hooks.capture(diffusion.network, ["mid_block"], schedule=schedule.timesteps) as captured:
        diffusion.denoiser(1)(noise, schedule.timesteps[0])
    change = 100 * torch.randn(2, 192, 4, 4, generator=seeded())  # one of each branch of guidance
    made = space.decode(captured["mid_block", 0].transpose(0, 1) + change)
    handle = model.denoiser.mid_block.register_forward_hook(lambda module, args, output: output + change)  # type: ignore[union-attr]
    expected = model.space("noise", steps=STEPS).decode(noise)
    handle.remove()
    assert torch.allclose(made, expected, atol=1e-4)
    assert (made - model.space("noise", steps=STEPS).decode(noise)).abs().mean() > 1e-3
    assert not torch.equal(made, space.decode(captured["mid_block", 0].transpose(0, 1) + change.flip(1)))


def test_an_activation_in_an_image_of_one_s_own_gives_what_sampling_from_the_noised_image_does(
    mini_sd: Model, any_shape: None
) -> None:
    space, images, diffusion = mini_sd.space("h", steps=STEPS), pictures(mini_sd, 3), mini_sd.diffusion
    schedule = diffusion.schedule(STEPS)
    first = min(range(STEPS), key=lambda step: abs(schedule.timesteps[step] - 500))
    signal, noise = schedule.level(first)
    noised = signal * diffusion.encode(images) + noise * diffusion.noise([0], 0)
    expected = diffusion.decode(diffusion.walk(noised, lambda d, part: sample(d, part, schedule.after(first)).end))
    latents = space.encode(images)
    assert torch.equal(space.decode(latents, rest_of=images), expected)
    # swapped, they change pictures that stay those of the rest
    swapped = space.decode(latents.flip(0), rest_of=images)
    assert torch.allclose(swapped[1], expected[1], atol=1e-5) and not torch.equal(swapped[0], expected[0])
    assert (swapped - expected).abs().mean() < 0.1
    with pytest.raises(ProbekitError, match="3 latents for the rest of 2 images: as many are needed") as error:
        space.decode(latents, rest_of=images[:2])
    said(error)


# newton takes a thousand calls where a step of mini-sd's stalls; test_inversions has it
@pytest.mark.parametrize("method", [name for name, one in INVERSIONS.items() if not one.flows and name != "newton"])
@pytest.mark.slow
def test_inversions_of_every_method_lead_there_and_back(mini_sd: Model, method: str) -> None:
    inversion, steps = INVERSIONS[method], 50 if method in ("plain", "renoised") else 10  # those that solve are exact in few
    space, code = mini_sd.space(f"inverted:method={method}:steps={steps}"), mini_sd.space("code")
    images = code.decode(code.encode(load_data("scenes", 64).images([3])))
    latents = space.encode(images, seeded())
    parts = inversion.parts(steps)
    assert space.shape == ((parts, 4, 16, 16) if parts > 1 else (4, 16, 16)) and latents.std() < 1.6
    # only fresh noise depends on the generator
    assert torch.equal(latents, space.encode(images, seeded(1))) == (inversion.draws(steps) == 0)
    error = (space.decode(latents) - code.decode(code.encode(images))).square().mean()
    assert error < ({"plain": 1e-3, "renoised": 2e-3, "renoise": 1e-3} | {"fixed-point": 1e-5}).get(method, 1e-10)
    drawn = space.sample(2, seeded())
    assert drawn.shape == (2, *space.shape)
    expected = mini_sd.space("noise").sample(2, seeded())
    if method == "edit-friendly":  # whose prior has as many noises as it has maps
        assert drawn.std().item() == pytest.approx(1, abs=0.02)
    else:
        assert torch.equal((drawn[:, 0] if parts > 1 else drawn).float(), expected)
    if method in ("bdia", "belm"):  # from noise, sampling begins as it does without an inversion
        begun = sample(mini_sd.diffusion.denoiser(2), expected, mini_sd.diffusion.schedule(steps), keep=[1]).kept[1]
        assert torch.allclose(drawn[:, 1].float(), begun, atol=1e-5)


@pytest.mark.parametrize("method", ["rf-solver", "fireflow"])
def test_inversions_for_flows_are_refused_of_diffusion_and_lead_back_of_flows(mini_sd: Model, method: str) -> None:
    with pytest.raises(ProbekitError, match=f"inversion '{method}': is for rectified flows, the network") as error:
        mini_sd.space("inverted", method=method)
    said(error)
    flow = load("mini-flow", device="cpu")
    space, plain = (flow.space("inverted", method=name, steps=10) for name in (method, "plain"))
    images = load_data("avatars", 32).images([0, 1])
    errors = [(each.decode(each.encode(images)) - images).square().mean().sqrt() for each in (space, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_noised_is_the_image_with_noise_of_its_timestep(mini_sd: Model) -> None:
    images, scheduler = pictures(mini_sd), mini_sd.pipeline.scheduler
    space = mini_sd.space("noised", t=300, steps=STEPS)
    code, latents = mini_sd.space("code").encode(images), space.encode(images, seeded(4))
    epsilon = torch.randn(4, 16, 16, generator=seeded(4))
    abar = scheduler.alphas_cumprod[300]
    assert torch.allclose(latents[0], abar.sqrt() * code[0] + (1 - abar).sqrt() * epsilon, atol=1e-5)
    assert space.decode(latents).shape == images.shape and space.sampler is None
    assert mini_sd.space("noised", steps=STEPS).sampler is not None
    little = mini_sd.space("noised", t=20, steps=STEPS)
    rebuilt = mini_sd.space("code").decode(code)
    assert (little.decode(little.encode(images)) - rebuilt).abs().mean() < 0.1


# --- other models ------------------------------------------------------------------------------------------------------


def check_spaces(model: Model) -> None:
    for name, space in quick_spaces(model).items():
        items: Any = pictures(model) if space.takes == "images" else [RED, MOON]
        assert space.name == name and space.about and (space.encoder or space.sampler), name
        latents = space.encode(items, seeded()) if space.encoder else space.sample(2, seeded())
        assert (latents.shape, latents.dtype, latents.device.type) == ((2, *space.shape), torch.float32, "cpu"), name
        assert latents.isfinite().all(), name
        if space.sampler:
            drawn = space.sample(3, seeded(1))
            assert (drawn.shape, drawn.dtype) == ((3, *space.shape), torch.float32), name
            assert torch.equal(drawn, space.sample(3, seeded(1))), name
        if space.decoder:
            made = space.decode(latents)
            assert made.shape == (2, 3, model.image_size, model.image_size) and made.dtype == torch.float32, name
            assert made.abs().max() <= 1 and made.device.type == "cpu", name


@pytest.mark.parametrize("name", ["mini-sd", *MODELS, "random"])
def test_every_space_of_a_bundled_model_does_what_it_says(name: str) -> None:
    model = load(name, device="cpu")
    check_spaces(model)
    digests = {name: space.digest for name, space in model.spaces.items()}
    assert len(set(digests.values())) == len(digests)
    assert digests == {name: space.digest for name, space in load(name, device="cpu").spaces.items()}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_space_of_a_pipeline_does_what_it_says(tiny_pipelines: dict[str, Model], name: str) -> None:
    model = tiny_pipelines[name]
    check_spaces(model)
    text = {"sdxl": ["text", "text-eos", "text-pooled"], "pixart": ["text"]}.get(name, ["text", "text-pooled"])
    assert list(model.spaces) == ["code", "inverted", "noised", "h", "noise", *text]
    again = tiny_pipeline(PIPELINES[name])
    assert {k: s.digest for k, s in model.spaces.items()} == {k: s.digest for k, s in again.spaces.items()}


def test_a_dit_s_spaces_are_those_of_its_class(dit_folder: Path) -> None:
    model = load(dit_folder, device="cpu")
    assert list(model.spaces) == ["code", "inverted", "noised", "h", "noise"]
    guided = model.conditioned(label=3, guidance=2.0)
    for conditioned in (model, guided):
        check_spaces(conditioned)
    noise = model.space("noise", steps=2).sample(1, seeded())
    assert not torch.allclose(*(m.space("noise", steps=2).decode(noise) for m in (model, guided)), atol=1e-3)
    assert model.space("noise").digest != guided.space("noise").digest


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_s_noise_decodes_to_what_it_paints(tiny_pipelines: dict[str, Model], name: str) -> None:
    space = tiny_pipelines[name].conditioned(prompt=RED, guidance=2.0).space("noise", steps=3)
    noise, painter = space.sample(1, seeded()), tiny_pipelines[name].painter
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "height": 32, "width": 32}
    expected = painter.paint([painter.row(RED, 0) | {"latents": noise}], **options)
    assert torch.allclose(space.decode(noise), expected.float(), atol=1e-3)


def test_the_pooled_embedding_is_what_the_pipeline_is_given(tiny_pipelines: dict[str, Model]) -> None:
    for name in ("sdxl", "sd3", "flux"):
        model = tiny_pipelines[name]
        space = model.space("text-pooled", steps=2)
        latents = space.encode([RED, MOON])
        assert torch.equal(latents[1], model.painter.embedded(MOON)["pooled_prompt_embeds"][0].float()), name
        # beside the empty caption's tokens: those of the empty caption give its picture
        empty = space.decode(space.encode([""]))
        assert torch.allclose(empty, model.generate([""], [0], num_inference_steps=2), atol=1e-5), name
        assert not torch.allclose(space.decode(latents[:1]), empty, atol=1e-4), name


def test_text_of_a_pipeline_that_leaves_tokens_out_leaves_the_same_out(tiny_pipelines: dict[str, Model]) -> None:
    model = tiny_pipelines["pixart"]
    space = model.space("text", steps=2)
    latents = space.encode([RED, "a"])
    kept = model.painter.embedded(RED)["prompt_attention_mask"][0].bool()
    assert torch.equal(latents[0].any(-1), kept) and not kept.all() and not torch.equal(latents[1].any(-1), kept)
    expected = model.generate([RED, "a"], [0, 0], num_inference_steps=2)
    assert torch.allclose(space.decode(latents), expected, atol=1e-5)


def test_a_digest_tells_all_that_makes_latents_apart_and_nothing_else(mini_sd: Model) -> None:
    told = [
        "noise",
        "noise:steps=10",
        "noised",
        "noised:t=5",
        "inverted",
        "inverted:method=edict",
        "code",
        "text",
        "text:seed=1",
    ]
    told += ["h", "h:t=400", "h:seed=1", "h:layer=conv_in", "h:layer=conv_in:stream=main", "h:layer=conv_in:stream=skip"]
    spaces = {spec: mini_sd.space(spec) for spec in told}
    assert len({space.digest for space in spaces.values()}) == len(told)
    # spelled otherwise it is the same
    for same in (mini_sd.space("noise:steps=50"), mini_sd.space("noise", steps=50, label="x")):
        assert same.digest == spaces["noise"].digest
    assert mini_sd.space("h:layer=mid_bloc[k]").digest == spaces["h"].digest == mini_sd.space("h", t=500).digest
    conditions = [{"prompt": RED}, {"prompt": RED, "guidance": 2.0}, {"prompt": MOON}, {"guidance": 2.0}]
    for name in ("noise", "h", "inverted"):
        assert len({spaces[name].digest, *(mini_sd.conditioned(**c).space(name).digest for c in conditions)}) == 5, name


@pytest.mark.slow
def test_digests_are_the_same_in_every_process(tmp_path: Path) -> None:
    """Also where a scheduler's file leaves much to its defaults, as those of Stable Diffusion 1 do."""
    from tests.conftest import tiny

    tiny().save_pretrained(tmp_path / "bare")
    code = "import sys, probekit; print(probekit.load_space(sys.argv[1], device='cpu').digest)"
    command = [sys.executable, "-c", code, f"{tmp_path / 'bare'}:noise"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == load_space(f"{tmp_path / 'bare'}:noise", device="cpu").digest


# --- the spelling ------------------------------------------------------------------------------------------------------


def test_a_space_is_named_by_its_model_its_name_and_its_parameters(mini_sd: Model) -> None:
    space = mini_sd.space("h:t=100:layer=up_blocks.1.attentions.0:steps=10")
    assert str(space) == "mini-sd:h:t=100:layer=up_blocks.1.attentions.0:steps=10"
    assert (space.model, space.family, space.image_size, space.name) == ("mini-sd", "text-to-image", 64, "h")
    wanted = {"layer": "up_blocks.1.attentions.0", "stream": None, "t": 100, "steps": 10, "seed": 0}
    assert dict(space.parameters) == wanted
    same = mini_sd.space("h", t=100, layer="up_blocks.1.attentions.0", steps=10)
    assert str(same) == "mini-sd:h:t=100:layer=up_blocks.1.attentions.0:steps=10" and same.digest == space.digest
    # the spelling of a space that was made in Python makes it again
    assert mini_sd.space(str(same).partition(":")[2]).digest == same.digest
    assert str(load_space("avatar-vae", device="cpu")) == "avatar-vae" and str(mini_sd.space()) == "mini-sd:code"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hh", "model 'mini-sd': no space 'hh'; it has code, inverted, noised, h, noise, text, text-eos"),
        ("", None),
        ("h:stepps=3", "space 'mini-sd:h:stepps=3': no parameter 'stepps'; it has steps"),
        ("code:t=3", "space 'mini-sd:code:t=3': no parameter 't'; it has none"),
        ("h:t=3:t=4", "space 'mini-sd:h:t=3:t=4': t is given twice"),
        ("h:t", "space 'mini-sd:h:t': 't' is no key=value"),
        ("h:=3", "'=3' is no key=value"),
        ("h::t=3", "'' is no key=value"),
        ("h:t=abc", "space 'mini-sd:h:t=abc': t 'abc' is not a whole number"),
        ("h:t=", "t '' is not a whole number"),
        ("h:t=1.5", "t '1.5' is not a whole number"),
        ("h:t=5000", "space 'mini-sd:h:t=5000': t 5000: the schedule has timesteps 0 to 999"),
        ("noised:t=-1", "t -1: the schedule has timesteps 0 to 999"),
        ("h:steps=0", "space 'mini-sd:h:steps=0': steps 0: choose 1 to 1000"),
        ("noised:steps=0", "steps 0: choose 1 to 1000"),
        ("noise:steps=1001", "steps 1001: choose 1 to 1000"),
        ("text:steps=0", "steps 0: choose 1 to 1000"),
        ("h:seed=-1", "seed -1: choose 0 to 4294967295"),
        ("text:seed=99999999999999999999", "seed 99999999999999999999: choose 0 to"),
        ("h:layer=mid_blok", r"space 'mini-sd:h:layer=mid_blok': no layer 'mid_blok' in this model \(nearest: mid_block"),
        ("h:layer=", "no layer ''"),
        ("h:layer=mid_block.*", r"layer 'mid_block.\*': names \d+ layers, one is needed \(mid_block\.\S+, …\)"),
        ("h:layer=@resnets", "layer '@resnets': names 11 layers"),
        ("h:stream=text", "stream 'text' of layer mid_block: it has main"),
        ("inverted:method=magic", "inversion 'magic': choose plain, fixed-point, newton, renoise, renoised, edict"),
    ],
)
def test_what_is_no_space_is_refused_in_one_line(mini_sd: Model, spec: str, message: str | None) -> None:
    if message is None:
        assert mini_sd.space(spec).name == "code"  # nothing asked for
        return
    with pytest.raises(ProbekitError, match=message) as error:
        mini_sd.space(spec)
    assert "mini-sd" in said(error)


def test_parameters_from_python_are_checked_as_those_of_a_spelling(mini_sd: Model) -> None:
    for value in (1.5, float("nan"), float("inf"), "x", [1]):
        with pytest.raises(ProbekitError, match="is not a whole number") as error:
            mini_sd.space("noised", t=value)
        said(error)
    assert mini_sd.space("noised", t=np.int64(3)).digest == mini_sd.space("noised:t=3").digest
    with pytest.raises(ProbekitError, match="t is given twice"):
        mini_sd.space("h:t=3", t=3)


TOY = '''
import torch

class Toy:
    """Colours of the four quarters."""
    image_size = 8

    def encode(self, images):
        return torch.nn.functional.avg_pool2d(images, 4).flatten(1)

    def decode(self, latents):
        return torch.nn.functional.interpolate(latents.reshape(-1, 3, 2, 2), scale_factor=4)
'''


def test_colons_may_be_part_of_paths_and_a_class_of_one_s_own_has_a_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.conftest import tiny

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(TOY)
    for spec in ("./my.py:Toy", "./my.py:Toy:latent", f"{tmp_path}/my.py:Toy:latent"):
        space = load_space(spec, device="cpu")
        assert (str(space), space.name, space.shape, space.family) == (spec, "latent", (12,), "custom")
        assert space.about == "Colours of the four quarters."
    tiny().save_pretrained(tmp_path / "a:b")
    tiny().save_pretrained(tmp_path / "a:b" / "c:h")
    assert load_space("a:b", device="cpu").name == "inverted"
    assert load_space("a:b:noised:t=7", device="cpu").parameters["t"] == 7
    assert load_space("./a:b/c:h", device="cpu").name == "inverted" and load_space("a:b/c:h:h", device="cpu").name == "h"
    for spec, message in {
        "./my.py:Toy:w": r"model 'my.py:Toy': no space 'w'; it has latent",
        "./my.py:Toy:latent:t=3": "no parameter 't'; it has none",
        "./my.py:Other:latent": "the file has no class 'Other'",
        "./none.py:Toy:latent": "cannot be read",
        "a:c:h": "model 'a': neither a bundled model",
        "mini-ds:h:t=3": r"model 'mini-ds': neither a bundled model \(mini-sd\)",
        ":h": "model ''",
        "": "model ''",
        "x" * 5000: "model 'xxx",
        f"{'x' * 5000}:h": "model 'xxx",
        "\0:h": "model",
    }.items():
        with pytest.raises(ProbekitError, match=message) as error:
            load_space(spec, device="cpu")
        assert len(said(error)) < 6000


def test_a_model_that_several_spaces_name_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    real = probekit.models.load
    monkeypatch.setattr(probekit.models, "load", lambda name, **options: loaded.append(name) or real(name, **options))
    specs = ["avatar-vae", "avatar-vae:mean", "avatar-ddpm:noised:t=10"]
    spaces = load_spaces(specs, device="cpu", baseline=True)
    assert [str(space) for space in spaces] == [*specs, "random"]
    assert loaded == ["avatar-vae", "avatar-ddpm", "random"]
    assert [space.name for space in spaces] == ["sample", "mean", "noised", "normal"]


# --- conditions --------------------------------------------------------------------------------------------------------


def test_conditions_that_a_model_has_no_use_for_are_refused_in_one_line(mini_sd: Model, dit_folder: Path) -> None:
    dit, gan = load(dit_folder, device="cpu"), load("avatar-gan", device="cpu")
    cases: list[tuple[Model, dict[str, Any], str]] = [
        (gan, {"prompt": "a dog"}, "--prompt 'a dog': model 'avatar-gan' takes none"),
        (gan, {"label": 1}, "--label 1: model 'avatar-gan' has no classes"),
        (gan, {"guidance": 2.0}, "--guidance 2: model 'avatar-gan' has no classes"),
        (mini_sd, {"label": 0}, "--label 0: model 'mini-sd' has no classes; give a --prompt"),
        (mini_sd, {"prompt": "a", "guidance": 0.5}, "--guidance 0.5: text-to-image pipelines are guided from 1"),
        (mini_sd, {"guidance": 0.0}, "--guidance 0: text-to-image pipelines"),
        (dit, {"prompt": "a dog"}, "--prompt 'a dog': model .* takes none"),
        (dit, {"label": 1000}, "--label 1000: model .* has classes 0 to 999"),
        (dit, {"label": -1}, "--label -1: model .* has classes 0 to 999"),
        (dit, {"guidance": 2.0}, "--guidance 2: model .* needs a --label to be guided to"),
    ]
    for model, condition, message in cases:
        with pytest.raises(ProbekitError, match=message) as error:
            model.conditioned(**condition)
        said(error)
    assert gan.conditioned() is gan and gan.conditioned(guidance=1.0) is gan  # which is none
    with pytest.raises(ProbekitError, match="model 'avatar-gan': a stylegan2, which takes no prompt") as error:
        gan.generate(["a dog"], [0])
    said(error)
    with pytest.raises(ProbekitError, match="a stylegan2, which makes no images from noise step by step") as error:
        gan.diffusion  # noqa: B018
    said(error)


def test_conditions_add_up(mini_sd: Model, dit_folder: Path) -> None:
    at_once, in_turn = (
        mini_sd.conditioned(prompt=RED, guidance=2.0),
        mini_sd.conditioned(prompt=MOON).conditioned(guidance=2.0).conditioned(prompt=RED),
    )
    assert at_once.diffusion.condition == in_turn.diffusion.condition == {"prompt": RED, "guidance": 2.0}
    assert at_once.space("noise").digest == in_turn.space("noise").digest and at_once.digest == mini_sd.digest
    dit = load(dit_folder, device="cpu").conditioned(label=3).conditioned(guidance=2.0)
    assert dit.diffusion.condition == {"label": 3, "guidance": 2.0}


@pytest.mark.parametrize("vae", [None, types.SimpleNamespace(config={"z_dim": 16})])
def test_a_pipeline_without_a_vae_or_with_one_of_another_kind_says_so(tiny_sd: Any, vae: Any) -> None:
    class Decoderless:
        """A pipeline that makes no images itself."""

        components: ClassVar[dict[str, Any]] = {"unet": tiny_sd.unet}
        unet, vae = tiny_sd.unet, None

        def set_progress_bar_config(self, disable: bool) -> None:
            pass

    Decoderless.vae = vae
    model = text_to_image.as_model(Decoderless(), "own")
    for use in (lambda: model.diffusion, lambda: model.space("h"), lambda: model.space()):
        with pytest.raises(ProbekitError, match="model 'own': a Decoderless, which has no VAE") as error:
            use()
        said(error)
    assert model.spaces == {} and model.layers


# --- a newcomer's family -----------------------------------------------------------------------------------------------

FAMILY = '''
"""Averages: the colour of every square of eight pixels."""

import json

import torch
import torch.nn.functional as F
from torch import nn

from probekit.latents import LatentSpace
from probekit.models.formats import Format
from probekit.models.model import Model


class Squares(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size, self.gain = size, nn.Parameter(torch.tensor(2.0))


def as_model(network, name):
    n = network.size // 8

    def colours(blur: float = 0.0, top: int = 0) -> LatentSpace:
        def encode(images, generator):
            noise = torch.randn(len(images), 3 * n * n, generator=generator)
            return network.gain * F.avg_pool2d(images, 8).flatten(1) + blur * noise

        def decode(latents):
            return F.interpolate((latents / network.gain).reshape(-1, 3, n, n), scale_factor=8)

        told = {"blur": blur, "top": top}
        return LatentSpace("colours", (3 * n * n,), "the colour of every square", encode, decode, parameters=told)

    return Model(name, "squares", network.size, network, {"colours": colours})


def read(place):
    return as_model(Squares(json.loads((place.path / "squares.json").read_text())["size"]), place.name)


FORMATS = (Format("squares", lambda place: (place.path / "squares.json").is_file(), read),)
'''


def test_a_newcomer_adds_a_family_in_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "squares_family.py").write_text(FAMILY)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "squares.json").write_text(json.dumps({"size": 32}))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProbekitError, match="the folder is no model"):
        load(tmp_path / "model")
    import squares_family  # type: ignore[import-not-found]

    monkeypatch.setattr(probekit.models, "FORMATS", [*probekit.models.FORMATS])
    probekit.models.FORMATS.extend(squares_family.FORMATS)  # the one line, in probekit/models/__init__.py

    model = load(tmp_path / "model", device="cpu")
    assert (model.family, model.image_size, model.parameters, list(model.spaces)) == ("squares", 32, 1, ["colours"])
    check_spaces(model)
    space = load_space("model:colours:blur=0.5:top=1", device="cpu")
    assert dict(space.parameters) == {"blur": 0.5, "top": 1} and space.digest != model.space().digest
    for spec, message in {
        "model:colours:blur=much": "space 'model:colours:blur=much': blur 'much' is not a number",
        "model:colours:bler=1": "no parameter 'bler'; it has blur",
        "model:h": "no space 'h'; it has colours",
    }.items():
        with pytest.raises(ProbekitError, match=message) as error:
            load_space(spec, device="cpu")
        said(error)
    with pytest.raises(ProbekitError, match=r"model '.*': a squares, which makes no images from noise step by step"):
        model.diffusion  # noqa: B018

    # through the store on the disk, and beside another model's space for the same images
    data = load_data("avatars", 32)
    store = LatentStore(tmp_path / "latents", space, data, seed=3)
    store.encode([5, 7])
    held = LatentStore(tmp_path / "latents", load_space("model:colours:blur=0.5:top=1", device="cpu"), data, seed=3)
    assert np.array_equal(store.read([7, 5]), held.read([7, 5])) and held.encoded.tolist() == list(range(100))
    spaces = load_spaces(["model", "avatar-vae:mean"], device="cpu")
    (codes,) = code_sets(spaces, "avatars", 20, 10, 0).values()
    latents = codes.of(spaces[0], "test")
    expected = 2 * torch.nn.functional.avg_pool2d(codes.images("test"), 8).flatten(1)
    assert np.allclose(latents, expected.numpy(), atol=1e-5)
    assert codes.of(spaces[1], "train").shape == (20, 128)


def test_a_space_that_lacks_a_way_says_which(any_shape: None) -> None:
    space = LatentSpace("z", (2,), "nothing", model="m", label="m:z")
    for use, message in (
        (lambda: space.encode(torch.zeros(1, 3, 8, 8)), "space 'm:z': cannot encode images"),
        (lambda: space.decode(torch.zeros(1, 2)), "space 'm:z': cannot decode latents"),
        (lambda: space.sample(1, seeded()), "space 'm:z': has no prior to sample from"),
    ):
        with pytest.raises(ProbekitError, match=message) as error:
            use()
        said(error)

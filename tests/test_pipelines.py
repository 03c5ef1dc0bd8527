"""Every text-to-image pipeline of diffusers: it loads, paints its own pictures, and every row has its own noise."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from probekit import ProbekitError, hooks, load, seeds
from probekit.hooks.pictures import pictures
from probekit.models import Model
from probekit.models.families import text_to_image
from tests.conftest import probekit, refused, tiny_vae
from tests.pipelines import (
    MOON,
    PIPELINES,
    RED,
    build,
    call,
    cascade_decoder,
    cascade_prior,
    each,
    kandinsky22_decoder,
    kandinsky_decoder,
    kandinsky_prior,
    picture,
    row,
    vae,
)

PAINTERS = [name for name in PIPELINES if name != "dit"]
OF_PICTURES = [name for name in PAINTERS if PIPELINES[name].pictures]
NUMBERS = (1, 2)


def model(name: str) -> Model:
    return text_to_image.as_model(build(name), name)


def generators(numbers: Sequence[int] = NUMBERS) -> list[torch.Generator]:
    return [seeds.numbered(0, number) for number in numbers]


@torch.no_grad()
def own(name: str, captions: Sequence[str] = (RED, MOON), **options: Any) -> Tensor:
    """The pipeline's own pictures, in [-1, 1]."""
    batches = [slice(0, 1), slice(1, 2)] if name == "prx" else [slice(0, 2)]  # PRX's pipeline can guide one caption only
    made = [
        torch.from_numpy(build(name)(**call(name, captions[part], generators()[part], **options), output_type="np")[0])
        for part in batches
    ]
    return torch.cat(made).permute(0, 3, 1, 2) * 2 - 1


@contextlib.contextmanager
def watched(name: str) -> Iterator[list[Any]]:
    """Meanwhile, what the denoiser is called with: the noisy picture."""
    states: list[Any] = []

    def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(next(value for value in (*args, *kwargs.values()) if value is not None))

    handle = hooks.denoiser(build(name)).register_forward_pre_hook(listen, with_kwargs=True)
    try:
        yield states
    finally:
        handle.remove()


@pytest.mark.parametrize("name", each(PAINTERS))
def test_a_picture_is_the_pipeline_s_own(name: str) -> None:
    tiny, expected = PIPELINES[name], own(name)
    assert (expected[0] - expected[1]).abs().mean() > 0.1  # captions and noises matter
    with watched(name) as states:
        made = model(name).generate([RED, MOON], NUMBERS, **tiny.options, **tiny.guided, **tiny.pictures)
    assert made.shape == expected.shape and made.dtype == torch.float32
    assert torch.allclose(made, expected, atol=1e-5)
    # and the table says rightly how the denoiser is called under guidance
    branches = 3 if "pag_scale" in tiny.guided else 2 if tiny.guidance == "one call" else 1
    calls = 2 if tiny.guidance == "two calls" else 1
    assert [len(state) for state in states] == [2 * branches] * calls * tiny.options["num_inference_steps"]


@pytest.mark.parametrize("name", each(PAINTERS))
def test_layers_are_watched_on_a_picture_of_the_config_s_size(name: str) -> None:
    loaded, side = model(name), hooks.denoiser(build(name)).config.get("sample_size")
    if side is None:  # the pipeline's own size, hundreds of pixels
        loaded.painter.defaults |= {key: PIPELINES[name].options[key] for key in ("height", "width")}
    with watched(name) as states:
        loaded.denoise_once()
    assert states and (side is None or states[0].shape[-2:] == (side, side))


@pytest.mark.slow
def test_layers_are_watched_on_a_picture_of_the_pipeline_s_own_size() -> None:
    for name in PAINTERS:
        if hooks.denoiser(build(name)).config.get("sample_size") is None:
            with watched(name) as states:
                model(name).denoise_once()
            assert states, name


@pytest.mark.parametrize("name", each(name for name in PAINTERS if name != "flux_true"))
def test_a_saved_pipeline_loads_as_it_is(name: str, tmp_path: Path) -> None:
    pipeline = build(name)
    pipeline.save_pretrained(tmp_path / name)
    loaded = load(tmp_path / name, device="cpu").pipeline
    assert type(loaded) is type(pipeline)
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            weights = getattr(loaded, part).state_dict()
            assert all(torch.equal(weights[key], value) for key, value in module.state_dict().items()), part


# --- decoders, whose priors lie elsewhere --------------------------------------------------------------------------------

DECODERS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "kandinsky": (kandinsky_decoder, "KandinskyPriorPipeline", "KandinskyCombinedPipeline"),
    "kandinsky22": (kandinsky22_decoder, "KandinskyV22PriorPipeline", "KandinskyV22CombinedPipeline"),
    "cascade": (cascade_decoder, "StableCascadePriorPipeline", "StableCascadeCombinedPipeline"),
}


@pytest.mark.parametrize("name", each(DECODERS))
def test_a_decoder_paints_with_the_prior_that_its_card_names(name: str, tmp_path: Path) -> None:
    decoder, prior, combined = DECODERS[name]
    folder, card = tmp_path / "decoder", tmp_path / "decoder" / "README.md"
    decoder().save_pretrained(folder)
    for text in (None, "A model.", "---\nlicense: mit\n---\n"):
        if text is not None:
            card.write_text(text)
        with pytest.raises(ProbekitError, match="decodes the image embeddings of a prior; name its folder") as error:
            load(folder, device="cpu")
        assert decoder().__class__.__name__ in str(error.value) and "\n" not in str(error.value)
    parts = (cascade_prior if name == "cascade" else kandinsky_prior)()
    getattr(diffusers, prior)(**parts).save_pretrained(tmp_path / "prior")
    card.write_text(f"---\nprior:\n- {tmp_path / 'prior'}\n---\n")
    if name == "cascade":  # as the published one names it
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"vqgan": ["wuerstchen", "PaellaVQModel"]}))
    loaded = load(folder, device="cpu")
    assert type(loaded.pipeline).__name__ == combined
    tiny = PIPELINES[name]
    whole = text_to_image.as_model(getattr(diffusers, combined)(**loaded.pipeline.components), name)
    made = loaded.generate([RED], [1], **tiny.options, **tiny.guided)
    assert torch.equal(made, whole.generate([RED], [1], **tiny.options, **tiny.guided))
    assert made.std() > 0.1


def test_what_takes_no_caption_is_refused(tmp_path: Path) -> None:
    from diffusers import KandinskyV22PriorPipeline, StableDiffusionImageVariationPipeline

    parts, prior = build("sd").components, kandinsky_prior()
    shared = {part: parts[part] for part in ("vae", "unet", "scheduler")}
    of_images = {"image_encoder": prior["image_encoder"], "feature_extractor": prior["image_processor"], "safety_checker": None}
    variation = StableDiffusionImageVariationPipeline(**shared, **of_images, requires_safety_checker=False)
    variation.save_pretrained(tmp_path / "variation")
    KandinskyV22PriorPipeline(**prior).save_pretrained(tmp_path / "prior")
    assert "a StableDiffusionImageVariationPipeline takes no prompt" in refused("layers", tmp_path / "variation")
    assert "KandinskyV22PriorPipeline has neither a unet nor a transformer" in refused("layers", tmp_path / "prior")


# --- options that are a row's, or the encoders' --------------------------------------------------------------------------


@pytest.mark.parametrize("name", each(OF_PICTURES))
def test_what_paints_from_pictures_says_so_without_them(name: str) -> None:
    painter, (missing,) = model(name).painter, PIPELINES[name].pictures
    expected = f"a {painter.kind} does not paint from a caption alone; give {missing} in Python"
    with pytest.raises(ProbekitError, match=expected) as error:
        painter.generate([RED], [1], num_inference_steps=1)
    assert "\n" not in str(error.value)
    with pytest.raises(ProbekitError, match=expected):
        painter.sweep((RED, 1), (MOON, 1), [[]], num_inference_steps=1)


def test_the_command_line_says_so_too(tmp_path: Path) -> None:
    build("sd_controlnet").save_pretrained(tmp_path / "model")
    captions = ["--prompt-original", RED, "--prompt-edit", MOON, "--layers", "mid_block", "--out", tmp_path / "a.png"]
    said = refused("inject", "image", "--model", tmp_path / "model", *captions, "--num-steps", "1")
    assert "a StableDiffusionControlNetPipeline does not paint from a caption alone; give image in Python" in said
    shown = probekit("layers", tmp_path / "model")
    assert shown.returncode == 0 and "mid_block" in shown.stdout


def test_each_row_may_have_its_own_picture() -> None:
    painter, options = model("sd_controlnet").painter, PIPELINES["sd_controlnet"].options
    dark = picture().point(lambda value: value // 4)
    rows = [painter.row(RED, 1, image=image) for image in (picture(), dark)]
    made = painter.paint(rows, **options)
    assert torch.allclose(made[:1], painter.generate([RED], [1], image=picture(), **options), atol=1e-5)
    assert (made[0] - made[1]).abs().mean() > 0.01


# options that change the text a pipeline paints from: they must reach the encoders, which run before it does
ENCODING: dict[str, dict[str, Any]] = {
    "sd": {"negative_prompt": MOON},
    "sdxl": {"negative_prompt": MOON, "prompt_2": MOON, "clip_skip": 1},
    "sd3": {"negative_prompt": MOON, "prompt_3": MOON, "max_sequence_length": 8, "clip_skip": 1},
    "flux": {"prompt_2": MOON, "max_sequence_length": 8},
    "flux_true": {"negative_prompt": "small", "max_sequence_length": 8},
    "pixart": {"negative_prompt": MOON, "max_sequence_length": 8},
    "pixart_sigma": {"negative_prompt": MOON, "max_sequence_length": 8},
    "hunyuan_dit": {"negative_prompt": MOON},
    "cascade": {"negative_prompt": MOON},
    "aura_flow": {"negative_prompt": MOON, "max_sequence_length": 8},
}


@pytest.mark.parametrize("name", each(ENCODING))
def test_options_reach_the_encoders_of_text(name: str) -> None:
    told, tiny = ENCODING[name], PIPELINES[name]
    captions = {key: [value] * 2 for key, value in told.items() if key.startswith("prompt")}
    expected = own(name, **told | captions)
    assert (expected - own(name)).abs().mean() > 1e-3
    made = model(name).generate([RED, MOON], NUMBERS, **{**tiny.options, **tiny.guided, **told})
    assert torch.allclose(made, expected, atol=1e-5)


def test_options_of_captions_that_come_too_late_are_refused() -> None:
    painter = model("sd").painter
    with pytest.raises(ProbekitError, match="clip_skip: the captions of these rows are encoded already; give it to `row`"):
        painter.paint([painter.row(RED, 1)], clip_skip=1)
    # whose own pipeline fails there: it doubles the captions, and not the generators
    with pytest.raises(
        ProbekitError, match="negative_prompt: the prior of model 'kandinsky', a KandinskyCombinedPipeline, has"
    ):
        model("kandinsky").generate([RED], [1], negative_prompt=MOON)


# what classifier-free guidance is called, where it is not `guidance_scale`
@pytest.mark.parametrize("name, told", [("cascade", {}), ("qwen_image", {"negative_prompt": " "})])
def test_guidance_has_one_name(name: str, told: dict[str, Any]) -> None:
    tiny, loaded = PIPELINES[name], model(name)
    (its,) = tiny.guided.keys() - {"negative_prompt"}
    made = loaded.generate([RED], [1], **tiny.options, guidance_scale=2.5)
    expected = loaded.generate([RED], [1], **tiny.options, **{its: 2.5}, **told)
    assert torch.equal(made, expected)
    assert (made - loaded.generate([RED], [1], **tiny.options, guidance_scale=1.0)).abs().mean() > 0.01


def test_options_that_a_pipeline_does_not_have_are_refused() -> None:
    for name, option, near in (
        ("hunyuan_image", "guidance_scale", "; it takes distilled_guidance_scale"),
        ("sd", "num_inference_step", "; it takes num_inference_steps"),
        ("sd", "nonsense", ""),
    ):
        expected = f"{option}: model {name!r}, a {type(build(name)).__name__}, has no such option{near}"
        for paint in (model(name).generate, lambda p, n, name=name, **o: model(name).sweep((RED, 1), (RED, 1), [[]], **o)):
            with pytest.raises(ProbekitError) as error:
                paint([RED], [1], **{option: 2})
            assert str(error.value).startswith(expected)


@pytest.mark.parametrize("name", ["sd", "pixart", "flux"])
def test_captions_that_are_read_anew_are_the_same(name: str) -> None:
    """A sweep over layers of text encoders hands the pipeline text instead of embeddings."""
    tiny, loaded = PIPELINES[name], model(name)
    told = ENCODING[name] | {"negative_prompt": MOON} if name != "flux" else ENCODING[name]
    options = {**tiny.options, **tiny.guided, **told}
    layer = next(la.name for la in hooks.text_layers(loaded.pipeline))
    swept = loaded.sweep((RED, 1), (MOON, 2), [[], [hooks.Injection(layer)]], **options)
    expected = loaded.generate([RED, MOON], [1, 2], **options)
    assert torch.allclose(swept.images[0], expected[0], atol=1e-5) and torch.allclose(swept.edit, expected[1], atol=1e-5)
    assert (swept.images[1] - swept.images[0]).abs().mean() > 1e-3


def test_a_row_may_start_from_a_latent() -> None:
    loaded, options = model("sd"), {**PIPELINES["sd"].options, **PIPELINES["sd"].guided}
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = loaded.pipeline(RED, latents=latent, output_type="np", **options)[0]
    made = loaded.generate([RED, RED], [latent, latent], **options)
    assert torch.allclose(made, torch.from_numpy(expected).permute(0, 3, 1, 2) * 2 - 1, atol=1e-5)


def test_a_row_is_one_picture() -> None:
    for paint in (model("sd").generate, lambda p, n, **o: model("sd").sweep((p[0], n[0]), (p[0], n[0]), [[]], **o)):
        with pytest.raises(ProbekitError, match="num_images_per_prompt 2: a row is one picture; give as many rows"):
            paint([RED], [1], num_inference_steps=1, num_images_per_prompt=2)


def test_sana_sprint_takes_other_numbers_of_steps() -> None:
    made = model("sana_sprint").generate([RED], [1], **{**PIPELINES["sana_sprint"].options, "num_inference_steps": 3})
    assert made.isfinite().all() and made.std() > 0.1


# --- each row's own noise ------------------------------------------------------------------------------------------------

# what draws noise in its steps, on a pipeline that it is for
DRAWING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ancestral": ("sd", "EulerAncestralDiscreteScheduler", {}),
    "ancestral second order": ("sd", "KDPM2AncestralDiscreteScheduler", {}),
    "ddpm": ("sd", "DDPMScheduler", {}),
    "lcm": ("lcm", "LCMScheduler", {}),
    "dpm-solver++ sde": ("sd", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm-solver sde": ("sd", "DPMSolverSDEScheduler", {}),
    "flow": ("sd3", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    "flow lcm": ("flux", "FlowMatchLCMScheduler", {}),
}


@pytest.fixture
def bare_objects() -> Iterator[None]:
    """nnsight, where another test has used it, gives every object a `save`, which torchsde would take for one of its names."""
    if not hasattr(object, "save"):
        yield
        return
    import nnsight
    from nnsight._c import mount, unmount

    unmount("save")
    yield
    mount(nnsight.save, "save")


@pytest.mark.usefixtures("bare_objects")
@pytest.mark.parametrize("case", DRAWING)
def test_rows_of_one_generator_see_one_noise_in_every_step(case: str) -> None:
    name, scheduler, config = DRAWING[case]
    pipeline = copy.copy(build(name))
    pipeline.scheduler = getattr(diffusers, scheduler)(**config)
    painter = text_to_image.as_model(pipeline, name).painter
    options = {**PIPELINES[name].options, **PIPELINES[name].guided, "num_inference_steps": 4}
    made = painter.paint([painter.row(RED, number) for number in (1, 1, 2, 1)], **options)
    assert torch.allclose(made[1], made[0], atol=1e-6) and torch.allclose(made[3], made[0], atol=1e-6)
    assert (made[2] - made[0]).abs().mean() > 0.1
    # alone, and at another time, it is the same
    assert torch.allclose(painter.paint([painter.row(RED, 1)], **options)[0], made[0], atol=1e-4)
    # in a sweep, too
    swept = painter.sweep((RED, 1), (MOON, 2), [[], [], []], **options)
    assert torch.allclose(swept.images, made[:1].expand_as(swept.images), atol=1e-4)
    # and it is there: from one start, other generators go other ways
    start = painter.row(RED, torch.randn((1, 64, 16) if name == "flux" else (1, 4, 16, 16)))
    ways = painter.paint([start | {"generator": seeds.numbered(0, number)} for number in (1, 2)], **options)
    assert (ways[0] - ways[1]).abs().mean() > 0.01


@pytest.mark.parametrize("name", ["sd3_controlnet", "hunyuan_dit_controlnet"])
def test_rows_of_one_generator_see_one_code_of_a_control_picture(name: str) -> None:
    pipeline = copy.copy(build(name))
    pipeline.vae = tiny_vae() if name == "sd3_controlnet" else vae()  # whose codes are drawn
    painter, tiny = text_to_image.as_model(pipeline, name).painter, PIPELINES[name]
    made = painter.generate([RED] * 4, [1, 1, 2, 1], **tiny.options, **tiny.guided, **tiny.pictures)
    assert torch.allclose(made[1], made[0], atol=1e-5) and torch.allclose(made[3], made[0], atol=1e-5)
    assert (made[2] - made[0]).abs().mean() > 0.1
    again = painter.generate([RED], [1], **tiny.options, **tiny.guided, **tiny.pictures)
    assert torch.allclose(again[0], made[0], atol=1e-5)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("name", ["sd3_controlnet", "prx"])
def test_painting_leaves_no_trace(name: str) -> None:
    pipeline, tiny = build(name), PIPELINES[name]
    rows = [row(name, RED, seeds.numbered(0, 1))]
    state = rows[0]["generator"].get_state()

    def stop(*_: Any) -> None:
        raise Stop

    for failing in (False, True):
        denoiser = hooks.denoiser(pipeline)
        handle = denoiser.register_forward_hook(stop) if failing else None
        with pytest.raises(Stop) if failing else contextlib.nullcontext():
            pictures(pipeline, rows, **tiny.options, **tiny.guided)
        if handle is not None:
            handle.remove()
        assert "step" not in vars(pipeline.scheduler) and "encode" not in vars(pipeline.vae)
        assert not denoiser._forward_pre_hooks and not denoiser._forward_hooks
        assert torch.equal(rows[0]["generator"].get_state(), state)  # rows are used again


# --- spaces --------------------------------------------------------------------------------------------------------------

WITH_SPACES = ("sd", "sdxl", "sd3", "flux", "flux_true", "pixart", "pixart_sigma", "hunyuan_dit")


def test_only_what_samples_as_it_paints_has_spaces() -> None:
    assert {name for name in PAINTERS if model(name).makers} == set(WITH_SPACES)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", ["pixart_sigma", "hunyuan_dit"])  # others: tests/test_spaces.py
def test_noise_decodes_to_what_the_pipeline_paints_from_it(name: str, guidance: float) -> None:
    loaded = model(name).conditioned(prompt=RED, guidance=guidance)
    space = loaded.space("noise", steps=3)
    noise = space.sample(2, torch.Generator().manual_seed(0))
    options = {**PIPELINES[name].options, "num_inference_steps": 3, "guidance_scale": guidance}
    assert torch.allclose(space.decode(noise), loaded.generate([RED] * 2, noise.split(1), **options), atol=1e-5)

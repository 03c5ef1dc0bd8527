from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from probekit import hooks
from probekit.hooks import Injection, Steps
from tests.conftest import embedded

RED = "a large red fish at the top left on a striped blue ground"
MOON = "a small white moon at the right on a plain green ground"


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class Case:
    """A pipeline with rows E and O and the options of a short run."""

    def __init__(self, pipeline: Any, original: dict[str, Any], edit: dict[str, Any], **options: Any) -> None:
        self.pipeline, self.original, self.edit, self.options = pipeline, original, edit, options
        self.denoiser = hooks.denoiser(pipeline)
        self.layers = hooks.layers(self.denoiser)

    def sweep(self, rules: list[list[Injection]], *, itself: bool = False, **options: Any) -> hooks.Swept:
        original = self.edit if itself else self.original
        return hooks.sweep(self.pipeline, original=original, edit=self.edit, rules=rules, **self.options | options)


@pytest.fixture(params=["sd guidance 1", "sd guidance 3", "sd3", "flux"])
def case(request: pytest.FixtureRequest) -> Case:
    kind = request.param
    if kind.startswith("sd guidance"):
        rows = [{"prompt": prompt, "generator": generator()} for prompt in (MOON, RED)]
        return Case(request.getfixturevalue("tiny_sd"), *rows, num_inference_steps=3, guidance_scale=float(kind[-1]))
    rows = [embedded(seed, negative=kind == "sd3") for seed in (1, 2)]
    scale = 3.0 if kind == "sd3" else 0.0
    pipeline = request.getfixturevalue(f"tiny_{kind}")
    return Case(pipeline, *rows, num_inference_steps=3, guidance_scale=scale, height=16, width=16)


def test_injecting_e_into_itself_gives_e_at_every_layer_and_stream(case: Case) -> None:
    layers = [la for i, la in enumerate(case.layers) if la.inside is None or i % 7 == 0]  # test_architectures sees them all
    swept = case.sweep([[Injection(la.name, stream=s)] for la in layers for s in la.streams], itself=True)
    assert all(torch.equal(image, swept.edit) for image in swept.images)


def test_the_last_layer_from_e_at_every_step_gives_e(case: Case) -> None:
    swept = case.sweep([[], [Injection(case.layers[-1].name)]])
    assert not torch.allclose(swept.images[0], swept.edit, atol=1e-2)
    assert torch.allclose(swept.images[1], swept.edit, atol=1e-5)


def test_an_empty_rule_is_the_pipeline_untouched(case: Case) -> None:
    swept = case.sweep([[]])
    alone = case.pipeline(**hooks.stack([case.original]), **case.options, output_type="pt").images[0]
    assert torch.allclose(swept.images[0], alone, atol=1e-5)


def test_the_result_does_not_depend_on_the_batch_size(case: Case) -> None:
    rules = [[], *([Injection(la.name)] for la in case.layers if la.inside is None)]
    whole, parts = case.sweep(rules), case.sweep(rules, batch_size=4)
    assert torch.allclose(whole.images, parts.images, atol=1e-5)


def test_an_injection_equals_the_same_one_in_plain_nnsight(case: Case) -> None:
    traced = hooks.trace(case.pipeline)
    steps = case.options["num_inference_steps"]
    doubled = case.options["guidance_scale"] > 1
    blocks = {"unet": ["down_blocks.1.resnets.0", "mid_block.attentions.0", "up_blocks.1.resnets.1"]}
    kind = "unet" if hasattr(case.pipeline, "unet") else "transformer"
    for name in blocks.get(kind, ["transformer_blocks.0", "transformer_blocks.1"]):
        ours = case.sweep([[Injection(name)]])
        rows = hooks.stack([case.edit, case.original])
        with traced.generate(**rows, **case.options, output_type="pt") as tracer:
            for _ in tracer.iter[:steps]:
                out = hooks.layer(getattr(traced, kind), name).output
                stream = out[1] if kind == "transformer" else out[0] if "attentions" in name else out
                stream[1] = stream[0]
                if doubled:
                    stream[3] = stream[2]
            theirs = traced.output.save()
        assert torch.allclose(ours.images[0], theirs.images[1], atol=1e-5), name


def test_flux_keeps_its_picture_in_the_image_stream(tiny_flux: Any) -> None:
    case = Case(
        tiny_flux,
        embedded(1, negative=False),
        embedded(2, negative=False),
        num_inference_steps=3,
        guidance_scale=0.0,
        height=16,
        width=16,
    )
    last = [la.name for la in case.layers if la.name.startswith("single_transformer_blocks")][-1]
    original, text, both, image = case.sweep([[], *([Injection(last, stream=s)] for s in ("text", "both", "image"))]).images
    assert torch.allclose(text, original, atol=1e-6)
    assert torch.allclose(both, image, atol=1e-6)
    assert not torch.allclose(image, original, atol=1e-2)


def test_the_image_stream_of_fluxs_last_block_is_everything_for_one_prompt(tiny_flux: Any) -> None:
    # same prompt, other noise: after the last block only the image stream differs between O and E
    original, edit = embedded(1, negative=False), embedded(1, negative=False)
    edit["generator"] = torch.Generator().manual_seed(8)
    case = Case(tiny_flux, original, edit, num_inference_steps=1, guidance_scale=0.0, height=16, width=16)
    denoiser = case.denoiser
    last = [la.name for la in case.layers if la.name.startswith("single_transformer_blocks")][-1]
    predictions: list[Tensor] = []
    handle = denoiser.register_forward_hook(lambda m, a, o: predictions.append(o[0].clone()))
    case.sweep([[Injection(last, stream="image")], []])
    handle.remove()
    edit_prediction, injected, untouched = predictions[0]
    assert torch.allclose(injected, edit_prediction, atol=1e-6)
    assert not torch.allclose(untouched, edit_prediction, atol=1e-3)


def test_main_skip_and_both_are_three_injections_and_skip_plus_main_is_both(tiny_sd: Any) -> None:
    rows = [{"prompt": prompt, "generator": generator()} for prompt in (MOON, RED)]
    case = Case(tiny_sd, *rows, num_inference_steps=2, guidance_scale=2.0)
    for la in case.layers:
        if "skip" not in la.streams:
            continue
        rules = [[Injection(la.name, stream=s)] for s in ("main", "skip", "both")]
        rules.append([Injection(la.name, stream="main"), Injection(la.name, stream="skip")])
        main, skip, both, joined = case.sweep(rules).images
        assert torch.allclose(joined, both, atol=1e-6), la.name
        assert not torch.allclose(main, skip, atol=1e-4), la.name
        assert not torch.allclose(skip, both, atol=1e-5), la.name
        # a downsampler feeds one resnet that remakes the main path from it, so main and both stay different everywhere
        assert not torch.allclose(main, both, atol=1e-5), la.name


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "HeunDiscreteScheduler", "EulerDiscreteScheduler", "DDIMScheduler"])
def test_the_right_steps_are_injected_under_every_scheduler(tiny_sd: Any, scheduler: str) -> None:
    import diffusers

    before = tiny_sd.scheduler
    options = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    tiny_sd.scheduler = getattr(diffusers, scheduler).from_config(before.config, **options)
    try:
        at: list[tuple[int, float]] = []

        def note(target: Tensor, source: Tensor, context: hooks.Context) -> Tensor:
            at.append((context.step, context.timestep))
            return target

        rows = [{"prompt": prompt, "generator": generator()} for prompt in (MOON, RED)]
        case = Case(tiny_sd, *rows, num_inference_steps=6, guidance_scale=2.0)
        called: list[float] = []
        handle = tiny_sd.unet.register_forward_pre_hook(lambda m, a, k: called.append(float(a[1])), with_kwargs=True)
        case.sweep([[Injection("mid_block", steps=Steps(indices=(1, 2)), operation=note)]])
        handle.remove()
        distinct = list(dict.fromkeys(called))
        assert len(distinct) == 6
        # every call at those timesteps is injected, the second one of Heun and PNDM included, and no other
        assert [t for _, t in at] == [t for t in called if t in distinct[1:3]]
        assert {step for step, _ in at} == {1, 2}
        assert len(called) == {"PNDMScheduler": 7, "HeunDiscreteScheduler": 11}.get(scheduler, 6)
    finally:
        tiny_sd.scheduler = before


def test_conditional_goes_into_conditional_and_unconditional_into_unconditional(tiny_sd: Any) -> None:
    rows = [{"prompt": prompt, "generator": generator()} for prompt in (MOON, RED)]
    case = Case(tiny_sd, *rows, num_inference_steps=1, guidance_scale=3.0)
    seen: list[Tensor] = []
    handle = tiny_sd.unet.mid_block.register_forward_hook(lambda m, a, o: seen.append(o.clone()))
    taken: list[Tensor] = []

    def take(target: Tensor, source: Tensor, context: hooks.Context) -> Tensor:
        taken.append(source.clone())
        return source

    case.sweep([[Injection("mid_block", operation=take)]])
    handle.remove()
    # batch is [uncond E, uncond O, cond E, cond O]
    assert torch.equal(taken[0], seen[0][[0, 2]])


def test_blend_add_mask_and_function_do_what_they_say(tiny_sd: Any) -> None:
    rows = [{"prompt": prompt, "generator": generator()} for prompt in (MOON, RED)]
    case = Case(tiny_sd, *rows, num_inference_steps=2, guidance_scale=2.0)
    half = torch.zeros(16, 16)
    half[:, 8:] = 1
    rules = [
        [],
        [Injection("mid_block")],
        [Injection("mid_block", operation=hooks.blend(0.0))],
        [Injection("mid_block", operation=hooks.blend(1.0))],
        [Injection("mid_block", operation=hooks.add(0.0))],
        [Injection("mid_block", operation=lambda target, source, context: source)],
        [Injection("mid_block", mask=torch.ones(4, 4))],
        [Injection("mid_block", mask=torch.zeros(4, 4))],
        [Injection("mid_block", mask=half)],
        [Injection("mid_block", operation=hooks.blend(0.5))],
    ]
    o, replaced, blend0, blend1, add0, function, all_of_it, none_of_it, masked, blended = case.sweep(rules).images
    for same in (blend0, add0, none_of_it):
        assert torch.allclose(same, o, atol=1e-6)
    for same in (blend1, function, all_of_it):
        assert torch.allclose(same, replaced, atol=1e-6)
    for other in (masked, blended):
        assert not torch.allclose(other, o, atol=1e-4) and not torch.allclose(other, replaced, atol=1e-4)


def test_a_mask_writes_inside_it_only(tiny_sd: Any) -> None:
    before = torch.zeros(2, 8, 8, 8)

    def write(target: Tensor, source: Tensor, context: hooks.Context) -> Tensor:
        before.copy_(target)
        return torch.full_like(target, 7.0)

    half = torch.zeros(16, 16)
    half[:, 8:] = 1
    rows = [{"prompt": prompt, "generator": generator()} for prompt in (MOON, RED)]
    name = "down_blocks.0.downsamplers.0"
    seen: list[Tensor] = []
    observe = tiny_sd.unet.down_blocks[0].register_forward_hook(lambda m, a, o: seen.append(o[0][[1, 3]]))
    try:
        Case(tiny_sd, *rows, num_inference_steps=1, guidance_scale=2.0).sweep([[Injection(name, mask=half, operation=write)]])
    finally:
        observe.remove()
    assert torch.equal(seen[0][..., :4], before[..., :4])
    assert (seen[0][..., 4:] == 7).all()


def test_tokens_are_written_alone(tiny_sd3: Any) -> None:
    case = Case(
        tiny_sd3,
        embedded(1, negative=True),
        embedded(2, negative=True),
        num_inference_steps=1,
        guidance_scale=2.0,
        height=16,
        width=16,
    )
    every = [Injection("transformer_blocks.1", tokens=tuple(range(16)))]
    one = [Injection("transformer_blocks.1", tokens=(3,))]
    o, whole, plain, single = case.sweep([[], every, [Injection("transformer_blocks.1")], one]).images
    assert torch.allclose(whole, plain, atol=1e-6)
    assert not torch.allclose(single, o, atol=1e-5) and not torch.allclose(single, plain, atol=1e-4)


@pytest.mark.parametrize("to", ["device", "half", "disk"])
def test_a_stored_capture_injects_as_the_row_itself_does(case: Case, to: str, tmp_path: Path) -> None:
    names = [la.name for la in case.layers if la.kind in ("mid", "block", "attention")][:3]
    place: Any = tmp_path / "store" if to == "disk" else to
    denoiser, schedule = case.denoiser, case.pipeline.scheduler
    with hooks.capture(denoiser, names, schedule=schedule, rows=1, to=place) as captured:
        case.pipeline(**hooks.stack([case.edit]), **case.options)
    assert captured.steps == {0, 1, 2}
    assert (captured.bytes == 0) == (to == "disk")
    for name in names:
        rules = [[Injection(name)], [Injection(name, source=hooks.Stored(captured))]]
        direct, stored = case.sweep(rules).images
        # half precision rounds what is stored
        assert torch.allclose(direct, stored, atol=1e-2 if to == "half" else 1e-5), name


def test_a_capture_keeps_what_the_layer_gave_for_the_rows_and_steps_asked(tiny_sd: Any) -> None:
    seen: list[Tensor] = []
    handle = tiny_sd.unet.mid_block.register_forward_hook(lambda m, a, o: seen.append(o.clone()))
    rows = hooks.stack([{"prompt": p, "generator": generator()} for p in (MOON, RED)])
    steps = Steps(indices=(1,))
    with hooks.capture(tiny_sd.unet, ["mid_block"], schedule=tiny_sd.scheduler, rows=2, keep_rows=[1], steps=steps) as captured:
        tiny_sd(**rows, num_inference_steps=3, guidance_scale=2.0, output_type="latent")
    handle.remove()
    assert captured.steps == {1}
    assert torch.equal(captured["mid_block", 1][:, 0], seen[1][[1, 3]])
    with pytest.raises(hooks.ProbekitError, match="step 0"):
        captured["mid_block", 0]
    with pytest.raises(hooks.ProbekitError, match="conv_in"):
        captured["conv_in", 1]


def test_a_tensor_is_injected_and_a_wrong_shape_names_both(tiny_sd: Any) -> None:
    rows = [{"prompt": prompt, "generator": generator()} for prompt in (MOON, RED)]
    case = Case(tiny_sd, *rows, num_inference_steps=2, guidance_scale=2.0)
    zeros = torch.zeros(16, 8, 8)
    by_tensor = [Injection("mid_block", source=zeros)]
    by_function = [Injection("mid_block", operation=lambda target, source, context: torch.zeros_like(target))]
    a, b = case.sweep([by_tensor, by_function]).images
    assert torch.allclose(a, b, atol=1e-6)
    with pytest.raises(hooks.ProbekitError, match=r"\(1, 3, 8, 8\).*mid_block.*\(2, 16, 8, 8\)"):
        case.sweep([[Injection("mid_block", source=torch.zeros(3, 8, 8))]])
    with pytest.raises(hooks.ProbekitError, match=r"returned \(2, 16, 8\).*\(2, 16, 8, 8\)"):
        case.sweep([[Injection("mid_block", operation=lambda target, source, context: target[..., 0])]])


def test_hooks_leave_no_trace_behind_also_after_an_error(tiny_sd: Any) -> None:
    def state() -> list[Any]:
        return [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)), m.forward)
            for name, m in tiny_sd.unet.named_modules()
        ]

    before = state()
    rows = [{"prompt": prompt, "generator": generator()} for prompt in (MOON, RED)]
    case = Case(tiny_sd, *rows, num_inference_steps=2, guidance_scale=2.0)
    case.sweep([[Injection(la.name, stream=s)] for la in case.layers for s in la.streams])
    assert state() == before

    def fail(target: Tensor, source: Tensor, context: hooks.Context) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        case.sweep([[Injection("mid_block", operation=fail)]])
    assert state() == before
    with pytest.raises(hooks.ProbekitError), hooks.capture(tiny_sd.unet, ["mid_block"], schedule=[1.0], rows=1):
        tiny_sd(RED, num_inference_steps=2, output_type="latent")
    assert state() == before


def test_bad_rules_are_refused_before_anything_runs(tiny_sd: Any) -> None:
    def enter(rules: dict[int, list[Injection]], rows: int = 2) -> None:
        with hooks.inject(tiny_sd.unet, rules, schedule=tiny_sd.scheduler, rows=rows):
            raise AssertionError("it should not get here")

    with pytest.raises(hooks.ProbekitError, match="no layer 'mid'"):
        enter({1: [Injection("mid")]})
    with pytest.raises(hooks.ProbekitError, match="mid_block: it has main"):
        enter({1: [Injection("mid_block", stream="text")]})
    with pytest.raises(hooks.ProbekitError, match="row 5: the batch has rows 0 to 1"):
        enter({5: [Injection("mid_block")]})
    with pytest.raises(hooks.ProbekitError, match="batch size 1"):
        hooks.sweep(tiny_sd, original={"prompt": RED}, edit={"prompt": RED}, rules=[[]], batch_size=1)


def test_a_compiled_denoiser_is_refused(tiny_sd: Any) -> None:
    compiled = torch.compile(tiny_sd.unet)
    with pytest.raises(hooks.ProbekitError, match=r"torch\.compile"), hooks.inject(compiled, {}, schedule=[1.0], rows=1):
        pass


def test_gradients_flow_through_an_injection(tiny_sd: Any) -> None:
    noise, text = torch.randn(2, 4, 16, 16, generator=generator()), torch.randn(2, 20, 16, generator=generator())
    noise.requires_grad_()
    rule = {1: [Injection("mid_block.resnets.1")]}
    with hooks.inject(tiny_sd.unet, rule, schedule=[500.0], rows=2):
        tiny_sd.unet(noise, 500, text).sample[1].sum().backward()
    # the injected row depends on the donor row's noise through the layer, and on its own through the skips
    assert noise.grad is not None and (noise.grad[0] != 0).any() and (noise.grad[1] != 0).any()

"""Sampling and inversion against diffusers' schedulers, known answers, and each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

from probekit import ProbekitError, hooks
from probekit.sampling import (
    Schedule,
    denoisers,
    invert,
    invert_coupled,
    invert_fixed_point,
    invert_renoised,
    sample,
    sample_coupled,
    slerp,
)
from tests.conftest import embedded, scramble, smooth, tiny

SCHEDULERS: list[Any] = [
    DDIMScheduler(clip_sample=False),
    DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    DDIMScheduler(clip_sample=False, timestep_spacing="trailing", beta_schedule="scaled_linear"),
    DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
]
FLOWS: list[Any] = [
    FlowMatchEulerDiscreteScheduler(),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
]
SHIFTED = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- parity with diffusers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", SCHEDULERS, ids=range(len(SCHEDULERS)))
@pytest.mark.parametrize("steps", [7, 20])
def test_sampling_and_inversion_are_those_of_diffusers(forward: Any, steps: int) -> None:
    unet, x = tiny(out_channels=6), images(2)
    for scheduler, ours in (
        (DDIMScheduler.from_config(forward.config), sample),
        (DDIMInverseScheduler.from_config(forward.config), invert),
    ):
        scheduler.set_timesteps(steps)
        expected = x
        with torch.no_grad():
            for t in scheduler.timesteps:
                expected = scheduler.step(unet(expected, t).sample[:, :3], t, expected).prev_sample
        made = ours(denoisers.unconditional(unet), x, Schedule.of(forward, steps))  # type: ignore[operator]
        assert made.end.dtype == torch.float32 and made.calls == steps
        assert (made.end - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("scheduler", FLOWS, ids=range(len(FLOWS)))
def test_euler_s_steps_are_those_of_diffusers(scheduler: Any) -> None:
    unet, x = tiny(), images(2)
    schedule = Schedule.of(scheduler, 9)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(9)
    expected = x
    with torch.no_grad():
        for t in scheduler.timesteps:
            expected = scheduler.step(unet(expected, t).sample, t, expected).prev_sample
    assert (sample(denoisers.unconditional(unet), x, schedule).end - expected).abs().max() < 1e-5 * expected.abs().max()


def test_flux_s_shift_follows_the_number_of_tokens() -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(SHIFTED.config)
    sigmas = [1 - i / 6 for i in range(6)]
    scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(1024, max_shift=1.15))
    schedule = Schedule.of(SHIFTED, 6, tokens=1024)
    assert [noise for _, noise in schedule.sources] == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-6)
    assert schedule.timesteps == pytest.approx(scheduler.timesteps.tolist(), abs=1e-3)
    with pytest.raises(ProbekitError, match="tokens are needed"):
        Schedule.of(SHIFTED, 6)


def test_sampling_from_the_last_timestep_is_trailing_spacing() -> None:
    predict, x = denoisers.unconditional(tiny()), images(2)
    trailing = Schedule.of(DDIMScheduler(timestep_spacing="trailing"), 10)
    leading = Schedule.of(DDIMScheduler(), 10, start=999)
    assert torch.allclose(sample(predict, x, leading).end, sample(predict, x, trailing).end, atol=1e-4)


def test_the_network_is_called_once_a_step() -> None:
    unet, scheduler = tiny(), DDIMScheduler()
    told: list[float] = []
    unet.register_forward_pre_hook(lambda module, arguments: told.append(float(arguments[1])))
    predict = denoisers.unconditional(unet)
    sample(predict, images(1), Schedule.of(scheduler, 5))
    invert(predict, images(1), Schedule.of(scheduler, 5))
    sample(predict, images(1), Schedule.of(scheduler, 5, start=499))
    assert told == [800, 600, 400, 200, 0, 0, 200, 400, 600, 800, 499, 399, 299, 199, 99]


def test_a_schedule_of_another_kind_with_betas_is_ddim_s() -> None:
    for other in (PNDMScheduler(), DPMSolverMultistepScheduler()):
        assert Schedule.of(other, 8).sources == Schedule.of(DDIMScheduler(beta_end=0.02, beta_start=1e-4), 8).sources


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (EDMEulerScheduler(), "EDMEulerScheduler: has no betas"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "has stochastic_sampling, which cannot be inverted"),
        (DDIMScheduler(prediction_type="sample"), "scheduler DDIMScheduler: its network predicts 'sample'"),
        (DDIMScheduler(rescale_betas_zero_snr=True), "scheduler DDIMScheduler: its last timestep has no signal"),
    ],
)
def test_a_scheduler_that_cannot_be_inverted_is_refused_by_name(scheduler: Any, said: str) -> None:
    with pytest.raises(ProbekitError, match=said):
        Schedule.of(scheduler, 5)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler()])
@pytest.mark.parametrize("steps", [0, 1001])
def test_more_steps_than_there_are_timesteps_are_refused(scheduler: Any, steps: int) -> None:
    with pytest.raises(ProbekitError, match=rf"^steps {steps}: choose 1 to 1000"):
        Schedule.of(scheduler, steps)


# --- known answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("scheduler", [*SCHEDULERS, *FLOWS], ids=range(8))
def test_with_known_predictions_every_round_trip_is_exact(scheduler: Any, dtype: torch.dtype, bar: float) -> None:
    schedule = Schedule.of(scheduler, 50)
    image = images(2).to(dtype)
    fixed = torch.randn(image.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

    def known(states: Tensor, timestep: float) -> Tensor:
        if schedule.prediction != "v_prediction":
            return fixed
        # the velocity that belongs to this epsilon depends on the state
        signal, noise = next(s for t, s in zip(schedule.timesteps, schedule.sources, strict=True) if t == timestep)
        return (fixed - noise * states) / signal

    # float32 latents are rounded, which the way back magnifies by 1 / signal: 157 times with Ho et al.'s betas
    steep = dtype == torch.float32 and schedule.level(0)[0] < 0.05 and schedule.prediction != "flow"

    def back(latents: Tensor) -> float:
        error = (sample(known, latents, schedule).end - image).abs()
        return float(error.square().mean().sqrt() if steep else error.max())

    if schedule.prediction != "v_prediction":  # plain inversion takes the velocity at another level than it is known for
        assert back(invert(known, image, schedule).end) < bar
    assert back(invert_fixed_point(known, image, schedule, tolerance=1e-15).end) < bar
    pair = torch.stack([image, image], 1).double()
    latents = invert_coupled(known, pair, schedule).end
    assert (sample_coupled(known, latents, schedule).end - pair).abs().max() < 1e-9


def test_states_that_are_kept_are_those_of_the_way() -> None:
    predict, schedule = denoisers.unconditional(smooth()), Schedule.of(DDIMScheduler(), 6)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = sample(predict, noise, schedule, keep=range(7))
    assert list(whole.kept) == list(range(7)) and torch.equal(whole.kept[0], noise) and torch.equal(whole.kept[6], whole.end)
    some = sample(predict, noise, schedule, keep=[4])
    assert list(some.kept) == [4] and torch.equal(some.kept[4], whole.kept[4])
    back = invert(predict, whole.end, schedule, keep=[6, 0])
    assert torch.equal(back.kept[6], whole.end) and torch.equal(back.kept[0], back.end)
    with pytest.raises(ProbekitError, match="keep 7: states are 0 to 6"):
        sample(predict, noise, schedule, keep=[7])


def test_half_precision_arithmetic_is_done_in_float32_and_what_overflows_is_said() -> None:
    schedule = Schedule.of(DDIMScheduler(), 5)
    made = sample(denoisers.unconditional(smooth().half()), images(1).half(), schedule)
    assert made.end.dtype == torch.float32
    with pytest.raises(ProbekitError, match="not finite; half precision may be too little"):
        sample(lambda states, timestep: torch.full_like(states, float("inf")), images(1), schedule)


# --- inversions --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(set_alpha_to_one=False), DDIMScheduler(prediction_type="v_prediction"), FlowMatchEulerDiscreteScheduler()],
)
def test_fixed_point_beats_plain_inversion_and_coupled_states_are_exact(scheduler: Any) -> None:
    predict, schedule = denoisers.unconditional(smooth()), Schedule.of(scheduler, 50)
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    image = sample(predict, noise, schedule).end

    def back(latents: Tensor) -> float:
        return float((sample(predict, latents, schedule).end - image).abs().max())

    plain, fixed = invert(predict, image, schedule), invert_fixed_point(predict, image, schedule)
    bar = 1e-4 * float(image.abs().max())
    assert back(fixed.end) < bar and back(fixed.end) < 0.1 * back(plain.end)
    pair = torch.stack([image, image], 1).double()
    latents = invert_coupled(predict, pair, schedule)
    assert latents.calls == 100
    assert (sample_coupled(predict, latents.end, schedule).end[:, 0] - image).abs().max() < bar


def test_a_slow_fixed_point_is_found_in_few_calls() -> None:
    schedule = Schedule.of(FlowMatchEulerDiscreteScheduler(), 1)  # state - prediction is the image
    slopes = torch.tensor([0.95, -0.8, 0.5], dtype=torch.float64)  # unaccelerated, 0.95 ** n of the error is left

    def predict(states: Tensor, timestep: float) -> Tensor:
        return slopes * states

    start = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start[3] = 0  # solved from the beginning
    found = invert_fixed_point(predict, start, schedule)
    assert torch.allclose(found.end, start / (1 - slopes), atol=1e-4) and found.calls < 10


def test_a_fixed_point_never_leads_back_worse_than_the_guess_it_starts_from() -> None:
    # as steep as a network can be: repeating diverges
    def steep(states: Tensor, timestep: float) -> Tensor:
        return 30 * torch.sin(10 * states)

    schedule = Schedule.of(DDIMScheduler(), 1)
    image = images(4)
    a, b = schedule.forward(0)

    def error(states: Tensor) -> Tensor:
        return (a * states + b * steep(states, 0) - image).flatten(1).square().mean(1)

    plain, fixed = invert(steep, image, schedule).end, invert_fixed_point(steep, image, schedule).end
    assert (error(fixed) <= error(plain)).all()


def test_renoising_no_step_is_plain_inversion_and_all_steps_the_forward_process() -> None:
    predict, schedule = denoisers.unconditional(smooth()), Schedule.of(DDIMScheduler(), 8)
    image = images(2)

    def renoised(count: int, **options: Any) -> Any:
        return invert_renoised(predict, image, schedule, epsilon, renoised=count, **options)

    epsilon = torch.randn(image.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(renoised(0).end, invert(predict, image, schedule).end)
    signal, noise = schedule.level(0)
    everything = renoised(8, keep=[8])
    assert everything.calls == 0 and torch.allclose(everything.end, signal * image + noise * epsilon, atol=1e-6)
    assert torch.equal(everything.kept[8], image)
    some = renoised(2, keep=range(9))
    assert some.calls == 6 and sorted(some.kept) == [0, 1, 2, 3, 4, 5, 6, 8]
    with pytest.raises(ProbekitError, match="renoised 9: choose 0 to 8"):
        renoised(9)


# --- interpolation -----------------------------------------------------------------------------------------------------


def test_great_circles_keep_the_norm_and_meet_their_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    path = slerp(a, b, torch.linspace(0, 1, 5, dtype=torch.float64))
    assert torch.allclose(path[0], a) and torch.allclose(path[-1], b)
    a, b = a / a.norm(), b / b.norm()
    path = slerp(a, b, torch.linspace(0, 1, 5, dtype=torch.float64))
    assert torch.allclose(path.flatten(1).norm(dim=1), torch.ones(5, dtype=torch.float64))
    steps = (path[1:] * path[:-1]).flatten(1).sum(1)
    assert float(steps.max() - steps.min()) < 1e-12
    assert torch.allclose(slerp(a, a, torch.tensor([0.5], dtype=torch.float64))[0], a)


# --- denoisers ---------------------------------------------------------------------------------------------------------


def test_a_captioned_denoiser_samples_what_its_pipeline_does(tiny_sd: Any) -> None:
    prompts = ["a large red fish at the left on a plain blue ground", "a small white moon at the right on a plain red ground"]
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    rows = [{"prompt": prompt} for prompt in prompts]
    for guidance in (1.0, 3.0):
        expected = tiny_sd(prompts, latents=noise, num_inference_steps=5, guidance_scale=guidance, output_type="latent").images
        made = sample(denoisers.captioned(tiny_sd, rows, guidance), noise, Schedule.of(tiny_sd.scheduler, 5)).end
        assert torch.allclose(made, expected, atol=1e-4), guidance
    assert not any(module._forward_pre_hooks for module in tiny_sd.unet.modules())


def test_a_captioned_transformer_samples_what_its_pipeline_does(tiny_sd3: Any, tiny_flux: Any) -> None:
    rows = [{k: v for k, v in embedded(seed, negative=True).items() if k != "generator"} for seed in (1, 2)]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "height": 16, "width": 16}
    expected = tiny_sd3(**hooks.stack(rows), latents=noise, guidance_scale=2.0, **options).images
    denoiser = denoisers.captioned(tiny_sd3, rows, 2.0)
    made = sample(denoiser, noise, Schedule.of(tiny_sd3.scheduler, 4)).end
    assert torch.allclose(made, expected, atol=1e-4)
    # Flux's latents are tokens, and its sigmas end at 1 / steps, shifted with their number or not
    rows = [{k: v for k, v in embedded(seed, negative=False).items() if k != "generator"} for seed in (1, 2)]
    noise = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = tiny_flux.scheduler
    try:
        for scheduler in (plain, SHIFTED):
            tiny_flux.scheduler = scheduler
            expected = tiny_flux(**hooks.stack(rows), latents=noise, guidance_scale=1.0, **options).images
            denoiser, schedule = denoisers.captioned(tiny_flux, rows, height=16, width=16), Schedule.of(scheduler, 4, tokens=16)
            made = sample(denoiser, noise, schedule).end
            assert torch.allclose(made, expected, atol=1e-4)
            pair = torch.stack([made, made], 1).double()
            there = invert_coupled(denoiser, pair, schedule).end
            assert torch.allclose(sample_coupled(denoiser, there, schedule).end, pair, atol=1e-4)
    finally:
        tiny_flux.scheduler = plain


@torch.no_grad()
def test_a_class_conditional_denoiser_is_guided_as_its_pipeline() -> None:
    torch.manual_seed(0)
    dit = scramble(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=10,
            norm_num_groups=1,
        )
    )
    x, labels = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 7])
    both = dit(torch.cat([x, x]), timestep=torch.full((4,), 400.0), class_labels=torch.tensor([3, 7, 10, 10])).sample[:, :4]
    conditional, empty = both.chunk(2)
    assert torch.allclose(denoisers.class_conditional(dit, labels, 4.0)(x, 400.0), empty + 4 * (conditional - empty), atol=1e-5)
    assert torch.allclose(denoisers.class_conditional(dit, labels)(x, 400.0), conditional, atol=1e-5)

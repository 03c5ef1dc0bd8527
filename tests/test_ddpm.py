from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from probekit import ProbekitError, load
from probekit.models.families import pixels
from probekit.models.papers.checkpoint import read
from probekit.models.papers.ddpm import from_ermon, from_openai, is_ermon, is_openai, published_scheduler
from tests.conftest import golden, smooth, tiny

State = dict[str, Tensor]


@torch.no_grad()
def error(unet: Any, case: State) -> float:
    return float((unet(case["x"], case["t"]).sample - case["y"]).abs().max())


def random_like(state: State) -> State:
    return {key: torch.randn_like(value) for key, value in state.items()}


def images(n: int, seed: int = 0, size: int = 8) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- the papers' checkpoints -------------------------------------------------------------------------------------------


def test_a_ddim_checkpoint_predicts_what_ddim_does() -> None:
    state, case, configuration = golden("ddim_unet")
    unet = from_ermon(state, configuration["image_size"])
    assert error(unet, case) < 2e-5
    assert unet.config.sample_size == 16
    assert unet.dtype == torch.float32 and not unet.training


@pytest.mark.parametrize(("name", "heads"), [("improved_ddpm_unet", {}), ("adm_unet", {"head_channels": 16})])
def test_an_openai_checkpoint_predicts_what_openais_code_does(name: str, heads: dict[str, int]) -> None:
    state, case, configuration = golden(name)
    assert configuration["num_heads"] == 4  # which is the default for improved-diffusion
    assert error(from_openai(state, 16, **heads), case) < 2e-5
    half = {key: value.half() for key, value in state.items()}
    assert 0 < error(from_openai(half, 16, **heads), case) < 0.05


@pytest.mark.parametrize("name", ["improved_ddpm_unet", "adm_unet"])
def test_the_number_of_heads_can_be_given_either_way_and_matters(name: str) -> None:
    state, case, _ = golden(name)
    assert error(from_openai(state, heads=4), case) < 2e-5
    assert error(from_openai(state, head_channels=16), case) < 2e-5
    assert error(from_openai(state, heads=2), case) > 1e-3
    assert error(from_openai(state), case) > 1e-3 if name == "adm_unet" else error(from_openai(state), case) < 2e-5


def openai_state(widths: tuple[int, ...], attended: tuple[bool, ...], *, scale_shift: bool) -> State:
    """Random tensors under improved-diffusion's names: one resnet a level, 3 channels out."""
    generator, state = torch.Generator().manual_seed(0), {}

    def add(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / 10
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) / 10

    def resnet(name: str, before: int, after: int) -> None:
        add(f"{name}.in_layers.0", before)
        add(f"{name}.in_layers.2", after, before, 3, 3)
        add(f"{name}.emb_layers.1", after * (1 + scale_shift), 4 * widths[0])
        add(f"{name}.out_layers.0", after)
        add(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            add(f"{name}.skip_connection", after, before, 1, 1)

    def attention(name: str, width: int) -> None:
        add(f"{name}.norm", width)
        add(f"{name}.qkv", 3 * width, width, 1)
        add(f"{name}.proj_out", width, width, 1)

    add("time_embed.0", 4 * widths[0], widths[0])
    add("time_embed.2", 4 * widths[0], 4 * widths[0])
    add("input_blocks.0.0", widths[0], 3, 3, 3)
    here, block, skips = widths[0], 1, [widths[0]]
    for level, width in enumerate(widths):
        resnet(f"input_blocks.{block}.0", here, width)
        if attended[level]:
            attention(f"input_blocks.{block}.1", width)
        here, block, skips = width, block + 1, [*skips, width]
        if level < len(widths) - 1:
            add(f"input_blocks.{block}.0.op", width, width, 3, 3)
            block, skips = block + 1, [*skips, width]
    resnet("middle_block.0", here, here)
    attention("middle_block.1", here)
    resnet("middle_block.2", here, here)
    for block in range(2 * len(widths)):
        level = len(widths) - 1 - block // 2
        resnet(f"output_blocks.{block}.0", here + skips.pop(), widths[level])
        here = widths[level]
        if attended[level]:
            attention(f"output_blocks.{block}.1", here)
        if level and block % 2:
            add(f"output_blocks.{block}.{1 + attended[level]}.conv", here, here, 3, 3)
    add("out.0", here)
    add("out.2", 3, here, 3, 3)
    return state


@pytest.mark.parametrize(("scale_shift", "heads"), [(True, 4), (False, 1)])
def test_heads_are_a_number_where_levels_differ_in_width(scale_shift: bool, heads: int) -> None:
    state = openai_state((32, 64, 96, 128), (False, False, True, True), scale_shift=scale_shift)
    unet = from_openai(state)
    assert unet.config.sample_size == 64  # ImageNet-64's multipliers
    attentions = [(unet.down_blocks[2].attentions[0], "input_blocks.5.1"), (unet.mid_block.attentions[0], "middle_block.1")]
    for ours, theirs in attentions:
        width = state[f"{theirs}.norm.weight"].shape[0]
        x = torch.randn(2, width, 2, 2, generator=torch.Generator().manual_seed(1))
        # AttentionBlock and QKVAttention of improved-diffusion, unet.py
        normed = torch.nn.functional.group_norm(x.flatten(2), 32, state[f"{theirs}.norm.weight"], state[f"{theirs}.norm.bias"])
        qkv = torch.nn.functional.conv1d(normed, state[f"{theirs}.qkv.weight"], state[f"{theirs}.qkv.bias"])
        q, k, v = qkv.reshape(2 * heads, -1, 4).chunk(3, dim=1)
        weight = (torch.einsum("bct,bcs->bts", q, k) / (width / heads) ** 0.5).softmax(-1)
        mixed = torch.einsum("bts,bcs->bct", weight, v).reshape(2, -1, 4)
        out = torch.nn.functional.conv1d(mixed, state[f"{theirs}.proj_out.weight"], state[f"{theirs}.proj_out.bias"])
        with torch.no_grad():
            assert torch.allclose(ours(x), x + out.reshape(x.shape), atol=1e-5)
    with torch.no_grad():
        assert unet(images(1), 3).sample.isfinite().all()
    steps = published_scheduler(state).alphas_cumprod
    assert (steps[500] > 0.4) == scale_shift  # cosine; LSUN's were trained with linear betas


def test_the_new_attention_order_is_q_k_v_of_all_heads() -> None:
    state, case, _ = golden("adm_unet")
    for key in [key for key in state if ".qkv." in key]:
        rows = state[key].unflatten(0, (4, 3, 16))
        state[key] = rows.transpose(0, 1).flatten(0, 2).contiguous()
    assert error(from_openai(state, head_channels=16, new_attention_order=True), case) < 2e-5
    assert error(from_openai(state, head_channels=16), case) > 1e-3


def test_a_first_multiplier_other_than_one_leaves_the_embedding_its_own_width() -> None:
    # an embedding of 64 values has the 32-value one's frequencies at every second place: with nought elsewhere, nothing changes
    state, case, _ = golden("adm_unet")
    narrow = state["time_embed.0.weight"]
    wide = torch.zeros(128, 64)
    wide[:, 0:32:2], wide[:, 32:64:2] = narrow[:, :16], narrow[:, 16:]
    assert error(from_openai(state | {"time_embed.0.weight": wide}, head_channels=16), case) < 2e-5


def test_resampling_without_convolutions_is_pooling_and_nearest_neighbours() -> None:
    state, _, _ = golden("ddim_unet")
    unet = from_ermon({key: value for key, value in state.items() if "sample.conv" not in key})
    x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled = unet.down_blocks[1].downsamplers[0](x)
        enlarged = unet.up_blocks[0].upsamplers[0](x)
    assert torch.allclose(pooled, torch.nn.functional.avg_pool2d(x, 2), atol=1e-6)
    assert torch.allclose(enlarged, torch.nn.functional.interpolate(x, scale_factor=2), atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_of_a_ddim_list_the_ema_is_taken(prefix: str, tmp_path: Path) -> None:
    state, case, _ = golden("ddim_unet")
    wrapped = {f"{prefix}{key}": value for key, value in random_like(state).items()}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    torch.save([wrapped, optimizer, 7, 1000, state], tmp_path / "ckpt.pth")
    torch.save([{f"{prefix}{key}": value for key, value in state.items()}, optimizer, 7, 1000], tmp_path / "no_ema.ckpt")
    torch.save({f"{prefix}{key}": value for key, value in state.items()}, tmp_path / "plain.ckpt")
    for name in ("ckpt.pth", "no_ema.ckpt", "plain.ckpt"):
        content = read(tmp_path / name)
        assert is_ermon(content) and not is_openai(content)
        assert error(from_ermon(content), case) < 2e-5


def test_an_openai_pt_is_read(tmp_path: Path) -> None:
    state, case, _ = golden("adm_unet")
    torch.save(state, tmp_path / "ema_0.9999_100000.pt")
    content = read(tmp_path / "ema_0.9999_100000.pt")
    assert is_openai(content) and not is_ermon(content)
    assert error(from_openai(content, head_channels=16), case) < 2e-5


@pytest.mark.parametrize("content", [None, 3, [], [1, 2], [{}, {}, 0, 0, {}], {}, {"a": torch.zeros(1)}, {"state_dict": {}}])
def test_other_content_is_neither(content: Any) -> None:
    assert not is_ermon(content) and not is_openai(content)


def test_the_image_size_is_that_of_the_published_model_with_these_multipliers() -> None:
    state, _, _ = golden("ddim_unet")
    assert from_ermon(state).config.sample_size == 64  # (1, 2, 2) is none
    with pytest.raises(ProbekitError, match=r"^image_size 18: this network needs a multiple of 4$"):
        from_ermon(state, 18)
    deeper = dict(state)  # (1, 2, 2, 2) is CIFAR-10's
    for key, value in state.items():
        if key.startswith(("down.2.", "up.2.")):
            deeper[key.replace(".2.", ".3.", 1)] = value
    deeper |= {f"down.2.downsample.conv.{leaf}": state[f"down.1.downsample.conv.{leaf}"] for leaf in ("weight", "bias")}
    assert from_ermon(deeper).config.sample_size == 32


LOADERS = [("ddim_unet", from_ermon), ("improved_ddpm_unet", from_openai), ("adm_unet", from_openai)]


@pytest.mark.parametrize(("name", "load"), LOADERS)
def test_any_tensor_that_is_missing_too_many_or_misshapen_is_named_in_one_line(name: str, load: Any) -> None:
    state, _, _ = golden(name)
    known = list(state)
    for key in known[:: len(known) // 5]:
        for broken in (
            {k: v for k, v in state.items() if k != key},
            state | {key: torch.zeros(5)},
            state | {key: torch.zeros(())},
            state | {key: torch.zeros(0, 0, 3, 3)},
        ):
            with pytest.raises(ProbekitError) as raised:
                load(broken)
            assert "\n" not in str(raised.value) and "tensor '" in str(raised.value)
    with pytest.raises(ProbekitError, match=r"tensor 'extra\.weight' has no place"):
        load(state | {"extra.weight": torch.zeros(1)})


def test_the_first_missing_tensor_is_named_by_its_own_name() -> None:
    state, _, _ = golden("ddim_unet")
    del state["up.1.attn.0.q.weight"]
    with pytest.raises(ProbekitError, match=r"^ddim checkpoint: lacks tensor 'up\.1\.attn\.0\.q\.weight'$"):
        from_ermon(state)
    state, _, _ = golden("adm_unet")
    del state["output_blocks.1.2.out_layers.3.bias"]
    with pytest.raises(
        ProbekitError, match=r"^OpenAI diffusion checkpoint: lacks tensor 'output_blocks\.1\.2\.out_layers\.3\.bias'$"
    ):
        from_openai(state)


def test_class_conditional_models_and_impossible_heads_are_refused() -> None:
    state, _, _ = golden("adm_unet")
    with pytest.raises(ProbekitError, match="class-conditional"):
        from_openai(state | {"label_emb.weight": torch.zeros(10, 128)})
    with pytest.raises(ProbekitError, match=r"^heads 5: does not divide the 64 channels"):
        from_openai(state, heads=5)
    with pytest.raises(ProbekitError, match=r"^heads 0: does not divide"):
        from_openai(state, heads=0)
    with pytest.raises(ProbekitError, match=r"^head_channels 48: does not divide"):
        from_openai(state, head_channels=48)
    with pytest.raises(ProbekitError, match="give one of the two"):
        from_openai(state, heads=4, head_channels=16)


def test_a_checkpoint_comes_with_the_noise_of_its_published_models() -> None:
    linear = DDIMScheduler(beta_start=1e-4, beta_end=0.02).alphas_cumprod
    for name in ("ddim_unet", "adm_unet"):
        assert torch.equal(published_scheduler(golden(name)[0]).alphas_cumprod, linear)
    cosine = published_scheduler(golden("improved_ddpm_unet")[0]).alphas_cumprod
    # equation 17 of Nichol and Dhariwal at t + 1 of 4000
    t = torch.arange(1, 4001, dtype=torch.float64) / 4000
    expected = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2 / torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2)) ** 2
    assert cosine.shape == (4000,)
    assert torch.allclose(cosine.double(), expected, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_a_published_file_of_4000_timesteps_is_sampled_in_as_many_and_told_a_fourth(tmp_path: Path) -> None:
    state, _, _ = golden("improved_ddpm_unet")
    torch.save(state, tmp_path / "imagenet64.pt")
    model = load(tmp_path / "imagenet64.pt", device="cpu")
    diffusion = model.diffusion
    assert "timestep 3999" in model.space("noised").about
    space = model.space("h")
    told: list[float] = []
    assert isinstance(model.network, nn.Module)
    model.network.register_forward_pre_hook(lambda module, arguments: told.append(float(arguments[1])))
    schedule, denoiser = diffusion.schedule(4000), diffusion.denoiser(1)
    assert schedule.timesteps[0] == 3999 and len(diffusion.schedule(10)) == 10
    x = diffusion.noise(range(1), 0)
    assert torch.equal(denoiser(x, 3999.0), from_openai(state)(x, torch.tensor(999.75)).sample[:, :3])
    space.encode(torch.zeros_like(x))
    assert told == [999.75, 500.0]


# --- spaces ------------------------------------------------------------------------------------------------------------


def test_a_round_trip_improves_with_steps() -> None:
    unet, x, errors = smooth(), images(3) * 0.5, []
    for steps in (5, 20, 60):
        space = pixels.as_model(unet, DDIMScheduler(beta_end=0.005), "tiny").space(f"inverted:steps={steps}")
        latents = space.encode(x)
        assert latents.shape == (3, *space.shape) and not torch.allclose(latents, x, atol=0.1)
        errors.append((space.decode(latents) - x).abs().mean().item())
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1]
    assert errors[2] < 0.003


def test_the_inverted_space_is_the_default_and_does_what_the_ddim_pipeline_does() -> None:
    unet = tiny()
    model = pixels.as_model(unet, DDPMScheduler(), "tiny")
    assert (model.family, model.image_size, list(model.spaces)) == ("ddpm", 8, ["inverted", "noised", "h", "noise"])
    assert model.space().name == "inverted" and model.space().digest == model.space("inverted").digest
    space = model.space("inverted", steps=10)
    assert space.shape == (3, 8, 8)
    latents = space.sample(2, torch.Generator().manual_seed(5))
    pipeline = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)]
    expected = pipeline(2, generators, num_inference_steps=10, output_type="np", use_clipped_model_output=False).images
    made = space.decode(latents)
    assert torch.allclose(made[0], torch.from_numpy(expected[0]).permute(2, 0, 1) * 2 - 1, atol=1e-4)
    assert made.abs().max() <= 1


def test_noised_images_have_the_formulas_mean_and_variance() -> None:
    scheduler = DDIMScheduler()
    for timestep in (100, 600):
        space = pixels.as_model(tiny(), scheduler, "tiny").space("noised", t=timestep)
        abar = float(scheduler.alphas_cumprod[timestep])
        x = images(1).expand(4000, -1, -1, -1)
        latents = space.encode(x, torch.Generator().manual_seed(3))
        assert (latents.mean(0) - abar**0.5 * x[0]).abs().max() < 5 * ((1 - abar) / 4000) ** 0.5
        assert latents.var(0).mean().item() == pytest.approx(1 - abar, rel=0.01)
        assert space.sampler is None  # a noised image is not standard normal
    last = pixels.as_model(tiny(), scheduler, "tiny").space("noised", steps=5)
    drawn = last.sample(500, torch.Generator().manual_seed(0))
    assert drawn.mean().abs() < 0.02 and drawn.std().item() == pytest.approx(1, abs=0.02)
    assert last.decode(drawn[:2]).shape == (2, 3, 8, 8)


def test_a_little_noise_is_taken_away_again() -> None:
    # epsilon as it was added: what an ideal network would predict
    x, generator = images(2) * 0.8, torch.Generator().manual_seed(1)
    model = pixels.as_model(tiny(), DDIMScheduler(), "tiny")
    space = model.space("noised", t=300, steps=4)
    latents = space.encode(x, generator)
    abar = float(DDIMScheduler().alphas_cumprod[300])
    epsilon = (latents - abar**0.5 * x) / (1 - abar) ** 0.5
    unet: Any = model.network
    unet.forward = lambda sample, timestep: type("Output", (), {"sample": epsilon})
    assert torch.allclose(space.decode(latents), x, atol=1e-4)


def test_h_space_is_the_middle_blocks_output_for_the_same_noise_on_every_image() -> None:
    unet, scheduler = tiny(), DDIMScheduler()
    space = pixels.as_model(unet, scheduler, "tiny").space("h", t=250, steps=100)  # of which 250 is one
    x = images(3)
    latents = space.encode(x, torch.Generator().manual_seed(99))
    assert space.shape == (16, 4, 4) and latents.shape == (3, 16, 4, 4)
    seen: list[Tensor] = []
    handle = unet.mid_block.register_forward_hook(lambda module, arguments, output: seen.append(output))
    noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    abar = scheduler.alphas_cumprod[250]
    with torch.no_grad():
        unet(abar**0.5 * x + (1 - abar) ** 0.5 * noise, 250)
    handle.remove()
    assert torch.allclose(latents, seen[0], atol=1e-5)
    assert torch.equal(latents, space.encode(x, torch.Generator().manual_seed(5)))
    assert torch.allclose(space.encode(x[:1].expand(2, -1, -1, -1))[1], latents[0], atol=1e-5)
    assert not unet._forward_hooks and not unet.mid_block._forward_hooks


@pytest.mark.parametrize("name", ["inverted", "noised", "h"])
def test_a_batch_gives_what_its_images_give_alone(name: str) -> None:
    space = pixels.as_model(tiny(sample_size=10), DDIMScheduler(), "tiny").space(name, steps=4)
    x, generator = images(3, size=10), torch.Generator().manual_seed(2)
    together = space.encode(x, torch.Generator().manual_seed(2))
    alone = torch.cat([space.encode(image[None], generator) for image in x])
    assert torch.allclose(together, alone, atol=1e-4)
    if space.decoder is not None:
        assert torch.allclose(space.decode(together), torch.cat([space.decode(z[None]) for z in together]), atol=1e-3)


def test_half_precision_networks_give_float32_latents() -> None:
    model = pixels.as_model(tiny().to(torch.bfloat16), DDIMScheduler(), "tiny")
    for name in ("inverted", "noised", "h"):
        space = model.space(name, steps=2)
        latents = space.encode(images(1))
        assert latents.dtype == torch.float32 and space.decode(latents).dtype == torch.float32


def test_what_no_model_can_be_made_of_is_refused_in_one_line() -> None:
    linear = DDIMScheduler()
    cases: list[tuple[Any, Any, str]] = [
        (tiny(in_channels=1, out_channels=1), linear, "takes 1 and gives 1 channels"),
        (tiny(num_class_embeds=4), linear, "class-conditional"),
        (tiny(sample_size=None), linear, "sample_size is None"),
        (tiny(), DDIMScheduler(prediction_type="sample"), "scheduler DDIMScheduler: its network predicts 'sample'"),
    ]
    for unet, scheduler, message in cases:
        with pytest.raises(ProbekitError, match=message) as raised:
            pixels.as_model(unet, scheduler, "tiny")
        assert "\n" not in str(raised.value)
    model = pixels.as_model(tiny(), linear, "tiny")
    for spec, message in {
        "noised:t=1000": "t 1000: the schedule has timesteps 0 to 999",
        "h:t=-1": "t -1: the schedule",
        "inverted:steps=0": "steps 0: choose 1 to 1000",
    }.items():
        with pytest.raises(ProbekitError, match=message) as raised:
            model.space(spec)
        assert "\n" not in str(raised.value) and f"'tiny:{spec}'" in str(raised.value)
    for name in ("inverted", "noised", "h"):
        with pytest.raises(ProbekitError, match=r"images of shape \(3, 16, 16\): model 'tiny' takes \(3, 8, 8\)"):
            model.space(name, steps=2).encode(images(1, size=16))


# --- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", [DDPMPipeline, DDIMPipeline])
def test_a_pipelines_folder_is_loaded_with_its_own_noise(pipeline: Any, tmp_path: Path) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=200, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    unet = tiny()
    pipeline(unet, scheduler).save_pretrained(tmp_path / "nested")
    # the hub's older models have all parts in one folder
    flat = tmp_path / "flat"
    shutil.copytree(tmp_path / "nested" / "unet", flat)
    shutil.copy(tmp_path / "nested" / "scheduler" / "scheduler_config.json", flat)
    shutil.copy(tmp_path / "nested" / "model_index.json", flat)
    expected = pixels.as_model(unet, DDIMScheduler.from_config(scheduler.config), "own")
    for path in (tmp_path / "nested", str(flat)):
        model = pixels.load_folder(path, "own")
        assert model.digest == expected.digest and not model.network.training
        # at half of 200 timesteps, with the cosine's noise
        assert torch.allclose(model.space("h").encode(images(1)), expected.space("h").encode(images(1)), atol=1e-4)


def test_a_bare_networks_folder_gets_linear_betas(tmp_path: Path) -> None:
    unet = tiny()
    unet.save_pretrained(tmp_path)
    expected = pixels.as_model(unet, DDIMScheduler(beta_start=1e-4, beta_end=0.02), "own")
    made = pixels.load_folder(tmp_path, "own").space("h")
    assert torch.allclose(made.encode(images(1)), expected.space("h").encode(images(1)), atol=1e-4)


def test_folders_that_hold_no_such_model_are_refused_in_one_line(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    def refuse(path: Path | str, message: str) -> None:
        with pytest.raises(ProbekitError, match=message) as raised:
            pixels.load_folder(path, "own")
        assert "\n" not in str(raised.value) and "'own'" in str(raised.value)

    def saved(name: str) -> Path:
        DDPMPipeline(tiny(), DDPMScheduler()).save_pretrained(tmp_path / name)
        return tmp_path / name

    refuse(tmp_path / "nowhere", "neither a folder nor a hub id")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "no UNet2DModel")
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=1).save_pretrained(tmp_path / "vae")
    refuse(tmp_path / "vae", "it holds a AutoencoderKL")

    cut = saved("cut") / "unet" / "diffusion_pytorch_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    refuse(tmp_path / "cut", "could not be loaded")

    lacking = saved("lacking") / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(lacking)
    del state["conv_in.bias"]
    save_file(state, lacking, metadata={"format": "pt"})
    refuse(tmp_path / "lacking", "lack 1 tensors, 'conv_in.bias'")

    index = saved("latent") / "model_index.json"
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"vqvae": ["diffusers", "VQModel"], "_class_name": "LDMPipeline"})
    )
    refuse(tmp_path / "latent", "a LDMPipeline, which has a vqvae")

    shutil.rmtree(saved("noiseless") / "scheduler")
    refuse(tmp_path / "noiseless", "its scheduler cannot be read")
    config = saved("foreign") / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "ScoreSdeVeScheduler", "num_train_timesteps": 2000, "sigma_min": 0.01}))
    refuse(tmp_path / "foreign", "scheduler ScoreSdeVeScheduler: has no betas")


# --- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_squared_error_of_the_drawn_noise(prediction: str) -> None:
    unet, scheduler, x = tiny(out_channels=6), DDPMScheduler(prediction_type=prediction), images(4)
    value, numbers = pixels.loss(unet, x, torch.Generator().manual_seed(8), scheduler)
    generator = torch.Generator().manual_seed(8)
    t = torch.randint(1000, (4,), generator=generator)
    epsilon = torch.stack([torch.randn(3, 8, 8, generator=generator) for _ in range(4)])
    abar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = abar.sqrt() * x + (1 - abar).sqrt() * epsilon
    target = epsilon if prediction == "epsilon" else abar.sqrt() * epsilon - (1 - abar).sqrt() * x
    expected = (unet(noisy, t).sample[:, :3] - target).square().mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert numbers == {"squared_error": value.item()}
    value.backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0


def test_training_lowers_the_loss() -> None:
    unet, scheduler, x = tiny(), DDPMScheduler(), images(1).expand(8, -1, -1, -1)
    optimizer, generator, losses = torch.optim.Adam(unet.parameters(), 2e-3), torch.Generator().manual_seed(0), []
    for _ in range(60):
        value, numbers = pixels.loss(unet.train(), x, generator, scheduler)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(numbers["squared_error"])
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])

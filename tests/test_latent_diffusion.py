"""Latent diffusion and text-to-image models as what is sampled and inverted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    UNet2DModel,
)

from probekit import ProbekitError, load
from probekit.experiments.noise_map_run import NoiseMapRun
from probekit.models.families import text_to_image
from probekit.sampling import sample
from tests.conftest import tiny


def test_an_ldm_samples_what_its_pipeline_does(ldm_folder: Path) -> None:
    model = load(ldm_folder, device="cpu")
    diffusion = model.diffusion
    assert model.family == "ldm"
    assert list(model.spaces) == ["grid", "quantized", "code", "inverted", "noised", "h", "noise"]
    assert diffusion.shape == (3, 8, 8) and diffusion.image_size == 16
    pipeline = LDMPipeline.from_pretrained(ldm_folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(1, torch.Generator().manual_seed(4), num_inference_steps=5, eta=0.0, output_type="np").images
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    made = diffusion.decode(sample(diffusion.denoiser(1), noise, diffusion.schedule(5)).end)
    assert torch.allclose(made, torch.from_numpy(expected).permute(0, 3, 1, 2) * 2 - 1, atol=1e-4)
    # its default space stays the VQ-VAE's grid, which All Roads stitches; noiseless states are that grid, scaled
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.allclose(diffusion.encode(images), 0.5 * model.space().encode(images), atol=1e-6)
    assert model.space("inverted").encode(images).shape == (2, 3, 8, 8)


def test_a_vq_vae_whose_files_name_no_factor_has_none(ldm_folder: Path) -> None:
    """As the files of CompVis/ldm-celebahq-256, which are older than diffusers' default."""
    config = ldm_folder / "vqvae" / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "scaling_factor"}))
    model = load(ldm_folder, device="cpu")
    diffusion = model.diffusion
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    states = diffusion.encode(images)
    assert torch.allclose(states, model.space("grid").encode(images), atol=1e-6)
    assert torch.allclose(diffusion.decode(states), model.space("grid").decode(states), atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"sample_size": (8, 8)}, "its U-Net's sample_size is"), ({"num_class_embeds": 10}, "its U-Net is class-conditional")],
)
def test_a_u_net_that_cannot_be_sampled_is_refused_when_it_is_loaded(
    ldm_folder: Path, wrong: dict[str, Any], said: str
) -> None:
    tiny(**wrong).save_pretrained(ldm_folder / "unet")
    with pytest.raises(ProbekitError, match=said):
        load(ldm_folder, device="cpu")


def test_a_dit_samples_what_its_pipeline_does(dit_folder: Path) -> None:
    model = load(dit_folder, device="cpu")
    diffusion = model.conditioned(label=3, guidance=4.0).diffusion
    pipeline = DiTPipeline.from_pretrained(dit_folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline([3], 4.0, torch.Generator().manual_seed(4), num_inference_steps=5, output_type="np").images
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    made = diffusion.decode(sample(diffusion.denoiser(1), noise, diffusion.schedule(5)).end)
    assert torch.allclose(made, torch.from_numpy(expected).permute(0, 3, 1, 2) * 2 - 1, atol=2e-4)
    free = model.diffusion
    assert not torch.allclose(free.denoiser(1)(noise, 500.0), diffusion.denoiser(1)(noise, 500.0), atol=1e-3)


def test_a_rectified_flow_of_pixels_is_recognised_by_its_scheduler(tmp_path: Path) -> None:
    pipeline = DDPMPipeline(tiny(), FlowMatchEulerDiscreteScheduler())
    pipeline.save_pretrained(tmp_path / "flow")
    model = load(tmp_path / "flow", device="cpu")
    assert model.family == "flow" and model.diffusion.schedule(4).prediction == "flow"
    assert list(model.spaces) == ["inverted", "noised", "h", "noise"]
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(1, torch.Generator().manual_seed(4), num_inference_steps=5, output_type="np").images
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    made = sample(model.diffusion.denoiser(1), noise, model.diffusion.schedule(5)).end.clamp(-1, 1)
    assert torch.allclose(made, torch.from_numpy(expected).permute(0, 3, 1, 2) * 2 - 1, atol=1e-4)


def test_a_text_to_image_model_samples_what_its_pipeline_does(tiny_sd: Any) -> None:
    model = text_to_image.as_model(tiny_sd, "tiny")
    prompt = "a large red fish at the left on a plain blue ground"
    diffusion = model.conditioned(prompt=prompt, guidance=2.0).diffusion
    made = diffusion.decode(sample(diffusion.denoiser(1), diffusion.noise(range(1), 0), diffusion.schedule(3)).end)
    expected = model.generate([prompt], [0], num_inference_steps=3, guidance_scale=2.0, latents=diffusion.noise(range(1), 0))
    assert torch.allclose(made, expected, atol=1e-4)
    images = diffusion.decode(diffusion.encode(made))
    assert images.shape == made.shape


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_guidance_that_pipelines_would_ignore_is_refused(tiny_sd: Any, guidance: float) -> None:
    with pytest.raises(ProbekitError, match=f"^--guidance {guidance:g}: text-to-image pipelines are guided from 1"):
        text_to_image.as_model(tiny_sd, "tiny").conditioned(prompt="a dog", guidance=guidance)


def test_the_precision_is_part_of_a_run_s_inputs_and_of_a_space_s_digest(tiny_sd: Any, tmp_path: Path) -> None:
    tiny_sd.save_pretrained(tmp_path / "sd")
    digests = set()
    for dtype, expected in (("auto", "float32"), ("bfloat16", "bfloat16")):
        run = NoiseMapRun(model=str(tmp_path / "sd"), device="cpu", dtype=dtype)
        assert run.inputs()["made_of"]["precision"] == expected
        digests.add(load(tmp_path / "sd", device="cpu", dtype=dtype).space("noise").digest)
    assert len(digests) == 2


def test_a_row_s_noise_depends_on_the_seed_and_its_number_alone(ldm_folder: Path) -> None:
    diffusion = load(ldm_folder, device="cpu").diffusion
    assert torch.equal(diffusion.noise(range(5), 1)[3:], diffusion.noise(range(3, 5), 1))
    assert not torch.equal(diffusion.noise(range(1), 1), diffusion.noise(range(1), 2))


def test_what_a_model_has_no_use_for_is_refused_in_one_line(ldm_folder: Path, dit_folder: Path, tmp_path: Path) -> None:
    def refused(said: str, path: Any, **options: Any) -> None:
        with pytest.raises(ProbekitError, match=said) as error:
            load(path, device="cpu").conditioned(**options).diffusion  # noqa: B018
        assert "\n" not in str(error.value)

    refused("takes none", ldm_folder, prompt="a dog")
    refused(r"--label 3: model .* has no classes", ldm_folder, label=3)
    refused(r"--guidance 2: model .* has no classes", ldm_folder, guidance=2.0)
    refused(r"--label 1000: model .* has classes 0 to 999", dit_folder, label=1000)
    refused(r"needs a --label", dit_folder, guidance=2.0)
    refused("makes no images from noise", "random")
    refused("has no classes; give a --prompt", "mini-sd", label=1)
    (ldm_folder / "scheduler" / "scheduler_config.json").unlink()
    refused("is no latent diffusion model", ldm_folder)


def test_what_overflows_in_half_precision_says_so(ldm_folder: Path) -> None:
    diffusion = load(ldm_folder, device="cpu").diffusion
    with pytest.raises(ProbekitError, match="not finite; use --dtype float32"):
        diffusion.decode(torch.full((1, 3, 8, 8), float("nan")))


def test_parts_that_do_not_fit_are_refused(ldm_folder: Path) -> None:
    UNet2DModel.from_config(tiny(in_channels=4, out_channels=4).config).save_pretrained(ldm_folder / "unet")
    with pytest.raises(ProbekitError, match="takes 4 and gives 4 channels, a grid has 3"):
        load(ldm_folder, device="cpu")

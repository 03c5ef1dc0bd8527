from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from probekit import ProbekitError, hooks, load
from probekit.models.families import text_to_image
from tests.pipelines import MOON, RED, flux, pixart, sd3, sdxl


@pytest.mark.parametrize("family", [sdxl, sd3, flux, pixart])
def test_a_picture_is_the_one_that_the_pipeline_makes_of_the_prompt(family: Any, tmp_path: Path) -> None:
    # through save_pretrained and load, as a user's own folder
    pipeline = family()
    pipeline.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", device="cpu")
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 32, "width": 32}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    extra = {"clean_caption": False} if family is pixart else {}
    if family is pixart:
        options["use_resolution_binning"] = False
    with torch.no_grad():
        expected = pipeline([RED, MOON], generator=generators, **options, **extra, output_type="pt").images * 2 - 1
    made = model.generate([RED, MOON], [1, 2], **options)
    assert torch.allclose(made, expected, atol=1e-4)
    last = model.layers[-1].name
    swept = model.sweep((MOON, 1), (RED, 1), [[], [hooks.Injection(last)], [hooks.Injection(model.layers[0].name)]], **options)
    assert torch.allclose(swept.images[1], swept.edit, atol=1e-4)
    assert not torch.allclose(swept.images[0], swept.edit, atol=1e-3)


def test_a_safety_checker_blacks_nothing_out(tiny_sd: Any) -> None:
    from diffusers import StableDiffusionPipeline

    class Offended(torch.nn.Module):
        def forward(self, images: Any, clip_input: Any) -> Any:
            raise AssertionError("it was asked")

    pipeline = StableDiffusionPipeline(**tiny_sd.components)
    pipeline.safety_checker = Offended()
    model = text_to_image.as_model(pipeline, "own")
    assert model.pipeline.safety_checker is None
    assert model.generate([RED], [0], num_inference_steps=1).shape == (1, 3, 32, 32)


def test_devices_and_dtypes_that_are_not_here_are_refused(tmp_path: Path) -> None:
    for options in ({"device": "tpu9"}, {"dtype": "int8"}):
        with pytest.raises(ProbekitError, match=next(iter(options.values()))):
            load("mini-sd", **options)
    assert load("mini-sd", device="cpu", dtype="bfloat16").denoiser.dtype == torch.bfloat16


def test_the_digest_tells_models_apart_and_knows_the_same_again(tiny_sd: Any) -> None:
    first, again = text_to_image.as_model(tiny_sd, "a"), text_to_image.as_model(tiny_sd, "b")
    assert first.digest == again.digest
    before = tiny_sd.unet.conv_out.bias.data.clone()
    tiny_sd.unet.conv_out.bias.data += 0.1
    try:
        assert text_to_image.as_model(tiny_sd, "c").digest != first.digest
    finally:
        tiny_sd.unet.conv_out.bias.data = before

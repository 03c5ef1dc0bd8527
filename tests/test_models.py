from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from probekit import ProbekitError, hooks, load
from probekit.models.families import text_to_image
from probekit.zoo.scene_clip import tokenizer
from tests.conftest import scramble, tiny_vae

RED = "a large red fish at the top left on a striped blue ground"
MOON = "a small white moon at the right on a plain green ground"


def clip_text(projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = tokenizer()
    end = words.eos_token_id
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
        max_position_embeddings=77,
        eos_token_id=end,
        pad_token_id=end,
        bos_token_id=words.bos_token_id,
    )
    return scramble((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(tokenizer()), d_model=width, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    return scramble(T5EncoderModel(config))


def words() -> Any:
    made = tokenizer()
    made.model_max_length = 77
    return made


def sdxl() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=clip_text(False),
        text_encoder_2=clip_text(True),
        tokenizer=words(),
        tokenizer_2=words(),
        unet=scramble(unet),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    )


def sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=scramble(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=clip_text(True),
        tokenizer=words(),
        text_encoder_2=clip_text(True),
        tokenizer_2=words(),
        text_encoder_3=t5(32),
        tokenizer_3=words(),
    )


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
    )
    return FluxPipeline(
        transformer=scramble(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=clip_text(False),
        tokenizer=words(),
        text_encoder_2=t5(32),
        tokenizer_2=words(),
    )


def pixart() -> Any:
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        cross_attention_dim=16,
        caption_channels=32,
        norm_num_groups=4,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(
        tokenizer=words(),
        text_encoder=t5(32),
        vae=tiny_vae(),
        transformer=scramble(transformer),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    )


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

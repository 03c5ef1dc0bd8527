"""Tiny pipelines of every family, built from their configs with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from probekit.zoo.scene_clip import MAX_TOKENS, tokenizer


class Golden(NamedTuple):
    """What a paper's own code gave: its network's weights, the tensors that went in and came out, and its configuration."""

    state: dict[str, Tensor]
    case: dict[str, Tensor]
    config: dict[str, Any]


def golden(name: str) -> Golden:
    with safe_open(Path(__file__).parent / "golden" / f"{name}.safetensors", "pt") as file:
        config = {key: json.loads(value) for key, value in file.metadata().items()}
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    state = {key.removeprefix("state/"): value for key, value in held.items() if key.startswith("state/")}
    return Golden(state, {key: value for key, value in held.items() if not key.startswith("state/")}, config)


def scramble(module: torch.nn.Module) -> torch.nn.Module:
    """Give zero-initialised gates and output layers values, so that every layer has an effect."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        if p.ndim > 1:
            p.data = torch.randn(p.shape, generator=generator) * (1.2 / p[0].numel() ** 0.5)
        else:
            p.data = p.data + 0.05 * torch.randn(p.shape, generator=generator)
    return module.eval()


def tiny_vae() -> Any:
    from diffusers import AutoencoderKL

    return scramble(
        AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            shift_factor=0.0,
        )
    )


@pytest.fixture(scope="session")
def tiny_sd() -> Any:
    """A StableDiffusionPipeline with two resnets a down block and attention on the upper level, as SD 1 and 2."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    words = tokenizer()
    end = words.eos_token_id
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS, eos_token_id=end, pad_token_id=end, bos_token_id=words.bos_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=2, cross_attention_dim=16, attention_head_dim=2,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(), text_encoder=scramble(CLIPTextModel(text)), tokenizer=words, unet=scramble(unet),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def tiny_sd3() -> Any:
    """A StableDiffusion3Pipeline that is given embeddings: its last block has no text stream."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        transformer=scramble(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=tiny_vae(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def tiny_flux() -> Any:
    """A FluxPipeline that is given embeddings."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6), guidance_embeds=False,
    )  # fmt: skip
    pipeline = FluxPipeline(
        transformer=scramble(transformer), scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny_vae(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embedded(seed: int, *, negative: bool) -> dict[str, Any]:
    """A row for the pipelines that are given embeddings."""
    generator = torch.Generator().manual_seed(seed)
    row: dict[str, Any] = {
        "prompt_embeds": torch.randn(1, 5, 16, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 8, generator=generator),
    }
    if negative:
        row |= {"negative_prompt_embeds": torch.zeros(1, 5, 16), "negative_pooled_prompt_embeds": torch.zeros(1, 8)}
    return row | {"generator": torch.Generator().manual_seed(7)}

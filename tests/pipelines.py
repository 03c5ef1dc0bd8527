"""Tiny pipelines of diffusers with random weights: every text-to-image pipeline that probekit says it works with.

Each is built in code from a configuration, with text encoders and tokenizers, and paints two steps in less than a second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from probekit.zoo.scene_clip import tokenizer
from tests.conftest import scramble, tiny_vae

RED = "a large red fish at the top left on a striped blue ground"
MOON = "a small white moon at the right on a plain green ground"

Guidance = Literal["one call", "two calls", "none"]


@dataclass(frozen=True)
class Tiny:
    """make: builds it. options: what every call of it needs, two steps and a small size among them. guided: the options that
    turn guidance on beside these, where there is any. guidance: how the denoiser is called under guidance: "one call" with a
    doubled batch (perturbed attention: tripled), "two calls" a step, or "none", where it has none or is told the scale.
    """

    make: Callable[[], Any]
    options: Mapping[str, Any]
    guided: Mapping[str, Any] = field(default_factory=dict)
    guidance: Guidance = "one call"


@functools.cache
def build(name: str) -> Any:
    """The pipeline of that name in `PIPELINES`, built once; whoever changes it builds one of his own by `PIPELINES[name].make()`."""
    torch.manual_seed(0)  # biases start as their layers make them
    pipeline = PIPELINES[name].make()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- text ----------------------------------------------------------------------------------------------------------------


@functools.cache
def words() -> Any:
    """A CLIPTokenizer of scenes, which stands for those of T5, BERT and others, too."""
    made = tokenizer()
    made.model_max_length = 77
    return made


def clip_text(projection: bool) -> Any:
    """A CLIP text encoder, 16 wide, projecting to 8 or not at all."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    end = words().eos_token_id
    config = CLIPTextConfig(
        vocab_size=len(words()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
        max_position_embeddings=77,
        eos_token_id=end,
        pad_token_id=end,
        bos_token_id=words().bos_token_id,
    )
    return scramble((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def t5(width: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(words()), d_model=width, d_ff=32, d_kv=8, num_layers=2, num_heads=2)
    return scramble(T5EncoderModel(config))


# --- Stable Diffusion ----------------------------------------------------------------------------------------------------


def ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(clip_sample=False, steps_offset=1)


def flow(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def unet(**options: Any) -> Any:
    """Two levels with two resnets each, cross-attention on both."""
    from diffusers import UNet2DConditionModel

    config: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "layers_per_block": 2,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return scramble(UNet2DConditionModel(**config | options))


def sd_parts() -> dict[str, Any]:
    return {
        "vae": tiny_vae(),
        "text_encoder": clip_text(False),
        "tokenizer": words(),
        "unet": unet(),
        "scheduler": ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def sd() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(**sd_parts())


def sd_pag() -> Any:
    from diffusers import StableDiffusionPAGPipeline

    return StableDiffusionPAGPipeline(**sd_parts(), pag_applied_layers=["mid"])


def lcm() -> Any:
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    changes = {"unet": unet(time_cond_proj_dim=8), "scheduler": LCMScheduler(clip_sample=False)}
    return LatentConsistencyModelPipeline(**sd_parts() | changes)


XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}


def sdxl_parts() -> dict[str, Any]:
    return {
        "vae": tiny_vae(),
        "text_encoder": clip_text(False),
        "text_encoder_2": clip_text(True),
        "tokenizer": words(),
        "tokenizer_2": words(),
        "unet": unet(
            cross_attention_dim=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **XL,
        ),
        "scheduler": ddim(),
    }


def sdxl() -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(**sdxl_parts())


def sdxl_pag() -> Any:
    from diffusers import StableDiffusionXLPAGPipeline

    return StableDiffusionXLPAGPipeline(**sdxl_parts(), pag_applied_layers=["mid"])


def sd3_parts() -> dict[str, Any]:
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return {
        "transformer": scramble(transformer),
        "scheduler": flow(shift=3.0),
        "vae": tiny_vae(),
        "text_encoder": clip_text(True),
        "tokenizer": words(),
        "text_encoder_2": clip_text(True),
        "tokenizer_2": words(),
        "text_encoder_3": t5(),
        "tokenizer_3": words(),
    }


def sd3() -> Any:
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(**sd3_parts())


def sd3_pag() -> Any:
    from diffusers import StableDiffusion3PAGPipeline

    return StableDiffusion3PAGPipeline(**sd3_parts(), pag_applied_layers=["blocks.1"])


# --- Flux and PixArt -----------------------------------------------------------------------------------------------------


def flux_parts() -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    return {
        "transformer": scramble(transformer),
        "scheduler": flow(),
        "vae": tiny_vae(),
        "text_encoder": clip_text(False),
        "tokenizer": words(),
        "text_encoder_2": t5(),
        "tokenizer_2": words(),
    }


def flux() -> Any:
    from diffusers import FluxPipeline

    return FluxPipeline(**flux_parts())


def flux_kontext() -> Any:
    from diffusers import FluxKontextPipeline

    return FluxKontextPipeline(**flux_parts())


def pixart_parts() -> dict[str, Any]:
    from diffusers import PixArtTransformer2DModel

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
    return {
        "tokenizer": words(),
        "text_encoder": t5(),
        "vae": tiny_vae(),
        "transformer": scramble(transformer),
        "scheduler": ddim(),
    }


def pixart() -> Any:
    from diffusers import PixArtAlphaPipeline

    return PixArtAlphaPipeline(**pixart_parts())


def pixart_sigma() -> Any:
    from diffusers import PixArtSigmaPipeline

    return PixArtSigmaPipeline(**pixart_parts())


def pixart_sigma_pag() -> Any:
    from diffusers import PixArtSigmaPAGPipeline

    return PixArtSigmaPAGPipeline(**pixart_parts(), pag_applied_layers=["blocks.1"])


# --- the table -----------------------------------------------------------------------------------------------------------

SMALL = {"height": 32, "width": 32, "num_inference_steps": 2}
NO_BINS = {"use_resolution_binning": False}
GUIDED = {"guidance_scale": 3.0}
PAG = {"guidance_scale": 3.0, "pag_scale": 2.0}
TRUE = {"guidance_scale": 3.0, "true_cfg_scale": 2.0, "negative_prompt": MOON}

PIPELINES = {
    "sd": Tiny(sd, SMALL, GUIDED),
    "sd_pag": Tiny(sd_pag, SMALL, PAG),
    "lcm": Tiny(lcm, SMALL, GUIDED, "none"),
    "sdxl": Tiny(sdxl, SMALL, GUIDED),
    "sdxl_pag": Tiny(sdxl_pag, SMALL, PAG),
    "sd3": Tiny(sd3, SMALL, GUIDED),
    "sd3_pag": Tiny(sd3_pag, SMALL, PAG),
    "flux": Tiny(flux, SMALL, GUIDED, "none"),
    "flux_true": Tiny(flux, SMALL, TRUE, "two calls"),
    "flux_kontext": Tiny(flux_kontext, SMALL | {"max_area": 32 * 32, "_auto_resize": False}, GUIDED, "none"),
    "pixart": Tiny(pixart, SMALL | NO_BINS, GUIDED),
    "pixart_sigma": Tiny(pixart_sigma, SMALL | NO_BINS, GUIDED),
    "pixart_sigma_pag": Tiny(pixart_sigma_pag, SMALL | NO_BINS, PAG),
}

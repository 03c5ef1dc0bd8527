"""Tiny pipelines of diffusers with random weights: every text-to-image pipeline that probekit says it works with.

Each is built in code from a configuration, with text encoders and tokenizers, and paints two steps in less than a second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch

from probekit.hooks import stack
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
    pictures: what it paints from beside the caption, once a row.
    """

    make: Callable[[], Any]
    options: Mapping[str, Any]
    guided: Mapping[str, Any] = field(default_factory=dict)
    guidance: Guidance = "one call"
    pictures: Mapping[str, Any] = field(default_factory=dict)


OF_EVERY_KIND = ("sd", "sdxl", "sd_controlnet", "sd3", "flux", "pixart", "chroma", "qwen_image", "lumina2", "cascade")
"""Pipelines that differ in kind: U-Nets, two streams, one sequence of both, two calls a step, what is not like any other."""


def each(names: Iterable[str]) -> list[Any]:
    """Pipelines for a test's parameters; all but those `OF_EVERY_KIND` make it a slow one."""
    return [name if name in OF_EVERY_KIND else pytest.param(name, marks=pytest.mark.slow) for name in names]


@functools.cache
def build(name: str) -> Any:
    """The pipeline of that name in `PIPELINES`, built once; whoever changes it makes one for himself."""
    torch.manual_seed(0)  # biases start as their layers make them
    pipeline = PIPELINES[name].make()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def row(name: str, caption: str, generator: torch.Generator) -> dict[str, Any]:
    """What is particular to a row of that pipeline, for `hooks.stack`; a caption is a class for DiTPipeline."""
    told = {"class_labels": len(caption) % 10} if name == "dit" else {"prompt": caption}
    return {**told, **PIPELINES[name].pictures, "generator": generator}


def call(name: str, captions: Sequence[str], generators: Sequence[torch.Generator], **options: Any) -> dict[str, Any]:
    """The whole call of that pipeline under guidance; options come last. Negative prompts stand in it once a caption."""
    tiny = PIPELINES[name]
    rows = [row(name, caption, generator) for caption, generator in zip(captions, generators, strict=True)]
    shared = {**tiny.options, **tiny.guided, **options}
    listed = {key: [value] * len(captions) for key, value in shared.items() if key == "negative_prompt"}
    return {**stack(rows), **shared, **listed}


# --- text ----------------------------------------------------------------------------------------------------------------


@functools.cache
def words(length: int = 77) -> Any:
    """A CLIPTokenizer of scenes, which stands for those of T5, BERT and others, too."""
    made = tokenizer()
    made.model_max_length = length
    return made


@functools.cache
def chat_words(pad: str = "right") -> Any:
    """A tokenizer with a template of messages, a token a word, which stands for those of language models.

    Words that no caption of a scene uses are all one token. pad: the side on which shorter captions are filled up.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from probekit.data.scenes import all_scenes

    spelled = sorted({word for scene in all_scenes() for word in scene.caption.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", "user", "system", "assistant", *spelled])}
    pieces = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    made = PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=512,
        padding_side=pad,
    )
    made.chat_template = (
        "{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }}"
        "{% else %}{% for c in m.content %}{{ c.text }} {% endfor %}{% endif %}\n{% endfor %}"
    )
    return made


def clip_text(projection: bool, to: int = 8, length: int = 77) -> Any:
    """A CLIP text encoder, 16 wide, projecting or not at all."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    end = words().eos_token_id
    config = CLIPTextConfig(
        vocab_size=len(words()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=to,
        max_position_embeddings=length,
        eos_token_id=end,
        pad_token_id=end,
        bos_token_id=words().bos_token_id,
    )
    return scramble((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def t5(width: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(words()), d_model=width, d_ff=32, d_kv=8, num_layers=2, num_heads=2)
    return scramble(T5EncoderModel(config))


def language(width: int = 16, layers: int = 3, vocabulary: int | None = None, *, causal: bool = False) -> Any:
    """A language model, which stands for Gemma, GLM, Llama, Mistral, Qwen and SmolLM."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        vocab_size=vocabulary or len(chat_words()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        attn_implementation="eager",  # the only one that gives HiDream the attentions that it asks for
    )
    return scramble((Qwen3ForCausalLM if causal else Qwen3Model)(config))


# --- Stable Diffusion ----------------------------------------------------------------------------------------------------


def ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(clip_sample=False, steps_offset=1)


def flow(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def vae(latent_channels: int = 4, **options: Any) -> Any:
    """An autoencoder of codes an eighth as wide as pictures; some pipelines count on that. `tiny_vae` halves them."""
    from diffusers import AutoencoderKL

    config: dict[str, Any] = {
        "block_out_channels": (4, 4, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": latent_channels,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "shift_factor": 0.0,
        "scaling_factor": 0.5,
    }
    return scramble(AutoencoderKL(**config | options))


def sharp(autoencoder: Any) -> Any:
    """Codes without noise: some ControlNets sample those of their pictures by torch's global generator."""
    channels = autoencoder.config.latent_channels
    with torch.no_grad():
        autoencoder.quant_conv.weight[channels:] = 0
        autoencoder.quant_conv.bias[channels:] = -30
    return autoencoder


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

    return FluxKontextPipeline(**flux_parts() | {"vae": vae()})


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


# --- with a ControlNet or an adapter -------------------------------------------------------------------------------------


def picture(side: int = 32) -> Any:
    from PIL import Image

    return Image.radial_gradient("L").resize((side, side)).convert("RGB")


def controlnet(of: Any) -> Any:
    from diffusers import ControlNetModel

    return scramble(ControlNetModel.from_unet(of, conditioning_embedding_out_channels=(8, 16)))


def adapter() -> Any:
    from diffusers import T2IAdapter

    return scramble(T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2))


def sd_controlnet() -> Any:
    from diffusers import StableDiffusionControlNetPipeline

    parts = sd_parts()
    return StableDiffusionControlNetPipeline(**parts, controlnet=controlnet(parts["unet"]))


def sd_adapter() -> Any:
    from diffusers import StableDiffusionAdapterPipeline

    return StableDiffusionAdapterPipeline(**sd_parts(), adapter=adapter())


def sdxl_controlnet() -> Any:
    from diffusers import StableDiffusionXLControlNetPipeline

    parts = sdxl_parts()
    return StableDiffusionXLControlNetPipeline(**parts, controlnet=controlnet(parts["unet"]))


def sdxl_adapter() -> Any:
    from diffusers import StableDiffusionXLAdapterPipeline

    levels = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    parts = sdxl_parts() | {"unet": unet(cross_attention_dim=32, **levels, **XL)}
    return StableDiffusionXLAdapterPipeline(**parts, adapter=adapter())


def sd3_controlnet() -> Any:
    from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline

    parts = sd3_parts()
    sharp(parts["vae"])
    of = SD3ControlNetModel(**dict(parts["transformer"].config) | {"num_layers": 2})
    return StableDiffusion3ControlNetPipeline(**parts, controlnet=scramble(of))


def flux_controlnet() -> Any:
    from diffusers import FluxControlNetModel, FluxControlNetPipeline

    parts = flux_parts()
    of = FluxControlNetModel.from_transformer(
        parts["transformer"],
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        load_weights_from_transformer=False,
    )
    return FluxControlNetPipeline(**parts, controlnet=scramble(of))


def upscale() -> Any:
    from diffusers import DDPMScheduler, StableDiffusionUpscalePipeline

    return StableDiffusionUpscalePipeline(
        vae=tiny_vae(),
        text_encoder=clip_text(False),
        tokenizer=words(),
        unet=unet(in_channels=7, num_class_embeds=1000),
        low_res_scheduler=DDPMScheduler(),
        scheduler=ddim(),
    )


# --- HunyuanDiT, DiT, OmniGen --------------------------------------------------------------------------------------------


def hunyuan_dit_parts() -> dict[str, Any]:
    from diffusers import HunyuanDiT2DModel
    from transformers import BertConfig, BertModel

    bert = BertConfig(vocab_size=len(words()), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    transformer = HunyuanDiT2DModel(
        sample_size=8,
        num_layers=4,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        hidden_size=16,
        in_channels=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        text_len=77,
        text_len_t5=256,
    )
    return {
        "vae": vae(),
        "text_encoder": scramble(BertModel(bert)),
        "tokenizer": words(),
        "text_encoder_2": t5(),
        "tokenizer_2": words(),
        "transformer": scramble(transformer),
        "scheduler": ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def hunyuan_dit() -> Any:
    from diffusers import HunyuanDiTPipeline

    return HunyuanDiTPipeline(**hunyuan_dit_parts())


def hunyuan_dit_pag() -> Any:
    from diffusers import HunyuanDiTPAGPipeline

    return HunyuanDiTPAGPipeline(**hunyuan_dit_parts(), pag_applied_layers=["1"])


def hunyuan_dit_controlnet() -> Any:
    from diffusers import HunyuanDiT2DControlNetModel, HunyuanDiTControlNetPipeline

    parts = hunyuan_dit_parts()
    sharp(parts["vae"])
    of = HunyuanDiT2DControlNetModel.from_transformer(
        parts["transformer"], transformer_num_layers=4, load_weights_from_transformer=False
    )
    return HunyuanDiTControlNetPipeline(**parts, controlnet=scramble(of))


def dit() -> Any:
    from diffusers import DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        num_embeds_ada_norm=1000,  # the empty class is number 1000
        norm_num_groups=1,
    )
    return DiTPipeline(scramble(transformer), tiny_vae(), ddim())


def omnigen() -> Any:
    from diffusers import OmniGenPipeline, OmniGenTransformer2DModel

    transformer = OmniGenTransformer2DModel(
        in_channels=4,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=2,
        pad_token_id=0,
        vocab_size=len(chat_words()),
        time_step_dim=16,
        rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
    )
    return OmniGenPipeline(scramble(transformer), flow(invert_sigmas=True, num_train_timesteps=1), vae(), chat_words())


# --- with a prior, or in pixels ------------------------------------------------------------------------------------------


def prior_parts() -> dict[str, Any]:
    """What makes image embeddings, 16 wide, of captions."""
    from diffusers import PriorTransformer, UnCLIPScheduler

    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=16)
    scheduler = UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0)
    return {"prior": scramble(prior), "text_encoder": clip_text(True, 16), "tokenizer": words(), "scheduler": scheduler}


def stable_unclip() -> Any:
    from diffusers import DDPMScheduler, StableUnCLIPPipeline
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    prior, parts = prior_parts(), sd_parts()
    return StableUnCLIPPipeline(
        prior=prior["prior"],
        prior_text_encoder=prior["text_encoder"],
        prior_tokenizer=prior["tokenizer"],
        prior_scheduler=prior["scheduler"],
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=16),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        unet=unet(class_embed_type="projection", projection_class_embeddings_input_dim=32),
        **{part: parts[part] for part in ("vae", "text_encoder", "tokenizer", "scheduler")},
    )


def kandinsky_prior() -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
        image_size=32,
        patch_size=16,
    )
    encoder = scramble(CLIPVisionModelWithProjection(vision))
    return prior_parts() | {"image_encoder": encoder, "image_processor": CLIPImageProcessor(size=32, crop_size=32)}


def movq() -> Any:
    from diffusers import VQModel

    made = VQModel(
        block_out_channels=(32, 32),  # its norms have 32 groups
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    return scramble(made)


def kandinsky_unet(**options: Any) -> Any:
    return unet(
        out_channels=8,
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
        encoder_hid_dim=16,
        **options,
    )


def kandinsky_decoder() -> Any:
    from diffusers import KandinskyPipeline
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    config = MCLIPConfig(
        numDims=16,
        transformerDimensions=16,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(words()),
    )
    return KandinskyPipeline(
        text_encoder=scramble(MultilingualCLIP(config)),
        tokenizer=words(),
        unet=kandinsky_unet(addition_embed_type="text_image", encoder_hid_dim_type="text_image_proj"),
        scheduler=ddim(),
        movq=movq(),
    )


def kandinsky22_decoder() -> Any:
    from diffusers import KandinskyV22Pipeline

    of = kandinsky_unet(addition_embed_type="image", encoder_hid_dim_type="image_proj")
    return KandinskyV22Pipeline(unet=of, scheduler=ddim(), movq=movq())


def with_prior(combined: str, decoder: Any, prior: Mapping[str, Any]) -> Any:
    import diffusers

    return getattr(diffusers, combined)(**decoder.components, **{f"prior_{part}": prior[part] for part in prior})


def kandinsky() -> Any:
    return with_prior("KandinskyCombinedPipeline", kandinsky_decoder(), kandinsky_prior())


def kandinsky22() -> Any:
    return with_prior("KandinskyV22CombinedPipeline", kandinsky22_decoder(), kandinsky_prior())


def kandinsky3() -> Any:
    from diffusers import Kandinsky3Pipeline, Kandinsky3UNet

    of = Kandinsky3UNet(
        time_embedding_dim=8,
        groups=2,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(8, 16),
        cross_attention_dim=16,
        encoder_hid_dim=32,
    )
    return Kandinsky3Pipeline(words(), t5(), scramble(of), ddim(), movq())


def deepfloyd() -> Any:
    from diffusers import DDPMScheduler, IFPipeline

    of = unet(
        in_channels=3,
        out_channels=6,
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        encoder_hid_dim=32,
        act_fn="gelu",
    )
    return IFPipeline(
        tokenizer=words(),
        text_encoder=t5(),
        unet=of,
        scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", prediction_type="epsilon"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def cascade_unet(**options: Any) -> Any:
    from diffusers.models.unets import StableCascadeUNet

    config: dict[str, Any] = {
        "timestep_ratio_embedding_dim": 8,
        "conditioning_dim": 16,
        "block_out_channels": (8, 16),
        "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (1, 2),
        "up_num_layers_per_block": (2, 1),
        "clip_text_pooled_in_channels": 16,
    }
    return scramble(StableCascadeUNet(**config | options))


def cascade_decoder() -> Any:
    from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    return StableCascadeDecoderPipeline(
        decoder=cascade_unet(in_channels=4, out_channels=4, patch_size=2, effnet_in_channels=4),
        tokenizer=words(),
        text_encoder=clip_text(True, 16),
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=scramble(PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=8)),
        latent_dim_scale=10.67,
    )


def cascade_prior() -> dict[str, Any]:
    from diffusers import DDPMWuerstchenScheduler

    return {
        "prior": cascade_unet(
            in_channels=4,
            out_channels=4,
            block_out_channels=(16,),
            num_attention_heads=(2,),
            down_num_layers_per_block=(2,),
            up_num_layers_per_block=(2,),
            down_blocks_repeat_mappers=(1,),
            up_blocks_repeat_mappers=(1,),
            block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),),
            clip_text_in_channels=16,
            clip_image_in_channels=16,
        ),
        "text_encoder": clip_text(True, 16),
        "tokenizer": words(),
        "scheduler": DDPMWuerstchenScheduler(),
        "image_encoder": None,
        "feature_extractor": None,
    }


def cascade() -> Any:
    return with_prior("StableCascadeCombinedPipeline", cascade_decoder(), cascade_prior())


# --- transformers that take a language model's text ----------------------------------------------------------------------


def qwen_vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    config: dict[str, Any] = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return scramble(AutoencoderKLQwenImage(**config, latents_mean=[0.0] * 4, latents_std=[1.0] * 4))


def dc_vae() -> Any:
    from diffusers import AutoencoderDC

    made = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.5,
    )
    return scramble(made)


STREAMS: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}
"""Blocks of two streams, and then of one, as Flux's relatives have them."""


def flux2() -> Any:
    from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel

    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    config = STREAMS | {"joint_attention_dim": 24, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16}
    return Flux2Pipeline(
        scheduler=flow(),
        vae=scramble(autoencoder),
        text_encoder=language(8, 31),  # it takes the layers 10, 20 and 30
        tokenizer=chat_words(),
        transformer=scramble(Flux2Transformer2DModel(**config)),
    )


def chroma() -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    guidance = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    transformer = ChromaTransformer2DModel(**STREAMS | guidance | {"joint_attention_dim": 32})
    return ChromaPipeline(flow(), tiny_vae(), t5(), words(), scramble(transformer))


def ovis() -> Any:
    from diffusers import OvisImagePipeline, OvisImageTransformer2DModel

    transformer = OvisImageTransformer2DModel(**STREAMS, out_channels=16)
    return OvisImagePipeline(flow(), tiny_vae(), language(), chat_words(), scramble(transformer))


def bria() -> Any:
    from diffusers import BriaPipeline, BriaTransformer2DModel

    transformer = BriaTransformer2DModel(**STREAMS | {"joint_attention_dim": 32, "axes_dims_rope": [4, 6, 6]})
    return BriaPipeline(scramble(transformer), flow(), tiny_vae(), t5(), words())


def bria_fibo() -> Any:
    from diffusers import AutoencoderKLWan, BriaFiboPipeline, BriaFiboTransformer2DModel

    autoencoder = AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, False, False, False],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    config = STREAMS | {"joint_attention_dim": 32, "text_encoder_dim": 16, "axes_dims_rope": [4, 6, 6]}
    transformer = BriaFiboTransformer2DModel(**config)
    text = language(layers=5, vocabulary=128_001, causal=True)  # an empty caption is token 128,000
    return BriaFiboPipeline(scramble(transformer), flow(), scramble(autoencoder), text, chat_words())


def qwen_image() -> Any:
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    config = {name: value for name, value in STREAMS.items() if name != "num_single_layers"}
    transformer = QwenImageTransformer2DModel(**config | {"patch_size": 2, "out_channels": 4})
    return QwenImagePipeline(flow(), qwen_vae(), language(), chat_words(), scramble(transformer))


def krea2() -> Any:
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel
    from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

    text = Qwen3VLTextConfig(
        vocab_size=len(chat_words()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    )
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        axes_dims_rope=(4, 6, 6),
    )
    return Krea2Pipeline(
        flow(),
        qwen_vae(),
        scramble(Qwen3VLTextModel(text)),
        chat_words(),
        scramble(transformer),
        text_encoder_select_layers=(1, 2),
    )


def hunyuan_image() -> Any:
    from diffusers import AutoencoderKLHunyuanImage, HunyuanImagePipeline, HunyuanImageTransformer2DModel
    from diffusers.guiders import AdaptiveProjectedMixGuidance
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    autoencoder = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=16,
        scaling_factor=0.5,
    )
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        patch_size=(1, 1),
        text_embed_dim=16,
        text_embed_2_dim=32,
        rope_axes_dim=(8, 8),
    )
    letters = T5Config(vocab_size=384, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    pipeline = HunyuanImagePipeline(
        scheduler=flow(),
        vae=scramble(autoencoder),
        text_encoder=language(),
        tokenizer=chat_words(),
        text_encoder_2=scramble(T5EncoderModel(letters)),
        tokenizer_2=ByT5Tokenizer(),
        transformer=scramble(transformer),
        guider=AdaptiveProjectedMixGuidance(guidance_scale=3.0, adaptive_projected_guidance_start_step=1),
    )
    pipeline.tokenizer_max_length = 48  # instead of a thousand
    return pipeline


def kandinsky5() -> Any:
    from diffusers import Kandinsky5T2IPipeline, Kandinsky5Transformer3DModel

    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(2, 2, 4),
    )
    pipeline = Kandinsky5T2IPipeline(scramble(transformer), vae(), language(), chat_words(), clip_text(False), words(), flow())
    pipeline.resolutions = [(64, 64)]  # of published models: a megapixel
    return pipeline


def cogview3() -> Any:
    from diffusers import CogVideoXDDIMScheduler, CogView3PlusPipeline, CogView3PlusTransformer2DModel

    transformer = CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
    )
    return CogView3PlusPipeline(words(), t5(), vae(), scramble(transformer), CogVideoXDDIMScheduler())


def cogview4() -> Any:
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel

    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    scheduler = flow(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return CogView4Pipeline(chat_words("left"), language(), vae(), scramble(transformer), scheduler)


def aura_flow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(words(), t5(), tiny_vae(), scramble(transformer), flow())


def prx() -> Any:
    from diffusers import PRXPipeline, PRXTransformer2DModel

    transformer = PRXTransformer2DModel(
        in_channels=4, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[4, 4]
    )
    pipeline = PRXPipeline(scramble(transformer), flow(), language(), chat_words(), vae(), default_sample_size=64)
    pipeline.text_preprocessor.clean_text = str.strip  # its own is for what is found on the web, and needs ftfy
    return pipeline


def lumina() -> Any:
    from diffusers import LuminaNextDiT2DModel, LuminaPipeline

    transformer = LuminaNextDiT2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
    )
    return LuminaPipeline(scramble(transformer), flow(), vae(), language(), chat_words())


def lumina2() -> Any:
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 64, 64),
        cap_feat_dim=16,
    )
    return Lumina2Pipeline(scramble(transformer), flow(), vae(), language(), chat_words())


def sana_parts(**options: Any) -> dict[str, Any]:
    from diffusers import SanaTransformer2DModel

    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        **options,
    )
    return {
        "tokenizer": chat_words(),
        "text_encoder": language(),
        "vae": dc_vae(),
        "transformer": scramble(transformer),
        "scheduler": flow(),
    }


def sana() -> Any:
    from diffusers import SanaPipeline

    return SanaPipeline(**sana_parts())


def sana_pag() -> Any:
    from diffusers import SanaPAGPipeline

    return SanaPAGPipeline(**sana_parts(), pag_applied_layers=["transformer_blocks.1"])


def sana_sprint() -> Any:
    from diffusers import SanaSprintPipeline, SCMScheduler

    return SanaSprintPipeline(**sana_parts(guidance_embeds=True) | {"scheduler": SCMScheduler()})


def hidream() -> Any:
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel

    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[32, 16],
        text_emb_dim=16,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=[0, 1, 2, 2],
        force_inference_output=True,
    )
    pipeline = HiDreamImagePipeline(
        flow(),
        tiny_vae(),
        clip_text(True, length=248),
        words(248),
        clip_text(True, length=248),
        words(248),
        t5(),
        words(248),
        language(causal=True),
        chat_words(),
        scramble(transformer),
    )
    pipeline.default_sample_size = 16  # every picture is made of that size, in its own proportions
    return pipeline


def z_image() -> Any:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[1024, 64, 64],
    )
    return ZImagePipeline(flow(), vae(), language(), chat_words(), scramble(transformer))


# --- the table -----------------------------------------------------------------------------------------------------------

SMALL = {"height": 32, "width": 32, "num_inference_steps": 2}
MIDDLE = SMALL | {"height": 64, "width": 64}
LARGE = SMALL | {"height": 128, "width": 128}
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
    "flux_kontext": Tiny(flux_kontext, MIDDLE | {"max_area": 64 * 64, "_auto_resize": False}, GUIDED, "none"),
    "pixart": Tiny(pixart, SMALL | NO_BINS, GUIDED),
    "pixart_sigma": Tiny(pixart_sigma, SMALL | NO_BINS, GUIDED),
    "pixart_sigma_pag": Tiny(pixart_sigma_pag, SMALL | NO_BINS, PAG),
    "sd_controlnet": Tiny(sd_controlnet, SMALL, GUIDED, pictures={"image": picture()}),
    "sd_adapter": Tiny(sd_adapter, SMALL, GUIDED, pictures={"image": picture()}),
    "sdxl_controlnet": Tiny(sdxl_controlnet, SMALL, GUIDED, pictures={"image": picture()}),
    "sdxl_adapter": Tiny(sdxl_adapter, SMALL, GUIDED, pictures={"image": picture()}),
    "sd3_controlnet": Tiny(sd3_controlnet, SMALL, GUIDED, pictures={"control_image": picture()}),
    "flux_controlnet": Tiny(flux_controlnet, SMALL, GUIDED, "none", pictures={"control_image": picture()}),
    "upscale": Tiny(upscale, {"num_inference_steps": 2}, GUIDED, pictures={"image": picture(16)}),
    "hunyuan_dit": Tiny(hunyuan_dit, MIDDLE | NO_BINS, GUIDED),
    "hunyuan_dit_pag": Tiny(hunyuan_dit_pag, MIDDLE | NO_BINS, PAG),
    "hunyuan_dit_controlnet": Tiny(hunyuan_dit_controlnet, MIDDLE | NO_BINS, GUIDED, pictures={"control_image": picture(64)}),
    "dit": Tiny(dit, {"num_inference_steps": 2}, GUIDED),
    "omnigen": Tiny(omnigen, MIDDLE, GUIDED),
    "stable_unclip": Tiny(stable_unclip, SMALL | {"prior_num_inference_steps": 2}, GUIDED),
    "kandinsky": Tiny(kandinsky, SMALL | {"prior_num_inference_steps": 2}, GUIDED),
    "kandinsky22": Tiny(kandinsky22, SMALL | {"prior_num_inference_steps": 2}, GUIDED),
    "kandinsky3": Tiny(kandinsky3, SMALL, GUIDED),
    "deepfloyd": Tiny(deepfloyd, SMALL, GUIDED),
    "cascade": Tiny(cascade, LARGE | {"prior_num_inference_steps": 2}, {"decoder_guidance_scale": 3.0}),
    "flux2": Tiny(flux2, SMALL | {"text_encoder_out_layers": (1, 2, 3), "max_sequence_length": 48}, GUIDED, "none"),
    "chroma": Tiny(chroma, SMALL | {"max_sequence_length": 48}, GUIDED | {"negative_prompt": "small"}, "two calls"),
    "ovis": Tiny(ovis, SMALL, GUIDED, "two calls"),
    "bria": Tiny(bria, SMALL, GUIDED),
    "bria_fibo": Tiny(bria_fibo, MIDDLE, GUIDED),
    "qwen_image": Tiny(qwen_image, MIDDLE, {"true_cfg_scale": 3.0, "negative_prompt": "small"}, "two calls"),
    "krea2": Tiny(krea2, MIDDLE, GUIDED, "two calls"),
    "hunyuan_image": Tiny(hunyuan_image, SMALL, {"negative_prompt": "small"}, "two calls"),
    "kandinsky5": Tiny(kandinsky5, MIDDLE, GUIDED, "two calls"),
    "cogview3": Tiny(cogview3, MIDDLE, GUIDED),
    "cogview4": Tiny(cogview4, MIDDLE, GUIDED, "two calls"),
    "aura_flow": Tiny(aura_flow, SMALL, GUIDED),
    "prx": Tiny(prx, MIDDLE | NO_BINS, GUIDED),
    "lumina": Tiny(lumina, MIDDLE, GUIDED),
    "lumina2": Tiny(lumina2, MIDDLE, GUIDED, "two calls"),
    "sana": Tiny(sana, SMALL | NO_BINS, GUIDED),
    "sana_pag": Tiny(sana_pag, SMALL | NO_BINS, PAG),
    "sana_sprint": Tiny(sana_sprint, SMALL | NO_BINS, GUIDED, "none"),
    "hidream": Tiny(hidream, SMALL, GUIDED),
    "z_image": Tiny(z_image, MIDDLE, GUIDED),
}

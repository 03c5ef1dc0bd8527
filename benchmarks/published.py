"""What a sweep of published models takes: built at full size from their published configs, with random weights, in bfloat16.

    python benchmarks/published.py sd-1.4 [sdxl sd-3.5-medium kandinsky-2.2] [--steps 2] [--layers 2] [--side 512]

Every model runs in a process of its own: two layers, spread over the denoiser, of one pair without guidance, pictures of the
published size if no other is asked for. Memory is the resident set's peak as the kernel counts it (Linux), beside what
`memory.of_a_row` says of it.
SD 3.5's T5, which is optional, is left out. What the random pictures look like does not matter; that they are finite and that
every layer changes something is checked. The last column is how far O stands from what the pipeline paints of it alone: the
rounding of bfloat16 in batches of other shapes, which random weights amplify.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import torch
from memory import resident, start_peak

ORIGINAL = ("a small white moon at the right on a dotted green ground", 0)
EDIT = ("a large red fish at the left on a plain blue ground", 1)  # random weights hardly read captions


def _clip(width: int, layers: int, heads: int, projection: int, kind: str = "CLIPTextModel", act: str = "quick_gelu") -> Any:
    import transformers

    from probekit.zoo.scene_clip import tokenizer

    words = tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=projection,
        hidden_act=act,
        eos_token_id=words.eos_token_id,
        bos_token_id=words.bos_token_id,
        pad_token_id=words.eos_token_id,
    )
    return getattr(transformers, kind)(config)


def _words() -> Any:
    from probekit.zoo.scene_clip import tokenizer

    words = tokenizer()
    words.model_max_length = 77
    return words


def _vae(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    shape: dict[str, Any] = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    return AutoencoderKL(**shape | options)


def sd_1_4() -> Any:
    """CompVis/stable-diffusion-v1-4."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    vae, text = _vae(sample_size=512), _clip(768, 12, 12, 768)
    return StableDiffusionPipeline(vae, text, _words(), unet, scheduler, None, None, requires_safety_checker=False)


def sdxl() -> Any:
    """stabilityai/stable-diffusion-xl-base-1.0."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    one = _clip(768, 12, 12, 768)
    two = _clip(1280, 32, 20, 1280, "CLIPTextModelWithProjection", "gelu")
    vae = _vae(sample_size=1024, scaling_factor=0.13025, force_upcast=False)
    return StableDiffusionXLPipeline(vae, one, two, _words(), _words(), unet, scheduler)


def sd_3_5_medium() -> Any:
    """stabilityai/stable-diffusion-3.5-medium, without its T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    one = _clip(768, 12, 12, 768, "CLIPTextModelWithProjection")
    two = _clip(1280, 32, 20, 1280, "CLIPTextModelWithProjection", "gelu")
    vae = _vae(
        sample_size=1024,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer, scheduler, vae, one, _words(), two, _words(), None, None)


def kandinsky_2_2() -> Any:
    """kandinsky-community/kandinsky-2-2-decoder with kandinsky-2-2-prior."""
    import diffusers
    import transformers

    unet = diffusers.UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=8,
        block_out_channels=(384, 768, 1152, 1536),
        down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
        layers_per_block=3,
        attention_head_dim=64,
        cross_attention_dim=768,
        addition_embed_type="image",
        encoder_hid_dim=1280,
        encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
    )
    movq = diffusers.VQModel(
        block_out_channels=(128, 256, 256, 512),
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=4,
        num_vq_embeddings=16384,
        vq_embed_dim=4,
        norm_type="spatial",
        sample_size=32,
    )
    prior = diffusers.PriorTransformer(num_attention_heads=32, attention_head_dim=64, num_layers=20, embedding_dim=1280)
    vision = transformers.CLIPVisionConfig(
        hidden_size=1664,
        intermediate_size=8192,
        num_hidden_layers=48,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=1280,
        hidden_act="gelu",
    )
    return diffusers.KandinskyV22CombinedPipeline(
        unet=unet,
        scheduler=diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False),
        movq=movq,
        prior_prior=prior,
        prior_image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        prior_text_encoder=_clip(1280, 32, 20, 1280, "CLIPTextModelWithProjection", "gelu"),
        prior_tokenizer=_words(),
        prior_scheduler=diffusers.UnCLIPScheduler(variance_type="fixed_small_log", clip_sample_range=5.0),
        prior_image_processor=transformers.CLIPImageProcessor(),
    )


MODELS: dict[str, Callable[[], Any]] = {
    "sd-1.4": sd_1_4,
    "sdxl": sdxl,
    "sd-3.5-medium": sd_3_5_medium,
    "kandinsky-2.2": kandinsky_2_2,
}


def measure(name: str, steps: int, count: int, side: int | None) -> str:
    """A line of the table."""
    from probekit import hooks
    from probekit.models import memory
    from probekit.models.families.text_to_image import as_model

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    pipeline = MODELS[name]()
    torch.set_default_dtype(torch.float32)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.bfloat16).eval().requires_grad_(False)
    model = as_model(pipeline, name)
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 1.0}
    if side is not None:
        options |= {"height": side, "width": side}
    if name == "kandinsky-2.2":
        options["prior_num_inference_steps"] = 2
    (alone,) = model.painter.generate([ORIGINAL[0]], [0], **options)
    row = memory.of_a_row(model.painter, **options)
    every = hooks.select(model.layers, hooks.default_layers(model.denoiser))
    layers = [every[(2 * i + 1) * len(every) // (2 * count)] for i in range(count)]
    before, start = start_peak(), time.process_time()
    rules = [[], *([hooks.Injection(layer.name)] for layer in layers)]
    swept = model.painter.sweep(ORIGINAL, EDIT, rules, **options)
    seconds, peak, rows = time.process_time() - start, resident("VmHWM") - before, len(rules) + 1
    assert swept.images.isfinite().all() and swept.edit.isfinite().all()
    off = (swept.images[0] - alone).abs().max().item()
    moved = [(image - swept.images[0]).abs().max().item() for image in swept.images[1:]]
    assert min(moved) > 0, "the layers do nothing"
    size = f"{alone.shape[-1]}x{alone.shape[-2]}"
    weights, parameters = memory.of_weights(model.painter), sum(p.numel() for p in model.denoiser.parameters())
    return (
        f"| {name} | {parameters / 1e6:,.0f} M | {size} | {len(every)} | {weights / 2**30:.1f} GiB | {row / 2**30:.2f} GiB | "
        f"{peak / rows / 2**30:.2f} GiB | {seconds / rows / steps:.1f} s | {off:.3f} |"
    )


def main() -> None:
    """Measure the models asked for and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--side", type=int, help="of the pictures in pixels, if not the published one")
    asked = parser.parse_args()
    print("| model | denoiser | pictures | layers | weights | a row, said | taken | seconds a row and step | rounding |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in asked.models:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(measure, (name, asked.steps, asked.layers, asked.side)), flush=True)


if __name__ == "__main__":
    main()

"""mini-sd: a complete StableDiffusionPipeline of 64x64 scenes, small enough to sweep every layer on a laptop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from probekit.data.scenes import PLACES, SIZES, render, split
from probekit.files import write_whole
from probekit.progress import progress
from probekit.zoo.measured import Measured
from probekit.zoo.training import Schedule, train

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

SCHEDULE = Schedule(steps=6500, learning_rate=1.2e-3, warmup=300, ema=0.999, bfloat16=True)
BATCH = 32
EMPTY_CAPTIONS = 0.1
OBJECT_WEIGHT = 8.0


def unet() -> UNet2DConditionModel:
    """Stable Diffusion's U-Net in small: cross-attention on two of three levels, 18 resnet and attention layers."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=2,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """DDIM with Stable Diffusion's betas and Stable Diffusion 2's v-prediction."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )


class SceneCodes:
    """Codes of all training scenes, computed once and kept in `cache`; their captions, and the empty one; where objects are."""

    def __init__(self, vae: AutoencoderKL, cache: Path) -> None:
        if not cache.exists():
            _encode(vae, cache)
        self.latents = load_file(cache)["latents"]
        scenes = split(held_out=False)
        self.captions = [*(scene.caption for scene in scenes), ""]
        centres = torch.tensor([PLACES[s.place] for s in scenes])
        reach = torch.tensor([SIZES[s.size] for s in scenes]) + 3
        cells = 4 * torch.arange(16) + 2
        inside = (centres[:, :, None] - cells).abs() < reach[:, None, None]
        self.objects = inside[:, 1, :, None] & inside[:, 0, None, :]

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The numbers of `BATCH` scenes, their codes (n, 4, 16, 16), and as much noise."""
        index = torch.randint(self.latents.shape[0], (BATCH,), generator=generator)
        latents = self.latents[index].float()
        return index, latents, torch.randn(latents.shape, generator=generator)

    def captioned(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """The numbers of these scenes' captions, now and then of the empty one instead."""
        return torch.where(torch.rand(len(index), generator=generator) < EMPTY_CAPTIONS, len(self.captions) - 1, index)

    def mean(self, error: Tensor, captioned: Tensor) -> Tensor:
        """The mean of an error (n, 4, 16, 16), in which cells around the object count `OBJECT_WEIGHT` times.

        They decide where it stands and what it is. That moves no optimum: given its caption, a cell's weight is fixed, and
        pictures without a caption have none.
        """
        last = len(self.captions) - 1
        objects = self.objects[captioned.clamp(max=last - 1)] & (captioned < last)[:, None, None]
        return (error * (1 + (OBJECT_WEIGHT - 1) * objects.float())[:, None]).mean()


class Denoising:
    """The loss of mini-sd."""

    def __init__(self, vae_folder: Path, clip_folder: Path, cache: Path) -> None:
        from diffusers import AutoencoderKL
        from transformers import CLIPTextModel, CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
        # frozen: trained along, it forgets early which words it does not need yet, and left and right become one
        self.text_encoder = CLIPTextModel.from_pretrained(clip_folder).bfloat16()
        self.scheduler = scheduler()
        self.scenes = SceneCodes(AutoencoderKL.from_pretrained(vae_folder), cache)
        self.tokens = tokenizer(self.scenes.captions, padding="max_length", return_tensors="pt").input_ids

    def __call__(self, unet: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of v (Salimans and Ho 2022, appendix D), the same weight for every timestep.

        Min-SNR weights (Hang et al. 2023) were slower here: they take the weight from the noisiest steps, which decide
        where the object stands and what it is, as do the cells that `SceneCodes.mean` favours.
        """
        index, latents, noise = self.scenes.draw(generator)
        timesteps = torch.randint(1000, (BATCH,), generator=generator)
        captioned = self.scenes.captioned(index, generator)
        dtype = next(unet.parameters()).dtype
        noisy = self.scheduler.add_noise(latents, noise, timesteps).to(dtype)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        with torch.no_grad():
            text = self.text_encoder(self.tokens[captioned])[0].to(dtype)
        predicted = unet(noisy, timesteps, text, return_dict=False)[0]
        error = (predicted.float() - target).square()
        return self.scenes.mean(error, captioned), {"v": error.mean().item()}


@torch.no_grad()
def _encode(vae: AutoencoderKL, cache: Path) -> None:
    """Write the scaled code of a drawing of every training scene, in their order."""
    vae = copy.deepcopy(vae).bfloat16()
    generator = torch.Generator().manual_seed(0)
    scenes = split(held_out=False)
    codes = [
        vae.encode(render(scenes[i : i + 128], generator).bfloat16()).latent_dist.mean.float() * vae.config.scaling_factor
        for i in range(0, len(scenes), 128)
    ]
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_whole(cache, save({"latents": torch.cat(codes).half()}))


def train_and_save(folder: Path, checkpoints: Path, *, seed: int = 0, vae_folder: Path, clip_folder: Path) -> None:
    """Train the U-Net on the codes of scenes, beside the scene CLIP's text encoder, and write a StableDiffusionPipeline."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    denoiser = unet()
    # plain attention: on CPUs the fused kernel's backward pass in bfloat16 is the slower one
    denoiser.set_attn_processor(AttnProcessor())
    loss = Denoising(vae_folder, clip_folder, checkpoints / "scene-codes.safetensors")
    train(denoiser, loss, SCHEDULE, checkpoint=checkpoints / "mini-sd.pt", seed=seed, title="mini-sd")
    denoiser.set_default_attn_processor()
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae_folder),
        text_encoder=CLIPTextModel.from_pretrained(clip_folder),
        tokenizer=CLIPTokenizer.from_pretrained(clip_folder),
        unet=denoiser,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)


def evaluate(name: str = "mini-sd", n: int = 500, seed: int = 1) -> list[Measured]:
    """What the scene reader finds in pictures of n captions that training never saw, at the bundled guidance, 20 steps.

    name: of a bundled pipeline. The bars are the ones it is meant to reach; size has none. The last row is the reader on the
    autoencoder's reconstructions of drawn scenes.
    """
    from probekit.bundled import GUIDANCE
    from probekit.data.scenes import VALUES, labels, sample_scenes
    from probekit.metrics.readers import scene_reader
    from probekit.models import load

    model, reader = load(name, device="cpu"), scene_reader()
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(n, generator, held_out=True)
    drawn = render(scenes, generator)
    seen, decoded = [], []
    with progress(f"{name} paints", n) as advance:
        for i in range(0, n, 50):
            captions = [s.caption for s in scenes[i : i + 50]]
            options = {"num_inference_steps": 20, "guidance_scale": GUIDANCE[name]}
            images = model.generate(captions, range(i, i + len(captions)), seed=seed, **options)
            seen.append(reader.read(images))
            with torch.no_grad():
                vae = model.pipeline.vae
                decoded.append(reader.read(vae.decode(vae.encode(drawn[i : i + 50]).latent_dist.mean).sample))
            advance(len(captions))
    truth = labels(scenes)
    bars = {"kind": 0.9, "colour": 0.95, "place": 0.95, "ground": 0.95, "texture": 0.95}

    def right(readings: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {a: torch.cat([r[a] for r in readings]) == truth[a] for a in VALUES}

    painted, rebuilt = right(seen), right(decoded)
    rows = [Measured(a, painted[a].float().mean().item(), bars.get(a)) for a in VALUES]
    whole, ceiling = (torch.stack(list(r.values())).all(0).float().mean().item() for r in (painted, rebuilt))
    return [*rows, Measured("all six", whole), Measured("all six, reconstructions", ceiling)]

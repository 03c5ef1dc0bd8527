"""mini-sd3 and mini-dit: diffusion transformers of mini-sd's scenes, on mini-sd's autoencoder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probekit.bundled import weights
from probekit.data.scenes import VALUES, labels, sample_scenes
from probekit.zoo import lending, mini_sd
from probekit.zoo.mini_sd import SceneCodes
from probekit.zoo.training import Loss, Schedule, train

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

SCHEDULES = {
    "mini-sd3": Schedule(steps=5000, learning_rate=1.5e-3, warmup=300, ema=0.999, bfloat16=True),
    "mini-dit": Schedule(steps=5500, learning_rate=1.5e-3, warmup=300, ema=0.999, bfloat16=True),
}
READING = Schedule(steps=400, learning_rate=2e-3, ema=0.99)
SHIFT = 3.0
T5_LENGTH = 256  # StableDiffusion3Pipeline's

LENDERS = {
    "mini-sd3": {
        "vae": "mini-sd/vae",
        "text_encoder": "scene-clip",
        "text_encoder_2": "scene-clip",
        "tokenizer": "mini-sd/tokenizer",
        "tokenizer_2": "mini-sd/tokenizer",
    },
    "mini-dit": {"vae": "mini-sd/vae", "tokenizer": "mini-sd/tokenizer"},
}
"""Components that a pipeline has from other models, and whose."""


# --- mini-sd3 ---------------------------------------------------------------------------------------------------------------


def sd3() -> SD3Transformer2DModel:
    """Stable Diffusion 3's transformer in small: six two-stream blocks on 64 patches and the caption's tokens."""
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=30,
        num_attention_heads=4,
        joint_attention_dim=192,  # two CLIPs of 96
        caption_projection_dim=120,
        pooled_projection_dim=192,
        pos_embed_max_size=8,
    )
    return _begun(network, [m.linear for m in network.modules() if type(m).__name__ == "AdaLayerNormZero"])


def flow() -> FlowMatchEulerDiscreteScheduler:
    """Stable Diffusion 3's scheduler: times that dwell where there is much noise, by its shift of 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


class Flowing:
    """The loss of mini-sd3.

    The pipeline has no T5, in whose place it puts 256 tokens of zeros. They stay alike in every block, so here one stands for
    all: attention is given to it as to that many, which is the same to rounding and four times as fast. How many there are is
    drawn anew for each batch, for who shortens them by `max_sequence_length`.
    """

    def __init__(self, text_encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, scenes: SceneCodes) -> None:
        self.text_encoder, self.scenes = text_encoder, scenes
        self.tokens = tokenizer(scenes.captions, padding="max_length", return_tensors="pt").input_ids

    def __call__(self, transformer: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of noise - code (Liu et al. 2022), at times drawn as densely as the scheduler's shift has them."""
        index, latents, noise = self.scenes.draw(generator)
        even = torch.rand(len(index), generator=generator)
        sigmas = SHIFT * even / (1 + (SHIFT - 1) * even)
        captioned = self.scenes.captioned(index, generator)
        repeats = math.exp(torch.rand((), generator=generator).item() * math.log(T5_LENGTH))
        dtype = next(transformer.parameters()).dtype
        with torch.no_grad():
            told = self.text_encoder(self.tokens[captioned], output_hidden_states=True)
        text = F.pad(told.hidden_states[-2].repeat(1, 1, 2), (0, 0, 0, 1)).to(dtype)
        noisy = torch.lerp(latents, noise, sigmas[:, None, None, None]).to(dtype)
        predicted = transformer(
            noisy,
            encoder_hidden_states=text,
            pooled_projections=told.text_embeds.repeat(1, 2).to(dtype),
            timestep=1000 * sigmas,
            joint_attention_kwargs={"repeats": repeats},
            return_dict=False,
        )[0]
        error = (predicted.float() - (noise - latents)).square()
        return self.scenes.mean(error, captioned), {"v": error.mean().item()}


class _LastTokenRepeated:
    """Joint attention of SD3's blocks (diffusers' JointAttnProcessor2_0) with the last text token there `repeats` times."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, repeats: float, **_: Any
    ) -> tuple[Tensor, Tensor]:
        def heads(own: nn.Module, added: nn.Module) -> Tensor:
            joint = torch.cat([own(hidden_states), added(encoder_hidden_states)], dim=1)
            return joint.view(len(joint), joint.shape[1], attn.heads, -1).transpose(1, 2)

        q, k, v = heads(attn.to_q, attn.add_q_proj), heads(attn.to_k, attn.add_k_proj), heads(attn.to_v, attn.add_v_proj)
        scores = q @ k.transpose(-1, -2) * attn.scale
        times = F.pad(scores.new_zeros(scores.shape[-1] - 1), (0, 1), value=math.log(repeats))
        joint = ((scores + times).softmax(-1) @ v).transpose(1, 2).flatten(2)
        images, text = joint.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[0](images), text if attn.context_pre_only else attn.to_add_out(text)


# --- mini-dit ---------------------------------------------------------------------------------------------------------------


def dit() -> PixArtTransformer2DModel:
    """PixArt-alpha's transformer in small: eight blocks of self-attention, cross-attention and feed-forward on 64 patches."""
    from diffusers import PixArtTransformer2DModel

    network = PixArtTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,  # no learned variance
        num_layers=8,
        num_attention_heads=4,
        attention_head_dim=36,
        cross_attention_dim=144,
        caption_channels=96,
    )
    with torch.no_grad():
        for block in network.transformer_blocks:
            block.scale_shift_table.zero_()
    return _begun(network, [network.adaln_single.linear, *(block.attn2.to_out[0] for block in network.transformer_blocks)])


class Reading(nn.Module):
    """mini-dit's T5 encoder, and what it is trained by and does not keep: a query and a linear reader for every attribute.

    It is to tell a caption's words apart by what they are said of, the object's colour from the ground's: who attends to its
    tokens, without their order, can then find each attribute.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        from transformers import T5Config, T5EncoderModel

        super().__init__()
        self.tokenizer = tokenizer
        size, end = len(self.tokenizer), self.tokenizer.eos_token_id
        shape = {"d_model": 96, "d_kv": 24, "d_ff": 384, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        self.t5 = T5EncoderModel(T5Config(vocab_size=size, pad_token_id=end, eos_token_id=end, **shape))
        self.queries = nn.Parameter(torch.randn(len(VALUES), 96) / 96**0.5)
        self.heads = nn.ModuleDict({a: nn.Linear(96, len(values)) for a, values in VALUES.items()})

    def forward(self, captions: list[str]) -> dict[str, Tensor]:
        """Logits of each attribute."""
        told = self.tokenizer(captions, padding="max_length", return_tensors="pt")
        tokens = self.t5(**told)[0]
        scores = (self.queries @ tokens.transpose(1, 2)).masked_fill(told.attention_mask[:, None] == 0, -math.inf)
        found = scores.softmax(-1) @ tokens
        return {a: head(found[:, i]) for i, (a, head) in enumerate(self.heads.items())}


def reading(model: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the attributes that are read off captions."""
    scenes = sample_scenes(mini_sd.BATCH, generator)
    truth = labels(scenes)
    read = model([scene.caption for scene in scenes])
    return sum((F.cross_entropy(logits, truth[a]) for a, logits in read.items()), torch.zeros(())), {}


class Denoising:
    """The loss of mini-dit: mini-sd's, on T5's tokens."""

    def __init__(self, text_encoder: T5EncoderModel, tokenizer: CLIPTokenizer, scenes: SceneCodes) -> None:
        self.text_encoder, self.scenes = text_encoder, scenes
        self.scheduler = mini_sd.scheduler()
        self.told = tokenizer(scenes.captions, padding="max_length", return_tensors="pt")

    def __call__(self, transformer: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of v, the same weight for every timestep."""
        index, latents, noise = self.scenes.draw(generator)
        timesteps = torch.randint(1000, (len(index),), generator=generator)
        captioned = self.scenes.captioned(index, generator)
        dtype = next(transformer.parameters()).dtype
        tokens, mask = self.told.input_ids[captioned], self.told.attention_mask[captioned]
        with torch.no_grad():
            text = self.text_encoder(tokens, attention_mask=mask)[0].to(dtype)
        predicted = transformer(
            self.scheduler.add_noise(latents, noise, timesteps).to(dtype),
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        error = (predicted.float() - self.scheduler.get_velocity(latents, noise, timesteps)).square()
        return self.scenes.mean(error, captioned), {"v": error.mean().item()}


# --- both -------------------------------------------------------------------------------------------------------------------


def _begun(network: Any, gates: list[nn.Linear]) -> Any:
    """The network with blocks that do nothing yet and an output of zeros (Peebles and Xie 2023, section 3.2, adaLN-Zero)."""
    for layer in [*gates, network.proj_out]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return network


def train_and_save(name: str, folder: Path, checkpoints: Path, *, seed: int = 0) -> None:
    """Train the transformer of that name on codes of scenes and write its pipeline, without what it has from other models."""
    from diffusers import AutoencoderKL, PixArtAlphaPipeline, StableDiffusion3Pipeline
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    places = {part: weights(place) for part, place in LENDERS[name].items()}
    vae, words = AutoencoderKL.from_pretrained(places["vae"]), CLIPTokenizer.from_pretrained(places["tokenizer"])
    scenes = SceneCodes(vae, checkpoints / "scene-codes.safetensors")
    torch.manual_seed(seed)
    transformer: Any
    loss: Loss
    pipeline: DiffusionPipeline
    if name == "mini-sd3":
        transformer, written_out = sd3(), _LastTokenRepeated()
        one, two = (CLIPTextModelWithProjection.from_pretrained(places["text_encoder"]).float() for _ in range(2))
        pipeline = StableDiffusion3Pipeline(transformer, flow(), vae, one, words, two, words, None, None)
        loss = Flowing(one, words, scenes)
    else:
        reader = train(Reading(words), reading, READING, checkpoint=checkpoints / f"{name}-t5.pt", seed=seed, title="T5")
        assert isinstance(reader, Reading)
        transformer, written_out = dit(), AttnProcessor()
        pipeline = PixArtAlphaPipeline(words, reader.t5, vae, transformer, mini_sd.scheduler())
        loss = Denoising(reader.t5, words, scenes)
    fused = transformer.attn_processors
    # on CPUs the fused kernel's backward pass in bfloat16 is the slower one
    transformer.set_attn_processor(written_out)
    train(transformer, loss, SCHEDULES[name], checkpoint=checkpoints / f"{name}.pt", seed=seed, title=name)
    transformer.set_attn_processor(fused)
    lending.save(pipeline.to(torch.float16), folder, LENDERS[name])

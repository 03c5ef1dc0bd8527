"""planted-sd: a small StableDiffusionPipeline of scenes in which it is known where every word enters.

The embeddings have one set of 32 dimensions for structure (place, size), one for content (kind), one for surface (colour,
ground, texture). Each of the four cross-attentions reads one set or nothing: the weights of its keys and values are zero
for all other dimensions. So `PLAN` is true by construction, not measured.

Four things keep it so, bit for bit:

- A token is a whole phrase ("at the top left", "red ground"), so that it belongs to one attribute, and all captions have
  the same number of tokens. Positions are not embedded.
- A token's code is a row of a Hadamard matrix in the set of its own attribute and the code of absence in the other two: all
  are of +-1 with sum zero, so every token has the same mean and norm in every set.
- The text model's last layer norm would mix rounding errors of one set into another. Its epsilon is so large that the
  variance does not count, and its weight undoes that: all embeddings are +-1 exactly.
- The norm before a cross-attention has the scale zero, so a query is a learned constant: what a cross-attention adds
  depends on its words alone. It is the same at every cell and step, and tells nothing of the picture so far. Queries that
  see the picture would carry, say, the place in how colours are laid out, and the plan would be no truth of what is patched.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from probekit.data.scenes import COLOURS, FACTORS, KINDS, PLACES, SIZES, TEXTURES
from probekit.zoo import lending, mini_sd, scene_clip
from probekit.zoo.training import Schedule, train

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

PLAN: dict[str, tuple[str, ...]] = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2": FACTORS["structure"],
    "mid_block.attentions.0.transformer_blocks.0.attn2": FACTORS["content"],
    "up_blocks.0.attentions.0.transformer_blocks.0.attn2": FACTORS["surface"],
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2": (),
}
"""Each cross-attention, in execution order, and the attributes of a scene whose words it reads."""

SET = 32
"""Dimensions of each factor's set; the sets follow each other in the order of `scenes.FACTORS`."""

SCHEDULE = Schedule(steps=4500, learning_rate=2e-3, warmup=200, ema=0.998, bfloat16=True)
MAX_TOKENS = 12

_TOKENS: dict[str, tuple[str, ...]] = {
    "place": tuple(f"at the {place}" for place in PLACES),
    "size": tuple(SIZES),
    "kind": KINDS,
    "colour": tuple(COLOURS),
    "ground": tuple(f"{colour} ground" for colour in COLOURS),
    "texture": TEXTURES,
}


def tokenizer() -> CLIPTokenizer:
    """Scene-clip's, in which places and the ground's colours are tokens too: a longer phrase goes before its words."""
    from tokenizers import AddedToken

    words = scene_clip.tokenizer()
    words.add_tokens([AddedToken(t, single_word=True, normalized=True) for t in (*_TOKENS["place"], *_TOKENS["ground"])])
    words.model_max_length = MAX_TOKENS
    return words


def text_encoder() -> CLIPTextModel:
    """A CLIPTextModel without layers, not trained: each token's codes, +-1 each, and nothing of its neighbours or its position.

    Tokens that are no word of a scene, the end and the padding have the code of absence in every set.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    words, codes = tokenizer(), _hadamard()
    end, scale = words.eos_token_id, 2.0**10
    width = SET * len(FACTORS)
    config = CLIPTextConfig(
        vocab_size=len(words),
        max_position_embeddings=MAX_TOKENS,
        hidden_size=width,
        num_hidden_layers=0,
        num_attention_heads=1,
        intermediate_size=width,
        projection_dim=width,
        layer_norm_eps=scale**2,
        bos_token_id=words.bos_token_id,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = CLIPTextModel(config)
    with torch.no_grad():
        embedding = model.embeddings.token_embedding.weight
        embedding.copy_(codes[1].repeat(len(FACTORS)))  # row 0 has no zero sum
        for dims, attributes in zip(sets().values(), FACTORS.values(), strict=True):
            for row, token in enumerate((t for a in attributes for t in _TOKENS[a]), start=2):
                (number,) = words(token, add_special_tokens=False).input_ids
                embedding[number, dims] = codes[row]
        model.embeddings.position_embedding.weight.zero_()
        model.final_layer_norm.weight.fill_(scale)
        model.final_layer_norm.bias.zero_()
    return model.eval()


def sets() -> dict[str, slice]:
    """Each factor's dimensions of the embeddings."""
    return {factor: slice(SET * i, SET * (i + 1)) for i, factor in enumerate(FACTORS)}


def read_by(site: str) -> Tensor:
    """Which dimensions of the embeddings a cross-attention of `PLAN` may read: bool of shape (96,)."""
    reads = torch.zeros(SET * len(FACTORS), dtype=torch.bool)
    for factor, attributes in FACTORS.items():
        if attributes == PLAN[site]:
            reads[sets()[factor]] = True
    return reads


def unet() -> UNet2DConditionModel:
    """Stable Diffusion's U-Net in small, two levels, four cross-attentions that read what `PLAN` says and start so."""
    from diffusers import UNet2DConditionModel

    denoiser = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=SET * len(FACTORS),
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )
    with torch.no_grad():
        for linear, reads in readers(denoiser):
            linear.weight[:, ~reads] = 0
        for norm in norms(denoiser):
            nn.init.zeros_(norm.weight).requires_grad_(False)
            nn.init.normal_(norm.bias)
    return denoiser


def readers(denoiser: nn.Module) -> Iterator[tuple[nn.Linear, Tensor]]:
    """The maps to keys and to values of every cross-attention, and the dimensions that they may read."""
    for site in PLAN:
        for part in ("to_k", "to_v"):
            linear = denoiser.get_submodule(f"{site}.{part}")
            assert isinstance(linear, nn.Linear)
            yield linear, read_by(site)


def norms(denoiser: nn.Module) -> Iterator[nn.LayerNorm]:
    """The norm before every cross-attention."""
    for site in PLAN:
        norm = denoiser.get_submodule(f"{site.rpartition('.')[0]}.norm2")
        assert isinstance(norm, nn.LayerNorm)
        yield norm


def keep_planted(denoiser: nn.Module) -> Iterator[RemovableHandle]:
    """Hooks, to be removed after training, under which the zeros of keys and values stay zero.

    The dimensions that a cross-attention does not read are zeroed in its input, so their weights' gradients are exactly
    zero; AdamW, weight decay and averaging leave a zero with no gradient where it is.
    """
    for linear, reads in readers(denoiser):
        yield linear.register_forward_pre_hook(lambda _, inputs, reads=reads: (inputs[0] * reads,))


def train_and_save(folder: Path, checkpoints: Path, *, seed: int = 0, vae_folder: Path) -> None:
    """Train the U-Net on the codes of scenes with mini-sd's loss, its zeros kept, and write a StableDiffusionPipeline."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(seed)
    denoiser, encoder, words = unet(), text_encoder(), tokenizer()
    text = checkpoints / "planted-text"
    encoder.save_pretrained(text)
    words.save_pretrained(text)
    denoiser.set_attn_processor(AttnProcessor())
    kept = list(keep_planted(denoiser))
    loss = mini_sd.Denoising(vae_folder, text, checkpoints / "scene-codes.safetensors")
    train(denoiser, loss, SCHEDULE, checkpoint=checkpoints / "planted-sd.pt", seed=seed, title="planted-sd")
    for hook in kept:
        hook.remove()
    denoiser.set_default_attn_processor()
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae_folder),
        text_encoder=encoder,
        tokenizer=words,
        unet=denoiser,
        scheduler=mini_sd.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    lending.save(pipeline.to(torch.float16), folder, {"vae": "mini-sd/vae"})


def _hadamard() -> Tensor:
    """Sylvester's Hadamard matrix (`SET`, `SET`): orthogonal rows of +-1, all but the first with sum zero."""
    matrix = torch.ones(1, 1)
    while len(matrix) < SET:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix

"""A small CLIP of scenes: mini-sd's text encoder, and the CLIP score of scenes."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probekit.data.scenes import VALUES, all_scenes, labels, render, sample_scenes
from probekit.zoo.measured import Measured
from probekit.zoo.training import Schedule, train

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SCHEDULE = Schedule(steps=500, learning_rate=1.5e-3, ema=0.998, bfloat16=True)
BATCH = 128
WIDTH = 96
MAX_TOKENS = 20


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, with merges that make one token of every word a caption uses."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    vocabulary = [*symbols, *(s + "</w>" for s in symbols)]
    merges: list[tuple[str, str]] = []
    words = sorted({word for scene in all_scenes() for word in scene.caption.split()})
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    # byte-pair encoding's own training, carried on until every word is one token
    while pairs := Counter(pair for pieces in spelled for pair in itertools.pairwise(pieces)):
        merge = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(merge)
        vocabulary.append("".join(merge))
        spelled = [_merged(pieces, merge) for pieces in spelled]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, model_max_length=MAX_TOKENS)


def _merged(pieces: list[str], merge: tuple[str, str]) -> list[str]:
    """The pieces of a word, with every adjacent pair that equals `merge` joined."""
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == merge:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


class ClipWithHeads(nn.Module):
    """A CLIPModel, and linear readers of each attribute on both embeddings that help it learn; the readers are not kept."""

    def __init__(self) -> None:
        from transformers import CLIPConfig, CLIPModel

        super().__init__()
        self.tokenizer = tokenizer()
        end = self.tokenizer.eos_token_id
        shape = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
        text = {"vocab_size": len(self.tokenizer), "max_position_embeddings": MAX_TOKENS, "num_hidden_layers": 2}
        text |= {"eos_token_id": end, "pad_token_id": end, "bos_token_id": self.tokenizer.bos_token_id}
        vision = {"image_size": 64, "patch_size": 8, "num_hidden_layers": 3}
        self.clip = CLIPModel(CLIPConfig(text_config=text | shape, vision_config=vision | shape, projection_dim=WIDTH))
        self.heads = nn.ModuleDict({a: nn.Linear(WIDTH, len(values)) for a, values in VALUES.items()})


def loss(model: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """CLIP's symmetric contrastive loss, plus cross-entropy of the attribute readers on both embeddings."""
    assert isinstance(model, ClipWithHeads)
    scenes = sample_scenes(BATCH, generator)
    tokens = model.tokenizer([s.caption for s in scenes], padding=True, return_tensors="pt")
    pixels = render(scenes, generator).to(next(model.parameters()).dtype)
    output = model.clip(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    logits, target, truth = output.logits_per_text.float(), torch.arange(BATCH), labels(scenes)
    contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    embeddings = output.text_embeds, output.image_embeds
    read = sum(
        (F.cross_entropy(10 * h(e).float(), truth[a]) for a, h in model.heads.items() for e in embeddings), torch.zeros(())
    )
    return contrast + 0.3 * read, {"contrast": contrast.item(), "top1": (logits.argmax(1) == target).float().mean().item()}


def train_and_save(folder: Path, checkpoints: Path, *, seed: int = 0) -> None:
    """Train and write a transformers folder: CLIPModel, tokenizer and image processor."""
    from transformers import CLIPImageProcessor

    torch.manual_seed(seed)
    model = train(ClipWithHeads(), loss, SCHEDULE, checkpoint=checkpoints / "scene-clip.pt", seed=seed, title="scene-clip")
    assert isinstance(model, ClipWithHeads)
    model.clip.half().save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    half = [0.5] * 3
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64, image_mean=half, image_std=half).save_pretrained(folder)


@torch.no_grad()
def evaluate(n: int = 500, seed: int = 1) -> list[Measured]:
    """Among n held-out scenes: how often a picture's nearest caption is its own, and a caption's nearest picture.

    Captions that occur twice count as the same.
    """
    from transformers import CLIPModel, CLIPTokenizer

    from probekit.bundled import weights

    clip, words = CLIPModel.from_pretrained(weights("scene-clip")).float(), CLIPTokenizer.from_pretrained(weights("scene-clip"))
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(n, generator, held_out=True)
    tokens = words([s.caption for s in scenes], padding=True, return_tensors="pt")
    logits = clip(**tokens, pixel_values=render(scenes, generator)).logits_per_image

    def right(nearest: Tensor) -> float:
        return sum(scenes[i] == scene for i, scene in zip(nearest.tolist(), scenes, strict=True)) / n

    return [
        Measured(f"picture to caption, of {n}", right(logits.argmax(1))),
        Measured(f"caption to picture, of {n}", right(logits.argmax(0))),
    ]

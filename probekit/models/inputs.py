"""What a text-to-image model makes its pictures of: its noise and its caption, the latter in the parts that it takes it in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probekit.latents.properties import Inputs
from probekit.models.model import Model

_BATCH = 25
_POOLED = "pooled_prompt_embeds"


def names(model: Model) -> tuple[str, ...]:
    """The inputs that a model's pictures are made of, named as its spaces are; of one that takes no captions none.

    `noise`; `text`, the caption's tokens but the one that ends it, where that has a space of its own, `text-eos`; and
    `text-pooled`. A pipeline whose encoding of captions is not known takes the caption as a whole, as `text`.
    """
    if model.paints is None:
        return ()
    painter = model.paints
    ends = ("text-eos",) if painter.has_end else ()
    return ("noise", "text", *ends, *(("text-pooled",) if _POOLED in painter.encodes else ()))


def inputs(model: Model, captions: Sequence[str], *, steps: int, seed: int = 0) -> Inputs:
    """The inputs of a text-to-image model, of which number i is noise number i of `seed`, or that part of caption i.

    A caption that is given another's end keeps its own length: the end stands where its own does, and what a CLIP writes behind
    the end stays the caption's. Raises ProbekitError for a model that takes no captions.
    """
    painter, known = model.painter, names(model)

    def row(numbers: Mapping[str, int]) -> dict[str, Any]:
        caption = captions[numbers["text"]]
        told = painter.row(caption, numbers["noise"], seed)
        if "text-eos" in numbers:
            other = captions[numbers["text-eos"]]
            tokens = told["prompt_embeds"].clone()
            tokens[:, painter.end(caption)] = painter.embedded(other)["prompt_embeds"][:, painter.end(other)]
            told["prompt_embeds"] = tokens
        if "text-pooled" in numbers:
            told[_POOLED] = painter.embedded(captions[numbers["text-pooled"]])[_POOLED]
        return told

    def paint(numbers: Mapping[str, Sequence[int]]) -> Float[Tensor, "n 3 h w"]:
        rows = [row(dict(zip(known, each, strict=True))) for each in zip(*(numbers[name] for name in known), strict=True)]
        made = [painter.paint(rows[i : i + _BATCH], num_inference_steps=steps) for i in range(0, len(rows), _BATCH)]
        return torch.cat([pictures.cpu() for pictures in made])

    return Inputs(known, paint)

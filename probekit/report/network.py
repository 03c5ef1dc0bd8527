"""A network for the inspector to draw: of every layer where it stands, what lies inside it, and what can be chosen of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probekit import hooks

_BRIEF = {
    "_blocks": "",
    "_block": "",
    "attentions": "attn",
    "resnets": "res",
    "transformer": "block",
    "downsamplers": "downsample",
    "upsamplers": "upsample",
    ".": " ",
    "_": " ",
}
_BLOCK = re.compile(r"(down_blocks|up_blocks)\.\d+|mid_block")
"""A U-Net's block, whose resnets and attentions stand in it as layers of their own."""

_BOTTOM = 99


def short(layer: str) -> str:
    """A layer's name as figures label it: down_blocks.1.attentions.0 becomes down 1 attn 0."""
    for long, brief in _BRIEF.items():
        layer = layer.replace(long, brief)
    return layer


def part_of(layer: str) -> str:
    """Where a layer stands: encoder, middle, decoder, stack for transformers, or text for text encoders."""
    starts = {
        "conv_in": "encoder",
        "down": "encoder",
        "mid": "middle",
        "up": "decoder",
        "conv_out": "decoder",
        "text_encoder": "text",
    }
    return next((part for start, part in starts.items() if layer.startswith(start)), "stack")


def form(layers: Sequence[hooks.Layer]) -> str:
    """How a network is drawn: `u`; `lanes`, where blocks carry text beside the image; or `column`."""
    return form_by_name([layer.name for layer in layers], carry_text(layers))


def carry_text(layers: Sequence[hooks.Layer]) -> list[str]:
    """The names of those that carry text beside the image, which names alone do not say."""
    return [layer.name for layer in layers if {"image", "text"} <= set(layer.streams)]


def form_by_name(names: Sequence[str], carry_text: Sequence[str] = ()) -> str:
    """As `form`, of layers that are known by name, and of which it is known that they carry text."""
    if carry_text:
        return "lanes"
    return "u" if any(part_of(name) in ("encoder", "middle", "decoder") for name in names) else "column"


def drawn(layers: Sequence[hooks.Layer]) -> list[dict[str, Any]]:
    """Every layer as the inspector draws it, in the order given.

    short: its label; part and level: where it stands, level 0 at the top; inside: the layer that it lies in; streams: the
    default first; words: those of them whose tokens are the caption's words; bypass: whether it can be left out.
    """
    names = [layer.name for layer in layers]
    return [
        {
            **_placed(layer.name, names),
            "kind": layer.kind,
            "inside": layer.inside,
            "streams": list(layer.streams),
            "words": [stream for stream in layer.streams if stream == "text"],
            "bypass": layer.stream().bypass is not None,
        }
        for layer in layers
    ]


def drawn_by_name(names: Sequence[str], carry_text: Sequence[str] = ()) -> list[dict[str, Any]]:
    """As `drawn`, of layers that are known by name, and of which it is known that they carry text."""
    unknown: dict[str, Any] = {"kind": "", "words": [], "bypass": False}
    return [
        {
            **_placed(name, names),
            **unknown,
            "inside": _inside(name, names),
            "streams": ["image", "text"] if name in carry_text else [],
        }
        for name in names
    ]


def _placed(name: str, names: Sequence[str]) -> dict[str, Any]:
    return {"name": name, "short": short(name), "part": part_of(name), "level": _level(name, names)}


def _inside(name: str, names: Sequence[str]) -> str | None:
    """The innermost of the other layers that a layer lies in."""
    around = [other for other in names if name.startswith(f"{other}.") and not _BLOCK.fullmatch(other)]
    return max(around, key=len, default=None)


def _level(layer: str, layers: Sequence[str]) -> int:
    """The row of the U a layer stands in, from the top; transformers have one row."""
    decoders = max((int(la.split(".")[1]) for la in layers if la.startswith("up_blocks.")), default=0)
    parts = layer.split(".")
    if parts[0] == "down_blocks":
        return int(parts[1])
    if parts[0] == "up_blocks":
        return decoders - int(parts[1])
    return _BOTTOM if layer.startswith("mid") else 0

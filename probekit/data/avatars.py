"""Avatars: drawn faces with exact binary attributes (avataaars by Pablo Stanley, drawn by dicebear, rasterised by resvg)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from probekit.data.dataset import check_split, no_captions
from probekit.files import write_whole
from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    import pandas as pd

IMAGE_SIZE = 32
TRAIN, TEST = 20_000, 10_000
"""Of one seed's series, avatars 0 to 19,999 are for training, the next 10,000 for testing."""

# for each part: value -> (how often it is drawn, the attributes that it gives); names of CelebA's mean what they mean there
_PARTS: dict[str, dict[str, tuple[float, tuple[str, ...]]]] = {
    "background": {
        "#b6e3f4": (3, ("Blue_Background",)),
        "#ffd5dc": (2, ()),
        "#ffdfbf": (2, ()),
        "#d8f0c8": (2, ()),
    },
    "skin": {
        "#ffdbb4": (3, ("Pale_Skin",)),
        "#edb98a": (3, ()),
        "#d08b5b": (2, ()),
        "#ae5d29": (2, ("Dark_Skin",)),
        "#614335": (2, ("Dark_Skin",)),
    },
    "top": {
        "none": (2, ("Bald",)),
        "sides": (2, ("Receding_Hairline",)),
        "shortFlat": (3, ()),
        "shortRound": (2, ()),
        "shortCurly": (2, ("Wavy_Hair",)),
        "fro": (1, ("Wavy_Hair",)),
        "dreads": (1, ("Long_Hair",)),
        "curvy": (2, ("Long_Hair", "Wavy_Hair")),
        "straight02": (2, ("Long_Hair", "Straight_Hair")),
        "bob": (2, ("Long_Hair", "Straight_Hair")),
        "straightAndStrand": (2, ("Long_Hair", "Straight_Hair", "Bangs")),
        "miaWallace": (2, ("Long_Hair", "Straight_Hair", "Bangs")),
        "hat": (2, ("Wearing_Hat",)),
        "winterHat02": (2, ("Wearing_Hat",)),
        "turban": (1, ("Wearing_Hat",)),
    },
    "hair": {
        "#2c1b18": (4, ("Black_Hair",)),
        "#724133": (4, ("Brown_Hair",)),
        "#d6b370": (4, ("Blond_Hair",)),
        "#e8e1e1": (3, ("Gray_Hair",)),
        "#c93305": (3, ("Red_Hair",)),
        "#f59797": (2, ()),
    },
    "hat": {"#ff5c5c": (1, ()), "#5199e4": (1, ()), "#3c4f5c": (1, ())},
    "eyebrows": {
        "defaultNatural": (4, ()),
        "raisedExcitedNatural": (3, ("Arched_Eyebrows",)),
        "flatNatural": (3, ("Bushy_Eyebrows",)),
        "angryNatural": (3, ("Angry_Eyebrows",)),
    },
    "eyes": {
        "default": (5, ()),
        "squint": (2, ("Narrow_Eyes",)),
        "surprised": (2, ("Wide_Eyes",)),
        "closed": (2, ("Eyes_Closed",)),
        "wink": (2, ("Winking",)),
        "hearts": (1.5, ("Heart_Eyes",)),
    },
    "mouth": {
        "smile": (4, ("Smiling", "Mouth_Slightly_Open")),
        "twinkle": (4, ("Smiling",)),
        "serious": (4, ()),
        "screamOpen": (3, ("Mouth_Slightly_Open",)),
        "tongue": (2, ("Smiling", "Mouth_Slightly_Open", "Tongue_Out")),
        "sad": (3, ("Frowning",)),
        "eating": (2, ("Rosy_Cheeks",)),
    },
    "beard": {
        "none": (7, ("No_Beard",)),
        "moustacheMagnum": (3, ("No_Beard", "Mustache")),
        "beardLight": (2, ()),
        "beardMajestic": (2, ("Full_Beard",)),
    },
    "accessories": {
        "none": (6, ()),
        "prescription02": (2, ("Eyeglasses",)),
        "round": (2, ("Eyeglasses",)),
        "sunglasses": (2, ("Eyeglasses", "Sunglasses")),
    },
    "shirt": {"#5199e4": (1, ()), "#ff488e": (1, ()), "#ffffb1": (1, ()), "#262e33": (1, ())},
}
ATTRIBUTES: tuple[str, ...] = tuple(
    dict.fromkeys(itertools.chain.from_iterable(given for values in _PARTS.values() for _, given in values.values()))
)
"""The names of all attributes, in the order of the labels."""

_WITHOUT_HAIR = ("none", "hat", "winterHat02", "turban")
_BEARD_COLOUR = "#4a312c"
# the middle of the 280x280 drawing: the head, with room for hair and hats
_VIEW = "46 22 188 188"


@dataclass(frozen=True)
class Avatar:
    """What an avatar shows: for each part one of its values, as `Avatar.values(part)` lists them."""

    background: str
    skin: str
    top: str
    hair: str
    hat: str
    eyebrows: str
    eyes: str
    mouth: str
    beard: str
    accessories: str
    shirt: str

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) not in _PARTS[field.name]:
                values = ", ".join(_PARTS[field.name])
                raise ProbekitError(f"avatar {field.name} {getattr(self, field.name)!r}: choose one of {values}")

    @staticmethod
    def values(part: str) -> tuple[str, ...]:
        """The values that a part can take."""
        return tuple(_PARTS[part])

    @functools.cached_property
    def attributes(self) -> frozenset[str]:
        """The attributes that the picture shows: hidden parts give none, as hair under a hat or eyes behind sunglasses."""
        hidden = {"hair"} if self.top in _WITHOUT_HAIR else set()
        hidden |= {"eyes"} if self.accessories == "sunglasses" else set()
        shown = (field.name for field in fields(self) if field.name not in hidden)
        return frozenset(name for part in shown for name in _PARTS[part][getattr(self, part)][1])

    def svg(self) -> str:
        """The drawing, zoomed to the head."""
        from dicebear import Avatar as Drawing

        options: dict[str, Any] = {
            "backgroundColor": [self.background],
            "skinColor": [self.skin],
            "hairColor": [self.hair],
            "hatColor": [self.hat],
            "facialHairColor": [_BEARD_COLOUR],
            "clothesColor": [self.shirt],
            "accessoriesColor": ["#262e33"],
            "eyebrowsVariant": [self.eyebrows],
            "mouthVariant": [self.mouth],
            # the glasses' tint lets some of the eyes through: behind it all eyes are the same, so that labels stay exact
            "eyesVariant": ["default" if self.accessories == "sunglasses" else self.eyes],
            "clothesVariant": ["shirtCrewNeck"],
        }
        for part, value in (("top", self.top), ("facialHair", self.beard), ("accessories", self.accessories)):
            options[f"{part}Probability"] = 0 if value == "none" else 100
            if value != "none":
                options[f"{part}Variant"] = [value]
        return Drawing(_style(), options).to_string().replace('viewBox="0 0 280 280"', f'viewBox="{_VIEW}"', 1)

    def draw(self, image_size: int = IMAGE_SIZE) -> UInt8[np.ndarray, "3 h w"]:
        """The picture as bytes."""
        from resvg_py import svg_to_bytes

        png = svg_to_bytes(svg_string=self.svg(), width=image_size, height=image_size, skip_system_fonts=True)
        return np.array(Image.open(io.BytesIO(bytes(png))).convert("RGB")).transpose(2, 0, 1)


def avatar(index: int, seed: int = 0) -> Avatar:
    """Avatar number `index` (from 0) of the endless series of that seed."""
    generator = np.random.default_rng([seed, index])
    chosen = {}
    for part, values in _PARTS.items():
        often = np.array([weight for weight, _ in values.values()])
        chosen[part] = tuple(values)[int(generator.choice(len(values), p=often / often.sum()))]
    return Avatar(**chosen)


def counterfactual(index: int, attribute: str, seed: int = 0) -> tuple[Avatar, Avatar]:
    """Two avatars (without, with) that differ in one part only, and in no attribute but this one.

    One of them is avatar `index`, or as near to it as can be: an attribute that hides others (a hat hides the hair's
    colour) or replaces another (black hair is not brown) needs a neutral partner. Raises ProbekitError for a name that is
    not in `ATTRIBUTES`.
    """
    if attribute not in ATTRIBUTES:
        raise ProbekitError(f"attribute {attribute!r}: choose from {', '.join(ATTRIBUTES)}")
    first = avatar(index, seed)
    parts = [part for part, values in _PARTS.items() if any(attribute in given for _, given in values.values())]
    for changes in range(3):
        for start in _changed(first, changes, tuple(_PARTS)):
            for other in _changed(start, 1, parts):
                if start.attributes ^ other.attributes == {attribute}:
                    return (other, start) if attribute in start.attributes else (start, other)
    raise AssertionError(f"no avatars differ in {attribute} alone")


def _changed(start: Avatar, count: int, parts: Sequence[str]) -> Iterator[Avatar]:
    """All avatars that differ from `start` in exactly `count` of those parts, in a fixed order."""
    for chosen in itertools.combinations(parts, count):
        others = ([v for v in _PARTS[part] if v != getattr(start, part)] for part in chosen)
        for values in itertools.product(*others):
            yield replace(start, **dict(zip(chosen, values, strict=True)))


@functools.cache
def _style() -> Any:
    from dicebear import Style

    return Style(json.loads(files("dicebear_styles").joinpath("avataaars.json").read_text("utf-8")))


_BLOCK = 1000


class Avatars:
    """The avatars of one seed as a data set; drawn in parallel when first asked for, then kept on the disk.

    cache: the folder of drawn avatars (`$XDG_CACHE_HOME/probekit` or `~/.cache/probekit`); about 1.2 MB for 1,000.
    """

    name = "avatars"

    def __init__(self, image_size: int = IMAGE_SIZE, seed: int = 0, cache: Path | None = None) -> None:
        self.image_size, self.seed = image_size, seed
        parts = json.dumps(
            [_PARTS, _VIEW, _BEARD_COLOUR, *(version(p) for p in ("dicebear-core", "dicebear-styles", "resvg-py"))]
        )
        self.digest = hashlib.sha256(f"{parts}{image_size}{seed}".encode()).hexdigest()[:12]
        self._folder = (cache or _cache()) / f"avatars-{self.digest}"

    def __len__(self) -> int:
        return TRAIN + TEST

    def split(self, part: str) -> np.ndarray:
        """The numbers of the avatars of `train` or `test`. Raises ProbekitError for another part."""
        check_split(part)
        return np.arange(TRAIN) if part == "train" else np.arange(TRAIN, TRAIN + TEST)

    def images(self, indices: Sequence[int] | np.ndarray) -> Float[Tensor, "n 3 h w"]:
        """Pictures in [-1, 1]."""
        return torch.from_numpy(self._take("images", indices)).float() / 127.5 - 1

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Raises ProbekitError: there are none."""
        raise no_captions(self.name)

    def labels(self, indices: Sequence[int] | np.ndarray) -> pd.DataFrame:
        """Which attributes each avatar has: one row an index, one column of bool an attribute."""
        import pandas as pd

        return pd.DataFrame(self._take("labels", indices), columns=list(ATTRIBUTES))

    def _take(self, what: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise ProbekitError(f"avatars: numbers 0 to {len(self) - 1}, not {wanted.min()} to {wanted.max()}")
        blocks = {int(b): self._block(int(b))[what] for b in np.unique(wanted // _BLOCK)}
        shape = (len(ATTRIBUTES),) if what == "labels" else (3, self.image_size, self.image_size)
        taken = np.empty((len(wanted), *shape), dtype=bool if what == "labels" else np.uint8)
        for number, block in blocks.items():
            inside = wanted // _BLOCK == number
            taken[inside] = block[wanted[inside] % _BLOCK]
        return taken

    @functools.cache  # noqa: B019 (a data set lives as long as the program)
    def _block(self, number: int) -> dict[str, np.ndarray]:
        file = self._folder / f"{number:04d}.npz"
        try:
            with np.load(file) as stored:
                return {"images": stored["images"], "labels": stored["labels"]}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):  # not drawn yet, or damaged: draw it
            pass
        avatars = [avatar(i, self.seed) for i in range(number * _BLOCK, (number + 1) * _BLOCK)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # resvg draws outside Python's lock
            images = np.stack(list(pool.map(lambda a: a.draw(self.image_size), avatars)))
        labels = np.array([[name in a.attributes for name in ATTRIBUTES] for a in avatars])
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=images, labels=labels)
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, buffer.getvalue())
        return {"images": images, "labels": labels}


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "probekit"

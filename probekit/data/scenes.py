"""Scenes: captioned 64x64 pictures whose structure, content and surface are known exactly.

A scene is one object (content: its kind) at one of nine places in one of two sizes (structure), in a colour, on a plain,
striped or dotted ground of another colour (surface). Pictures are drawn from signed distance functions, anti-aliased.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from probekit.data.dataset import check_split, numbers
from probekit.hooks.errors import ProbekitError
from probekit.seeds import numbered

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("circle", "square", "triangle", "cross", "ring", "star", "heart", "moon", "tree", "fish")
COLOURS = {
    "red": (214, 45, 48),
    "orange": (245, 146, 38),
    "yellow": (250, 220, 72),
    "green": (58, 158, 84),
    "blue": (48, 96, 200),
    "purple": (140, 70, 168),
    "white": (246, 246, 242),
    "black": (28, 28, 34),
}
PLACES = {
    f"{row}{column}".strip() or "center": (x, y)
    for y, row in zip((14.0, 32.0, 50.0), ("top ", "", "bottom "), strict=True)
    for x, column in zip((14.0, 32.0, 50.0), ("left", "", "right"), strict=True)
}
SIZES = {"small": 8.0, "large": 12.0}
TEXTURES = ("plain", "striped", "dotted")

IMAGE_SIZE = 64
VALUES: dict[str, tuple[str, ...]] = {
    "place": tuple(PLACES),
    "size": tuple(SIZES),
    "kind": KINDS,
    "colour": tuple(COLOURS),
    "ground": tuple(COLOURS),
    "texture": TEXTURES,
}
"""The values that each attribute of a scene can take."""

FACTORS: dict[str, tuple[str, ...]] = {
    "structure": ("place", "size"),
    "content": ("kind",),
    "surface": ("colour", "ground", "texture"),
}
"""The attributes that belong to each factor of the injection paper: structure, content, surface."""


@dataclass(frozen=True)
class Scene:
    """What a scene shows. The object's colour differs from the ground's.

    Raises ProbekitError when an attribute has a value that is not in `VALUES`, or when colour equals ground.
    """

    place: str
    size: str
    kind: str
    colour: str
    ground: str
    texture: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value not in VALUES[field.name]:
                raise ProbekitError(f"scene {field.name} {value!r}: choose one of {', '.join(VALUES[field.name])}")
        if self.colour == self.ground:
            raise ProbekitError(f"scene colour {self.colour!r} equals the ground's: the object would not be seen")

    @property
    def caption(self) -> str:
        """The sentence that mini-sd is trained on, such as "a large red fish at the top left on a striped blue ground"."""
        return f"a {self.size} {self.colour} {self.kind} at the {self.place} on a {self.texture} {self.ground} ground"

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """The scene that a caption describes. Raises ProbekitError for a sentence of another form."""
        try:
            thing, _, rest = caption.strip().removeprefix("a ").partition(" at the ")
            place, _, ground = rest.partition(" on a ")
            size, colour, kind = thing.split()
            texture, ground_colour, word = ground.split()
        except ValueError:
            word = ""
        if word != "ground":
            raise ProbekitError(
                f"caption {caption!r} is no scene: write 'a large red fish at the top left on a striped blue ground'"
            )
        return cls(place, size, kind, colour, ground_colour, texture)


@functools.cache
def all_scenes() -> tuple[Scene, ...]:
    """Every scene there is, in a fixed order."""
    return tuple(Scene(*values) for values in itertools.product(*VALUES.values()) if values[3] != values[4])


@functools.cache
def split(held_out: bool) -> tuple[Scene, ...]:
    """The scenes that mini-sd is trained on, or (`held_out`) the tenth of all combinations that it never sees."""
    scenes = all_scenes()
    return tuple(scenes[i] for i in _numbers(held_out))


@functools.cache
def _numbers(held_out: bool) -> tuple[int, ...]:
    order = torch.randperm(len(all_scenes()), generator=torch.Generator().manual_seed(0)).tolist()
    cut = len(order) // 10
    return tuple(order[:cut] if held_out else order[cut:])


def sample_scenes(n: int, generator: torch.Generator, *, held_out: bool = False) -> list[Scene]:
    """n scenes drawn with replacement from `split(held_out)`."""
    pool = split(held_out)
    return [pool[i] for i in torch.randint(len(pool), (n,), generator=generator).tolist()]


def controlled_pair(factor: str, generator: torch.Generator) -> tuple[Scene, Scene]:
    """Two scenes (O, E) that differ in every attribute of one factor and in nothing else.

    `factor` is a key of `FACTORS`. Raises ProbekitError for another name.
    """
    if factor not in FACTORS:
        raise ProbekitError(f"factor {factor!r}: choose from {', '.join(FACTORS)}")
    scenes = all_scenes()
    original = scenes[int(torch.randint(len(scenes), (), generator=generator))]
    edit = original
    while edit.colour == edit.ground or any(getattr(edit, a) == getattr(original, a) for a in FACTORS[factor]):
        other = scenes[int(torch.randint(len(scenes), (), generator=generator))]
        edit = (
            replace(original, **{a: getattr(other, a) for a in FACTORS[factor]})
            if _valid(original, other, factor)
            else original
        )
    return original, edit


def _valid(original: Scene, other: Scene, factor: str) -> bool:
    """Whether `original` with the factor's attributes of `other` keeps object and ground apart."""
    merged = {a: getattr(other if a in FACTORS[factor] else original, a) for a in VALUES}
    return merged["colour"] != merged["ground"]


def labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """For each attribute, the index of every scene's value in `VALUES[attribute]`: int64 tensors of shape (n,)."""
    return {a: torch.tensor([v.index(getattr(s, a)) for s in scenes]) for a, v in VALUES.items()}


def render(scenes: Sequence[Scene], generator: torch.Generator, *, image_size: int = IMAGE_SIZE) -> Float[Tensor, "n 3 h w"]:
    """Draw scenes as float images in [-1, 1].

    The generator moves each object by up to 1.5 pixels of 64 and shifts each texture; the same generator state gives
    the same pixels.
    """
    return _draw(scenes, torch.rand(len(scenes), 4, generator=generator), image_size)


class Scenes:
    """Every scene drawn once, with its caption and its attributes as classes; mini-sd never saw those of the test split.

    Image i shows scene i of `all_scenes`; where its object stands and how its texture is shifted follow from seed and i alone.
    """

    name = "scenes"

    def __init__(self, image_size: int = IMAGE_SIZE, seed: int = 0) -> None:
        self.image_size, self._seed = image_size, seed
        self.digest = hashlib.sha256(f"scenes 1 {VALUES} {image_size} {seed}".encode()).hexdigest()[:12]

    def __len__(self) -> int:
        return len(all_scenes())

    def split(self, part: str) -> np.ndarray:
        """The numbers of the scenes that mini-sd is trained on (`train`), or never sees (`test`), in an order drawn once.

        Raises ProbekitError for another part.
        """
        check_split(part)
        return np.array(_numbers(part == "test"))

    def images(self, indices: Sequence[int] | np.ndarray) -> Float[Tensor, "n 3 h w"]:
        """Pictures in [-1, 1]. Raises ProbekitError for a number that is not there."""
        wanted = numbers(indices, self.name, len(self)).tolist()
        jitter = [torch.rand(4, generator=numbered(self._seed, number)) for number in wanted]
        if not wanted:
            return torch.empty(0, 3, self.image_size, self.image_size)
        return _draw(self._scenes(wanted), torch.stack(jitter), self.image_size)

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """The sentences that mini-sd is trained on."""
        return [scene.caption for scene in self._scenes(numbers(indices, self.name, len(self)).tolist())]

    def labels(self, indices: Sequence[int] | np.ndarray) -> pd.DataFrame:
        """One row an index, one column of classes an attribute of `VALUES`."""
        import pandas as pd

        scenes = self._scenes(numbers(indices, self.name, len(self)).tolist())
        return pd.DataFrame({a: pd.Categorical([getattr(s, a) for s in scenes], values) for a, values in VALUES.items()})

    def _scenes(self, wanted: Sequence[int]) -> list[Scene]:
        pool = all_scenes()
        return [pool[number] for number in wanted]


def _draw(scenes: Sequence[Scene], jitter: Float[Tensor, "n 4"], image_size: int) -> Float[Tensor, "n 3 h w"]:
    n = len(scenes)
    unit = image_size / 64
    centres = torch.tensor([PLACES[s.place] for s in scenes]) + 3 * jitter[:, :2] - 1.5
    radii = torch.tensor([SIZES[s.size] for s in scenes])
    axis = (torch.arange(image_size) + 0.5) / unit
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    # one lookup in a table of distances draws every object: a distance is smooth, so bilinear lookup keeps edges sharp
    offset = (torch.stack([x, y], -1) - centres[:, None, None]) / radii[:, None, None, None]
    table = _distance_table()[torch.tensor([KINDS.index(s.kind) for s in scenes])]
    distance = F.grid_sample(table, offset / _TABLE_EXTENT, padding_mode="border", align_corners=True)[:, 0]
    shape = _coverage(distance * radii[:, None, None] * unit)

    period = 10.0
    shift = period * jitter[:, 2:, None, None]
    diagonal = ((x + y) / 2**0.5 + shift[:, 0]) % period
    stripes = _coverage(((diagonal - period / 2).abs() - period / 4) * unit)
    dx, dy = ((axis_ + shift[:, i]) % period - period / 2 for i, axis_ in enumerate((x, y)))
    dots = _coverage(((dx**2 + dy**2).sqrt() - 2.6) * unit)
    pattern = torch.stack([torch.zeros_like(dots), stripes, dots], 1)
    pattern = pattern[torch.arange(n), [TEXTURES.index(s.texture) for s in scenes]][:, None]

    ground = _rgb([s.ground for s in scenes])
    # the pattern's second tone is the ground's colour darkened, or lightened where the ground is dark already
    dark = ground.mean(1, keepdim=True) < -0.5
    tone = torch.where(dark, 0.72 * ground + 0.28, 0.72 * ground - 0.28)
    image = ground + (tone - ground) * pattern
    return image + (_rgb([s.colour for s in scenes]) - image) * shape[:, None]


_TABLE_EXTENT = 1.6


def _rgb(names: Sequence[str]) -> Float[Tensor, "n 3 1 1"]:
    return torch.tensor([COLOURS[name] for name in names], dtype=torch.float32)[:, :, None, None] / 127.5 - 1


def _coverage(distance: Tensor) -> Tensor:
    """How much of a pixel lies inside an edge that is `distance` pixels away (negative inside): 0 to 1."""
    return (0.5 - distance).clamp(0, 1)


@functools.cache
def _distance_table(resolution: int = 161) -> Float[Tensor, "kinds 1 h w"]:
    """Signed distance to each kind's outline, in radii, on a square of +-1.6 radii around its centre; y points down."""
    axis = np.linspace(-_TABLE_EXTENT, _TABLE_EXTENT, resolution)
    x, y = np.meshgrid(axis, axis)
    r = np.hypot(x, y)
    turn = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    spikes = np.arange(10)
    spike_radius = np.where(spikes % 2 == 0, 1.05, 0.44)
    distances = {
        "circle": r - 0.95,
        "square": _box(x, y, 0.82, 0.82),
        "triangle": _polygon(x, y, [(0, -1), (1, 0.8), (-1, 0.8)]),
        "cross": np.minimum(_box(x, y, 1.0, 0.32), _box(x, y, 0.32, 1.0)),
        "ring": np.abs(r - 0.72) - 0.26,
        "star": _polygon(
            x,
            y,
            list(zip(spike_radius * np.sin(np.pi * spikes / 5), -spike_radius * np.cos(np.pi * spikes / 5), strict=True)),
        ),
        "heart": _polygon(
            x,
            y,
            list(
                zip(
                    np.sin(turn) ** 3,
                    -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)) / 16,
                    strict=True,
                )
            ),
        ),
        "moon": np.maximum(np.hypot(x + 0.05, y) - 1, -(np.hypot(x - 0.45, y + 0.1) - 0.78)),
        "tree": np.minimum(_polygon(x, y, [(0, -1.05), (0.85, 0.45), (-0.85, 0.45)]), _box(x, y - 0.7, 0.2, 0.35)),
        "fish": np.minimum(
            np.maximum(np.hypot(x + 0.2, y - 0.6) - 1.08, np.hypot(x + 0.2, y + 0.6) - 1.08),
            _polygon(x, y, [(0.4, 0), (1.05, -0.62), (1.05, 0.62)]),
        ),
    }
    return torch.tensor(np.stack([distances[kind] for kind in KINDS]), dtype=torch.float32)[:, None]


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    """Signed distance to an axis-aligned box around the origin."""
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _polygon(x: np.ndarray, y: np.ndarray, corners: Sequence[tuple[float, float]]) -> np.ndarray:
    """Signed distance to a simple polygon (even-odd rule)."""
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        ex, ey = bx - ax, by - ay
        t = np.clip(((x - ax) * ex + (y - ay) * ey) / max(ex * ex + ey * ey, 1e-12), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - t * ex, y - ay - t * ey))
        crosses = (ay > y) != (by > y)
        inside ^= crosses & (x < ax + (y - ay) * ex / (ey if ey else 1.0))
    return np.where(inside, -nearest, nearest)

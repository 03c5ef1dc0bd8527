"""The readers: small CNNs that read every attribute of a drawn picture off it, and so judge what models paint."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from probekit.bundled import weights
from probekit.data import avatars
from probekit.data.scenes import VALUES

if TYPE_CHECKING:
    import pandas as pd


class SceneReader(nn.Module):
    """Logits for every attribute in `VALUES`, from images in [-1, 1] of 64x64 pixels (others are resized)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        layers: list[nn.Module] = []
        for i, (inner, outer) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(inner, outer, 3, stride=2 if i < 3 else 1, padding=1), nn.GroupNorm(8, outer), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 8 * 8, 256), nn.SiLU())
        self.heads = nn.ModuleDict({a: nn.Linear(256, len(values)) for a, values in VALUES.items()})

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> dict[str, Float[Tensor, "n _values"]]:
        """Logits of every attribute's values."""
        features = self.see(images)
        return {a: head(features) for a, head in self.heads.items()}

    def see(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 256"]:
        """What the logits are linear in."""
        if images.shape[-2:] != (64, 64):
            images = F.interpolate(images, (64, 64), mode="bilinear", antialias=True)
        return self.features(images)

    @torch.no_grad()
    def read(self, images: Float[Tensor, "n 3 h w"]) -> dict[str, Int[Tensor, " n"]]:
        """The index of the value seen, for each attribute of each image."""
        return {a: logits.argmax(1) for a, logits in self(images).items()}


class AvatarReader(nn.Module):
    """One logit for every attribute in `avatars.ATTRIBUTES`, from images in [-1, 1] of 32x32 pixels (others are resized)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (inner, outer) in enumerate(itertools.pairwise((3, 32, 64, 96))):
            layers += [nn.Conv2d(inner, outer, 3, padding=1, stride=1 if i == 0 else 2), nn.GroupNorm(8, outer), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 8 * 8, 128), nn.SiLU())
        self.head = nn.Linear(128, len(avatars.ATTRIBUTES))

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n attributes"]:
        """Logits."""
        return self.head(self.see(images))

    def see(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 128"]:
        """What the logits are linear in."""
        if images.shape[-2:] != (avatars.IMAGE_SIZE, avatars.IMAGE_SIZE):
            images = F.interpolate(images, (avatars.IMAGE_SIZE, avatars.IMAGE_SIZE), mode="bilinear", antialias=True)
        return self.features(images)

    @torch.no_grad()
    def read(self, images: Float[Tensor, "n 3 h w"]) -> Bool[Tensor, "n attributes"]:
        """Which attributes are seen in each image."""
        return self(images) > 0


@functools.cache
def scene_reader() -> SceneReader:
    """The trained reader of scenes, float32, on the CPU."""
    reader = SceneReader()
    reader.load_state_dict(_stored("scene-reader"))
    return reader.eval()


@functools.cache
def avatar_reader() -> AvatarReader:
    """The trained reader of avatars, float32, on the CPU."""
    reader = AvatarReader()
    reader.load_state_dict(_stored("avatar-reader"))
    return reader.eval()


def show_faces(images: Float[Tensor, "n 3 h w"]) -> Bool[Tensor, " n"]:
    """Which images show a face to the avatar reader: by what it sees (`AvatarReader.see`) they are told from faceless heads.

    What tells them is a logistic regression between 1,000 training avatars and the same with everything between hair and chin
    painted over in the colour of their skin. Of test avatars 1 in 100 has no face by it, of those painted over none has one.
    """
    coef, bias = _face_of_features()
    with torch.no_grad():
        return avatar_reader().see(images) @ coef + bias > 0


def without_faces(images: Float[Tensor, "n 3 32 32"], indices: Sequence[int]) -> Float[Tensor, "n 3 32 32"]:
    """Those avatars (of seed 0, as `Avatars().images(indices)` draws them) with no face, only skin where it would be."""
    images = images.clone()
    for image, index in zip(images, indices, strict=True):
        skin = torch.tensor(list(bytes.fromhex(avatars.avatar(index).skin[1:])))
        image[:, 10:26, 8:24] = (skin / 127.5 - 1)[:, None, None]
    return images


@functools.cache
def _face_of_features() -> tuple[Float[Tensor, "128"], Float[Tensor, ""]]:
    from sklearn.linear_model import LogisticRegression

    drawn = avatars.Avatars().images(range(1000))
    with torch.no_grad():
        seen = avatar_reader().see(torch.cat([drawn, without_faces(drawn, range(1000))])).numpy()
    fitted = LogisticRegression(C=0.01, max_iter=2000).fit(seen, np.repeat([True, False], 1000))
    return torch.tensor(fitted.coef_[0]).float(), torch.tensor(fitted.intercept_[0]).float()


def _stored(name: str) -> dict[str, Tensor]:
    return {key: value.float() for key, value in load_file(weights(name) / "model.safetensors").items()}


@dataclass(frozen=True, eq=False)
class Reading:
    """What a reader reads off pictures. values: how many values each factor has. read: each factor's, numbered from 0, a row a
    picture. see: what it reads them from, (n, d)."""

    values: Mapping[str, int]
    read: Callable[[Tensor], dict[str, np.ndarray]]
    see: Callable[[Tensor], Tensor]


def reading(data: str) -> Reading | None:
    """How the factors of a data set of that name are read, `scenes` or `avatars`; None of others."""
    if data == "scenes":
        scenes = scene_reader()

        def of_scenes(images: Tensor) -> dict[str, np.ndarray]:
            return {factor: seen.numpy() for factor, seen in scenes.read(images).items()}

        return Reading({factor: len(values) for factor, values in VALUES.items()}, of_scenes, _by_parts(scenes.see))
    if data == "avatars":
        faces = avatar_reader()

        def of_faces(images: Tensor) -> dict[str, np.ndarray]:
            seen = faces.read(images).long().numpy()
            return {attribute: seen[:, i] for i, attribute in enumerate(avatars.ATTRIBUTES)}

        return Reading(dict.fromkeys(avatars.ATTRIBUTES, 2), of_faces, _by_parts(faces.see))
    return None


def coded(labels: pd.DataFrame) -> dict[str, np.ndarray]:
    """A data set's attributes and classes, their values numbered from 0; labels that are numbers are left out."""
    import pandas as pd

    found = {}
    for name in labels:
        if isinstance(labels[name].dtype, pd.CategoricalDtype):
            found[str(name)] = labels[name].cat.codes.to_numpy()
        elif labels[name].dtype == bool:
            found[str(name)] = labels[name].to_numpy().astype(int)
    return found


def _by_parts(see: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def seen(images: Tensor) -> Tensor:
        return torch.cat([see(part) for part in torch.split(images.float().cpu(), 100)])

    return seen

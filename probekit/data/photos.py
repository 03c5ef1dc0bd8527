"""Photos: patches of the photographs that scikit-image and scikit-learn carry in their installed packages.

No picture is downloaded or kept here. `PHOTOGRAPHS` says where each comes from and under which licence. Left out are what is
grey, what was seen through a telescope or microscope, and the motorcycle, for which scikit-image states no licence.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from probekit.data.dataset import check_split, no_captions, numbers
from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    import pandas as pd

IMAGE_SIZE = 32
TRAIN, TEST = 100_000, 10_000
"""Of one seed's series, patches 0 to 99,999 are for training, the next 10,000 for testing."""
TEST_SHARE = 0.25
"""The share of each photograph's width, at its left, that test patches come from and training patches never touch."""
SIDES = 64, 112
"""The least and the greatest height and width of a patch in pixels of its photograph, before it becomes smaller."""


@dataclass(frozen=True)
class Photograph:
    """A picture that a package carries.

    file: its place in the package. author, licence, source: as the package states them.
    """

    name: str
    package: str
    file: str
    author: str
    licence: str
    source: str

    def path(self) -> Path:
        """Where it lies. Raises ProbekitError where the package is not there, or there without it."""
        found = find_spec(self.package)
        if found is None or found.origin is None:
            raise ProbekitError(f"photograph {self.name!r}: its package {self.package} is not installed")
        path = Path(found.origin).parent / self.file
        if not path.is_file():
            wheels = _ON_PYPI.get(self.package, self.package)
            raise ProbekitError(f"photograph {str(path)!r}: is not there; PyPI's wheels of {wheels} carry it")
        return path


_CC0 = "CC0 1.0"
_CC_BY = "CC BY 2.0, https://creativecommons.org/licenses/by/2.0/"
_ON_PYPI = {"skimage": "scikit-image", "sklearn": "scikit-learn"}

PHOTOGRAPHS = (
    Photograph(
        "astronaut", "skimage", "data/astronaut.png", "NASA", "public domain, no known copyright restrictions",
        "NASA Great Images, https://flic.kr/p/r9qvLn",
    ),
    Photograph("cat", "skimage", "data/chelsea.png", "Stefan van der Walt", _CC0, "given by the photographer"),
    Photograph("coffee", "skimage", "data/coffee.png", "Rachel Michetti", _CC0, "courtesy of Pikolo Espresso Bar"),
    Photograph(
        "rocket", "skimage", "data/rocket.jpg", "SpaceX", "released in the public domain",
        "https://www.flickr.com/photos/spacexphotos/16511594820/in/photostream/",
    ),
    Photograph(
        "china", "sklearn", "datasets/images/china.jpg", "danielbuechele", _CC_BY,
        "https://www.flickr.com/photos/danielbuechele/6061409035/sizes/z/in/photostream/",
    ),
    # scikit-learn names danielbuechele, but links to vultilion's page
    Photograph(
        "flower", "sklearn", "datasets/images/flower.jpg", "danielbuechele or vultilion", _CC_BY,
        "https://www.flickr.com/photos/vultilion/6056698931/sizes/z/in/photostream/",
    ),
)  # fmt: skip
"""The photographs, in the order of their numbers."""


@dataclass(frozen=True)
class Patch:
    """A square of `PHOTOGRAPHS[picture]` with its corner at (left, top), turned to its mirror image or not."""

    picture: int
    left: int
    top: int
    side: int
    mirrored: bool


class Photos:
    """The patches of one seed as a data set, cut and made smaller (bilinear with antialiasing) whenever they are asked for.

    What patch number i shows follows from the seed and i alone, at every image size: a photograph, a side between the `SIDES`
    (its logarithm uniform), a place, and whether it is mirrored. Test patches lie in the `TEST_SHARE` at the left of
    their photograph, training patches right of it. At image sizes above 64 some patches are enlarged.

    Raises ProbekitError for a photograph that is not in its package or cannot be read.
    """

    name = "photos"

    def __init__(self, image_size: int = IMAGE_SIZE, seed: int = 0) -> None:
        self.image_size, self.seed = image_size, seed
        files = [hashlib.sha256(read(photograph)[0]).hexdigest() for photograph in PHOTOGRAPHS]
        said = f"{[p.name for p in PHOTOGRAPHS]}{files}{TRAIN}{TEST}{TEST_SHARE}{SIDES}left bilinear{image_size}{seed}"
        self.digest = hashlib.sha256(said.encode()).hexdigest()[:12]

    def __len__(self) -> int:
        return TRAIN + TEST

    def split(self, part: str) -> np.ndarray:
        """The numbers of the patches of `train` or `test`. Raises ProbekitError for another part."""
        check_split(part)
        return np.arange(TRAIN) if part == "train" else np.arange(TRAIN, TRAIN + TEST)

    def patch(self, index: int) -> Patch:
        """Where patch number `index` lies."""
        generator = np.random.default_rng([self.seed, index])
        picture = int(generator.integers(len(PHOTOGRAPHS)))
        height, width = read(PHOTOGRAPHS[picture])[1].shape[:2]
        border = int(TEST_SHARE * width)
        first, last = (border, width) if index < TRAIN else (0, border)
        least, most = np.log(SIDES)
        side = round(float(np.exp(generator.uniform(least, most))))
        left = first + int(generator.integers(last - first - side + 1))
        return Patch(picture, left, int(generator.integers(height - side + 1)), side, bool(generator.integers(2)))

    def images(self, indices: Sequence[int] | np.ndarray) -> Float[Tensor, "n 3 h w"]:
        """Patches in [-1, 1]. Raises ProbekitError for a number that is not there."""
        wanted = numbers(indices, self.name, len(self))
        made = np.empty((len(wanted), self.image_size, self.image_size, 3), dtype=np.uint8)
        for row, index in enumerate(wanted):
            made[row] = self._draw(self.patch(int(index)))
        return torch.from_numpy(made).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Raises ProbekitError: there are none."""
        raise no_captions(self.name)

    def labels(self, indices: Sequence[int] | np.ndarray) -> pd.DataFrame:
        """Of each patch, which photograph it is of (`picture`) and how many pixels of it high and wide (`side`)."""
        import pandas as pd

        patches = [self.patch(int(index)) for index in numbers(indices, self.name, len(self))]
        names = [photograph.name for photograph in PHOTOGRAPHS]
        pictures = pd.Categorical.from_codes([patch.picture for patch in patches], categories=names)
        return pd.DataFrame({"picture": pictures, "side": np.array([float(patch.side) for patch in patches])})

    def _draw(self, patch: Patch) -> UInt8[np.ndarray, "h w 3"]:
        pixels = read(PHOTOGRAPHS[patch.picture])[1]
        # cut before it is made smaller: Pillow would look beyond a box
        cut = pixels[patch.top : patch.top + patch.side, patch.left : patch.left + patch.side]
        small = np.array(Image.fromarray(cut).resize((self.image_size, self.image_size), Image.Resampling.BILINEAR))
        return small[:, ::-1] if patch.mirrored else small


@cache
def read(photograph: Photograph) -> tuple[bytes, UInt8[np.ndarray, "h w 3"]]:
    """A photograph's file and its pixels. Raises ProbekitError where it is not there or cannot be read."""
    path = photograph.path()
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            return content, np.array(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise ProbekitError(f"photograph {str(path)!r}: cannot be read (is no picture)") from error
    except Exception as error:  # a damaged image can raise anything
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:160] or type(error).__name__
        raise ProbekitError(f"photograph {str(path)!r}: cannot be read ({reason})") from error

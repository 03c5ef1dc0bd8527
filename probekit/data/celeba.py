"""CelebA (Liu et al., Deep Learning Face Attributes in the Wild, 2015) from the files that its authors or Kaggle offer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from probekit.data.dataset import no_captions, numbers
from probekit.data.folder import check_labels, digest, list_images, read_images, read_rows
from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    import pandas as pd

_FIRST_VALID, _FIRST_TEST, _LAST = 162_771, 182_638, 202_599
# part -> its number in list_eval_partition, the official images
_PARTS = {"train": (0, "000001 to 162770"), "test": (2, "182638 to 202599")}


class CelebA:
    """The aligned and cropped images of CelebA with their 40 attributes; all of them, or those that are there.

    root: holds `img_align_celeba/` (or, as Kaggle's archive unpacks, a folder of that name in a folder of that name) and
    `list_attr_celeba.txt` or `.csv`; and `list_eval_partition.txt` or `.csv` if the split is to be another than the official
    one by the images' numbers (1 to 162,770 train, to 182,637 valid, to 202,599 test). Of two such files the .txt counts.

    The crop is that of the stitching paper's code ("All roads lead to Rome?", §3.1; thesis-latent-spaces, `metrics.py` and
    `probe.py`: `Resize(64)`, then `CenterCrop(64)`): the middle 178x178 of 178x218 pixels, reduced with a bilinear filter and
    antialiasing. Cropping comes first here, which shifts nothing by more than half a pixel of the original. Of the
    paper's models the DDIM alone was trained on another crop, 128x128 around (89, 121), hence its "slightly different crops".

    digest: of the names and sizes of the files, the labels, the split, the image size and the crop; no pixels are read for it.

    Raises ProbekitError for missing or damaged files, with the line's number, and an image without labels.
    """

    name = "celeba"

    def __init__(self, root: Path, image_size: int = 64) -> None:
        self.image_size, self._root = image_size, root
        folder = root / "img_align_celeba"
        self._folder = folder / folder.name if (folder / folder.name).is_dir() else folder
        sizes = list_images(self._folder)
        self._files = list(sizes)
        if (attributes := _either(root, "list_attr_celeba")) is None:
            raise ProbekitError(f"CelebA {str(root)!r}: has neither list_attr_celeba.txt nor list_attr_celeba.csv")
        self._attributes, self._has = _read_attributes(attributes, self._files)
        partition = _either(root, "list_eval_partition")
        self._part = _official(self._files) if partition is None else _read_partition(partition, self._files)
        said = ",".join(self._attributes) + self._has.tobytes().hex() + self._part.tobytes().hex()
        self.digest = digest(sizes, said, image_size)

    def __len__(self) -> int:
        return len(self._files)

    def split(self, part: str) -> Int64[np.ndarray, " n"]:
        """The numbers of the images of `train` or `test` as CelebA's authors split them; `valid` is in neither.

        The paper says that it takes 9,000 images of the test split; its code takes images 1 to 9,000, which are for training.
        Raises ProbekitError for another part, and where none of its images is there.
        """
        if part not in _PARTS:
            raise ProbekitError(f"split {part!r}: choose train or test")
        number, official = _PARTS[part]
        found = np.flatnonzero(self._part == number)
        if not found.size:
            raise ProbekitError(
                f"CelebA {str(self._root)!r}: none of its {len(self)} images ({self._files[0]} to {self._files[-1]}) is in "
                f"{part}; add some of {official}, or a list_eval_partition.txt that gives {number} to some"
            )
        return found

    def images(self, indices: Sequence[int] | np.ndarray) -> Float[Tensor, "n 3 h w"]:
        """Pictures in [-1, 1]. Raises ProbekitError for a number that is not there and a file that cannot be read."""
        return read_images([self._folder / self._files[i] for i in numbers(indices, self.name, len(self))], self.image_size)

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Raises ProbekitError: there are none."""
        raise no_captions(self.name)

    def labels(self, indices: Sequence[int] | np.ndarray) -> pd.DataFrame:
        """Which attributes each image has: one row an index, one column of bool an attribute."""
        import pandas as pd

        return pd.DataFrame(self._has[numbers(indices, self.name, len(self))], columns=self._attributes)


def _either(root: Path, name: str) -> Path | None:
    """The .txt or else the .csv file of that name, if there is one."""
    return next((file for file in (root / f"{name}.txt", root / f"{name}.csv") if file.exists()), None)


def _read_attributes(file: Path, images: Sequence[str]) -> tuple[list[str], Bool[np.ndarray, "n attributes"]]:
    """The attributes' names, and which image has which."""
    rows = read_rows(file)
    line, first = next(rows, (1, []))
    said = None
    if file.suffix == ".csv":
        names = first[1:]
    else:
        said = int(first[0]) if len(first) == 1 and re.fullmatch(r"[0-9]{1,9}", first[0]) else None
        if said is None:
            raise ProbekitError(f"labels {str(file)!r} line {line}: wants the number of images, not {' '.join(first)[:80]!r}")
        line, names = next(rows, (2, []))
    if not names or len(set(names)) < len(names) or {"1", "-1"} & set(names):
        raise ProbekitError(f"labels {str(file)!r} line {line}: wants the names of the attributes")
    check_labels(f"labels {str(file)!r} line {line}", names)
    has = _of_images(rows, file, images, len(names), ("-1", "1"), said)
    return names, has == 1


def _read_partition(file: Path, images: Sequence[str]) -> Int64[np.ndarray, " n"]:
    """For each image 0 (train), 1 (valid) or 2 (test)."""
    rows = read_rows(file)
    if file.suffix == ".csv":
        next(rows, None)
    return _of_images(rows, file, images, 1, ("0", "1", "2"))[:, 0]


def _of_images(
    rows: Iterator[tuple[int, list[str]]],
    file: Path,
    images: Sequence[str],
    width: int,
    allowed: Sequence[str],
    count: int | None = None,
) -> Int64[np.ndarray, "n width"]:
    """The whole numbers that rows of `NAME NUMBER...` give for these images; `count` is how many rows there should be."""
    values = {text: int(text) for text in allowed}
    places = {name: i for i, name in enumerate(images)}
    taken = np.zeros((len(images), width), dtype=np.int64)
    lines: dict[str, int] = {}
    for line, (name, *cells) in rows:
        place = f"labels {str(file)!r} line {line}"
        if len(cells) != width:
            raise ProbekitError(f"{place}: has {len(cells)} values after the file name, not {width}")
        if name in lines:
            raise ProbekitError(f"{place}: {name!r} is in line {lines[name]} too")
        lines[name] = line
        try:
            row = [values[cell] for cell in cells]
        except KeyError as error:
            raise ProbekitError(f"{place}: {error.args[0]!r} is none of {', '.join(allowed)}") from error
        if name in places:
            taken[places[name]] = row
    if count not in (None, len(lines)):
        raise ProbekitError(f"labels {str(file)!r}: says {count} images in line 1 and lists {len(lines)}: cut short?")
    if missing := [name for name in images if name not in lines]:
        raise ProbekitError(f"labels {str(file)!r}: does not list {missing[0]!r} and {len(missing) - 1} more of the images")
    return taken


def _official(images: Sequence[str]) -> Int64[np.ndarray, " n"]:
    """The part of each image by the number that is its name."""
    stems = [name.rpartition(".")[0] for name in images]
    for name, stem in zip(images, stems, strict=True):
        if not (re.fullmatch(r"[0-9]{1,9}", stem) and 1 <= int(stem) <= _LAST):
            raise ProbekitError(
                f"CelebA image {name!r}: is none of 000001 to {_LAST}; say in list_eval_partition.txt whether it is for "
                "training (0) or testing (2)"
            )
    return np.searchsorted([_FIRST_VALID, _FIRST_TEST], [int(stem) for stem in stems], side="right")

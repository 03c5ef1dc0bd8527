"""Any folder of images as a data set, with labels from a csv file; and how files of images and of labels are read."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from probekit import checked
from probekit.data.dataset import check_split, no_captions, numbers
from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    import pandas as pd

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""The endings of the files that count as images, in capitals or not."""
READING = "centre square, bilinear with antialiasing"
"""What becomes of an image between its file and its pixels; a part of every digest."""

CAPTION = "caption"
"""The column of a csv file that says what an image shows; it is no label."""

MOST_BYTES = 2**29
"""Of a picture's file."""
MOST_PIXELS = 2**26
"""Of a picture: 8,192 pixels high and as many wide, of which a few copies fit in memory."""
MOST_TABLE = 2**27
"""Bytes of a file of labels."""
MOST_LABELS = 1000
"""Columns of a file of labels."""
MOST_NUMBER = 1e15
"""The largest label that is a number, either sign: its square is still one in half the digits."""
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
_TAKEN = ("image",)
"""What latents on disk call a column of their own."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_TEST_SHARE = 0.1
_MOST_CLASSES = 20
_BINARY = ({"0", "1"}, {"-1", "1"}, {"true", "false"}, {"yes", "no"})
_MISSING = ("", "NA", "NaN", "nan")


class ImageFolder:
    """The images of a folder and of the folders inside it, ordered by name; with labels where a csv file gives them.

    root: the folder; files and folders whose name begins with a dot do not count. labels: a csv file in UTF-8 with one line of
    column names, then one line an image: the file's name relative to `root` (`sub/a.png`), then its labels. A column of

    - 0/1, -1/1, true/false or yes/no is an attribute (bool). It has no empty cells: a column that has some is refused.
    - other words is a class (category), as are whole numbers of at most 20 values which on average 2 images or more share.
    - other numbers is a number (float).

    A column `caption` is no label: it says what each image shows, in words.

    An empty cell, NA or NaN in a class or a number is an unknown one (NaN). Images without a line in the csv file are left
    out of the data set, and `unlabelled` says how many; so whoever does not know an attribute of an image deletes its line.

    digest: of the names and sizes of the files, the labels, the image size and the crop. No pixels are read for it: an image
    replaced by another of as many bytes keeps it.

    Raises ProbekitError, with the line's number, for a csv file that cannot be read, a line with too few or too many cells,
    and a file name that is not in the folder or comes twice.
    """

    def __init__(self, root: Path, image_size: int = 64, labels: Path | None = None) -> None:
        sizes = list_images(root)
        self.name, self.image_size = root.resolve().name, image_size
        self._root = root
        self._labels = None if labels is None else _read_labels(labels, root, sizes)
        self._files = [name for name in sizes if self._labels is None or _key(name) in self._labels.index]
        self.unlabelled = len(sizes) - len(self._files)
        if self._labels is not None:
            self._labels = self._labels.loc[[_key(name) for name in self._files]].reset_index(drop=True)
        said = "" if self._labels is None else self._labels.to_csv(index=False) + str(self._labels.dtypes.to_dict())
        self.digest = digest({name: sizes[name] for name in self._files}, said, image_size)

    def __len__(self) -> int:
        return len(self._files)

    def split(self, part: str) -> Int64[np.ndarray, " n"]:
        """The numbers of the images of `train` (9 in 10) or `test` (1 in 10).

        A hash of an image's name relative to the folder decides: it stays on its side whatever images are added. Raises
        ProbekitError for another part, and where no image falls in this one.
        """
        check_split(part)
        test = np.array([_hash(_key(name)) < _TEST_SHARE for name in self._files])
        found = np.flatnonzero(test if part == "test" else ~test)
        if not found.size:
            raise ProbekitError(
                f"folder {str(self._root)!r}: none of its {len(self)} images falls in {part} (a hash of the file name "
                "puts 1 in 10 in test); add images"
            )
        return found

    def images(self, indices: Sequence[int] | np.ndarray) -> Float[Tensor, "n 3 h w"]:
        """Pictures in [-1, 1], as `read_images` makes them."""
        return read_images([self._root / self._files[i] for i in numbers(indices, self.name, len(self))], self.image_size)

    def labels(self, indices: Sequence[int] | np.ndarray) -> pd.DataFrame:
        """One row an index, one column a label; no columns without a csv file."""
        import pandas as pd

        wanted = numbers(indices, self.name, len(self))
        if self._labels is None:
            return pd.DataFrame(index=range(len(wanted)))
        return self._labels.iloc[wanted].reset_index(drop=True).drop(columns=CAPTION, errors="ignore")

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """What each picture shows, in words.

        Raises ProbekitError without a csv file that has a column `caption`, and where an image's cell of it is empty.
        """
        if self._labels is None or CAPTION not in self._labels:
            raise no_captions(self.name)
        wanted = numbers(indices, self.name, len(self))
        found = self._labels[CAPTION].iloc[wanted].tolist()
        if "" in found:
            without = self._files[wanted[found.index("")]]
            raise ProbekitError(f"data {self.name!r}: image {without!r} has an empty caption; write one, or delete its line")
        return found


def list_images(folder: Path) -> dict[str, int]:
    """The images in a folder and in the folders inside it: name relative to it, with slashes -> bytes; ordered by name.

    Raises ProbekitError for a folder that is not there or cannot be read, one without images, and a link that makes images
    count twice.
    """
    if not checked.is_folder(folder):
        raise ProbekitError(f"folder {str(folder)!r}: {'is no folder' if os.path.lexists(folder) else 'does not exist'}")
    found: dict[str, int] = {}
    seen: set[str] = set()
    try:
        for inside, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
            if (real := os.path.realpath(inside)) in seen:
                raise ProbekitError(f"folder {inside!r}: is a link to a folder whose images are already here; remove the link")
            seen.add(real)
            folders[:] = [name for name in folders if not name.startswith(".")]
            before = "" if inside == str(folder) else f"{Path(inside).relative_to(folder).as_posix()}/"
            for name in files:
                if name.lower().endswith(IMAGE_TYPES) and not name.startswith("."):
                    there = os.stat(f"{inside}/{name}")  # noqa: PTH116 (Path takes 3 s for CelebA)
                    if not stat.S_ISREG(there.st_mode):  # a pipe, which one would wait for for ever
                        raise ProbekitError(f"image {f'{inside}/{name}'!r}: is no file")
                    found[before + name] = there.st_size
    except OSError as error:
        raise ProbekitError(f"file {error.filename!r}: cannot be read ({error.strerror})") from error
    if not found:
        raise ProbekitError(f"folder {str(folder)!r}: holds no images ({', '.join(IMAGE_TYPES)})")
    return {name: found[name] for name in sorted(found)}


def _raise(error: OSError) -> None:
    raise error


def digest(sizes: Mapping[str, int], labels: str, image_size: int) -> str:
    """12 hex digits for files of these names and sizes in bytes, with these labels, read at this size."""
    content = "\n".join([*(f"{size} {name}" for name, size in sizes.items()), labels, READING, str(image_size)])
    return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def read_images(files: Sequence[Path], image_size: int) -> Float[Tensor, "n 3 h w"]:
    """Pictures in [-1, 1]: of each file the centre square, resized with a bilinear filter and antialiasing.

    The filter is torchvision's `Resize(antialias=True)`. Grey, palette and CMYK become RGB, what is transparent lies on
    white, a camera's rotation is applied. JPEGs of 16 times the image size or more are decoded at 1/2, 1/4 or 1/8: three times
    as fast, and at sharp edges a few of 255 grey levels from the full decoding.
    Raises ProbekitError for the first file that is damaged or no image.
    """
    pixels = np.empty((len(files), 3, image_size, image_size), dtype=np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and resizes outside Python's lock
        for i, image in enumerate(pool.map(lambda file: _read_image(file, image_size), files)):
            pixels[i] = image
    return torch.from_numpy(pixels).float() / 127.5 - 1


def _read_image(file: Path, image_size: int) -> UInt8[np.ndarray, "3 h w"]:
    checked.file(f"image {str(file)!r}", file, MOST_BYTES)
    try:
        with Image.open(file, formats=_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ProbekitError(
                    f"image {str(file)!r}: has {image.width}x{image.height} pixels; at most {MOST_PIXELS:,} are read"
                )
            image.draft(None, (8 * image_size, 8 * image_size))
            ImageOps.exif_transpose(image, in_place=True)
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = _rgb(image.crop((left, top, left + side, top + side)))
        return np.asarray(square.resize((image_size, image_size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    except ProbekitError:
        raise
    except UnidentifiedImageError as error:
        raise ProbekitError(f"image {str(file)!r}: is no PNG, JPEG, WebP or BMP, or damaged") from error
    except Exception as error:  # a damaged image can raise anything
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:160] or type(error).__name__
        raise ProbekitError(f"image {str(file)!r}: cannot be read ({reason})") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return image.convert("RGB")


def read_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a table of text, as (number of the line from 1, cells), without the empty ones.

    A .csv file is cut at commas, another at white space. Raises ProbekitError for one that is not there, not UTF-8, or not csv.
    """
    content = checked.content(f"labels {str(file)!r}", file, MOST_TABLE)
    try:
        lines = io.StringIO(content.decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ProbekitError(f"labels {str(file)!r} line {number}: is not UTF-8; save the file as UTF-8") from error
    if odd := _CONTROL.search(content):
        number = content.count(b"\n", 0, odd.start()) + 1
        raise ProbekitError(f"labels {str(file)!r} line {number}: has a control character in it ({odd[0].decode()!r})")
    if file.suffix.lower() != ".csv":
        yield from ((number, cells) for number, line in enumerate(lines, 1) if (cells := line.split()))
        return
    reader = csv.reader(lines, strict=True)
    number = 1
    while True:
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            raise ProbekitError(f"labels {str(file)!r} line {number}: is no csv ({error})") from error
        if any(cells):
            yield number, cells
        number = reader.line_num + 1


def _read_labels(file: Path, root: Path, known: Mapping[str, int]) -> pd.DataFrame:
    """The labels of the images that the csv file names; the index is their keys."""
    import pandas as pd

    rows = read_rows(file)
    first, header = next(rows, (1, []))
    if len(header) < 2 or not all(header[1:]) or len(set(header)) < len(header):
        raise ProbekitError(
            f"labels {str(file)!r} line {first}: wants different column names with commas between, as file,Smiling"
        )
    check_labels(f"labels {str(file)!r} line {first}", header[1:])
    keys = {_key(name) for name in known}
    lines: dict[str, int] = {}
    table = []
    for line, cells in rows:
        place = f"labels {str(file)!r} line {line}"
        if len(cells) != len(header):
            raise ProbekitError(f"{place}: has {len(cells)} cells, and the line of column names {len(header)}")
        key = _key(Path(cells[0]).as_posix())
        if key not in keys:
            raise ProbekitError(f"{place}: {cells[0]!r} is no image in {str(root)!r}; one that is: {next(iter(known))!r}")
        if key in lines:
            raise ProbekitError(f"{place}: {cells[0]!r} is in line {lines[key]} too")
        lines[key] = line
        table.append(cells[1:])
    if not table:
        raise ProbekitError(f"labels {str(file)!r}: names no images, only columns")
    columns = zip(header[1:], zip(*table, strict=True), strict=True)
    return pd.DataFrame(
        {
            name: cells if name == CAPTION else _column(f"labels {str(file)!r} column {name!r}", cells, [*lines.values()])
            for name, cells in columns
        },
        index=list(lines),
    )


def check_labels(said: str, names: Sequence[str]) -> None:
    """Raises ProbekitError for names of labels that cannot stand beside each other in results and figures, or are too many."""
    if len(names) > MOST_LABELS:
        raise ProbekitError(f"{said}: has {len(names):,} labels; at most {MOST_LABELS:,} are read")
    for name in names:
        checked.name(f"{said}: column {checked.shown(name)}", name)
        if name in _TAKEN:
            raise ProbekitError(f"{said}: column {name!r} is the images' own; call the label otherwise")


def _column(said: str, cells: Sequence[str], lines: Sequence[int]) -> Sequence[bool] | pd.Categorical | np.ndarray:
    """One column's labels: bool, category or float. `said` names the column in errors."""
    import pandas as pd

    there = [cell not in _MISSING for cell in cells]
    values = np.array([_number(cell) for cell in cells])
    words = [f"{value:g}" if math.isfinite(value) else cell.lower() for cell, value in zip(cells, values, strict=True)]
    if any(there) and any({word for word, is_there in zip(words, there, strict=True) if is_there} <= two for two in _BINARY):
        if not all(there):
            raise ProbekitError(
                f"{said}: {there.count(False)} cells of an attribute are empty, the first in line {lines[there.index(False)]}; "
                "write yes or no, or delete the lines of images for which it is not known"
            )
        return [word in ("1", "true", "yes") for word in words]
    count = int(np.isfinite(values).sum())
    if (large := np.abs(np.where(np.isfinite(values), values, 0)) > MOST_NUMBER).any():
        odd = int(np.flatnonzero(large)[0])
        raise ProbekitError(f"{said}: {checked.shown(cells[odd])} in line {lines[odd]}: at most {MOST_NUMBER:g} will do")
    if count == sum(there):
        distinct = np.unique(values[np.isfinite(values)])
        if not (distinct % 1).any() and 0 < len(distinct) <= min(_MOST_CLASSES, count / 2):
            return pd.Categorical([int(v) if math.isfinite(v) else None for v in values], categories=[int(v) for v in distinct])
        return values
    if count > sum(there) / 2:
        odd = next(i for i, cell in enumerate(cells) if there[i] and not math.isfinite(values[i]))
        raise ProbekitError(
            f"{said}: {cells[odd]!r} in line {lines[odd]} is no number, as most of its cells are; leave it empty"
        )
    return pd.Categorical([cell if is_there else None for cell, is_there in zip(cells, there, strict=True)])


def _number(cell: str) -> float:
    """The number, or NaN for what is none."""
    try:
        return float(cell) if "_" not in cell else math.nan
    except ValueError:
        return math.nan


def _key(name: str) -> str:
    """A file name in the one form of its accents: macOS stores them decomposed, a csv file does not."""
    return unicodedata.normalize("NFC", name)


def _hash(key: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:6]) / 2**48

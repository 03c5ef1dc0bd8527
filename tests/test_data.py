from __future__ import annotations

import io
import itertools
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from probekit.data import avatars, load_data
from probekit.data.avatars import ATTRIBUTES, Avatar, Avatars, avatar, counterfactual
from probekit.data.celeba import CelebA
from probekit.data.folder import ImageFolder, read_images
from probekit.hooks.errors import ProbekitError


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 20 + 2, width // 20 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def plain(file: Path, box: tuple[int, int, int, int], size: int) -> torch.Tensor:
    """What Pillow alone makes of a file, as (3, h, w) in [-1, 1]."""
    with Image.open(file) as image:
        small = image.convert("RGB").crop(box).resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1) / 127.5 - 1


def one_line(error: pytest.ExceptionInfo[ProbekitError]) -> str:
    said = str(error.value)
    assert "\n" not in said and len(said) < 400
    return said


# CelebA

NAMES = ["5_o_Clock_Shadow", "Eyeglasses", "Male", "Smiling", *(f"Attribute_{i}" for i in range(36))]
SOME = [1, 2, 3, 162_770, 162_771, 182_637, 182_638, 202_599]


def has(number: int) -> list[bool]:
    return [bool(x) for x in np.random.default_rng(number).integers(0, 2, 40)]


def celeba(root: Path, numbers: Sequence[int] = SOME, kind: str = "txt") -> Path:
    folder = root / "img_align_celeba"
    folder.mkdir(parents=True)
    for number in numbers:
        picture(178, 218, number).save(folder / f"{number:06d}.jpg", quality=95)
    rows = [(f"{n:06d}.jpg", *("1" if x else "-1" for x in has(n))) for n in numbers]
    if kind == "txt":  # as the authors write it: padded with blanks
        lines = [str(len(rows)), " ".join(NAMES) + " ", *(name + " " + " ".join(f"{x:>2}" for x in v) for name, *v in rows)]
    else:
        lines = [",".join(["image_id", *NAMES]), *map(",".join, rows)]
    (root / f"list_attr_celeba.{kind}").write_text("\n".join(lines) + "\n")
    return root


def test_celeba_shows_the_middle_178_pixels(tmp_path: Path) -> None:
    data = CelebA(celeba(tmp_path))
    assert len(data) == len(SOME) and data.image_size == 64
    images = data.images([3, 0])
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.float32 and images.abs().max() <= 1
    for image, number in zip(images, (SOME[3], SOME[0]), strict=True):
        expected = plain(tmp_path / "img_align_celeba" / f"{number:06d}.jpg", (0, 20, 178, 198), 64)
        assert torch.equal(image, expected)


def test_celeba_is_what_the_papers_transforms_give(tmp_path: Path) -> None:
    data = CelebA(celeba(tmp_path))
    with Image.open(tmp_path / "img_align_celeba" / "000001.jpg") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    # ToTensor, Resize(64), CenterCrop(64) of torchvision: 218 rows become 78 before the crop, which shifts them by 0.16 at most
    resized = torch.nn.functional.interpolate(pixels, (78, 64), mode="bilinear", antialias=True)
    difference = (data.images([0])[0] - resized[0, :, 7:71]).abs()
    assert difference.mean() < 0.01 and difference.max() < 0.15


def test_both_label_formats_of_celeba_agree(tmp_path: Path) -> None:
    text, table = CelebA(celeba(tmp_path / "a")), CelebA(celeba(tmp_path / "b", kind="csv"))
    labels = text.labels(range(len(SOME)))
    assert list(labels.columns) == NAMES and labels.dtypes.eq(bool).all()
    assert labels.to_numpy().tolist() == [has(n) for n in SOME]
    pd.testing.assert_frame_equal(labels, table.labels(range(len(SOME))))
    assert text.digest == table.digest and len(text.digest) == 12
    assert CelebA(tmp_path / "a", 32).digest != text.digest
    assert text.labels([5, 1]).to_numpy().tolist() == [has(SOME[5]), has(SOME[1])]


def test_kaggles_folder_in_a_folder_is_read(tmp_path: Path) -> None:
    digest = CelebA(celeba(tmp_path)).digest
    (tmp_path / "img_align_celeba").rename(tmp_path / "moved")
    (tmp_path / "img_align_celeba").mkdir()
    (tmp_path / "moved").rename(tmp_path / "img_align_celeba" / "img_align_celeba")
    assert CelebA(tmp_path).digest == digest


def test_celebas_official_split_goes_by_number(tmp_path: Path) -> None:
    data = CelebA(celeba(tmp_path))
    assert data.split("train").tolist() == [0, 1, 2, 3]
    assert data.split("test").tolist() == [6, 7]
    with pytest.raises(ProbekitError, match="split 'valid': choose train or test"):
        data.split("valid")


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_celebas_partition_file_decides(tmp_path: Path, kind: str) -> None:
    celeba(tmp_path, [1, 2, 3, 4])
    comma = "," if kind == "csv" else " "
    rows = ["000004.jpg 2", "000001.jpg 0", "000002.jpg 1", "000003.jpg 2", "000005.jpg 0"]
    text = ("image_id,partition\n" if kind == "csv" else "") + "\n".join(rows).replace(" ", comma)
    before = CelebA(tmp_path).digest
    (tmp_path / f"list_eval_partition.{kind}").write_text(text)
    data = CelebA(tmp_path)
    assert data.split("train").tolist() == [0] and data.split("test").tolist() == [2, 3]
    assert data.digest != before


def test_a_part_of_celeba_without_test_images_says_so_once(tmp_path: Path) -> None:
    data = CelebA(celeba(tmp_path, [1, 2, 3]))
    assert data.split("train").tolist() == [0, 1, 2]
    with pytest.raises(ProbekitError, match=r"none of its 3 images \(000001.jpg to 000003.jpg\) is in test; add") as error:
        data.split("test")
    assert "182638 to 202599" in one_line(error)


def edit(file: Path, line: int, text: str | None) -> None:
    """Replace a line, counted from 1, or take it out."""
    lines = file.read_text().splitlines()
    lines[line - 1 : line] = [] if text is None else [text]
    file.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("line", "text", "said"),
    [
        (1, "hello", "line 1: wants the number of images"),
        (2, " ".join(["1"] * 40), "line 2: wants the names"),
        (4, "000002.jpg 1 -1 1", "line 4: has 3 values after the file name, not 40"),
        (5, "000003.jpg" + " 0" * 40, "line 5: '0' is none of -1, 1"),
        (5, "000002.jpg" + " 1" * 40, "line 5: '000002.jpg' is in line 4 too"),
        (5, None, "says 8 images in line 1 and lists 7"),
        (5, "000009.jpg" + " 1" * 40, "does not list '000003.jpg'"),
    ],
)
def test_celebas_damaged_labels_are_named(tmp_path: Path, line: int, text: str | None, said: str) -> None:
    edit(celeba(tmp_path) / "list_attr_celeba.txt", line, text)
    with pytest.raises(ProbekitError) as error:
        CelebA(tmp_path)
    assert said in one_line(error) and "list_attr_celeba.txt" in one_line(error)


def test_celebas_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ProbekitError, match=r"img_align_celeba': does not exist"):
        CelebA(tmp_path)
    celeba(tmp_path, [1, 2])
    (tmp_path / "list_eval_partition.csv").write_text("image_id,partition\n000001.jpg,0\n000002.jpg,5\n")
    with pytest.raises(ProbekitError, match="line 3: '5' is none of 0, 1, 2"):
        CelebA(tmp_path)
    (tmp_path / "list_eval_partition.csv").unlink()
    (tmp_path / "img_align_celeba" / "000001.jpg").rename(tmp_path / "img_align_celeba" / "202600.jpg")
    edit(tmp_path / "list_attr_celeba.txt", 3, "202600.jpg" + " 1" * 40)
    with pytest.raises(ProbekitError, match=r"'202600.jpg': is none of 000001 to 202599"):
        CelebA(tmp_path)
    (tmp_path / "list_attr_celeba.txt").unlink()
    with pytest.raises(ProbekitError, match=r"has neither list_attr_celeba.txt nor list_attr_celeba.csv"):
        CelebA(tmp_path)


# any folder


def folder(root: Path, names: Sequence[str]) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(50 + 10 * i, 60, i).save(root / name)
    return root


@pytest.mark.parametrize(
    ("width", "height", "box"), [(90, 61, (14, 0, 75, 61)), (61, 90, (0, 14, 61, 75)), (20, 20, (0, 0, 20, 20))]
)
def test_a_folders_images_are_centre_squares(tmp_path: Path, width: int, height: int, box: tuple[int, int, int, int]) -> None:
    for kind in ("png", "jpg", "jpeg", "webp", "bmp", "PNG"):
        picture(width, height).save(tmp_path / f"{kind}.{kind}")
    data = ImageFolder(tmp_path, 24)
    files = sorted(tmp_path.iterdir())
    assert len(data) == len(files) == 6
    for image, file in zip(data.images(range(6)), files, strict=True):
        assert torch.equal(image, plain(file, box, 24))


def test_large_jpegs_are_decoded_small_and_look_the_same(tmp_path: Path) -> None:
    picture(2000, 1500).save(tmp_path / "a.jpg", quality=95)
    difference = (read_images([tmp_path / "a.jpg"], 32)[0] - plain(tmp_path / "a.jpg", (250, 0, 1750, 1500), 32)).abs()
    # of 255 grey levels, which are 1 / 127.5 apart here
    assert difference.max() < 8.5 / 127.5 and difference.mean() < 1.5 / 127.5


RED = (200, 40, 80)


@pytest.mark.parametrize(
    ("mode", "colour", "shown"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (0, 51), (204, 204, 204)),
        ("I;16", 51 * 257, (51, 51, 51)),
        ("RGBA", (*RED, 255), RED),
        ("RGBA", (*RED, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
    ],
)
def test_every_kind_of_pixel_becomes_rgb_on_white(tmp_path: Path, mode: str, colour: object, shown: tuple[int, ...]) -> None:
    Image.new(mode, (30, 30), colour).save(tmp_path / "a.png")  # type: ignore[arg-type]
    pixels = ((read_images([tmp_path / "a.png"], 8)[0] + 1) * 127.5).round()
    assert (pixels == torch.tensor(shown)[:, None, None]).all()


def test_palettes_and_cmyk_become_rgb(tmp_path: Path) -> None:
    palette = Image.new("RGB", (30, 30), RED).quantize(4)
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "clear.png", transparency=palette.getpixel((0, 0)))
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=100)
    pixels = (read_images([tmp_path / f for f in ("palette.png", "clear.png", "print.jpg")], 8) + 1) * 127.5
    for image, colour in zip(pixels, (RED, (255, 255, 255), (255, 0, 0)), strict=True):
        assert (image - torch.tensor(colour)[:, None, None]).abs().max() < 4


def test_a_cameras_rotation_is_applied(tmp_path: Path) -> None:
    image = picture(40, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "upright.png")
    turned, upright = read_images([tmp_path / "turned.png", tmp_path / "upright.png"], 40)
    assert torch.equal(turned, upright.rot90(-1, (1, 2))) and not torch.equal(turned, upright)


NESTED = ["b.png", "a/z.jpg", "a/a/c.bmp", "a.webp", "é.png", "B.png"]


def test_the_order_of_creation_does_not_matter(tmp_path: Path) -> None:
    first = ImageFolder(folder(tmp_path / "same", NESTED), 16)
    images = first.images(range(len(NESTED)))
    for name in ("notes.txt", ".hidden.png", ".cache/x.png"):  # which are no images of the folder
        (tmp_path / "other" / "same" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / "same" / name).write_text("")
    for name in reversed(sorted(NESTED)):
        (tmp_path / "other" / "same" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "same" / name, tmp_path / "other" / "same" / name)
    second = ImageFolder(tmp_path / "other" / "same", 16)
    assert second.digest == first.digest and second.name == first.name == "same"
    assert torch.equal(second.images(range(len(NESTED))), images)
    assert torch.equal(second.images(np.array([4, 1])), images[[4, 1]])
    assert torch.equal(images[1], read_images([tmp_path / "same" / "a.webp"], 16)[0])  # B.png, a.webp, a/a/c.bmp, ...


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    folder(tmp_path, ["a.png", "b.jpg", "d.jpg"])
    whole = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.png").write_bytes(b"")
    (tmp_path / "e.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    data = ImageFolder(tmp_path, 16)
    assert data.images([0, 3]).shape == (2, 3, 16, 16) and data.images([]).shape == (0, 3, 16, 16)
    for number, name, said in ((1, "b.jpg", "truncated"), (2, "c.png", "is no png"), (4, "e.png", "is no png")):
        with pytest.raises(ProbekitError) as error:
            data.images([0, number, 3])
        assert name in one_line(error) and said in one_line(error).lower()
    (tmp_path / "d.jpg").unlink()
    with pytest.raises(ProbekitError, match=r"d.jpg': cannot be read \(No such file or directory\)"):
        data.images([3])
    for wrong in (-1, 5):
        with pytest.raises(ProbekitError, match="numbers 0 to 4, not"):
            data.images([0, wrong])
        with pytest.raises(ProbekitError, match="numbers 0 to 4, not"):
            data.labels([0, wrong])


def test_folders_that_hold_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ProbekitError, match="nowhere': does not exist"):
        ImageFolder(tmp_path / "nowhere")
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(ProbekitError, match=r"holds no images \(.png, "):
        ImageFolder(tmp_path)
    with pytest.raises(ProbekitError, match=r"file.txt': is no folder"):
        ImageFolder(tmp_path / "file.txt")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ProbekitError, match=r"gone.png': cannot be read"):
        ImageFolder(tmp_path)


def test_linked_folders_count_once(tmp_path: Path) -> None:
    folder(tmp_path / "there", ["a.png"])
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there")
    assert len(ImageFolder(tmp_path / "here")) == 1
    (tmp_path / "there" / "back").symlink_to(tmp_path / "there")
    with pytest.raises(ProbekitError, match="back': is a link to a folder whose images are already here"):
        ImageFolder(tmp_path / "here")


def test_the_split_is_by_name_and_stays_when_images_are_added(tmp_path: Path) -> None:
    def sides() -> tuple[set[str], set[str]]:
        data, names = ImageFolder(tmp_path), sorted(p.name for p in tmp_path.iterdir())
        train, test = data.split("train"), data.split("test")
        assert sorted([*train, *test]) == list(range(len(data)))
        return {names[i] for i in train}, {names[i] for i in test}

    for i in range(600):
        (tmp_path / f"{i}.png").touch()
    train, test = sides()
    assert 0.07 < len(test) / 600 < 0.13
    for i in range(600, 1200):
        (tmp_path / f"{i}.png").touch()
    more_train, more_test = sides()
    assert train < more_train and test < more_test
    with pytest.raises(ProbekitError, match="split 'all': choose train or test"):
        ImageFolder(tmp_path).split("all")


def test_a_side_of_the_split_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    data = ImageFolder(tmp_path)
    empty = "test"
    assert data.split("train").tolist() == [0]
    with pytest.raises(ProbekitError, match=f"none of its 1 images falls in {empty}") as error:
        data.split(empty)
    one_line(error)


def labelled(root: Path, *columns: str, names: Sequence[str] = "abcdef") -> ImageFolder:
    """Images a.png to f.png, and columns of labels written as `name: cell cell ...`, _ for an empty cell."""
    for name in names:
        (root / f"{name}.png").touch()
    cells = {c.partition(": ")[0]: ["" if x == "_" else x for x in c.partition(": ")[2].split()] for c in columns}
    lines = [["file", *cells], *([f"{name}.png", *row] for name, *row in zip(names, *cells.values(), strict=True))]
    (root / "labels.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    return ImageFolder(root, labels=root / "labels.csv")


def test_columns_are_attributes_classes_or_numbers(tmp_path: Path) -> None:
    data = labelled(
        tmp_path,
        "zero: 0 1 1 0 0 1",
        "minus: -1 1 1 -1 -1 1",
        "truth: true FALSE True false False True",
        "yes: Yes no no yes YES No",
        "float: 0.0 1.0 1.0 0.0 1.0 1.0",
        "school: Dada Dada _ Fauve NA Dada",
        "century: 19 19 18 18 _ 19",
        "year: 1907 1912 1888 _ 1850 1911",
        "ratio: 0.5 1e3 -2 NaN 7 7",
        "unknown: _ _ _ _ _ _",
    )
    labels = data.labels(range(6))
    assert labels.dtypes[:5].eq(bool).all()
    assert labels["zero"].tolist() == labels["minus"].tolist() == [False, True, True, False, False, True]
    assert labels["truth"].tolist() == [True, False, True, False, False, True]
    assert labels["yes"].tolist() == [True, False, False, True, True, False]
    assert labels["float"].tolist() == [False, True, True, False, True, True]
    assert labels["school"].dtype == "category" and labels["school"].cat.categories.tolist() == ["Dada", "Fauve"]
    assert labels["school"].isna().tolist() == [False, False, True, False, True, False]
    assert labels["century"].dtype == "category" and labels["century"].cat.categories.tolist() == [18, 19]
    assert labels["century"].isna().sum() == 1
    for name in ("year", "ratio", "unknown"):
        assert labels[name].dtype == float
    assert labels["year"].tolist()[:3] == [1907, 1912, 1888] and np.isnan(labels["year"][3])
    assert labels["ratio"].tolist()[:3] == [0.5, 1000, -2] and np.isnan(labels["ratio"][3])
    some = data.labels([4, 0])
    assert some["yes"].tolist() == [True, True] and some.index.tolist() == [0, 1]
    assert data.labels([]).shape == (0, 10)


def test_labels_follow_their_file_names(tmp_path: Path) -> None:
    data = labelled(tmp_path, "n: 0.1 0.2 0.3 0.4 0.5 0.6")
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\r\n".join([lines[0], *reversed(lines[1:])]) + "\r\n,\r\n\r\n")
    again = ImageFolder(tmp_path, labels=tmp_path / "labels.csv")
    assert again.labels(range(6))["n"].tolist() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert again.digest == data.digest and again.unlabelled == 0


def test_images_without_a_line_are_left_out_and_counted(tmp_path: Path) -> None:
    labelled(tmp_path, "x: 1 0 0 1 0 1")
    edit(tmp_path / "labels.csv", 3, None)
    data = ImageFolder(tmp_path, labels=tmp_path / "labels.csv")
    assert len(data) == 5 and data.unlabelled == 1
    assert data.labels(range(5))["x"].tolist() == [True, False, True, False, True]
    without = ImageFolder(tmp_path)
    assert len(without) == 6 and without.unlabelled == 0 and without.labels([1, 2]).shape == (2, 0)


def test_accents_are_one_name_however_stored(tmp_path: Path) -> None:
    stored, written = (unicodedata.normalize(form, "Dürer") for form in ("NFD", "NFC"))
    assert stored != written
    for name in (stored, "Giotto"):
        (tmp_path / f"{name}.png").touch()
    (tmp_path / "labels.csv").write_text(f"\ufefffile,great\n./{written}.png,yes\nGiotto.png,yes\n", encoding="utf-8")
    assert ImageFolder(tmp_path, labels=tmp_path / "labels.csv").labels([0, 1])["great"].tolist() == [True, True]


def test_the_digest_knows_names_sizes_labels_and_image_size(tmp_path: Path) -> None:
    digests = {labelled(tmp_path, "x: 1 0 0 1 0 1").digest, ImageFolder(tmp_path).digest, ImageFolder(tmp_path, 32).digest}
    digests.add(labelled(tmp_path, "x: 1 0 0 1 0 0").digest)
    digests.add(labelled(tmp_path, "y: 1 0 0 1 0 1").digest)
    (tmp_path / "a.png").write_bytes(b"longer")
    digests.add(ImageFolder(tmp_path).digest)
    (tmp_path / "a.png").rename(tmp_path / "aa.png")
    digests.add(ImageFolder(tmp_path).digest)
    assert len(digests) == 7 and all(len(d) == 12 for d in digests)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,x\na.png,1\nb.png,1,2\n", "line 3: has 3 cells, and the line of column names 2"),
        ('file,x\n"a\n.png",1\nb.png\n', "line 2: 'a\\n.png' is no image"),
        ('file,x\na.png,"1\n2"\nb.png\n', "line 4: has 1 cells"),
        ("file,x\na.png,1\nz.png,1\n", "line 3: 'z.png' is no image in "),
        ("file,x\na.png,1\n\nb.png,1\n./a.png,0\n", "line 5: './a.png' is in line 2 too"),
        ("file;x\na.png;1\n", "line 1: wants different column names with commas between"),
        ("file,x,x\na.png,1,1\n", "line 1: wants different column names"),
        ("file,,x\na.png,1,1\n", "line 1: wants different column names"),
        ("", "line 1: wants different column names"),
        ("file,x\n", "names no images, only columns"),
        ('file,x\na.png,1\nb.png,"1\nc.png,1\n', "line 3: is no csv"),
        (
            "file,x\na.png,yes\nb.png,\nc.png,no\nd.png,NA\n",
            "column 'x': 2 cells of an attribute are empty, the first in line 3",
        ),
        ("file,x\na.png,1\nb.png,2,\n", "line 3: has 3 cells"),
        ("file,x\na.png,1.5\nb.png,2\nc.png,12 cm\n", "column 'x': '12 cm' in line 4 is no number, as most of its cells are"),
        ("file,x\na.png,1.5\nb.png,inf\nc.png,3\n", "column 'x': 'inf' in line 3 is no number"),
    ],
)
def test_mistakes_in_labels_are_named_with_their_line(tmp_path: Path, text: str, said: str) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.png").touch()
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ProbekitError) as error:
        ImageFolder(tmp_path, labels=tmp_path / "labels.csv")
    assert said in one_line(error) and "labels.csv" in one_line(error)


def test_labels_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "labels.csv").write_bytes("file,x\na.png,1\nDürer.png,1\n".encode("latin-1"))
    with pytest.raises(ProbekitError, match=r"labels.csv' line 3: is not UTF-8; save the file as UTF-8"):
        ImageFolder(tmp_path, labels=tmp_path / "labels.csv")
    with pytest.raises(ProbekitError, match=r"other.csv': cannot be read \(No such file or directory\)"):
        ImageFolder(tmp_path, labels=tmp_path / "other.csv")


# load


def test_load_finds_every_kind_of_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    celeba(tmp_path / "faces", [1])
    folder(tmp_path / "art", ["a.png"])
    (tmp_path / "art" / "labels.csv").write_text("file,x\na.png,1\n")
    (tmp_path / "labels,2.csv").write_text("file,y\na.png,1\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_data("avatars", 32), Avatars)
    for spec in ("celeba:faces", "faces", str(tmp_path / "faces")):
        assert isinstance(load_data(spec, 64), CelebA)
    for spec in ("folder:faces", "folder:art", "art", f"folder:{tmp_path / 'art'}"):
        data = load_data(spec, 48)
        assert isinstance(data, ImageFolder) and data.image_size == 48 and data.images([0]).shape == (1, 3, 48, 48)
    assert load_data("folder:art,labels=labels.csv", 8).labels([0]).columns.tolist() == ["x"]
    assert load_data("folder:art,labels=labels,2.csv", 8).labels([0]).columns.tolist() == ["y"]


@pytest.mark.parametrize("spec", ["avatar", "", "celeba:", "folder:", "nowhere/at/all", "folder:art,labels=", "cifar:art"])
def test_load_says_what_there_is(spec: str) -> None:
    with pytest.raises(ProbekitError) as error:
        load_data(spec, 64)
    assert repr(spec) in one_line(error) and "choose avatars, scenes, photos, celeba:PATH, folder:PATH" in one_line(error)


def test_load_refuses_an_image_without_pixels() -> None:
    with pytest.raises(ProbekitError, match="image size 0: choose 1 pixel or more"):
        load_data("avatars", 0)


def test_importing_the_data_sets_does_not_import_torch() -> None:
    subprocess.run([sys.executable, "-c", "import probekit.data, sys; assert 'torch' not in sys.modules"], check=True)


# avatars

# what gives each attribute, told apart from the table that draws them
GIVEN = {
    "Blue_Background": ("background", {"#b6e3f4"}),
    "Pale_Skin": ("skin", {"#ffdbb4"}),
    "Dark_Skin": ("skin", {"#ae5d29", "#614335"}),
    "Bald": ("top", {"none"}),
    "Receding_Hairline": ("top", {"sides"}),
    "Wavy_Hair": ("top", {"shortCurly", "fro", "curvy"}),
    "Long_Hair": ("top", {"dreads", "curvy", "straight02", "bob", "straightAndStrand", "miaWallace"}),
    "Straight_Hair": ("top", {"straight02", "bob", "straightAndStrand", "miaWallace"}),
    "Bangs": ("top", {"straightAndStrand", "miaWallace"}),
    "Wearing_Hat": ("top", {"hat", "winterHat02", "turban"}),
    "Black_Hair": ("hair", {"#2c1b18"}),
    "Brown_Hair": ("hair", {"#724133"}),
    "Blond_Hair": ("hair", {"#d6b370"}),
    "Gray_Hair": ("hair", {"#e8e1e1"}),
    "Red_Hair": ("hair", {"#c93305"}),
    "Arched_Eyebrows": ("eyebrows", {"raisedExcitedNatural"}),
    "Bushy_Eyebrows": ("eyebrows", {"flatNatural"}),
    "Angry_Eyebrows": ("eyebrows", {"angryNatural"}),
    "Narrow_Eyes": ("eyes", {"squint"}),
    "Wide_Eyes": ("eyes", {"surprised"}),
    "Eyes_Closed": ("eyes", {"closed"}),
    "Winking": ("eyes", {"wink"}),
    "Heart_Eyes": ("eyes", {"hearts"}),
    "Smiling": ("mouth", {"smile", "twinkle", "tongue"}),
    "Mouth_Slightly_Open": ("mouth", {"smile", "screamOpen", "tongue"}),
    "Tongue_Out": ("mouth", {"tongue"}),
    "Frowning": ("mouth", {"sad"}),
    "Rosy_Cheeks": ("mouth", {"eating"}),
    "No_Beard": ("beard", {"none", "moustacheMagnum"}),
    "Mustache": ("beard", {"moustacheMagnum"}),
    "Full_Beard": ("beard", {"beardMajestic"}),
    "Eyeglasses": ("accessories", {"prescription02", "round", "sunglasses"}),
    "Sunglasses": ("accessories", {"sunglasses"}),
}
PARTS = [field.name for field in fields(Avatar)]
WITHOUT_HAIR, HATS = {"none", "hat", "winterHat02", "turban"}, {"hat", "winterHat02", "turban"}
# nothing hides anything: three heads of different colours in all their parts
BARE = [
    Avatar("#b6e3f4", "#ffdbb4", "none", "#2c1b18", "#ff5c5c", "flatNatural", "hearts", "serious", "none", "none", "#5199e4"),
    Avatar("#ffd5dc", "#ae5d29", "none", "#d6b370", "#5199e4", "flatNatural", "wink", "eating", "none", "none", "#ffffb1"),
    Avatar("#d8f0c8", "#614335", "none", "#c93305", "#3c4f5c", "angryNatural", "closed", "sad", "none", "none", "#262e33"),
]
draw = cache(Avatar.draw)


@cache
def first_thousand() -> list[Avatar]:
    return [avatar(i) for i in range(1000)]


def differs(one: Avatar, other: Avatar) -> np.ndarray:
    return (draw(one) != draw(other)).any(0)


@cache
def where_drawn(part: str, top: str) -> np.ndarray:
    """The pixels that a part's values change on the bare heads; for hair on heads with this top, which it colours."""
    heads = [replace(head, top=top) for head in BARE] if part == "hair" else BARE
    where = np.zeros((avatars.IMAGE_SIZE,) * 2, dtype=bool)
    for head in heads:
        first, *others = (replace(head, **{part: value}) for value in Avatar.values(part))
        for other in others:
            where |= differs(first, other)
    return where


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of 10 avatars, which are drawn in a moment."""
    monkeypatch.setattr(avatars, "_BLOCK", 10)
    return 10


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, small_blocks: int) -> None:
    asked = [0, 25, 3, 11, 10, 3]  # of three blocks, out of order, one twice
    images = Avatars(cache=tmp_path / "a").images(asked)
    assert images.shape == (6, 3, 32, 32) and images.min() >= -1 and images.max() <= 1
    drawn = np.stack([avatar(i).draw() for i in asked])
    assert torch.equal(images, torch.from_numpy(drawn).float() / 127.5 - 1)
    (file, *_) = sorted((tmp_path / "a").rglob("0000.npz"))
    before = file.read_bytes()
    assert torch.equal(Avatars(cache=tmp_path / "a").images(asked), images)  # from the disk
    Avatars(cache=tmp_path / "b").images([0])
    assert next((tmp_path / "b").rglob("0000.npz")).read_bytes() == before
    other = Avatars(seed=1, cache=tmp_path / "a")
    assert other.digest != Avatars().digest == Avatars(cache=tmp_path).digest != Avatars(64).digest
    assert not torch.equal(other.images(asked), images)


def test_labels_are_exact() -> None:
    assert set(GIVEN) == set(ATTRIBUTES)
    for shown in first_thousand():
        hidden = {"hair"} if shown.top in WITHOUT_HAIR else set()
        hidden |= {"eyes"} if shown.accessories == "sunglasses" else set()
        expected = {a for a, (part, values) in GIVEN.items() if part not in hidden and getattr(shown, part) in values}
        assert shown.attributes == expected


def test_every_attribute_comes_and_goes() -> None:
    often = np.mean([[a in shown.attributes for a in ATTRIBUTES] for shown in first_thousand()], axis=0)
    assert (often > 0.02).all() and (often < 0.9).all()


def test_the_data_sets_labels_are_the_avatars(tmp_path: Path, small_blocks: int) -> None:
    labels = Avatars(cache=tmp_path).labels(range(15))
    assert labels.columns.tolist() == list(ATTRIBUTES) and labels.dtypes.eq(bool).all()
    for i, row in enumerate(labels.to_dict("records")):
        assert {name for name, there in row.items() if there} == avatar(i).attributes


def test_hidden_parts_change_no_pixel_and_shown_ones_do() -> None:
    for head, top in itertools.product(BARE, Avatar.values("top")):
        head = replace(head, top=top)
        hair = next(v for v in Avatar.values("hair") if v != head.hair)
        hat = next(v for v in Avatar.values("hat") if v != head.hat)
        assert differs(head, replace(head, hair=hair)).any() == (top not in WITHOUT_HAIR), top
        assert differs(head, replace(head, hat=hat)).any() == (top in HATS), top
    for head, glasses in itertools.product(BARE, Avatar.values("accessories")):
        head = replace(head, accessories=glasses)
        for eyes in set(Avatar.values("eyes")) - {head.eyes}:
            assert differs(head, replace(head, eyes=eyes)).any() == (glasses != "sunglasses")


@pytest.mark.parametrize(
    ("part", "over"),
    [
        ("eyebrows", [{"top": t, "accessories": a} for t in ("miaWallace", "turban", "none") for a in ("none", "sunglasses")]),
        ("mouth", [{"beard": b} for b in ("moustacheMagnum", "beardLight", "beardMajestic")]),
        ("beard", [{"top": t} for t in ("straight02", "dreads", "turban")]),
        ("skin", [{"top": t, "beard": "beardMajestic", "accessories": "sunglasses"} for t in ("miaWallace", "turban")]),
        ("background", [{"top": "dreads"}, {"top": "turban"}]),
    ],
)
def test_no_value_looks_like_another_behind_what_lies_over_it(part: str, over: list[dict[str, str]]) -> None:
    for head, changes in itertools.product(BARE, over):
        shown = [replace(head, **changes, **{part: value}) for value in Avatar.values(part)]
        assert all(differs(one, other).any() for one, other in itertools.combinations(shown, 2)), changes


def test_a_face_s_parts_are_drawn_in_their_places() -> None:
    for part in ("eyebrows", "eyes", "mouth", "beard", "accessories", "shirt"):
        assert 0 < where_drawn(part, "none").mean() < 0.3, part
    eyes, mouth = (np.argwhere(where_drawn(part, "none")) for part in ("eyes", "mouth"))
    assert eyes[:, 0].mean() < mouth[:, 0].mean()
    assert where_drawn("background", "none")[0].all()


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_counterfactuals_differ_in_one_part_one_attribute_and_where_it_is_drawn(attribute: str) -> None:
    for index in (0, 7, 20_500):
        without, having = counterfactual(index, attribute)
        assert having.attributes - without.attributes == {attribute} and without.attributes <= having.attributes
        (part,) = (p for p in PARTS if getattr(without, p) != getattr(having, p))
        assert part == GIVEN[attribute][0]
        original = avatar(index)
        assert min(sum(getattr(a, p) != getattr(original, p) for p in PARTS) for a in (without, having)) <= 2
        changed = differs(without, having)
        assert changed.any()
        assert not (changed & ~where_drawn(part, having.top)).any()


def test_counterfactuals_of_no_attribute_are_refused() -> None:
    with pytest.raises(ProbekitError, match="attribute 'Young': choose from Blue_Background"):
        counterfactual(0, "Young")
    with pytest.raises(ProbekitError, match="avatar top 'wig': choose one of none"):
        replace(BARE[0], top="wig")


def damaged(block: bytes, how: str) -> bytes:
    with ZipFile(io.BytesIO(block)) as archive:
        first = archive.infolist()[0]
    # the file's header: 30 bytes, the name and an extra field
    start = first.header_offset + 30 + int.from_bytes(block[26:28], "little") + int.from_bytes(block[28:30], "little")
    middle = len(block) // 3
    return {
        "empty": b"",
        "cut short": block[: len(block) // 2],
        "end missing": block[:-1],
        "no archive": b"not an archive" * 10,
        "other bytes inside": block[:middle] + bytes(200) + block[middle + 200 :],
        "no stream": block[:start] + b"\xff" + block[start + 1 :],  # deflate has no block of this type
    }[how]


@pytest.mark.parametrize("how", ["empty", "cut short", "end missing", "no archive", "other bytes inside", "no stream"])
def test_a_damaged_block_is_drawn_again(tmp_path: Path, small_blocks: int, how: str) -> None:
    first = Avatars(cache=tmp_path)
    images, labels = first.images(range(small_blocks)), first.labels(range(small_blocks))
    (file,) = tmp_path.rglob("*.npz")
    whole = file.read_bytes()
    file.write_bytes(damaged(whole, how))
    again = Avatars(cache=tmp_path)
    assert torch.equal(again.images(range(small_blocks)), images)
    pd.testing.assert_frame_equal(again.labels(range(small_blocks)), labels)
    assert file.read_bytes() == whole


def test_avatars_that_are_not_there_are_refused(tmp_path: Path) -> None:
    data = Avatars(cache=tmp_path)
    for wrong in ([-1], [0, len(data)]):
        for ask in (data.images, data.labels):
            with pytest.raises(ProbekitError, match=f"avatars: numbers 0 to {len(data) - 1}, not"):
                ask(wrong)
    assert not list(tmp_path.iterdir())  # nothing was drawn for it


def test_no_indices_give_no_rows(tmp_path: Path) -> None:
    data = Avatars(cache=tmp_path)
    assert data.images([]).shape == (0, 3, 32, 32)
    assert data.labels([]).shape == (0, len(ATTRIBUTES))


def test_avatars_are_for_training_or_for_testing() -> None:
    data = Avatars()
    train, test = data.split("train"), data.split("test")
    assert not set(train) & set(test) and len(train) + len(test) == len(data)
    with pytest.raises(ProbekitError, match="split 'valid': choose train or test"):
        data.split("valid")

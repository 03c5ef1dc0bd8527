from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from probekit.data import load_data, photos
from probekit.data.photos import PHOTOGRAPHS, SIDES, TEST, TRAIN, Patch, Photograph, Photos, read
from probekit.hooks.errors import ProbekitError

SOME = [5, 100_003, 0, 99_999, 5]  # of both parts, out of order, one twice


def one_line(error: pytest.ExceptionInfo[ProbekitError]) -> str:
    said = str(error.value)
    assert "\n" not in said and len(said) < 400
    return said


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `carries` whose one picture is all the photographs there are; gives its file."""
    folder = tmp_path / "carries"
    folder.mkdir()
    (folder / "__init__.py").touch()
    pixels = np.random.default_rng(0).integers(0, 256, (200, 500, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "noise.png")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(photos, "PHOTOGRAPHS", (Photograph("noise", "carries", "noise.png", "nobody", "none", "here"),))
    read.cache_clear()
    return folder / "noise.png"


@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=lambda p: p.name)
def test_a_photograph_is_in_its_wheel_in_colour_with_its_licence(photograph: Photograph) -> None:
    shipped = files({"skimage": "scikit-image", "sklearn": "scikit-learn"}[photograph.package])
    assert shipped is not None and f"{photograph.package}/{photograph.file}" in {file.as_posix() for file in shipped}
    _, pixels = read(photograph)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and min(pixels.shape[:2]) >= 300
    assert (pixels.std(2) > 5).mean() > 0.3  # grey has one value for red, green and blue
    assert photograph.author and photograph.source
    assert any(word in photograph.licence for word in ("CC0", "CC BY", "public domain"))


def test_the_names_of_photographs_differ() -> None:
    assert len({p.name for p in PHOTOGRAPHS}) == len({p.file for p in PHOTOGRAPHS}) == len(PHOTOGRAPHS)


def test_a_number_stands_for_the_same_patch_for_ever() -> None:
    # what photo-ddpm was trained on
    assert Photos().patch(0) == Patch(picture=5, left=419, top=108, side=74, mirrored=False)
    assert Photos().patch(99_999) == Patch(picture=0, left=378, top=57, side=89, mirrored=True)
    assert Photos().patch(100_000) == Patch(picture=0, left=14, top=306, side=73, mirrored=False)


def test_a_patch_follows_from_its_number_alone() -> None:
    images = Photos().images(SOME)
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.float32 and images.is_contiguous()
    assert torch.equal(images[0], images[4]) and not torch.equal(images[0], images[1])
    for image, number in zip(images, SOME, strict=True):
        assert torch.equal(image, Photos().images([number])[0])
    assert [Photos(64).patch(i) for i in SOME] == [Photos().patch(i) for i in SOME]
    assert [Photos(seed=1).patch(i) for i in SOME] != [Photos().patch(i) for i in SOME]


def test_another_process_cuts_the_same_patches() -> None:
    code = "from probekit.data.photos import Photos as P; print(P().digest, P().images([5, 100_003]).double().sum().item())"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert said == [Photos().digest, str(Photos().images([5, 100_003]).double().sum().item())]


@pytest.mark.parametrize("size", [16, 32, 64])
def test_a_patch_is_a_square_of_its_photograph_made_smaller(size: int) -> None:
    data = Photos(size)
    assert {data.patch(i).mirrored for i in range(20)} == {False, True}
    for i in range(20):
        patch = data.patch(i)
        whole = Image.open(PHOTOGRAPHS[patch.picture].path()).convert("RGB")
        cut = whole.crop((patch.left, patch.top, patch.left + patch.side, patch.top + patch.side))
        small = np.array(cut.resize((size, size), Image.Resampling.BILINEAR))
        expected = torch.from_numpy(small.copy()).permute(2, 0, 1) / 127.5 - 1
        assert torch.equal(data.images([i])[0], expected.flip(2) if patch.mirrored else expected)


def test_patches_are_pictures_in_their_range() -> None:
    images = Photos().images(range(600))
    assert images.min() >= -1 and images.max() <= 1
    assert images.min() < -0.95 and images.max() > 0.95  # black and white are there
    # most show something
    assert images.std((2, 3)).mean(1).median() > 0.15


def test_no_training_patch_touches_what_a_test_patch_shows() -> None:
    data = Photos()
    shown = {
        part: [np.zeros(read(photograph)[1].shape[:2], dtype=bool) for photograph in PHOTOGRAPHS] for part in ("train", "test")
    }
    for part, masks in shown.items():
        for number in data.split(part)[:3000]:
            patch = data.patch(int(number))
            area = masks[patch.picture][patch.top : patch.top + patch.side, patch.left : patch.left + patch.side]
            assert area.shape == (patch.side, patch.side)  # all of it is inside
            area[:] = True
    for train, test in zip(*shown.values(), strict=True):
        assert not (train & test).any()
        # between them they show nearly all; corners come seldom
        assert train.mean() > 0.7 and test.mean() > 0.2
        left, right = np.flatnonzero(test.any(0)).max(), np.flatnonzero(train.any(0)).min()
        assert left < right


def test_what_lies_beside_a_patch_does_not_shine_through(monkeypatch: pytest.MonkeyPatch) -> None:
    data, number = Photos(), 3
    before, patch = data.images([number]), data.patch(number)
    changed = read(PHOTOGRAPHS[patch.picture])[1] ^ 255
    square = np.s_[patch.top : patch.top + patch.side, patch.left : patch.left + patch.side]
    changed[square] ^= 255
    monkeypatch.setattr(photos, "read", lambda photograph: (b"", changed))
    assert torch.equal(data.images([number]), before)


@pytest.mark.slow
def test_every_photograph_and_scale_comes_about_as_often() -> None:
    patches = [Photos().patch(i) for i in range(3000)]
    often = np.bincount([p.picture for p in patches]) / 3000
    assert len(often) == len(PHOTOGRAPHS) and np.abs(often - 1 / len(PHOTOGRAPHS)).max() < 0.03
    assert abs(np.mean([p.mirrored for p in patches]) - 0.5) < 0.05
    sides = np.array([p.side for p in patches])
    assert sides.min() == SIDES[0] and sides.max() == SIDES[1]
    # the logarithm is uniform: as many below the geometric mean as above
    assert abs((sides < np.sqrt(SIDES[0] * SIDES[1])).mean() - 0.5) < 0.05


def test_labels_say_which_photograph_and_how_much_of_it() -> None:
    labels = Photos().labels(SOME)
    assert labels.columns.tolist() == ["picture", "side"]
    assert labels.picture.cat.categories.tolist() == [p.name for p in PHOTOGRAPHS] and labels.side.dtype == float
    for row, number in zip(labels.itertuples(), SOME, strict=True):
        patch = Photos().patch(number)
        assert (row.picture, row.side) == (PHOTOGRAPHS[patch.picture].name, patch.side)


def test_the_digest_changes_with_what_the_pictures_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = Photos().digest
    assert len(digest) == 12 and int(digest, 16) >= 0 and digest == Photos().digest
    changed = {Photos(64).digest, Photos(seed=1).digest}
    with monkeypatch.context() as patched:
        patched.setattr(photos, "SIDES", (40, 112))
        changed.add(Photos().digest)
    with monkeypatch.context() as patched:
        patched.setattr(photos, "PHOTOGRAPHS", PHOTOGRAPHS[::-1])
        changed.add(Photos().digest)
    with monkeypatch.context() as patched:  # another file under the same name
        patched.setattr(photos, "read", lambda photograph: (photograph.name.encode(), read(photograph)[1]))
        changed.add(Photos().digest)
    assert len(changed | {digest}) == 6


def test_patches_are_for_training_or_for_testing() -> None:
    data = Photos()
    train, test = data.split("train"), data.split("test")
    assert len(train) == TRAIN and len(test) == TEST and not set(train) & set(test) and len(train) + len(test) == len(data)
    with pytest.raises(ProbekitError, match="split 'valid': choose train or test"):
        data.split("valid")


def test_patches_that_are_not_there_are_refused() -> None:
    data = Photos()
    for wrong in ([-1], [0, len(data)]):
        for ask in (data.images, data.labels):
            with pytest.raises(ProbekitError, match=f"photos: numbers 0 to {len(data) - 1}, not") as error:
                ask(wrong)
            one_line(error)


def test_no_indices_give_no_rows() -> None:
    data = Photos()
    assert data.images([]).shape == (0, 3, 32, 32) and data.labels([]).shape == (0, 2)


def test_load_finds_photos() -> None:
    data = load_data("photos", 24)
    assert isinstance(data, Photos) and data.name == "photos" and data.images([0]).shape == (1, 3, 24, 24)


def test_a_package_s_picture_is_cut_up(carried: Path) -> None:
    assert Photos().images(SOME).shape == (5, 3, 32, 32)


def test_a_photograph_that_is_not_there_is_named_in_one_line(carried: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carried.unlink()
    with pytest.raises(ProbekitError, match=r"noise.png': is not there; PyPI's wheels of carries carry it") as error:
        Photos()
    one_line(error)
    monkeypatch.setattr(photos, "PHOTOGRAPHS", (replace(PHOTOGRAPHS[0], package="no_such_package"),))
    with pytest.raises(ProbekitError, match="photograph 'astronaut': its package no_such_package is not installed") as error:
        Photos()
    one_line(error)


@pytest.mark.parametrize("how", ["empty", "cut short", "no picture", "other bytes inside"])
def test_a_damaged_photograph_is_named_in_one_line(carried: Path, how: str) -> None:
    whole = carried.read_bytes()
    middle = len(whole) // 3
    carried.write_bytes({
        "empty": b"", "cut short": whole[: len(whole) // 2], "no picture": b"hello\nthere" * 20,
        "other bytes inside": whole[:middle] + bytes(200) + whole[middle + 200 :],
    }[how])  # fmt: skip
    with pytest.raises(ProbekitError, match=r"noise.png': cannot be read \(") as error:
        Photos()
    one_line(error)

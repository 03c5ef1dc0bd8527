from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from probekit import ProbekitError
from probekit.data import load_data
from probekit.data.scenes import (
    COLOURS,
    FACTORS,
    KINDS,
    PLACES,
    VALUES,
    Scene,
    Scenes,
    all_scenes,
    controlled_pair,
    labels,
    render,
    sample_scenes,
    split,
)
from probekit.images import save_png

FISH = Scene("top left", "large", "fish", "red", "blue", "plain")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_caption_is_distinct_and_reads_back_as_its_scene() -> None:
    scenes = all_scenes()
    assert len(scenes) == 9 * 2 * 10 * 8 * 7 * 3
    assert len({s.caption for s in scenes}) == len(scenes)
    assert all(Scene.parse(s.caption) == s for s in scenes)


def test_what_is_no_scene_is_refused() -> None:
    with pytest.raises(ProbekitError, match="choose one of circle"):
        Scene("top", "large", "dragon", "red", "blue", "plain")
    with pytest.raises(ProbekitError, match="equals the ground"):
        Scene("top", "large", "fish", "red", "red", "plain")
    with pytest.raises(ProbekitError, match="is no scene"):
        Scene.parse("an astronaut riding a horse")


def test_the_split_shares_nothing_and_leaves_nothing_out() -> None:
    train, held_out = split(held_out=False), split(held_out=True)
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == len(all_scenes())


@pytest.mark.parametrize("factor", FACTORS)
def test_controlled_pairs_differ_in_all_of_one_factor_and_nothing_else(factor: str) -> None:
    for seed in range(50):
        original, edit = controlled_pair(factor, seeded(seed))
        differ = {a for a in VALUES if getattr(original, a) != getattr(edit, a)}
        assert differ == set(FACTORS[factor])


def test_pictures_are_in_range_and_the_same_for_the_same_seed() -> None:
    scenes = list(all_scenes()[::997])
    images = render(scenes, seeded())
    assert images.shape == (len(scenes), 3, 64, 64)
    assert images.min() >= -1 and images.max() <= 1
    assert torch.equal(images, render(scenes, seeded()))
    assert not torch.equal(images, render(scenes, seeded(1)))
    assert render(scenes, seeded(), image_size=128).shape[-1] == 128


def test_every_kind_stands_at_its_place_in_its_colour() -> None:
    for kind in KINDS:
        for place, centre in PLACES.items():
            image = render([Scene(place, "large", kind, "red", "blue", "plain")], seeded())[0]
            red = torch.tensor(COLOURS["red"])[:, None, None] / 127.5 - 1
            drawn = (image - red).abs().sum(0) < 0.05
            assert drawn.any(), kind
            y, x = drawn.nonzero().float().mean(0).tolist()
            # a moon's and a fish's middle of mass is not their centre
            assert abs(x + 0.5 - centre[0]) < 6 and abs(y + 0.5 - centre[1]) < 4.5, (kind, place)


def test_pictures_that_differ_in_one_attribute_differ_only_where_it_is_drawn() -> None:
    plain, striped = render([FISH], seeded()), render([Scene("top left", "large", "fish", "red", "blue", "striped")], seeded())
    differs = ((plain - striped).abs() > 1e-5).any(1)[0]
    assert differs.any()
    assert not differs[10:18, 8:14].any()  # inside the fish


def test_labels_index_the_values() -> None:
    found = labels([FISH])
    assert {a: VALUES[a][int(i)] for a, i in found.items()} == {a: getattr(FISH, a) for a in VALUES}


# --- as a data set -----------------------------------------------------------------------------------------------------


def test_the_data_set_s_test_split_is_what_mini_sd_never_saw() -> None:
    data = load_data("scenes", 64)
    assert isinstance(data, Scenes) and len(data) == len(all_scenes()) and data.image_size == 64
    train, test = data.split("train"), data.split("test")
    assert sorted([*train, *test]) == list(range(len(data))) and len(test) == len(data) // 10
    pool = all_scenes()
    assert [pool[i] for i in test] == list(split(held_out=True))
    trained_on = set(split(held_out=False)) | set(sample_scenes(2000, seeded()))
    assert not trained_on & {pool[i] for i in test}
    with pytest.raises(ProbekitError, match="split 'valid': choose train or test"):
        data.split("valid")


def test_captions_say_what_the_labels_say() -> None:
    data = Scenes()
    index = np.concatenate([data.split("test")[:200], data.split("train")[:200]])
    captions, told = data.captions(index), data.labels(index)
    assert list(told.columns) == list(VALUES) and len(captions) == len(told) == 400
    for caption, (_, row) in zip(captions, told.iterrows(), strict=True):
        assert {a: getattr(Scene.parse(caption), a) for a in VALUES} == dict(row)
    assert all(tuple(told[a].cat.categories) == VALUES[a] for a in VALUES)


@pytest.mark.parametrize("size", [64, 32])
def test_a_scene_s_picture_is_the_same_in_every_call_and_batch(size: int) -> None:
    data, index = Scenes(size), [7, 29_999, 0, 12_345, 7]
    images = data.images(index)
    assert images.shape == (5, 3, size, size) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1
    assert torch.equal(images, Scenes(size).images(np.array(index)))
    assert torch.equal(images, torch.cat([data.images([i]) for i in index]))
    assert torch.equal(images[0], images[4]) and not torch.equal(images[0], images[1])
    assert data.images([]).shape == (0, 3, size, size) and data.captions([]) == []
    other = Scenes(size, seed=1)
    assert not torch.equal(other.images([7]), images[:1]) and other.captions([7]) == data.captions([7])
    assert len({data.digest, other.digest, Scenes(size + 1).digest}) == 3


def test_a_scene_that_is_not_there_is_refused() -> None:
    for wanted in ([30_240], [-1]):
        with pytest.raises(ProbekitError, match="scenes: numbers 0 to 30239"):
            Scenes().images(wanted)


def test_a_folder_of_pictures_with_captions_is_as_good(tmp_path: Path) -> None:
    scenes = Scenes(16)
    for i, image in enumerate(scenes.images(range(4))):
        save_png(image, tmp_path / f"{i}.png")
    lines = [f'{i}.png,"{caption}, drawn",{i}' for i, caption in enumerate(scenes.captions(range(3)))]
    (tmp_path / "told.csv").write_text("\n".join(["file,caption,number", *lines, "3.png,,9"]))
    data = load_data(f"folder:{tmp_path},labels=told.csv", 16)
    assert data.captions([2, 0]) == [f"{caption}, drawn" for caption in scenes.captions([2, 0])]
    assert list(data.labels([0, 1, 2, 3]).columns) == ["number"]
    assert (data.images([1]) - scenes.images([1])).abs().max() < 0.01
    with pytest.raises(ProbekitError, match=r"image '3\.png' has an empty caption; write one, or delete its line") as error:
        data.captions([1, 3])
    assert "\n" not in str(error.value)
    (tmp_path / "other.csv").write_text("\n".join(["file,caption,number", *lines]).replace("drawn", "painted"))
    assert load_data(f"folder:{tmp_path},labels=other.csv", 16).digest != data.digest


@pytest.mark.parametrize("spec", ["avatars", "folder"])
def test_data_without_captions_says_who_has_some(spec: str, tmp_path: Path) -> None:
    save_png(torch.zeros(3, 8, 8), tmp_path / "a.png")
    data = load_data(spec if spec == "avatars" else f"folder:{tmp_path}", 8)
    with pytest.raises(ProbekitError, match="has no captions; scenes have, and a folder whose csv file has") as error:
        data.captions([0])
    assert "\n" not in str(error.value)

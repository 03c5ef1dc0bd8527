from __future__ import annotations

import pytest
import torch

from probekit import ProbekitError
from probekit.data.scenes import (
    COLOURS,
    FACTORS,
    KINDS,
    PLACES,
    VALUES,
    Scene,
    all_scenes,
    controlled_pair,
    labels,
    render,
    split,
)

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

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from probekit.hooks.errors import ProbekitError
from probekit.latents import LatentSpace
from probekit.latents.store import BLOCK, LatentStore


class Ramp:
    """A data set of 250 images, each of one grey level, with one label."""

    name, image_size, digest = "ramp", 4, "0123456789ab"

    def __len__(self) -> int:
        return 250

    def split(self, part: str) -> np.ndarray:
        return np.arange(250)

    def images(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        return (torch.as_tensor(np.asarray(indices)) / 250).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()

    def labels(self, indices: Sequence[int] | np.ndarray) -> pd.DataFrame:
        return pd.DataFrame({"Even": np.asarray(indices) % 2 == 0})


def noisy(calls: list[int] | None = None) -> LatentSpace:
    """A space that draws noise, and notes how many images it was given."""

    def encode(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if calls is not None:
            calls.append(len(images))
        return images[:, :2] + torch.randn(len(images), 2, 4, 4, generator=generator)

    return LatentSpace("noisy", "z", (2, 4, 4), "for tests", encode)


def test_latents_depend_neither_on_order_nor_on_what_was_asked_for(tmp_path: Path) -> None:
    whole = LatentStore(tmp_path / "a", noisy(), "d", Ramp())
    whole.encode(range(250))
    parts = LatentStore(tmp_path / "b", noisy(), "d", Ramp())
    parts.encode([249])
    parts.encode([120, 3])
    some = [3, 249, 120, 3]
    assert np.array_equal(whole.read(some), parts.read(some)) and whole.read(some).shape == (4, 32)
    assert whole.encoded.tolist() == list(range(250))


def test_nothing_is_encoded_twice_and_a_run_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    calls: list[int] = []
    store = LatentStore(tmp_path / "a", noisy(calls), "d", Ramp())
    seen: list[int] = []

    def cut(images: int) -> None:
        seen.append(images)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.encode(range(250), cut)
    assert calls == [BLOCK, BLOCK]
    again = LatentStore(tmp_path / "a", noisy(calls), "d", Ramp())
    again.encode(range(250))
    assert calls == [BLOCK, BLOCK, 50]
    fresh = LatentStore(tmp_path / "b", noisy(), "d", Ramp())
    fresh.encode(range(250))
    assert np.array_equal(again.read(range(250)), fresh.read(range(250)))


def test_labels_lie_beside_the_latents(tmp_path: Path) -> None:
    LatentStore(tmp_path / "a", noisy(), "d", Ramp()).encode([210])
    (file,) = (tmp_path / "a" / "labels").glob("*.parquet")
    labels = pd.read_parquet(file)
    assert labels.image.tolist() == list(range(200, 250)) and (labels.Even == (labels.image % 2 == 0)).all()


def test_what_is_not_encoded_damaged_or_of_something_else_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    store = LatentStore(folder, noisy(), "d", Ramp())
    store.encode([5])
    with pytest.raises(ProbekitError, match="image 150 is not encoded"):
        store.read([5, 150])
    with pytest.raises(ProbekitError, match="model_digest 'd' there, 'e' here"):
        LatentStore(folder, noisy(), "e", Ramp())
    (chunk,) = [p for p in (folder / "latents" / "c").rglob("*") if p.is_file()]
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(ProbekitError, match="damaged"):
        LatentStore(folder, noisy(), "d", Ramp()).read([5])
    (folder / "provenance.json").write_text("{")
    with pytest.raises(ProbekitError, match=r"provenance\.json"):
        LatentStore(folder, noisy(), "d", Ramp())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ProbekitError, match="holds no latents"):
        LatentStore(tmp_path / "mine", noisy(), "d", Ramp())


def test_latents_that_are_not_finite_are_refused_with_the_spaces_name(tmp_path: Path) -> None:
    broken = LatentSpace("broken", "z", (1,), "for tests", lambda images, _: images[:, 0, 0, :1] / 0)
    store = LatentStore(tmp_path / "a", broken, "d", Ramp())
    with pytest.raises(ProbekitError, match="broken:z"):
        store.encode([1])
    assert store.encoded.size == 0

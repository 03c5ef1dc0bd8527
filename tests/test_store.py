from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from diffusers import DDIMScheduler, DDPMPipeline

from probekit import ProbekitError
from probekit.latents import LatentSpace
from probekit.latents.store import BLOCK, LatentStore, default_folder
from probekit.models import load_space
from probekit.models.families import text_to_image
from tests.conftest import tiny


class Ramp:
    """A data set of 250 images, each of one grey level, with one label and a caption."""

    name, image_size, digest = "ramp", 4, "0123456789ab"

    def __len__(self) -> int:
        return 250

    def split(self, part: str) -> np.ndarray:
        return np.arange(250)

    def images(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        return (torch.as_tensor(np.asarray(indices)) / 250).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        return [f"grey {number}" for number in indices]

    def labels(self, indices: Sequence[int] | np.ndarray) -> pd.DataFrame:
        return pd.DataFrame({"Even": np.asarray(indices) % 2 == 0})


def noisy(calls: list[int] | None = None, weights: str = "d") -> LatentSpace:
    """A space that draws noise, and notes how many images it was given."""

    def encode(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if calls is not None:
            calls.append(len(images))
        return images[:, :2] + torch.randn(len(images), 2, 4, 4, generator=generator)

    return LatentSpace("z", (2, 4, 4), "for tests", encode, model="noisy", weights=lambda: weights)


# --- what a space's latents depend on ----------------------------------------------------------------------------------


@pytest.fixture
def ddpm(tmp_path: Path) -> Path:
    DDPMPipeline(tiny(), DDIMScheduler()).save_pretrained(tmp_path / "ddpm")
    return tmp_path / "ddpm"


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def other_weights(folder: Path) -> None:
    unet = tiny()
    unet.conv_out.bias.data += 1e-3
    unet.save_pretrained(folder / "unet")


@pytest.mark.parametrize("space", ["inverted", "noised", "h", "noise"])
@pytest.mark.parametrize(
    "change",
    [
        other_weights,
        lambda folder: edited(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction"),
        lambda folder: edited(folder / "scheduler" / "scheduler_config.json", beta_end=0.03),
        lambda folder: edited(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=900),
        lambda folder: edited(folder / "unet" / "config.json", act_fn="gelu"),
    ],
    ids=["weights", "prediction type", "noise levels", "timesteps", "what leaves no trace in weights"],
)
def test_a_change_of_the_model_changes_what_its_latents_are_kept_under(
    ddpm: Path, space: str, change: Callable[[Path], None]
) -> None:
    before = load_space(f"{ddpm}:{space}", device="cpu")
    change(ddpm)
    after = load_space(f"{ddpm}:{space}", device="cpu")
    assert after.digest != before.digest
    assert default_folder(after, Ramp()) != default_folder(before, Ramp())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("inverted", "inverted:steps=20"),
        ("inverted", "inverted:method=fixed-point"),
        ("noised", "noised:t=300"),
        ("noised", "noised:steps=20"),
        ("h", "h:t=300"),
        ("h", "h:layer=down_blocks.0"),
        ("h:layer=conv_in:stream=main", "h:layer=conv_in:stream=skip"),
        ("h", "h:steps=20"),
        ("h", "h:seed=1"),
        ("noise", "noise:steps=20"),
        ("noised", "inverted"),
    ],
)
def test_every_parameter_of_a_space_changes_what_its_latents_are_kept_under(ddpm: Path, one: str, other: str) -> None:
    spaces = [load_space(f"{ddpm}:{spec}", device="cpu") for spec in (one, other)]
    assert spaces[0].digest != spaces[1].digest


@pytest.mark.parametrize("space", ["inverted", "noised", "h:layer=mid_block:t=499"])
def test_renaming_and_moving_a_model_changes_nothing(ddpm: Path, tmp_path: Path, space: str) -> None:
    before = load_space(f"{ddpm}:{space}", device="cpu")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(ddpm, tmp_path / "elsewhere" / "another name")
    after = load_space(f"{tmp_path / 'elsewhere' / 'another name'}:{space}", device="cpu")
    assert after.digest == before.digest and str(after) != str(before)


@pytest.mark.parametrize("space", ["inverted", "noised", "h"])
def test_the_caption_and_the_guidance_of_a_model_change_what_its_latents_are_kept_under(tiny_sd: Any, space: str) -> None:
    model = text_to_image.as_model(tiny_sd, "tiny")
    under = [model, *(model.conditioned(**told) for told in ({"prompt": "a dog"}, {"guidance": 3.0}, {"prompt": "a fish"}))]
    assert len({each.space(space).digest for each in under}) == 4


@pytest.mark.parametrize("space", ["code", "inverted", "h"])
def test_how_an_autoencoder_scales_its_code_changes_what_latents_are_kept_under(
    tiny_sd: Any, tmp_path: Path, space: str
) -> None:
    tiny_sd.save_pretrained(tmp_path / "sd")
    before = load_space(f"{tmp_path / 'sd'}:{space}", device="cpu")
    edited(tmp_path / "sd" / "vae" / "config.json", scaling_factor=0.5)
    assert load_space(f"{tmp_path / 'sd'}:{space}", device="cpu").digest != before.digest


@pytest.mark.parametrize("space", ["text", "text-eos"])
def test_captions_latents_depend_on_what_they_are_painted_with(tiny_sd: Any, space: str) -> None:
    model = text_to_image.as_model(tiny_sd, "tiny")
    spaces = [
        model.space(space),
        model.space(space, seed=1),
        model.space(space, steps=3),
        model.conditioned(guidance=3.0).space(space),
    ]
    assert len({each.digest for each in spaces}) == 4


# --- the store ---------------------------------------------------------------------------------------------------------


def test_latents_depend_neither_on_order_nor_on_what_was_asked_for(tmp_path: Path) -> None:
    whole = LatentStore(tmp_path / "a", noisy(), Ramp())
    whole.encode(range(250))
    parts = LatentStore(tmp_path / "b", noisy(), Ramp())
    parts.encode([249])
    parts.encode([120, 3])
    some = [3, 249, 120, 3]
    assert np.array_equal(whole.read(some), parts.read(some)) and whole.read(some).shape == (4, 32)
    assert whole.encoded.tolist() == list(range(250))


def test_nothing_is_encoded_twice_and_a_run_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    calls: list[int] = []
    store = LatentStore(tmp_path / "a", noisy(calls), Ramp())
    seen: list[int] = []

    def cut(images: int) -> None:
        seen.append(images)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.encode(range(250), cut)
    assert len(calls) == 2
    again = LatentStore(tmp_path / "a", noisy(calls), Ramp())
    again.encode(range(250))
    assert sorted(calls) == [50, BLOCK, BLOCK]
    fresh = LatentStore(tmp_path / "b", noisy(), Ramp())
    fresh.encode(range(250))
    assert np.array_equal(again.read(range(250)), fresh.read(range(250)))


def test_labels_lie_beside_the_latents(tmp_path: Path) -> None:
    LatentStore(tmp_path / "a", noisy(), Ramp()).encode([210])
    (file,) = (tmp_path / "a" / "labels").glob("*.parquet")
    labels = pd.read_parquet(file)
    assert labels.image.tolist() == list(range(200, 250)) and (labels.Even == (labels.image % 2 == 0)).all()


def test_a_space_of_captions_encodes_the_captions(tmp_path: Path) -> None:
    def encode(captions: Sequence[str], generator: torch.Generator) -> torch.Tensor:
        return torch.tensor([[float(caption.split()[1])] for caption in captions])

    store = LatentStore(tmp_path / "a", replace(noisy(), shape=(1,), encoder=encode, takes="captions"), Ramp())
    store.encode([3, 120])
    assert store.read([120, 3]).tolist() == [[120], [3]]


def test_the_images_of_a_split_are_encoded_without_those_of_the_other(tmp_path: Path) -> None:
    """However they are numbered."""

    class Scattered(Ramp):
        order = np.random.default_rng(0).permutation(250)

        def split(self, part: str) -> np.ndarray:
            return self.order[:50] if part == "test" else self.order[50:240]

    calls: list[int] = []
    data = Scattered()
    store = LatentStore(tmp_path / "a", noisy(calls), data)
    store.encode(data.split("test"))
    assert sum(calls) <= 150 and set(data.split("test")) <= set(store.encoded)
    store.encode(range(250))
    assert sum(calls) == 250 and store.encoded.tolist() == list(range(250))
    kept = pd.concat(map(pd.read_parquet, sorted((tmp_path / "a" / "labels").iterdir())))
    assert kept.image.tolist() == [*data.order[50:240], *data.order[:50], *sorted(data.order[240:])]
    assert np.array_equal(store.read(kept.image), zarr.open_array(tmp_path / "a" / "latents")[:].reshape(250, -1))


def test_two_spaces_noise_has_nothing_in_common(tmp_path: Path) -> None:
    flat = Ramp()
    flat.images = lambda indices: torch.zeros(len(indices), 3, 4, 4)  # type: ignore[method-assign]
    drawn = []
    for name, weights in (("one", "1"), ("two", "2"), ("again", "1")):
        store = LatentStore(tmp_path / name, noisy(weights=weights), flat)
        store.encode(range(100))
        drawn.append(store.read(range(100)).ravel())
    assert abs(np.corrcoef(drawn[0], drawn[1])[0, 1]) < 0.06 and np.array_equal(drawn[0], drawn[2])


def test_what_another_process_is_still_writing_is_no_reason_to_refuse(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "provenance.json.0123456789ab.partial").write_bytes(b"{")
    store = LatentStore(folder, noisy(), Ramp())
    store.encode([5])
    # one that found no array yet, and made one, must not put it in the place of another's that has latents by now
    store._make()
    assert np.array_equal(LatentStore(folder, noisy(), Ramp()).read([5]), store.read([5]))
    assert not list(folder.rglob("*.partial")) and not (folder / "locks").exists()


def test_what_is_not_encoded_damaged_or_of_something_else_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    store = LatentStore(folder, noisy(), Ramp())
    store.encode([5])
    with pytest.raises(ProbekitError, match="image 150 is not encoded"):
        store.read([5, 150])
    other = noisy(weights="e")
    with pytest.raises(ProbekitError, match=f"digest '{noisy().digest}' there, '{other.digest}' here"):
        LatentStore(folder, other, Ramp())
    (chunk,) = [p for p in (folder / "latents" / "c").rglob("*") if p.is_file()]
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(ProbekitError, match="image 5 is not encoded, or damaged; encode it again"):
        LatentStore(folder, noisy(), Ramp()).read([5])
    (folder / "provenance.json").write_text("{")
    with pytest.raises(ProbekitError, match=r"provenance\.json"):
        LatentStore(folder, noisy(), Ramp())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ProbekitError, match="holds no latents"):
        LatentStore(tmp_path / "mine", noisy(), Ramp())


def test_latents_that_are_not_finite_are_refused_with_the_spaces_name(tmp_path: Path) -> None:
    broken = LatentSpace("z", (1,), "for tests", lambda images, _: images[:, 0, 0, :1] / 0, label="broken:z")
    store = LatentStore(tmp_path / "a", broken, Ramp())
    with pytest.raises(ProbekitError, match="broken:z"):
        store.encode([1])
    assert store.encoded.size == 0


def test_what_is_damaged_is_encoded_again_and_said_and_the_rest_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, calls = tmp_path / "a", []
    LatentStore(folder, noisy(), Ramp()).encode(range(250))
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for part in ("latents/c/1/0/0/0", "labels/000001.parquet", "checksums/000001.json"):
        content = bytearray(whole[folder / part])
        content[len(content) // 2] ^= 4
        (folder / part).write_bytes(content)
        store = LatentStore(folder, noisy(calls), Ramp())
        with pytest.raises(ProbekitError, match="image 150 is not encoded, or damaged; encode it again"):
            store.read([5, 150])
        store.encode(range(250))
        assert f"{part} is damaged or missing; its images are encoded again" in capsys.readouterr().out
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == whole
    assert calls == [BLOCK] * 3


def test_a_chunk_that_says_it_is_larger_than_a_block_is_refused_unread(tmp_path: Path) -> None:
    store = LatentStore(tmp_path / "a", noisy(), Ramp())
    store.encode([5])
    (chunk,) = store._files(0)
    content = bytearray(chunk.read_bytes())
    content[4:8] = (2**31 - 1).to_bytes(4, "little")
    chunk.write_bytes(content)
    with pytest.raises(ProbekitError, match=r"damaged .*is no chunk of 12800 bytes"):
        store.read([5])


def test_a_chunk_that_inflates_to_10_gigabytes_is_refused_in_little_memory(tmp_path: Path) -> None:
    store = LatentStore(tmp_path / "a", noisy(), Ramp())
    store.encode([5])
    (chunk,) = store._files(0)
    repeated, blocks = (131_072 << 3 | 1 << 1).to_bytes(3, "little") + b"\0", 76_294  # 128 KiB of zeros, so often
    frame = b"\x28\xb5\x2f\xfd\xe0" + (131_072 * blocks).to_bytes(8, "little") + repeated * (blocks - 1)
    frame += bytes([repeated[0] | 1]) + repeated[1:]
    head = chunk.read_bytes()[:12]  # which says, as it should, 12,800 bytes
    sizes = (16 + 4 + 4 + len(frame), 16 + 4, len(frame))  # of all; where the one block begins, and how long it is
    bomb = head + b"".join(size.to_bytes(4, "little") for size in sizes) + frame
    chunk.write_bytes(bomb + google_crc32c.value(bomb).to_bytes(4, "little"))
    assert len(bomb) < 400_000
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    with pytest.raises(ProbekitError, match=r"damaged .*decompression"):
        store.read([5])
    assert resident("VmHWM") - before < 200e6


def resident(what: str) -> int:
    """This process's memory in bytes, as the kernel counts it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def test_several_processes_each_encode_what_no_other_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []
    one, two = (LatentStore(tmp_path / "a", noisy(calls), Ramp()) for _ in range(2))

    def second(images: int) -> None:
        if len(calls) == 1:  # while the first is at work
            two.encode(range(100, 250))

    one.encode(range(250), second)
    assert sorted(calls) == [50, BLOCK, BLOCK] and f"process {os.getpid()} on" in capsys.readouterr().out
    fresh = LatentStore(tmp_path / "b", noisy(), Ramp())
    fresh.encode(range(250))
    assert np.array_equal(one.read(range(250)), fresh.read(range(250)))
    assert not (tmp_path / "a" / "locks").exists()

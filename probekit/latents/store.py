"""Latents on disk: each image of a data set encoded once by a latent space, in a chunked and compressed array."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from probekit import __version__
from probekit.checksums import broken, digest, digest_of, sealed, unsealed, write_manifest
from probekit.data.dataset import Dataset
from probekit.files import file_name, remove, sweep, whole_folder, write_whole, writing
from probekit.hooks.errors import ProbekitError
from probekit.latents.space import LatentSpace
from probekit.locks import Lock, clear
from probekit.seeds import named

if TYPE_CHECKING:
    import zarr

BLOCK = 100
"""Images are encoded in blocks of this many rows; a block is on disk whole or not at all."""
_BLOSC = 16
"""Bytes of a compressed chunk's header."""


class LatentStore:
    """The latents of one space for one data set: a zarr array `latents` (images, *shape), float32, NaN where not encoded.

    Its rows are the data set's train split and then its test split, each in its own order, so that the images of a split lie
    together. Beside it lie `labels/`, a parquet file a block of rows, with the number of each row's `image` and its labels,
    `checksums/`, what the files of a block hold, and `provenance.json`. Noise that a space draws comes
    from a generator seeded with the model's weights, the space, the seed and the block's number: latents depend neither on what
    is asked for nor in which order, and two models' noise has nothing in common.

    Several processes may fill one store: each holds the block that it encodes, and leaves out what others hold.

    folder: the store's own, made where there is none. Raises ProbekitError for a folder that holds other latents (another
    model, space, data set or seed), naming what differs, and for a damaged one. A model is the same wherever it lies.
    """

    def __init__(self, folder: Path, space: LatentSpace, data: Dataset, *, seed: int = 0) -> None:
        import zarr

        self.folder, self.space, self.data, self.seed = folder, space, data, seed
        self._sound: set[int] = set()
        self.provenance: dict[str, Any] = {
            "model": space.model,
            "space": space.name,
            "parameters": dict(space.parameters),
            "digest": space.digest,
            "shape": list(space.shape),
            "data": data.name,
            "data_digest": data.digest,
            "image_size": data.image_size,
            "seed": seed,
            "rows": "train, test",
            "probekit": __version__,
        }
        described = folder / "provenance.json"
        if described.exists():
            self._refuse_other(described)
        elif _holds_something(folder):
            raise ProbekitError(f"latents {str(folder)!r}: exists and holds no latents; name a new or an empty folder")
        else:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(described, sealed(self.provenance))
        if not (folder / "latents" / "zarr.json").exists():  # new, or killed before it was made
            self._make()
        try:
            self._array: zarr.Array[Any] = zarr.open_array(folder / "latents", mode="r+")
        except Exception as error:  # zarr raises a dozen kinds
            raise ProbekitError(f"latents {str(folder)!r}: cannot be opened ({_brief(error)}); delete the folder") from error
        if json.dumps(self._array.metadata.to_dict(), default=str) != json.dumps(self._header(), default=str):
            raise ProbekitError(f"latents {str(folder)!r}: latents/zarr.json is damaged; delete the folder")

    def _create(self, store: Any) -> zarr.Array[Any]:
        """The empty array, in a folder or in one of zarr's stores."""
        import zarr
        import zarr.codecs

        return zarr.create_array(
            store,
            shape=(len(self.data), *self.space.shape),
            chunks=(BLOCK, *self.space.shape),
            dtype="float32",
            compressors=[zarr.codecs.BloscCodec(cname="zstd", clevel=3), zarr.codecs.Crc32cCodec()],
            fill_value=float("nan"),
        )

    def _header(self) -> dict[str, Any]:
        """How the array is described."""
        from zarr.storage import MemoryStore

        return dict(self._create(MemoryStore()).metadata.to_dict())

    def _make(self) -> None:
        """Make the empty array beside its place and move it there, unless another process's is there, and filled, by now."""
        with writing(self.folder), Lock(self.folder / "locks" / "array") as lock:
            lock.wait()
            if not (self.folder / "latents" / "zarr.json").exists():
                with whole_folder(self.folder / "latents") as made:
                    self._create(made)

    def _refuse_other(self, described: Path) -> None:
        try:
            stored = json.loads(described.read_bytes())
            if "sha256" in stored:  # older ones have none
                unsealed(described.read_bytes())
            differ = [k for k, v in self.provenance.items() if k not in ("model", "probekit") and stored.get(k) != v]
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise ProbekitError(f"latents {str(self.folder)!r}: provenance.json cannot be read; delete the folder") from error
        if differ:
            said = ", ".join(f"{k} {stored.get(k)!r} there, {self.provenance[k]!r} here" for k in differ)
            raise ProbekitError(f"latents {str(self.folder)!r}: of something else ({said}); name another folder")

    @property
    def encoded(self) -> np.ndarray:
        """The numbers of the images that are encoded, in order."""
        done = [int(p.stem) for p in (self.folder / "labels").glob("*.parquet")]
        return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *(self._numbers(block) for block in done)]))

    def encode(self, indices: Sequence[int] | np.ndarray, on_block: Callable[[int], None] = lambda images: None) -> None:
        """Encode the blocks that hold these images, those that are there already excepted.

        on_block: called after every block, with the number of images in it. Raises ProbekitError, naming the space, for
        latents that are not finite.
        """
        blocks: list[int] = np.unique(self._rows[np.asarray(indices, dtype=np.int64)] // BLOCK).tolist()
        left = [block for block in blocks if not self._whole(block)]
        for block in blocks:
            if block not in left:
                on_block(len(self._numbers(block)))
        if not left and not (self.folder / "locks").exists():  # of a process that was killed at its end, perhaps
            return
        with self._at_work():
            for wait in (False, True):  # what others hold comes last, should they not come to its end
                for block in list(left):
                    with Lock(self.folder / "locks" / f"block-{block:06d}") as lock:
                        if wait:
                            lock.wait()
                        elif not lock.take():
                            continue
                        if not self._whole(block):
                            self._encode(block)
                    left.remove(block)
                    on_block(len(self._numbers(block)))

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Say who else is at work; where nobody is, remove what killed processes had begun to write."""
        with Lock(self.folder / "locks" / "store") as lock:
            with writing(self.folder):
                if lock.take():
                    sweep(self.folder)
                    clear(self.folder / "locks")
                    lock.share()
                else:
                    print(
                        f"latents {str(self.folder)!r}: {lock.holder or 'another process'}; each does its own blocks",
                        flush=True,
                    )
                    lock.take(shared=True)
                for part in ("labels", "checksums"):
                    (self.folder / part).mkdir(exist_ok=True)
            yield

    def _encode(self, block: int) -> None:
        """Encode a block that this process holds."""
        mark, manifest, numbers = self._mark(block), self._manifest(block), self._numbers(block)
        if mark.exists() and manifest.exists():
            what = broken(manifest, self.folder)
            print(f"latents {str(self.folder)!r}: {what} is damaged or missing; its images are encoded again", flush=True)
        noise = named(self.space.weights(), self.space.name, self.seed, block)
        items = self.data.captions(numbers) if self.space.takes == "captions" else self.data.images(numbers)
        latents = self.space.encode(items, noise).numpy()
        if not np.isfinite(latents).all():
            raise ProbekitError(f"space {str(self.space)!r}: gives latents that are not finite")
        labels = self.data.labels(numbers)
        labels.insert(0, "image", numbers)
        table = labels.to_parquet(index=False)
        with writing(self.folder):
            remove(mark)
            remove(self._chunk(block))
            self._array[block * BLOCK : block * BLOCK + len(numbers)] = latents
            held = {str(path.relative_to(self.folder)): digest(path) for path in self._files(block)}
            write_manifest(manifest, held | {str(mark.relative_to(self.folder)): digest_of(table)})
            # written last, the labels say that the block is whole
            write_whole(mark, table)
        self._sound.add(block)

    def _whole(self, block: int) -> bool:
        """Whether a block is encoded, and as it was written; looked into once."""
        if block not in self._sound and self._mark(block).exists() and not broken(self._manifest(block), self.folder):
            self._sound.add(block)
        return block in self._sound

    def _mark(self, block: int) -> Path:
        return self.folder / "labels" / f"{block:06d}.parquet"

    def _manifest(self, block: int) -> Path:
        return self.folder / "checksums" / f"{block:06d}.json"

    def _chunk(self, block: int) -> Path:
        """Where zarr keeps a block: a file, in folders for a space of several dimensions."""
        return self.folder / "latents" / "c" / str(block)

    def _files(self, block: int) -> list[Path]:
        chunk = self._chunk(block)
        return [chunk] if chunk.is_file() else sorted(path for path in chunk.rglob("*") if path.is_file())

    def read(self, indices: Sequence[int] | np.ndarray) -> Float[np.ndarray, "n d"]:
        """Latents as flat vectors. Raises ProbekitError for images that are not encoded and for damaged files."""
        numbers = np.asarray(indices, dtype=np.int64)
        flat = np.empty((len(numbers), math.prod(self.space.shape)), dtype=np.float32)
        rows = self._rows[numbers]
        # block by block: zarr reads several at once, and where one is damaged it leaves the others' tasks to complain at exit
        blocks = rows // BLOCK
        for block in np.unique(blocks).tolist():
            here = blocks == block
            if not self._whole(block):
                number = numbers[here].tolist()[0]
                raise ProbekitError(f"latents {str(self.folder)!r}: image {number} is not encoded, or damaged; encode it again")
            try:
                self._refuse_lies(block)
                latents = np.asarray(self._array.blocks[block])
            except Exception as error:  # zarr raises a dozen kinds
                raise ProbekitError(f"latents {str(self.folder)!r}: damaged ({_brief(error)}); delete the folder") from error
            flat[here] = latents.reshape(len(latents), -1)[rows[here] - block * BLOCK]
        return flat

    def _refuse_lies(self, block: int) -> None:
        """Raises ValueError for a chunk that says it is larger than a block, before memory is given to it."""
        largest = BLOCK * math.prod(self.space.shape) * 4
        for path in self._files(block):
            with path.open("rb") as file:
                header = file.read(_BLOSC)
            if len(header) < _BLOSC or int.from_bytes(header[4:8], "little") > largest:
                raise ValueError(f"{path.name} is no chunk of {largest} bytes")

    @cached_property
    def _order(self) -> np.ndarray:
        """The number of each row's image."""
        parts = []
        for part in ("train", "test"):
            with contextlib.suppress(ProbekitError):  # a folder so small that no image falls in it
                parts.append(self.data.split(part))
        numbers = np.concatenate([*parts, np.arange(len(self.data))])  # what is in neither comes last
        return numbers[np.sort(np.unique(numbers, return_index=True)[1])]

    @cached_property
    def _rows(self) -> np.ndarray:
        """The row of each image."""
        return np.argsort(self._order)

    def _numbers(self, block: int) -> np.ndarray:
        return self._order[block * BLOCK : (block + 1) * BLOCK]


def default_folder(space: LatentSpace, data: Dataset, seed: int = 0) -> Path:
    """runs/latents/<model>-<space>-<data>-<what they are>: the same space and data find the same folder again."""
    label = file_name(f"{Path(space.model).name}-{space.name}-{data.name}")
    return Path("runs") / "latents" / f"{label}-{space.digest}-{data.digest}-{seed}"


def _holds_something(folder: Path) -> bool:
    """Whether something is there that is not just being written, by another process that makes the same latents."""
    if not folder.is_dir():
        return folder.exists()
    return any(path.suffix != ".partial" for path in folder.iterdir())


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__

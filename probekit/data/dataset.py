"""What every data set of images offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    import pandas as pd


def no_captions(name: str) -> ProbekitError:
    """The error of a data set without captions."""
    return ProbekitError(f"data {name!r}: has no captions; scenes have, and a folder whose csv file has a column caption")


def check_split(part: str, said: str = "split") -> None:
    """Raises ProbekitError, which begins with what is said, for other than `train` and `test`."""
    if part not in ("train", "test"):
        raise ProbekitError(f"{said} {part!r}: choose train or test")


class Dataset(Protocol):
    """Images of one size with labels, numbered from 0.

    name: what it is called in results; image_size: height and width in pixels; digest: 12 hex digits that change when the
    pictures or labels do.
    """

    name: str
    image_size: int
    digest: str

    def __len__(self) -> int: ...

    def split(self, part: str) -> np.ndarray:
        """The numbers of the images of `train` or `test`. Raises ProbekitError for another part."""
        ...

    def images(self, indices: Sequence[int] | np.ndarray) -> Float[Tensor, "n 3 h w"]:
        """Pictures in [-1, 1]. Raises ProbekitError for a number that is not there and a picture that cannot be read."""
        ...

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """What each picture shows, in words. Raises ProbekitError where the data set has no captions."""
        ...

    def labels(self, indices: Sequence[int] | np.ndarray) -> pd.DataFrame:
        """One row an index; a column of bool is an attribute, of category a class, of float a number (NaN where unknown)."""
        ...


def numbers(indices: Sequence[int] | np.ndarray, name: str, count: int) -> Int64[np.ndarray, " n"]:
    """The indices of images of a data set of that name, as an array. Raises ProbekitError unless all are below `count`."""
    wanted = np.asarray(indices, dtype=np.int64)
    if wanted.size and not 0 <= wanted.min() <= wanted.max() < count:
        raise ProbekitError(f"{name}: numbers 0 to {count - 1}, not {wanted.min()} to {wanted.max()}")
    return wanted

"""What every data set of images offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


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

    def labels(self, indices: Sequence[int] | np.ndarray) -> pd.DataFrame:
        """One row an index; a column of bool is an attribute, of category a class, of float a number (NaN where unknown)."""
        ...

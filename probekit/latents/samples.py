"""Pictures that a model draws, as a data set: what stands in for a data set where a model cannot encode (a GAN)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probekit.data.dataset import check_split, no_captions
from probekit.hooks.errors import ProbekitError
from probekit.latents.space import LatentSpace
from probekit.seeds import named

if TYPE_CHECKING:
    import pandas as pd

_BLOCK = 100


class Samples:
    """The first `n` samples of a space, without labels; each block of 100 has a generator of its own.

    All Roads calls this CelebA-Synthetic (A.4): the latents that a picture was drawn from count as its code. The last `test`
    of them are the test split. Raises ProbekitError where the space cannot sample or decode.
    """

    def __init__(self, space: LatentSpace, image_size: int, n: int, test: int, seed: int = 0) -> None:
        if space.sampler is None or space.decoder is None:
            raise ProbekitError(f"space {str(space)!r}: cannot {'sample' if space.sampler is None else 'decode'}")
        self.space, self.image_size, self.seed = space, image_size, seed
        self.name = f"samples of {space}"
        self.digest = hashlib.sha256(f"{space.digest}{seed} {n}".encode()).hexdigest()[:12]
        self._n, self._test = n, test

    def __len__(self) -> int:
        return self._n

    def split(self, part: str) -> np.ndarray:
        """The numbers of the samples of `train` or `test`. Raises ProbekitError for another part."""
        check_split(part)
        cut = self._n - self._test
        return np.arange(cut) if part == "train" else np.arange(cut, self._n)

    def latents(self, indices: Sequence[int] | np.ndarray) -> Float[Tensor, "n *shape"]:
        """What the samples are drawn from."""
        numbers = np.asarray(indices, dtype=np.int64)
        drawn = torch.empty(len(numbers), *self.space.shape)
        for block in np.unique(numbers // _BLOCK).tolist():
            inside = torch.from_numpy(numbers // _BLOCK == block)
            drawn[inside] = self.space.sample(_BLOCK, named("samples", self.space.name, self.seed, block))[
                numbers[inside.numpy()] % _BLOCK
            ]
        return drawn

    def images(self, indices: Sequence[int] | np.ndarray) -> Float[Tensor, "n 3 h w"]:
        """The samples, in [-1, 1]."""
        return torch.cat([self.space.decode(part) for part in torch.split(self.latents(indices), _BLOCK)])

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Raises ProbekitError: nobody has written any."""
        raise no_captions(self.name)

    def labels(self, indices: Sequence[int] | np.ndarray) -> pd.DataFrame:
        """A row an index and no columns: nobody has labelled them."""
        import pandas as pd

        return pd.DataFrame(index=range(len(indices)))

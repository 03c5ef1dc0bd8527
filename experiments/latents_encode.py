"""Latents on disk: encode a data set once, for the other experiments and for one's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from probekit import checked
from probekit.hooks.errors import ProbekitError
from probekit.runs.experiment import Options


@dataclass(frozen=True, kw_only=True)
class LatentsEncode(Options):
    """Write the latents of a data set: a zarr array, with labels and where they come from beside it."""

    model: Annotated[str, typer.Argument(help="MODEL, MODEL:SPACE or MODEL:SPACE:key=value; file.py:Class for one's own.")]
    data: Annotated[str, typer.Option(help="avatars, scenes, photos, celeba:PATH, folder:PATH or a folder.")] = "avatars"
    split: Annotated[str, typer.Option(help="train or test.")] = "test"
    n: Annotated[int | None, typer.Option("--n", min=1, help="How many images, the split's first. [default: all of them]")] = (
        None
    )
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of noise.")] = 0
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto"
    out: Annotated[Path | None, typer.Option(help="The folder to write to. [default: runs/latents/…]")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        from probekit.data.dataset import check_split

        check_split(self.split, "--split")
        if self.out is not None:
            checked.folder_to_write(f"--out {str(self.out)!r}", self.out)

    def run(self) -> str:
        """Encode what is not yet; returns what was done. Raises ProbekitError for what cannot be, and as `LatentStore`."""
        import numpy as np

        from probekit.data import load_data
        from probekit.latents.codes import common_size
        from probekit.latents.store import LatentStore, default_folder
        from probekit.models import load_space
        from probekit.progress import progress, telling

        if "," in self.model:
            raise ProbekitError(f"model {self.model!r}: one at a time")
        space = load_space(self.model, device=self.device)
        dataset = load_data(self.data, common_size([space]))
        index = dataset.split(self.split)
        if self.n is not None and self.n > len(index):
            raise ProbekitError(f"--n {self.n}: the {self.split} split of {dataset.name} has {len(index)} images")
        if space.takes == "captions":
            dataset.captions(index[: self.n])  # refuses those that are missing before a folder is made
        folder = self.out or default_folder(space, dataset, self.seed)
        store = LatentStore(folder, space, dataset, seed=self.seed)
        wanted = index[: self.n]

        def kept() -> str:
            done = int(np.isin(wanted, store.encoded).sum())
            return f"interrupted: {done} of {len(wanted)} latents are kept in {folder}; the same command goes on from there"

        with telling(kept), progress(f"{space} encodes {dataset.name}", len(wanted)) as advance:
            store.encode(wanted, advance)
        return f"{len(wanted)} latents of {'x'.join(map(str, space.shape))}: {folder}"

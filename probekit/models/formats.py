"""What `load` is given and recognises: a place, and for each kind of file or folder a `Format` that says how it is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from probekit.hooks.errors import ProbekitError
from probekit.models.papers import checkpoint

if TYPE_CHECKING:
    import torch

    from probekit.models.model import Model

HUB_ID = r"[\w.-]+/[\w.-]+"
"""What Hugging Face's hub calls a model: owner/name."""


@dataclass(frozen=True, eq=False)
class Place:
    """What a name refers to: a file, a folder, or a hub id; read as far as a format needs to recognise it.

    name: how the model was asked for. path: the file or folder, for a hub id where a folder would be. device, dtype, variant,
    offload: where, in which precision, from which files, and how much of it at a time on the device the model is wanted.
    """

    name: str
    path: Path
    device: torch.device
    dtype: str = "auto"
    variant: str | None = None
    offload: str = "none"

    @property
    def at(self) -> str | Path:
        """The folder, or the hub id."""
        return self.path if self.path.is_dir() else self.name

    @property
    def is_file(self) -> bool:
        """Whether it is a file."""
        return self.path.is_file()

    @cached_property
    def kind(self) -> str:
        """The class that the folder's model_index.json or config.json names, "" where there is none to read."""
        if self.is_file:
            return ""
        if self.path.is_dir() and not (self.path / "model_index.json").is_file():
            try:
                return str(json.loads((self.path / "config.json").read_bytes()).get("_class_name"))
            except (OSError, ValueError, AttributeError, RecursionError):
                return ""
        from diffusers import DiffusionPipeline

        try:
            return str(DiffusionPipeline.load_config(str(self.at)).get("_class_name"))
        except Exception:  # diffusers and the hub raise a dozen kinds; what loads the pipeline says which
            return ""

    @property
    def is_pipeline(self) -> bool:
        """Whether it is, or may be, a whole pipeline: a folder with a model_index.json, or a hub id."""
        return not self.is_file and (not self.path.is_dir() or (self.path / "model_index.json").is_file())

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What a network that probekit saved says of itself: `family` and `image_size`; empty for anything else."""
        file = self.path / "model.safetensors" if self.path.is_dir() else self.path
        if not file.is_file() or file.suffix != ".safetensors":
            return {}
        try:
            with safe_open(file, "pt") as tensors:
                return tensors.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ProbekitError(f"model {self.name!r}: {str(file)!r} is damaged ({error})") from error

    @cached_property
    def content(self) -> Any:
        """What the file, or the network's file in the folder, holds; nothing in it is ever run (`papers.checkpoint.read`)."""
        return checkpoint.read(self.path / "model.safetensors" if self.path.is_dir() else self.path)

    def saved_as(self, family: str) -> bool:
        """Whether it is a network that probekit saved, of that family."""
        return not self.is_pipeline and self.metadata.get("family") == family

    @property
    def image_size(self) -> int:
        """The size of its images that a network which probekit saved names. Raises ProbekitError where it names none."""
        told = self.metadata.get("image_size", "")
        if not re.fullmatch(r"[0-9]{1,9}", told):
            raise ProbekitError(
                f"model {self.name!r}: its image_size is {self.metadata.get('image_size')!r}, a number of pixels is needed"
            )
        return int(told)


@dataclass(frozen=True)
class Format:
    """One kind of thing that `load` recognises.

    about: what it is, for README and errors. matches: whether a place is such a thing, from names and headers alone. load: the
    model there; it raises ProbekitError, in one line, where it cannot be read.
    """

    about: str
    matches: Callable[[Place], bool]
    load: Callable[[Place], Model]

"""What diffusers and transformers load: a local folder or a hub id, onto which device, in which precision."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.hooks.errors import ProbekitError
from probekit.models.formats import HUB_ID

if TYPE_CHECKING:
    import torch


def place(path: str | Path, name: str) -> str:
    """What `from_pretrained` is to be given. Raises ProbekitError for what is neither a folder nor a hub id (owner/name)."""
    folder = Path(path).expanduser()
    if not folder.is_dir() and (folder.exists() or not re.fullmatch(HUB_ID, str(path))):
        raise ProbekitError(f"model {name!r}: {str(path)!r} is neither a folder nor a hub id (owner/name)")
    return str(folder if folder.is_dir() else path)


def hush() -> None:
    """Turn off the libraries' bars and reports, which would bury a one-line error."""
    import transformers
    from diffusers.utils import logging as of_diffusers

    for library in (of_diffusers, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity(logging.CRITICAL)


def load_part(kind: Any, place: str, part: str | None, name: str) -> Any:
    """`kind.from_pretrained` of a folder's part, in evaluation mode, float32.

    Raises ProbekitError, in one line, for weights that cannot be read, and for incomplete ones, which diffusers would fill
    with random numbers.
    """
    try:
        network, report = kind.from_pretrained(place, subfolder=part, output_loading_info=True)
    except Exception as error:  # diffusers, safetensors and the hub raise a dozen kinds
        reason = " ".join(str(error).split())[:160]
        raise ProbekitError(f"model {name!r}: could not be loaded ({type(error).__name__}: {reason})") from error
    if missing := sorted(report["missing_keys"]):
        raise ProbekitError(f"model {name!r}: its weights lack {len(missing)} tensors, {missing[0]!r} first")
    return network.float().eval()


def choose_device(device: str) -> torch.device:
    """`auto` is cuda, then mps, then cpu. Raises ProbekitError where the device is not there."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ProbekitError(f"device {device!r}: not available here; use auto, cpu, cuda or mps") from error


def precision(dtype: str, device: torch.device, *, transformer: bool) -> torch.dtype:
    """The precision of that name; `auto` is float32 on the CPU, elsewhere bfloat16 for transformers and float16 for U-Nets.

    Raises ProbekitError for a name that is none.
    """
    import torch

    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16" if transformer else "float16"
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise ProbekitError(f"dtype {dtype!r}: choose auto, {', '.join(known)}")
    return known[dtype]

"""What diffusers and transformers load: which files of a folder or hub id, onto which device, in which precision."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import threading
from collections.abc import Iterable, Iterator
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

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
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
        raise not_loaded(name, error) from error
    if missing := sorted(report["missing_keys"]):
        raise ProbekitError(f"model {name!r}: its weights lack {len(missing)} tensors, {missing[0]!r} first")
    return network.float().eval()


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn whatever the libraries raise inside, in a dozen kinds, into the ProbekitError that `not_loaded` makes of it."""
    try:
        yield
    except ProbekitError:
        raise
    except Exception as error:
        raise not_loaded(name, error) from error


def kept(name: str) -> Path | None:
    """Where the hub does not answer, the folder of what is kept of a repository on this machine; None where it answers.

    The hub is asked once: its library would ask again and again, for most of a minute, for each of a model's files. Raises
    ProbekitError where it does not answer and nothing is kept.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    hush()
    if not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT):
        return None
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, OSError) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise ProbekitError(f"model {name!r}: could not be loaded ({why}, and nothing of it is kept here)") from error


_PATIENCE = 6.0
"""Seconds that the hub has to answer in."""


@functools.cache
def _answers(endpoint: str) -> bool:
    """Whether something answers there, whatever it says."""
    from huggingface_hub import get_session

    said: list[Any] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # a dozen kinds, of names, sockets, proxies and certificates
            said.append(get_session().head(endpoint, timeout=_PATIENCE))

    asking = threading.Thread(target=ask, daemon=True)  # a name is looked up for as long as the system likes
    asking.start()
    asking.join(_PATIENCE)
    return bool(said)


def not_loaded(name: str, error: BaseException) -> ProbekitError:
    """What to say where diffusers, transformers or the hub could not load a model; gated and hidden repositories by name."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return ProbekitError(
            f"model {name!r}: is gated; accept its licence at https://huggingface.co/{name}, then log in with `hf auth login` "
            "(or set HF_TOKEN) and run this again"
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return ProbekitError(
            f"model {name!r}: the hub has no such repository, or a private one; check the name, or log in with `hf auth login`"
        )
    reason = " ".join(str(error).split())[:200]
    return ProbekitError(f"model {name!r}: could not be loaded ({type(error).__name__}: {reason})")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_VARIANT = re.compile(r"^(?:diffusion_pytorch_model|pytorch_model|model)\.(\w+)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)$")
"""A file of weights in other than a pipeline's plain form, such as `diffusion_pytorch_model.fp16.safetensors`."""
_PLAIN = re.compile(r"^(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)$")


def choose_variant(place: str | Path, name: str, asked: str | None, dtype: torch.dtype, denoisers: Iterable[str]) -> str | None:
    """Which form of a pipeline's weights to load; None is the plain one.

    asked: the variant's name, or None: `fp16` where the model is wanted in half precision and its denoiser has that, which is
    half of the download, and where nothing else is there. Raises ProbekitError for a variant that no part of the pipeline has.
    """
    import torch

    parts = _files(place)
    found = {variant[1] for files in parts.values() for file in files if (variant := _VARIANT.match(file))}
    if asked is not None:
        if asked not in found:
            there = f"it has {', '.join(sorted(found))}" if found else "it has its plain weights only"
            raise ProbekitError(f"--variant {asked!r}: model {name!r} has none; {there}")
        return asked
    files = [file for part in denoisers for file in parts.get(part, ())]
    half = any((variant := _VARIANT.match(file)) and variant[1] == "fp16" for file in files)
    return "fp16" if half and (dtype != torch.float32 or not any(_PLAIN.match(file) for file in files)) else None


def _files(place: str | Path) -> dict[str, list[str]]:
    """The names of a pipeline's files by its parts; of a hub id those on the hub, without a network those kept from it."""
    if (folder := Path(place)).is_dir():
        listed = [file.relative_to(folder) for file in folder.glob("*/*")]
    else:
        from huggingface_hub import list_repo_files, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            listed = [Path(file) for file in list_repo_files(str(place))]
        except HfHubHTTPError:  # gated, hidden or not there: loading tells which
            raise
        except (OfflineModeIsEnabled, OSError):
            kept = Path(snapshot_download(str(place), local_files_only=True))
            listed = [file.relative_to(kept) for file in kept.glob("*/*")]
    parts: dict[str, list[str]] = {}
    for file in listed:
        if len(file.parts) == 2:
            parts.setdefault(file.parts[0], []).append(file.name)
    return parts


OFFLOADS = ("none", "model", "sequential")


def put_on(pipeline: Any, device: torch.device, offload: str) -> None:
    """Move a pipeline to a device: whole, or from the CPU as its parts (`model`) or their modules (`sequential`) are called."""
    if offload == "none":
        pipeline.to(device)
    elif offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)


def check_offload(offload: str, device: torch.device) -> None:
    """Raises ProbekitError for a way of offloading that there is not, and for one from the CPU to the CPU."""
    if offload not in OFFLOADS:
        raise ProbekitError(f"--offload {offload!r}: choose {', '.join(OFFLOADS)}")
    if offload != "none" and device.type == "cpu":
        raise ProbekitError(f"--offload {offload!r}: keeps weights on the CPU until a GPU needs them; here all runs on the CPU")


def choose_device(device: str) -> torch.device:
    """`auto` is cuda, then mps, then cpu. Raises ProbekitError where the device is not there."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        made = torch.zeros(1, device=device)
        made.item()  # of a device without values, such as torch's `meta`, there is none
    except Exception as error:  # torch's backends raise a dozen kinds
        raise ProbekitError(f"device {device!r}: not available here; use auto, cpu, cuda or mps") from error
    return made.device


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

"""A model's folder, looked through before diffusers or transformers build anything of it: what its configs ask for.

The libraries build what a config says before they see whether weights fit, and import what a model_index.json names.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from probekit import checked
from probekit.bundled import BORROWED, WEIGHTS, weights
from probekit.hooks.errors import ProbekitError
from probekit.models.papers import checkpoint

MOST_LAYERS = 256
"""Of a stack; the deepest published denoiser has less than a hundred."""
MOST_LEVELS = 16
"""Of a U-Net or an autoencoder."""
MOST_SIDE = 2048
"""Cells of a denoiser's picture, a side."""
MOST_TIMESTEPS = 10_000
_MOST_NUMBER = 2**40
_MOST_ITEMS = 10_000

_LIBRARIES = ("diffusers", "transformers")
_AUTO = re.compile(r"Auto(Model|Tokenizer|Processor|Config|ImageProcessor|FeatureExtractor|Pipeline)")
"""Classes that look up in the folder which class it is, and may find code there."""
_LAYERS = re.compile(r"layers|n_layer$|depth|(^|num_)blocks$|num_(res_?)?blocks")
_COUNTED = re.compile(r"^num_|_(channels|groups|heads|head_dim)$|hidden_size$|layers_per_block$")
"""What there is a number of, and so never less than none."""
_LEVELS = re.compile(r"block_types$|block_out_channels$|(^|_)channel_mult")
_CHOICES = {
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction", "trigflow"),
}
_VOCABULARIES = (".json", ".txt", ".model", ".tiktoken", ".spm", ".vocab", ".jinja")
_NO_VOCABULARY = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")


def check(folder: Path, name: str) -> None:
    """Look through the JSON files of a folder that `save_pretrained` wrote, and of its parts, and its pickled weights' sizes.

    Raises ProbekitError, naming the file and the key, for what is no JSON, for parts of other libraries, for layers, levels,
    sizes and timesteps beyond all that models have, for text where a number belongs, and for a tokenizer without a vocabulary.
    """
    index = folder / "model_index.json"
    parts = _parts(index, name) if index.exists() else {}
    for file in _configs(folder):
        said = f"model {name!r}: {str(file.relative_to(folder))!r}"
        config = checked.json_object(said, file)
        called = file.parent.name if file.parent != folder else ""
        _check_values(said, config, _class(str(config.get("_class_name") or parts.get(called, ""))))
    for part, kind in parts.items():
        if "Tokenizer" in kind and (folder / part).is_dir():
            _check_tokenizer(folder / part, kind, name)
    for file in (*folder.glob("*.bin"), *folder.glob("*/*.bin")):
        checkpoint.check_archive(checked.file(f"model {name!r}: {str(file)!r}", file, 2**50))
    if (lent := folder / BORROWED).exists():
        _check_borrowed(lent, name)


def _configs(folder: Path) -> Iterator[Path]:
    """What the libraries build from."""
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        yield from (file for called in ("config.json", "scheduler_config.json") if (file := place / called).exists())


def _parts(index: Path, name: str) -> dict[str, str]:
    """The classes that the index names, by part. Raises ProbekitError for those of other libraries."""
    import diffusers

    said = f"model {name!r}: 'model_index.json'"
    told, found = checked.json_object(said, index), dict[str, str]()
    kind = told.get("_class_name")
    if not isinstance(kind, str):
        raise ProbekitError(f"{said}: its _class_name is {checked.shown(kind)}, the name of a pipeline of diffusers is needed")
    pipelines = Path(diffusers.__file__).parent / "pipelines"
    for part, value in told.items():
        match value:
            case [str(library), str(made)]:
                there = any((place / library).is_dir() for place in (pipelines, pipelines / "deprecated"))
                if not (library in _LIBRARIES or (library.isidentifier() and there)):
                    raise ProbekitError(
                        f"{said}: {part!r} is of {checked.shown(library)}; nothing is imported but {' and '.join(_LIBRARIES)}"
                    )
                if _AUTO.match(made):
                    raise ProbekitError(f"{said}: {part!r} is {made}, which may run code of the folder's; name its class")
                found[part] = made
    return found


def _class(name: str) -> Any:
    """The class of diffusers of that name, None where there is none."""
    import diffusers

    return getattr(diffusers, name, None) if name.isidentifier() else None


def _check_values(said: str, config: dict[str, Any], kind: Any) -> None:
    """Raises ProbekitError, naming the key, for a value that nothing should be built from."""
    defaults = {key: p.default for key, p in inspect.signature(kind.__init__).parameters.items()} if kind is not None else {}
    for key, value in config.items():
        where = f"{said}: {key} {checked.shown(value)}"
        for number in (numbers := list(_numbers(where, value))):
            if not math.isfinite(number) or abs(number) > _MOST_NUMBER:
                raise ProbekitError(f"{where}: is no number that a model has")
        if isinstance(value, list) and len(value) > (MOST_LEVELS if _LEVELS.search(key) else _MOST_ITEMS):
            raise ProbekitError(f"{where}: has {len(value):,} items, which no model has")
        if _LAYERS.search(key) and any(number > MOST_LAYERS for number in numbers):
            raise ProbekitError(f"{where}: at most {MOST_LAYERS} layers are built")
        if _COUNTED.search(key) and any(number < 0 for number in numbers):
            raise ProbekitError(f"{where}: a number from 0 is needed")
        if key in _CHOICES and value is not None and value not in _CHOICES[key]:
            raise ProbekitError(f"{where}: choose {', '.join(_CHOICES[key])}")
        if key == "num_train_timesteps" and value is not None and not (type(value) is int and 1 <= value <= MOST_TIMESTEPS):
            raise ProbekitError(f"{where}: a whole number from 1 to {MOST_TIMESTEPS:,} is needed")
        if key == "sample_size" and value is not None:
            _check_side(where, value, config)
        default = defaults.get(key, inspect.Parameter.empty)
        if isinstance(default, int | float) and not isinstance(default, bool) and isinstance(value, str | dict | bool):
            raise ProbekitError(f"{where}: a number is needed, as {default!r}")
        if isinstance(default, str) and not isinstance(value, str | list | None):
            raise ProbekitError(f"{where}: text is needed, as {default!r}")
        if isinstance(default, bool) and not isinstance(value, bool | None):
            raise ProbekitError(f"{where}: true or false is needed")


def _numbers(where: str, value: Any, depth: int = 0) -> Iterator[float]:
    """Every number in a value. Raises ProbekitError for deep nesting."""
    if depth > 8:
        raise ProbekitError(f"{where[:200]}: is nested too deep")
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(where, item, depth + 1)


def _check_side(where: str, value: Any, config: dict[str, Any]) -> None:
    """Raises ProbekitError for a size that a network with these patches and levels cannot have."""
    sides = value if isinstance(value, list) else [value]
    if not 1 <= len(sides) <= 3 or not all(type(side) is int and 1 <= side <= MOST_SIDE for side in sides):
        raise ProbekitError(f"{where}: a whole number from 1 to {MOST_SIDE} is needed")
    patch, levels = config.get("patch_size"), config.get("block_out_channels")
    if type(patch) is int and patch > 0:
        factor, why = patch, "its patches"
    elif isinstance(levels, list) and config.get("_class_name") in ("UNet2DModel", "VQModel", "AutoencoderKL"):
        factor, why = 2 ** (len(levels) - 1), f"its {len(levels)} levels"
    else:
        return
    if any(side % factor for side in sides):
        raise ProbekitError(f"{where}: a multiple of {factor} is needed, for {why}")


def _check_tokenizer(folder: Path, kind: str, name: str) -> None:
    """Raises ProbekitError for a tokenizer's folder without words: transformers makes one of it that knows none."""
    words = [
        file
        for file in folder.iterdir()
        if file.suffix in _VOCABULARIES and file.name not in _NO_VOCABULARY and file.is_file() and file.stat().st_size
    ]
    if words:
        return
    import transformers

    if getattr(getattr(transformers, kind, None), "vocab_files_names", True):  # ByT5's words are bytes
        raise ProbekitError(f"model {name!r}: {folder.name!r} has no vocabulary (tokenizer.json, vocab.json, spiece.model, …)")


def _check_borrowed(file: Path, name: str) -> None:
    said = f"model {name!r}: {BORROWED!r}"
    for part, place in checked.json_object(said, file).items():
        lent = weights(place).resolve() if isinstance(place, str) else None
        if lent is None or not lent.is_relative_to(WEIGHTS.resolve()) or not lent.is_dir():
            raise ProbekitError(f"{said}: {part!r} is to come from {checked.shown(place)}, which no bundled model has")

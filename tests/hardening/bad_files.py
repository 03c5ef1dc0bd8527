"""The files that nobody should be able to harm probekit with, made once; and the commands that are given them."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

THERE = "@there@"
"""In a command: a folder with results of earlier runs, which must stay as it is."""

Named = tuple[str, Sequence[str]]
"""What is wrong, as `group: what`, and the command."""


@dataclass(frozen=True)
class Files:
    """folder: where they lie. there: results of earlier runs. script: one that does. unreadable, unwritable: paths."""

    folder: Path

    @classmethod
    def made(cls, folder: Path) -> Files:
        """Make them all."""
        found = cls(folder)
        for part in ("there/run/units", "there/store", "plain", "pictures", "data"):
            (folder / part).mkdir(parents=True)
        (folder / "there" / "run" / "config.json").write_text(
            json.dumps(
                {
                    "experiment": "inject-sweep",
                    "form": 2,
                    "probekit": "0.1.0",
                    "options": {"seed": 5},
                    "inputs": {"model_digest": "another"},
                    "command": ["probekit", "inject", "sweep"],
                }
            )
        )
        (folder / "there" / "run" / "units" / "own-00.parquet").write_bytes(b"a unit")
        (folder / "there" / "store" / "provenance.json").write_text("{}")
        (folder / "there" / "notes.txt").write_text("mine")
        found._paths()
        _pictures(folder / "data" / "faces", 24)
        (folder / "script.py").write_text("def operation(target, source, context):\n    return source\n")
        return found

    @property
    def there(self) -> Path:
        return self.folder / "there"

    @property
    def script(self) -> str:
        return str(self.folder / "script.py")

    def _paths(self) -> None:
        plain = self.folder / "plain"
        os.mkfifo(plain / "pipe")
        (plain / "loop").symlink_to(plain / "loop")
        (plain / "empty").write_bytes(b"")
        (plain / "noise").write_bytes(bytes(range(256)) * 16)
        (plain / "folder").mkdir()
        (plain / "folder" / "inside").write_text("x")
        with (plain / "large").open("wb") as file:
            file.truncate(2**40)  # of holes

    @property
    def unreadable(self) -> list[str]:
        """Nothing that a command reads lies there."""
        plain = self.folder / "plain"
        here = [str(plain / name) for name in ("pipe", "loop", "empty", "noise", "folder", "large", "nowhere")]
        return [*here, "/dev/zero", "/dev/null/x", f"{plain}/{'a' * 300}", "~nobody-at-all/x", f"{plain}/loop/x"]

    @property
    def unwritable(self) -> list[str]:
        """Nothing can be written there, or something else is."""
        plain = self.folder / "plain"
        here = [str(plain / name) for name in ("pipe", "loop", "noise", "noise/x", "loop/x")]
        return [*here, "/dev/null", "/dev/null/x", "/proc/nowhere/x", f"{plain}/{'a' * 300}"]

    def cases(self) -> Iterator[Named]:
        """Every special case."""
        for cases in (
            _pipelines,
            _schedules,
            _weights,
            _tables,
            _folders,
            _images,
            _pairs,
            _checkpoints,
            _classes,
            _stores,
            _words,
        ):
            yield from cases(self)


# --- pipelines -----------------------------------------------------------------------------------------------------------


def _copied(base: Path, to: Path) -> Path:
    """The folder again, its JSON files written anew and its weights links."""
    for file in sorted(path for path in base.rglob("*") if path.is_file()):
        here = to / file.relative_to(base)
        here.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".json":
            shutil.copy(file, here)
        else:
            here.symlink_to(file.resolve())
    return to


def _changed(base: Path, to: Path, file: str, change: Mapping[str, Any]) -> Path:
    """A copy whose JSON file says something else; a value of `...` is left out."""
    folder = _copied(base, to)
    told = json.loads((folder / file).read_bytes()) | dict(change)
    (folder / file).write_text(json.dumps({key: value for key, value in told.items() if value is not ...}))
    return folder


_UNET = "unet/config.json"
_CONFIGS: dict[str, list[dict[str, Any]]] = {
    _UNET: [
        *({"sample_size": value} for value in (10**9, 0, -16, 16.5, "16", [], [16, 0], True, {"a": 1}, [10**9] * 2)),
        *({"layers_per_block": value} for value in (10**5, "2", -1, [10**5, 10**5], True, {"a": 2})),
        *({"block_out_channels": value} for value in ([], [8] * 10**5, ["a", "b"], [-8, 16], "8", 8, [10**9, 10**9], [0, 0])),
        *({"down_block_types": value} for value in (["NoBlock"] * 2, "x", 5, [], [None, None], ["CrossAttnDownBlock2D"] * 40)),
        *({"cross_attention_dim": value} for value in ("16", 10**9, 0, -4, 17)),
        *({"attention_head_dim": value} for value in (0, "x", -2, 10**9)),
        *({"norm_num_groups": value} for value in (0, "x", 3, -1)),
        *({"in_channels": value} for value in (0, -4, "4", 10**7, 5, 10**50)),
        *({"transformer_layers_per_block": value} for value in (10**5, "x")),
        {"act_fn": 5},
        {"act_fn": "nonsense"},
        {"center_input_sample": "yes"},
        {"mid_block_type": 5},
        {"time_embedding_type": "nonsense"},
    ],
    "model_index.json": [
        *({"unet": value} for value in (["os", "system"], ["mine", "Mine"], ["subprocess", "Popen"], ["diffusers", "NoSuch"])),
        *({"unet": value} for value in (["diffusers", "AutoModel"], [None, None], ["diffusers.utils", "load_image"], ...)),
        *(
            {"text_encoder": value}
            for value in (["transformers", "AutoModel"], ["builtins", "exec"], ["transformers", "pipeline"])
        ),
        *({"scheduler": value} for value in (["../mine", "Mine"], ["diffusers", "StableDiffusionPipeline"], [None, None])),
        *(
            {"_class_name": value}
            for value in (["mine", "Mine"], 5, None, "os.system", "NoSuchPipeline", "UNet2DModel", {}, ...)
        ),
    ],
    "text_encoder/config.json": [
        *({"num_hidden_layers": value} for value in (10**5, "2", -1)),
        *({"hidden_size": value} for value in ("x", 0, 10**9, -16)),
        {"vocab_size": -1},
        {"model_type": "nonsense", "hidden_act": "nonsense"},
    ],
    "vae/config.json": [
        {"latent_channels": 0},
        {"block_out_channels": []},
        {"layers_per_block": 10**5},
        {"scaling_factor": "x"},
        {"down_block_types": ["NoBlock"] * 2},
    ],
}
_NAN, _INFINITY = float("nan"), float("inf")
_SCHEDULES: list[dict[str, Any]] = [
    *({"num_train_timesteps": value} for value in (0, -1, 10**9, "1000", 1.5, True, [1000])),
    *({"beta_start": value} for value in ("x", _NAN, _INFINITY)),
    {"beta_schedule": "nonsense"},
    {"timestep_spacing": "nonsense"},
    {"timestep_spacing": 5},
    {"prediction_type": "nonsense"},
    {"trained_betas": "abc"},
    {"steps_offset": "x"},
    {"clip_sample": "x"},
    {"_class_name": "NoSuchScheduler", "beta_schedule": "nonsense"},
    {"_class_name": 5, "beta_schedule": 5},
]


def _tiny(files: Files) -> Path:
    """A Stable Diffusion of a few thousand weights."""
    folder = files.folder / "sd"
    if not folder.exists():
        from tests.pipelines import PIPELINES

        PIPELINES["sd"].make().save_pretrained(folder)
    return folder


def _pipelines(files: Files) -> Iterator[Named]:
    base = _tiny(files)
    for file, changes in _CONFIGS.items():
        for number, change in enumerate(changes):
            place = _changed(base, files.folder / "pipelines" / f"{file.partition('/')[0]}-{number}", file, change)
            said = json.dumps({key: "left out" if value is ... else value for key, value in change.items()})[:60]
            yield f"pipelines: {file} {said}", ("layers", str(place))
    texts = {
        "empty": b"",
        "a list": b"[]",
        "half": b'{"a": ',
        "deep": b'{"a":' * 100_000,
        "deep lists": b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}",
        "no text": bytes(range(256)),
        "utf-16": '{"a": 1}'.encode("utf-16"),
        "a number of 5,000 digits": b'{"sample_size": ' + b"9" * 5000 + b"}",
        "large": b'{"a": "' + b"x" * 2**25 + b'"}',
    }
    for file in ("model_index.json", _UNET, "scheduler/scheduler_config.json"):
        for name, content in texts.items():
            place = _copied(base, files.folder / "pipelines" / f"text {name} {file.partition('/')[0]}")
            (place / file).write_bytes(content)
            yield f"pipelines: {file} is {name}", ("layers", str(place))
        for name in ("pipe", "loop", "folder"):
            place = _copied(base, files.folder / "pipelines" / f"{name} {file.partition('/')[0]}")
            (place / file).unlink()
            (place / file).symlink_to(files.folder / "plain" / name)
            yield f"pipelines: {file} is a {name}", ("layers", str(place))
    for name, kept in {"no words": (), "garbled words": (b"{", b"x")}.items():
        place = _copied(base, files.folder / "pipelines" / name)
        for file in (place / "tokenizer").iterdir():
            if file.name != "tokenizer_config.json":
                file.unlink()
                if kept:
                    file.write_bytes(kept[0])
        yield f"pipelines: a tokenizer with {name}", ("layers", str(place))
    from probekit.bundled import weights

    for number, value in enumerate(("../../../..", 5, "nonsense", "/etc", None, "mini-sd/../../..")):
        place = _copied(weights("avatar-ldm"), files.folder / "pipelines" / f"lent-{number}")
        (place / "borrowed.json").write_text(json.dumps({"vqvae": value}))
        yield f"pipelines: borrows {value!r}", ("layers", str(place))
    for number, content in enumerate(("[", "[]", '{"vqvae":' * 5000)):
        place = _copied(weights("avatar-ldm"), files.folder / "pipelines" / f"lends-{number}")
        (place / "borrowed.json").write_text(content)
        yield f"pipelines: borrowed.json {content[:10]}", ("layers", str(place))
    for number, value in enumerate((33, 10**9, 0, "32", [32, 33])):
        place = _changed(weights("avatar-ddpm"), files.folder / "pipelines" / f"ddpm-{number}", _UNET, {"sample_size": value})
        yield f"pipelines: a U-Net of pixels, sample_size {value}", ("layers", str(place))


def _schedules(files: Files) -> Iterator[Named]:
    for number, change in enumerate(_SCHEDULES):
        file = "scheduler/scheduler_config.json"
        place = _changed(_tiny(files), files.folder / "schedules" / str(number), file, change)
        yield f"pipelines: scheduler {json.dumps(change)[:60]}", ("inject", "sweep", "--model", str(place), *_TWO, *_OUT)


_TWO = ("--prompt-original", "a", "--prompt-edit", "b", "--num-steps", "2", "--layers", "@mid")
_OUT = ("--out", f"{THERE}/new")


def _header(told: Any, size: int | None = None) -> bytes:
    text = told if isinstance(told, bytes) else json.dumps(told).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text


def _weights(files: Files) -> Iterator[Named]:
    base, name = _tiny(files), "unet/diffusion_pytorch_model.safetensors"
    whole = (base / name).read_bytes()
    lies = {
        "empty": b"",
        "8 bytes": whole[:8],
        "half": whole[: len(whole) // 2],
        "a header of 2**40": struct.pack("<Q", 2**40) + whole[8:],
        "a header of 2**63": struct.pack("<Q", 2**63) + whole[8:],
        "a header that is a list": _header([]),
        "a deep header": _header(b"[" * 100_000),
        "no tensors": _header({}),
        "a tensor of 2**60": _header({"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 4]}}) + b"abcd",
        "a tensor beyond the end": _header({"a": {"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}}) + b"abcd",
        "tensors that overlap": _header({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("a", "b")})
        + b"abcd",
        "another network": _header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + b"abcd",
        "noise": bytes(range(256)) * 64,
    }
    for number, (what, content) in enumerate(lies.items()):
        place = _copied(base, files.folder / "weights" / str(number))
        (place / name).unlink()
        (place / name).write_bytes(content)
        yield f"weights: {what}", ("layers", str(place))
        if number < 8:
            file = files.folder / "weights" / f"{number}.safetensors"
            file.write_bytes(content)
            yield f"weights: a file of {what}", ("models", str(file))
    for what in ("pipe", "loop", "folder", "nowhere"):
        place = _copied(base, files.folder / "weights" / what)
        (place / name).unlink()
        (place / name).symlink_to(files.folder / "plain" / what)
        yield f"weights: a {what}", ("layers", str(place))
    from tests.test_load import BOMBS, RUN, zip_format

    hostile = {"inflates": BOMBS["inflated.pt"], "runs a command": zip_format(RUN["posix.system"])}
    for what, content in hostile.items():
        place = _copied(base, files.folder / "weights" / what)
        (place / name).unlink()
        (place / "unet" / "diffusion_pytorch_model.bin").write_bytes(content)
        yield f"weights: a pickle that {what}", ("layers", str(place))


# --- data ----------------------------------------------------------------------------------------------------------------


def _pictures(folder: Path, count: int) -> Path:
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    return folder


def _tables(files: Files) -> Iterator[Named]:
    faces = files.folder / "data" / "faces"
    names = sorted(path.name for path in faces.iterdir())

    def rows(header: str, *cells: str) -> bytes:
        return "\n".join([header, *(f"{name},{cells[i % len(cells)]}" for i, name in enumerate(names))]).encode()

    good = rows("file,Smiling", "yes", "no")
    tables: dict[str, bytes] = {
        "empty": b"",
        "a header alone": b"file,Smiling\n",
        "one column": b"file\n" + b"\n".join(name.encode() for name in names),
        "two columns of one name": rows("file,a,a", "1,0"),
        "a column without a name": rows("file,,a", "1,0"),
        "a column image": rows("file,image", "1", "0"),
        "a name of 250 letters": rows(f"file,{'a' * 250}", "1", "0"),
        "a name of 20,000 letters": rows(f"file,{'a' * 20_000}", "1", "0"),
        "a name with an escape": rows("file,a\x1b[31mb", "1", "0"),
        "a zero byte": rows("file,a", "1\x000", "0"),
        "no UTF-8": rows("file,a", "1", "0") + b"\n\xff\xfe",
        "UTF-16": good.decode().encode("utf-16"),
        "an open quote": rows("file,a", '"yes', "no"),
        "a short line": good + b"\nx.png",
        "a long line": rows("file,a", "1", "0,1"),
        "a picture that is not there": good + b"\nnowhere.png,yes",
        "a picture above": good + b"\n../../etc/passwd,yes",
        "a picture twice": good + f"\n{names[0]},yes".encode(),
        "an empty cell": rows("file,a", "yes", "no", ""),
        "1e400": rows("file,a", "1.5", "2.5", "1e400"),
        "1e300": rows("file,a", "1.5", "2.5", "1e300"),
        "-1e300": rows("file,a", *(f"{i}.5" for i in range(20)), "-1e300"),
        "a word among numbers": rows("file,a", "1.5", "2.5", "3.25", "x"),
        "2,000 columns": rows("file," + ",".join(f"a{i}" for i in range(2000)), ",".join("1" * 2000)),
        "a field of a megabyte": rows("file,a", "x" * 2**20, "y"),
        "a number of 5,000 digits": rows("file,a", "9" * 5000, "1.5", "2.5"),
        "nothing but commas": b"," * 2**20,
        "binary": bytes(range(256)) * 100,
    }
    place = files.folder / "tables"
    place.mkdir()
    for number, (what, content) in enumerate(tables.items()):
        (file := place / f"{number}.csv").write_bytes(content)
        yield f"tables: {what}", _probe(f"folder:{faces},labels={file}")
    for path in files.unreadable:
        if not path.endswith("empty"):
            yield f"tables: {Path(path).name[:20]}", _probe(f"folder:{faces},labels={path}")
    yield "tables: no labels", _probe(f"folder:{faces}")
    captions = place / "captions.csv"
    captions.write_bytes(rows("file,caption", "a face", ""))
    spec = f"folder:{faces},labels={captions}"
    sampling = ("probe", "layers", "--data", spec, "--train", "20", "--test", "4")
    yield "tables: only captions", _probe(spec)
    yield "tables: an empty caption", ("latents", "encode", "mini-sd:text", "--data", spec, "--split", "train", *_OUT)
    yield "tables: captions, and nothing to read", (*sampling, *_OUT)


def _probe(data: str) -> tuple[str, ...]:
    return ("probe", "run", "--models", "avatar-vae", "--data", data, "--train", "16", "--test", "4", *_OUT)


def _folders(files: Files) -> Iterator[Named]:
    place = files.folder / "folders"
    (place / "nothing").mkdir(parents=True)
    (place / "texts").mkdir()
    (place / "texts" / "a.txt").write_text("x")
    _pictures(place / "pipe", 12)
    os.mkfifo(place / "pipe" / "x.png")
    _pictures(place / "device", 12)
    (place / "device" / "x.png").symlink_to("/dev/zero")
    _pictures(place / "dangling", 12)
    (place / "dangling" / "x.png").symlink_to(place / "nowhere")
    _pictures(place / "circle", 12)
    (place / "circle" / "x.png").symlink_to(place / "circle" / "x.png")
    _pictures(place / "around", 12)
    (place / "around" / "again").symlink_to(place / "around")
    _pictures(place / "few", 3)
    (place / "self").symlink_to(place / "self")
    for name in ("nothing", "texts", "pipe", "device", "dangling", "circle", "around", "few", "self", "nowhere", "a" * 300):
        for spec in (f"folder:{place / name}", str(place / name)):
            yield f"folders: {name[:20]}", ("stitch", "run", "--models", "avatar-vae", "--data", spec, *_OUT)
    for text in (
        "celeba:",
        "folder:",
        "folder:,labels=x",
        "folder:x,labels=",
        "celeba:/etc",
        "folder:/dev/null",
        "folder:~nobody-x",
    ):
        yield f"folders: {text}", ("probe", "run", "--models", "avatar-vae", "--data", text, *_OUT)
    celeba = {
        "no labels": None,
        "no count": "x\nSmiling\n000001.jpg 1",
        "a count of 5,000 digits": "9" * 5000 + "\nSmiling\n000001.jpg 1",
        "a count too high": "7\nSmiling\n000001.jpg 1",
        "no names": "1\n\n",
        "another value": "1\nSmiling\n000001.jpg 3",
        "too many values": "1\nSmiling\n000001.jpg 1 1",
        "another picture": "1\nSmiling\n000002.jpg 1",
        "a column image": "1\nimage\n000001.jpg 1",
    }
    for what, text in celeba.items():
        folder = place / f"celeba {what}"
        _pictures(folder / "img_align_celeba", 1)
        (folder / "img_align_celeba" / "00.png").rename(folder / "img_align_celeba" / "000001.jpg")
        if text is not None:
            (folder / "list_attr_celeba.txt").write_text(text)
        yield f"folders: CelebA with {what}", _probe(f"celeba:{folder}")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, *more: bytes) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + _chunk(b"IDAT", zlib.compress(bytes(1000))) + _chunk(b"IEND", b"")


def _images(files: Files) -> Iterator[Named]:
    from PIL import Image

    whole, gif, tiff = io.BytesIO(), io.BytesIO(), io.BytesIO()
    picture = Image.new("RGB", (64, 64), "red")
    picture.save(whole, "PNG")
    picture.save(gif, "GIF")
    picture.save(tiff, "TIFF")
    contents = {
        "empty": b"",
        "text": b"a picture",
        "half": whole.getvalue()[:90],
        "60,000 pixels a side": _png(60_000, 60_000),
        "2**31 pixels a side": _png(2**31 - 1, 2**31 - 1),
        "9,000 pixels a side": _png(9000, 9000),
        "no pixels": _png(0, 0),
        "a text that inflates": _png(64, 64, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**30), 9))),
        "a GIF": gif.getvalue(),
        "a TIFF": tiff.getvalue(),
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "a BMP of 2**31": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 58, 0, 0, 54, 40, 2**31 - 1, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
        "noise": bytes(range(256)) * 40,
    }
    sweep = ("inject", "sweep", "--model", "mini-sd", *_TWO, *_OUT)
    place = files.folder / "pictures"
    for number, (what, content) in enumerate(contents.items()):
        (place / f"{number}.png").write_bytes(content)
        yield f"pictures: {what}", (*sweep, "--image-original", str(place / f"{number}.png"))
        if number % 3 == 0:
            folder = _pictures(place / f"data-{number}", 30)
            for path in folder.iterdir():
                path.write_bytes(content)
            yield f"pictures: a folder of {what}", ("latents", "encode", "avatar-vae", "--data", str(folder), *_SPLIT)
    for path in files.unreadable:
        yield f"pictures: {Path(path).name[:20]}", (*sweep, "--image-edit", path)


_SPLIT = ("--split", "train")


# --- pairs ---------------------------------------------------------------------------------------------------------------


def _pairs(files: Files) -> Iterator[Named]:
    place = files.folder / "pairs"
    place.mkdir()
    bomb = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]\n" for i in range(12))
    texts: dict[str, bytes | str] = {
        "empty": "",
        "a mapping": "original: a\nedit: b\n",
        "a number": "5",
        "nothing": "[]",
        "an open list": "- {original: [\n",
        "a pair of numbers": "- {original: 1, edit: 2}",
        "a pair that is text": "- a red fish",
        "nested 3,000 deep": "[" * 3000 + "]" * 3000,
        "nested 100,000 deep": "[" * 100_000,
        "a bomb": bomb,
        "an alias": "- &a {original: a, edit: b}\n- *a\n",
        "an alias of itself": "&a [*a]",
        "a tag of Python's": "- !!python/object/apply:os.system [touch ran]",
        "seed": "- {original: a, edit: b, seed: true}",
        "noise true": "- {original: a, edit: b, noise: true}",
        "noise beyond": "- {original: a, edit: b, noise: 18446744073709551616}",
        "noise of 5,000 digits": f"- {{original: a, edit: b, noise: {'9' * 5000}}}",
        "noise 1.5": "- {original: a, edit: b, noise: 1.5}",
        "an empty prompt": "- {original: '', edit: b}",
        "a blank prompt": "- {original: '  ', edit: b}",
        "half a character": '- {original: "\\ud800", edit: b}',
        "a control character": '- {original: "a\\e[31m", edit: b}',
        "a zero byte": '- {original: "a\\0", edit: b}',
        "a prompt of 100,000": f"- {{original: {'a' * 100_000}, edit: b}}",
        "a factor of 250": f"- {{original: a, edit: b, factor: {'a' * 250}}}",
        "a factor of two lines": '- {original: a, edit: b, factor: "a\\nb"}',
        "an empty factor": "- {original: a, edit: b, factor: ''}",
        "a date": "- {original: 2001-01-01, edit: b}",
        "a date that is none": "- {original: 2001-99-99, edit: b}",
        "another key": "- {original: a, edit: b, prompt: c}",
        "a key that is a list": "- {[original]: a, edit: b}",
        "a key of [/x]": "- {original: a, edit: b, '[/x]': c}",
        "5,000 pairs": "- {original: a, edit: b}\n" * 5000,
        "two megabytes": "- {original: a, edit: b}\n" * 90_000,
        "no picture": "- {original: a, edit: b, image_original: nowhere.png}",
        "a picture that is a pipe": f"- {{original: a, edit: b, image_original: {files.folder / 'plain' / 'pipe'}}}",
        "an empty picture": "- {original: a, edit: b, image_original: ''}",
        "not UTF-8": b"- {original: \xff, edit: b}",
        "UTF-32": "- {original: a, edit: b}".encode("utf-32"),
        "tabs": "-\t{original: a,\tedit: b}\n\t- x",
        "two documents": "- {original: a, edit: b}\n---\n- {original: a, edit: b}",
    }
    for number, (what, content) in enumerate(texts.items()):
        file = place / f"{number}.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        yield f"pairs: {what}", ("inject", "sweep", "--num-steps", "2", "--pairs-file", str(file), *_OUT)


# --- checkpoints ---------------------------------------------------------------------------------------------------------


def _checkpoints(files: Files) -> Iterator[Named]:
    import torch

    from tests.test_load import BOMBS, CALLS, RUN, SIZES, whole, zip_format

    place = files.folder / "checkpoints"
    place.mkdir()
    for number, (what, body) in enumerate((RUN | CALLS).items()):
        file = place / (f"{number}.pkl" if number % 2 else f"{number}.pt")
        file.write_bytes((whole if number % 2 else zip_format)(body))
        yield f"checkpoints: {what}", ("models", str(file))
    for what, content in BOMBS.items():
        (place / what).write_bytes(content)
        yield f"checkpoints: {what}", ("models", str(place / what))
    for what, state in SIZES.items():
        torch.save(state, place / f"{what}.pt")
        yield f"checkpoints: {what}", ("models", str(place / f"{what}.pt"))
    many = io.BytesIO()
    with zipfile.ZipFile(many, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", whole(b"}"))
        archive.writestr("archive/data/0", bytes(2**28))
    (place / "zip in zip.pt").write_bytes(many.getvalue())
    yield "checkpoints: a zip that inflates", ("models", str(place / "zip in zip.pt"))
    for path in files.unreadable:
        if Path(path).name not in ("large",):
            yield f"checkpoints: {Path(path).name[:20]}", ("models", path)


# --- a class of one's own ------------------------------------------------------------------------------------------------

_OWN = """
import torch
class Mine:
    image_size = 16
    def encode(self, images):
        return images.flatten(1)[:, :8]
"""


def _classes(files: Files) -> Iterator[Named]:
    place = files.folder / "classes"
    place.mkdir()
    encode = "    def encode(self, images):\n        return images.flatten(1)[:, :8]\n"

    def of(size: str, body: str = encode) -> str:
        return f"import sys, torch\nclass Mine:\n    image_size = {size}\n{body}"

    def raising(what: str) -> str:
        return of("16", f"    def __init__(self):\n        raise {what}\n{encode}")

    texts = {
        **{f"image_size {size}": of(size) for size in ("10**6", "0", "-16", "16.0", "'16'", "True", "None", "10**30", "[16]")},
        **{f"raises {what}": raising(what) for what in ("SystemExit(0)", "SystemExit", "BaseException('x')", "GeneratorExit")},
        **{
            f"raises {what}": raising(what)
            for what in ("ValueError('a\\nb')", "MemoryError", "RecursionError", "StopIteration")
        },
        "ends the process": raising("sys.exit(3)"),
        "ends at import": "import sys\nsys.exit(0)\n",
        "fails at import": "1 / 0\n",
        "is no Python": "class Mine(\n",
        "imports what is not there": "import nowhere_at_all\n",
        "has no class": "x = 1\n",
        "is a number": "Mine = 5\n",
        "has no methods": "class Mine:\n    image_size = 16\n",
        "has methods that are numbers": "class Mine:\n    image_size = 16\n    encode = 5\n",
        "has an image_size that raises": of(
            "16", f"    @property\n    def image_size(self):\n        raise SystemExit\n{encode}"
        ),
        "encodes to None": of("16", "    def encode(self, images):\n        return None\n"),
        "encodes to text": of("16", "    def encode(self, images):\n        return 'x'\n"),
        "encodes to another number": of("16", "    def encode(self, images):\n        return torch.zeros(7, 8)\n"),
        "encodes to a vector": of("16", "    def encode(self, images):\n        return torch.zeros(len(images))\n"),
        "encodes and exits": of("16", "    def encode(self, images):\n        raise SystemExit(0)\n"),
        "decodes to another size": of(
            "16", f"{encode}    def decode(self, latents):\n        return torch.zeros(len(latents), 3, 8, 8)\n"
        ),
        "samples to nothing": of(
            "16", "    def decode(self, z):\n        return z\n    def sample(self, n, generator):\n        return None\n"
        ),
        "raises what cannot be told": "class Odd(Exception):\n    def __str__(self):\n        raise ValueError\n"
        + of("16", f"    def __init__(self):\n        raise Odd\n{encode}"),
    }
    for number, (what, text) in enumerate(texts.items()):
        (place / f"{number}.py").write_text(text)
        yield f"classes: {what}", ("models", f"{place / f'{number}.py'}:Mine")
    (place / "nan.py").write_text(of("16", "    def encode(self, images):\n        return images.flatten(1) / 0 * 0\n"))
    faces = files.folder / "data" / "faces"
    spec = f"{place / 'nan.py'}:Mine"
    yield "classes: encodes to NaN", ("stitch", "run", "--models", f"{spec},avatar-vae", "--data", str(faces), *_OUT)
    for name in ("a b.py", "a_b.py"):
        (place / name).write_text(_OWN.replace("16", "32"))
    both = f"{place / 'a b.py'}:Mine,{place / 'a_b.py'}:Mine"
    yield (
        "classes: two whose names fall together",
        (
            *("properties", "run", "--spaces", both, "--data", str(faces)),
            *_OUT,
        ),
    )
    for path in files.unreadable:
        yield f"classes: {Path(path).name[:20]}", ("models", f"{path}.py:Mine")
    for name in ("pipe", "loop", "folder", "noise"):
        (place / f"{name}.py").symlink_to(files.folder / "plain" / name)
        yield f"classes: a {name}", ("models", f"{place / f'{name}.py'}:Mine")
        yield f"classes: a script that is a {name}", ("inject", "script", str(place / f"{name}.py"), *_TWO)
    scripts = {
        "exits": "raise SystemExit(0)",
        "has no operation": "x = 1",
        "has a number": "operation = 5",
        "exits when it is called": "def operation(target, source, context):\n    raise SystemExit(0)\n",
        "raises when it is called": "def operation(target, source, context):\n    raise BaseException('a\\nb')\n",
        "returns text": "def operation(target, source, context):\n    return 'x'\n",
        "returns another shape": "def operation(target, source, context):\n    return target[0]\n",
    }
    for number, (what, text) in enumerate(scripts.items()):
        (place / f"script-{number}.py").write_text(text)
        yield f"classes: a script that {what}", ("inject", "script", str(place / f"script-{number}.py"), *_TWO)


# --- stores --------------------------------------------------------------------------------------------------------------


def _stores(files: Files) -> Iterator[Named]:
    """Latents on disk whose array is described as what it is not."""
    import torch

    from probekit.data import load_data
    from probekit.latents.store import LatentStore
    from probekit.models import load_space

    faces = str(files.folder / "data" / "faces")
    with torch.no_grad():
        space, data = load_space("random", device="cpu"), load_data(faces, 32)
        store = LatentStore(files.folder / "store", space, data)
        store.encode(data.split("train")[:4])
    described = Path("latents") / "zarr.json"

    def lie(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            told = json.loads((folder / described).read_bytes())
            change(told)
            (folder / described).write_text(json.dumps(told))

        return write

    lies: dict[str, Callable[[Path], None]] = {
        "a shape of 10**12": lie(lambda told: told.update(shape=[10**12, *told["shape"][1:]])),
        "chunks of 10**9": lie(lambda told: told["chunk_grid"]["configuration"].update(chunk_shape=[10**9, 512])),
        "another type": lie(lambda told: told.update(data_type="complex128")),
        "no codecs": lie(lambda told: told.update(codecs=[])),
        "text for a shape": lie(lambda told: told.update(shape="x")),
        "half a description": lambda folder: (folder / described).write_bytes((folder / described).read_bytes()[:50]),
        "a deep description": lambda folder: (folder / described).write_text('{"a":' * 100_000),
    }
    for number, (what, change) in enumerate(lies.items()):
        folder = files.folder / "stores" / str(number)
        shutil.copytree(files.folder / "store", folder)
        change(folder)
        yield f"stores: {what}", ("latents", "encode", "random", "--data", faces, "--split", "train", "--out", str(folder))


# --- words ---------------------------------------------------------------------------------------------------------------


def _words(files: Files) -> Iterator[Named]:
    """Specs, steps and names that mean nothing."""
    sweep = ("inject", "sweep", *_TWO[:4], "--layers", "@mid", *_OUT)
    for spec in (
        "avatar-vae:",
        "avatar-vae::",
        "avatar-vae:nothing",
        "avatar-vae:mean:x=1",
        "avatar-vae:[/x]",
        ":mean",
        "avatar-ddpm:h:t=-1",
        f"avatar-ddpm:h:t={10**9}",
        "avatar-ddpm:h:t=1e3",
        "avatar-ddpm:h:t=nan",
        f"avatar-ddpm:h:t={'9' * 5000}",
        "avatar-ddpm:h:layer=",
        "avatar-ddpm:h:layer=nothing",
        "avatar-ddpm:h:layer=*",
        "avatar-ddpm:h:stream=nothing",
        "avatar-ddpm:h:seed=-1",
        f"avatar-ddpm:h:seed={2**64}",
        f"avatar-ddpm:inverted:steps={10**12}",
        "avatar-ddpm:inverted:steps=0",
        "avatar-ddpm:inverted:method=",
        "avatar-ddpm:inverted:method=nonsense",
        "avatar-ddpm:noised:t=1000",
        "avatar-ddpm:noised:t=5:t=5",
        "avatar-ddpm:noised:=5",
        "mini-sd:text:seed=x",
        "avatar-vae,avatar-vqvae",
        "nobody-at-all/nothing",
        "nobody-at-all/[x]",
        "/",
        ".",
        "..",
    ):
        told = spec if len(spec) < 60 else f"{spec[:30]}…"
        yield f"words: {told}", ("latents", "encode", spec, "--data", str(files.folder / "data" / "faces"), *_OUT)
    for steps in (
        "early",
        "0%-0%",
        "50%-10%",
        "5-3",
        "t1-1000",
        "-1",
        "0-",
        "99999",
        "1,,2",
        "0%-200%",
        "all,0",
        "٣",
        "t9999-9998",
    ):
        yield f"words: --steps {steps}", (*sweep, "--num-steps", "4", "--steps", steps)
    for model in (str(_tiny(files)), "mini-sd", "mini-sd3"):
        yield f"words: 1001 steps of {Path(model).name}", (*sweep, "--model", model, "--num-steps", "1001")
    yield "words: 1001 steps of an image", ("inject", "image", *_TWO[:4], "--layers", "@mid", "--num-steps", "1001")
    yield "words: 1001 steps of planted-sd", ("inject", "calibrate", "--num-steps", "1001", *_OUT)
    for device in ("meta", "cpu:x", "cuda:99", "vulkan", "xla", "hpu"):
        yield f"words: --device {device}", ("layers", "mini-sd", "--device", device)
    for text in ("875,875", "x", str(10**9), "-1", "1000", "875,,1", "٣"):
        yield f"words: --timesteps {text}", ("probe", "layers", f"--timesteps={text}", *_OUT)
    for text in ("0", "0,1,2", "0,99999999999", "a,b", "-1,0", "0,0.5", "0," + "9" * 5000):
        yield f"words: --pictures {text[:20]}", ("invert", "interpolate", f"--pictures={text}", *_OUT)
    for text in ("0,10", "10,x", "1000000", "10,", "1001", "٣"):
        yield f"words: --steps {text} of a noise map", ("noise-map", "run", f"--steps={text}", *_OUT)
    for text in ("plain,plain", "plain,nothing", ","):
        yield f"words: --methods {text}", ("invert", "run", "--methods", text, *_OUT)
    for text in ("0/2", "3/2", "1/0", "x", "1/2/3", "-1/2", "1/" + "9" * 5000):
        yield f"words: --shard {text[:20]}", (*sweep, "--num-steps", "2", f"--shard={text}")
    for text in ("nan", "inf", "-1", "1e400", "", "x"):
        yield f"words: --alpha {text}", ("stitch", "run", "--models", "avatar-vae,avatar-vqvae", f"--alpha={text}", *_OUT)
    for text in ("", ",", "structure,", "style", "Structure", "[/x]"):
        yield f"words: --factors {text!r}", ("inject", "sweep", f"--factors={text}", *_OUT)
    yield "words: more images than there are", ("probe", "run", "--train", "999999", "--test", "999999", *_OUT)
    yield (
        "words: a run of another config",
        (*sweep[:-2], "--model", str(_tiny(files)), "--num-steps", "2", "--out", f"{THERE}/run"),
    )
    yield (
        "words: a run in a file",
        (*sweep[:-2], "--model", str(_tiny(files)), "--num-steps", "2", "--out", f"{THERE}/notes.txt"),
    )
    yield "words: a folder of one's own", (*sweep[:-2], "--model", str(_tiny(files)), "--num-steps", "2", "--out", THERE)
    yield "words: latents in a run", ("latents", "encode", "avatar-vae", "--n", "2", "--out", f"{THERE}/run")
    yield "words: other latents", ("latents", "encode", "avatar-vae", "--n", "2", "--out", f"{THERE}/store")
    for name in ("train", "evaluate"):
        for text in ("mini-s", "", "[/x]", "../mini-sd", "random"):
            yield f"words: zoo {name} {text!r}", ("zoo", name, "--", text)
    for out in ("/dev/null/x", f"{THERE}/notes.txt", f"{THERE}/notes.txt/x"):
        yield f"words: zoo train --out {out}", ("zoo", "train", "avatar-vae", "--out", out)
        yield (
            f"words: zoo train --checkpoints {out}",
            ("zoo", "train", "avatar-vae", "--out", f"{THERE}/new", "--checkpoints", out),
        )
    for where in (THERE, f"{THERE}/notes.txt", f"{THERE}/nowhere", "/dev/null", "/"):
        yield f"words: describe {where}", ("describe", where)
    yield "words: --against no run", ("probe", "layers", "--against", f"{THERE}/store", *_OUT)
    yield "words: no such command", ("injct",)
    yield "words: no such verb", ("inject", "swep")
    yield "words: no such option", (*sweep, "--sed", "1")
    yield "words: an argument too many", (*sweep, "more")
    yield "words: no argument", ("describe",)
    yield "words: a value for a flag", (*sweep, "--by-time=5")

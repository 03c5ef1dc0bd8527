"""`probekit.load` on every file and folder that it knows, and on what is broken, foreign or hostile."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from probekit import ProbekitError, load
from probekit.models import Model
from probekit.models.families import glow, pixels, stylegan2, vae, vqvae
from probekit.models.papers.ddpm import from_ermon, from_openai, published_scheduler
from probekit.zoo.avatar_families import _save_own
from tests import test_glow
from tests.conftest import probekit, tiny
from tests.conftest import refused as refused_by_the_commands
from tests.test_ddpm import openai_state
from tests.test_stylegan2 import network as tiny_gan
from tests.test_vae import HYPER_PARAMETERS, PLAN, tiny_vq

State = dict[str, Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- what loads --------------------------------------------------------------------------------------------------------


def tiny_vae() -> vae.VAE:
    torch.manual_seed(0)
    return vae.VAE(**PLAN)


def guided_state() -> State:
    """guided-diffusion's names: improved-diffusion's, with resnets where it resamples."""
    state = openai_state((64, 64), (False, True), scale_shift=True)
    resamplers = [found for key in state if (found := re.fullmatch(r"(.+)\.(op|conv)\.weight", key))]
    for at, kind in (found.groups() for found in resamplers):
        for leaf in ("weight", "bias"):
            kernel = state.pop(f"{at}.{kind}.{leaf}")
            state |= {f"{at}.in_layers.2.{leaf}": kernel, f"{at}.out_layers.3.{leaf}": kernel.flip(0)}
            state |= {f"{at}.{norm}.0.{leaf}": torch.ones(64) for norm in ("in_layers", "out_layers")}
        state |= {f"{at}.emb_layers.1.weight": torch.zeros(128, 256), f"{at}.emb_layers.1.bias": torch.zeros(128)}
    return state


def ermon_state(seed: int) -> State:
    """Random tensors under ermongroup/ddim's names: CIFAR-10's multipliers, one resnet a level, attention on the second."""
    generator, state, widths = seeded(seed), {}, (32, 64, 64, 64)

    def add(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / 10
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) / 10

    def resnet(name: str, before: int, after: int) -> None:
        add(f"{name}.norm1", before)
        add(f"{name}.conv1", after, before, 3, 3)
        add(f"{name}.temb_proj", after, 128)
        add(f"{name}.norm2", after)
        add(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            add(f"{name}.nin_shortcut", after, before, 1, 1)

    def attention(name: str, width: int) -> None:
        add(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{name}.{part}", width, width, 1, 1)

    add("temb.dense.0", 128, 32)
    add("temb.dense.1", 128, 128)
    add("conv_in", 32, 3, 3, 3)
    here, skips = 32, [32]
    for level, width in enumerate(widths):
        resnet(f"down.{level}.block.0", here, width)
        if level == 1:
            attention(f"down.{level}.attn.0", width)
        here, skips = width, [*skips, width]
        if level < 3:
            add(f"down.{level}.downsample.conv", width, width, 3, 3)
            skips.append(width)
    resnet("mid.block_1", here, here)
    attention("mid.attn_1", here)
    resnet("mid.block_2", here, here)
    for level in reversed(range(4)):
        for block in range(2):
            resnet(f"up.{level}.block.{block}", here + skips.pop(), widths[level])
            here = widths[level]
            if level == 1:
                attention(f"up.{level}.attn.{block}", here)
        if level:
            add(f"up.{level}.upsample.conv", here, here, 3, 3)
    add("norm_out", here)
    add("conv_out", 3, here, 3, 3)
    return state


def prefixed(state: Any) -> Any:
    return {f"module.{key}": value for key, value in state.items()}


def write(file: Path, content: Any, **options: Any) -> Path:
    torch.save(content, file, **options)
    return file


def unet_model(unet: Any, scheduler: Any, told: float = 1.0) -> Model:
    return pixels.as_model(unet, scheduler, "expected", told=told)


Made = tuple[Path, Model]
Pickled = Callable[..., bytes]


def glow_file(folder: Path, _: Pickled) -> Made:
    network = test_glow.glow(size=64, blocks=2, width=8)
    return write(folder / "glow.pt", network.state_dict()), glow.as_model(network, "expected", 64)


def glow_of_data_parallel(folder: Path, _: Pickled) -> Made:
    network = test_glow.glow(size=64, blocks=2, width=8, affine=False, lu=False)
    path = write(folder / "model_000001.pt", prefixed(network.state_dict()), _use_new_zipfile_serialization=False)
    return path, glow.as_model(network, "expected", 64)


def vae_of_lightning(folder: Path, _: Pickled) -> Made:
    network = tiny_vae()
    content = {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "1.4.9",
        "callbacks": {},
        "lr_schedulers": [],
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"seen": {1}}]}],
        "state_dict": network.state_dict(),
        "hyper_parameters": argparse.Namespace(**HYPER_PARAMETERS),
    }
    return write(folder / "vae.ckpt", content), vae.as_model(network, "expected")


def ermon_list(folder: Path, _: Pickled) -> Made:
    ema = ermon_state(1)
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    path = write(folder / "ckpt.ckpt", [prefixed(ermon_state(0)), optimizer, 7, 1000, ema])
    return path, unet_model(from_ermon(ema), published_scheduler(ema))


def improved_pt(folder: Path, _: Pickled) -> Made:
    state = openai_state((32, 64), (False, True), scale_shift=True)
    return write(folder / "ema_0.9999_500000.pt", state), unet_model(from_openai(state), published_scheduler(state), 0.25)


def guided_pt(folder: Path, _: Pickled) -> Made:
    state = guided_state()
    return write(folder / "lsun.pt", state), unet_model(from_openai(state), published_scheduler(state))


def ada_pickle(folder: Path, pickled: Pickled) -> Made:
    network = tiny_gan()
    (folder / "network.pkl").write_bytes(pickled(network))
    return folder / "network.pkl", stylegan2.as_model(network, "expected")


def plain_generator(folder: Path, _: Pickled) -> Made:
    network = tiny_gan()
    save_file(network.state_dict(), folder / "generator.safetensors")
    return folder / "generator.safetensors", stylegan2.as_model(network, "expected")


def unet_folder(folder: Path, _: Pickled) -> Made:
    from diffusers import DDIMScheduler

    unet = tiny()
    unet.save_pretrained(folder / "unet2d")
    return folder / "unet2d", unet_model(unet, DDIMScheduler(beta_start=1e-4, beta_end=0.02))


def ddpm_folder(folder: Path, _: Pickled) -> Made:
    from diffusers import DDPMPipeline, DDPMScheduler

    unet, scheduler = tiny(), DDPMScheduler(num_train_timesteps=200, beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(unet, scheduler).save_pretrained(folder / "ddpm")
    return folder / "ddpm", unet_model(unet, scheduler)


def vq_folder(folder: Path, _: Pickled) -> Made:
    network = tiny_vq()
    network.save_pretrained(folder / "vq")
    return folder / "vq", vqvae.as_model(network, "expected")


def own_folder(family: str) -> Callable[[Path, Pickled], Made]:
    def make(folder: Path, _: Pickled) -> Made:
        network: Any = {"vae": tiny_vae, "stylegan2": tiny_gan, "glow": lambda: test_glow.glow(size=32, width=8)}[family]()
        _save_own(family)(network, folder / family)
        network.half().float()  # which is what the file holds
        made = {"vae": vae, "stylegan2": stylegan2}.get(family)
        return folder / family, made.as_model(network, "expected") if made else glow.as_model(network, "expected", 32)

    return make


FILES = {
    "glow": (glow_file, "glow", ["z", "eps"]),
    "glow, module.": (glow_of_data_parallel, "glow", ["z", "eps"]),
    "vae": (vae_of_lightning, "vae", ["sample", "mean"]),
    "ddim": (ermon_list, "ddpm", ["inverted", "noised", "h", "noise"]),
    "improved": (improved_pt, "ddpm", ["inverted", "noised", "h", "noise"]),
    "guided": (guided_pt, "ddpm", ["inverted", "noised", "h", "noise"]),
    "ada": (ada_pickle, "stylegan2", ["w", "z", "w+"]),
    "generator": (plain_generator, "stylegan2", ["w", "z", "w+"]),
}
FOLDERS = {
    "UNet2DModel": (unet_folder, "ddpm", ["inverted", "noised", "h", "noise"]),
    "DDPMPipeline": (ddpm_folder, "ddpm", ["inverted", "noised", "h", "noise"]),
    "VQModel": (vq_folder, "vqvae", ["grid", "quantized"]),
    "own vae": (own_folder("vae"), "vae", ["sample", "mean"]),
    "own glow": (own_folder("glow"), "glow", ["z", "eps"]),
    "own stylegan2": (own_folder("stylegan2"), "stylegan2", ["w", "z", "w+"]),
}


@pytest.mark.parametrize("kind", [*FILES, *FOLDERS])
def test_a_model_is_recognised_and_gives_what_its_network_gives(kind: str, tmp_path: Path, reference: Pickled) -> None:
    make, family, spaces = (FILES | FOLDERS)[kind]
    path, expected = make(tmp_path, reference)
    model = load(path, device="cpu")
    assert (model.name, model.family, list(model.spaces)) == (str(path), family, spaces)
    assert (model.image_size, model.parameters, model.digest) == (expected.image_size, expected.parameters, expected.digest)
    assert model.network is not None and not model.network.training
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}
    images = torch.rand(2, 3, model.image_size, model.image_size, generator=seeded(1)) * 2 - 1
    compared = 0
    # of few steps; on the way from noise rounding grows
    steps, tolerance = ({"steps": 2}, 1e-4) if family == "ddpm" else ({}, 1e-6)
    for name in model.spaces:
        space, other = model.space(name, **steps), expected.space(name, **steps)
        assert space.shape == other.shape
        if space.encoder is not None:
            torch.testing.assert_close(space.encode(images), other.encode(images), rtol=0, atol=1e-6)
            compared += 1
        if space.decoder is not None:
            latents = space.encode(images) if space.encoder is not None else other.sample(2, seeded(2))
            torch.testing.assert_close(space.decode(latents), other.decode(latents), rtol=0, atol=tolerance)
            compared += 1
    assert compared


def test_a_file_that_says_its_image_size_is_taken_at_its_word(tmp_path: Path) -> None:
    path, expected = own_folder("glow")(tmp_path, lambda: b"")
    model = load(path / "model.safetensors", device="cpu")
    assert (model.image_size, model.digest) == (expected.image_size, expected.digest)


def test_sets_and_slices_of_every_protocol_and_format_are_read(tmp_path: Path) -> None:
    from probekit.models.papers.checkpoint import read

    held = {"set": {1, 2}, "slice": slice(1, 2), "size": torch.Size([2]), "type": torch.float16, "complex": 1j}
    tensors = {"view": torch.arange(10)[::2], "turned": torch.ones(2, 3).T, "none": torch.zeros(0, 3), "one": torch.tensor(3)}
    for protocol in (2, 4, 5):
        for zipped in (True, False):
            options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
            found = read(write(tmp_path / "x.pt", held | tensors, **options))
            assert {key: found[key] for key in held} == held, options
            assert all(torch.equal(found[key], tensors[key]) for key in tensors), options


# --- what is broken or foreign -----------------------------------------------------------------------------------------


def refused(path: Path | str, says: str | None = None) -> str:
    with pytest.raises(ProbekitError, match=says) as error:
        load(path, device="cpu")
    said = str(error.value)
    assert "\n" not in said and len(said) < 2000, said[:500]
    # which file, too, where a message is from far below
    assert Path(path).name[:20] in said, said
    return said


def cut(file: Path) -> dict[str, bytes]:
    whole = file.read_bytes()
    return {"10 bytes": whole[:10], "half": whole[: len(whole) // 2], "all but 10": whole[:-10]}


@pytest.mark.parametrize("kind", FILES)
def test_a_truncated_file_is_refused(kind: str, tmp_path: Path, reference: Pickled) -> None:
    path, _ = FILES[kind][0](tmp_path, reference)
    for content in cut(path).values():
        path.write_bytes(content)
        refused(path, "damaged|is no checkpoint|cannot be read")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_truncated_weights_is_refused(kind: str, tmp_path: Path, reference: Pickled) -> None:
    folder, _ = FOLDERS[kind][0](tmp_path, reference)
    (weights,) = folder.rglob("*.safetensors")
    before = sorted(tmp_path.rglob("*"))
    for content in cut(weights).values():
        weights.write_bytes(content)
        refused(folder)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".pkl", ".safetensors", ""])
def test_what_is_no_checkpoint_is_refused(suffix: str, tmp_path: Path) -> None:
    from PIL import Image

    picture, archive = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "PNG")
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("word/document.xml", "<xml/>")
    others = {
        "empty": b"",
        "text": b"a text,\nof two lines\n",
        "picture": picture.getvalue(),
        "archive": archive.getvalue(),
        "zeros": bytes(100),
        "half a zip": b"PK\x03\x04",
        "a number": pickle.dumps(3),
        "legacy": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        "json": b'{"a": 1}',
        "list": pickle.dumps([1, [2]]),
    }
    for name, content in others.items():
        (tmp_path / f"{name}{suffix}").write_bytes(content)
        refused(tmp_path / f"{name}{suffix}")


def test_other_networks_weights_are_refused(tmp_path: Path) -> None:
    resnet = {"conv1.weight": torch.zeros(4, 3, 7, 7), "layer1.0.bn1.running_mean": torch.zeros(4), "fc.bias": torch.zeros(2)}
    for name, content in {
        "resnet": resnet,
        "wrapped": {"state_dict": resnet, "epoch": 3},
        "list": [resnet, {}, 3],
        "odd list": [1, "a", None],
        "numbered": {0: torch.zeros(2)},
        "list of numbered": [{0: torch.zeros(2)}],
        "tensor": torch.zeros(3),
        "none": None,
        "deep": {"state_dict": {"state_dict": resnet}},
        "bytes": {b"conv_in.weight": torch.zeros(2)},
    }.items():
        refused(write(tmp_path / f"{name}.pt", content), "holds none of")
    save_file(resnet, tmp_path / "resnet.safetensors")
    refused(tmp_path / "resnet.safetensors", "holds none of")


def test_paths_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    refused(tmp_path / "folder.pt", "the folder is no model")
    for path in (
        tmp_path / "nowhere.pt",
        "models/nowhere.pt",
        "a" * 300,
        f"{tmp_path}/{'a' * 300}.pt",
        "~nobody-at-all/x.pt",
    ):
        said = refused(path)
        assert "could not be loaded" not in said, said  # no hub is asked for what is plainly a file


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_and_folders_that_may_not_be_read_are_refused(tmp_path: Path) -> None:
    private = write(tmp_path / "private.pt", {})
    private.chmod(0)
    refused(private, "Permission denied")
    private.chmod(0o600)
    tmp_path.chmod(0)
    refused(private, "Permission denied")


OWN = {"family": "vae", "image_size": "16"}


@pytest.mark.parametrize(
    ("metadata", "config"),
    [
        ({"family": "vae"}, None),
        (OWN | {"image_size": "many"}, None),
        (OWN | {"image_size": "-16"}, None),
        (OWN | {"family": "nonsense"}, None),
        (OWN, None),
        ({"family": "glow", "image_size": "32"}, None),
        ({"family": "stylegan2", "image_size": "32"}, None),
        (None, "{"),
        (None, "[]"),
        (None, "[" * 100_000),
        (None, '{"_class_name": ["UNet2DModel"]}'),
        (None, '{"_class_name": "AutoencoderKL"}'),
    ],
)
def test_folders_that_say_nonsense_are_refused(metadata: Any, config: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "nonsense"
    folder.mkdir()
    if metadata:
        save_file({"enc.in_conv.weight": torch.zeros(1)}, folder / "model.safetensors", metadata)
    if config:
        (folder / "config.json").write_text(config)
    refused(folder)


def test_a_folder_with_code_of_its_own_runs_none(tmp_path: Path) -> None:
    folder, marker = tmp_path / "code", tmp_path / "ran"
    folder.mkdir()
    for place in (folder / "mine.py", folder / "unet" / "mine.py"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(f"open({str(marker)!r}, 'w').close()\nclass Mine: pass\n")
    for index in ({"_class_name": ["mine", "Mine"]}, {"_class_name": "DDPMPipeline", "unet": ["mine", "Mine"]}):
        (folder / "model_index.json").write_text(json.dumps(index))
        refused(folder)
    assert not marker.exists()


# --- what is hostile ---------------------------------------------------------------------------------------------------
# pickles by hand: bodies are opcodes that leave one object on the stack


def plain(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + tuple_of(*arguments) + b"R"


def whole(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


def zip_format(body: bytes, storages: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", whole(body))
        archive.writestr("archive/version", "3\n")
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return file.getvalue()


def legacy_format(body: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    start = b"".join(pickle.dumps(part, 2) for part in (torch.serialization.MAGIC_NUMBER, 1001, system))
    filled = b"".join(struct.pack("<Q", len(content) // 4) + content for content in (storages or {}).values())
    return start + whole(body) + pickle.dumps(list(storages or {}), 2) + filled


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "pkl": whole,
    "zip.pt": zip_format,
    "legacy.pt": legacy_format,
    "nested.pkl": lambda body: whole(call("torch.storage", "_load_from_bytes", plain(zip_format(body)))),
    "nested_legacy.pt": lambda body: zip_format(call("torch.storage", "_load_from_bytes", plain(legacy_format(body)))),
}
WRAPPED: tuple[Callable[[bytes], bytes], ...] = (
    lambda body: body,
    lambda body: b"](" + plain(1) + body + b"e",
    lambda body: b"}" + plain("state_dict") + b"}" + plain("a") + body + b"ss",
)
TOUCH = "touch ran"
RUN = {
    "os.system": call("os", "system", plain(TOUCH)),
    "posix.system": call("posix", "system", plain(TOUCH)),
    "eval": call("builtins", "eval", plain(f"__import__('os').system({TOUCH!r})")),
    "exec": call("builtins", "exec", plain(f"import os; os.system({TOUCH!r})")),
    "eval of Python 2": call("__builtin__", "eval", plain(f"__import__('os').system({TOUCH!r})")),
    "Popen": call("subprocess", "Popen", plain(["touch", "ran"])),
    "check_output": call("subprocess", "check_output", plain(["touch", "ran"])),
    "partial": call("functools", "partial", name("os", "system"), plain(TOUCH)) + tuple_of() + b"R",
    "getattr": call("builtins", "getattr", name("os", "system"), plain("__call__")) + tuple_of(plain(TOUCH)) + b"R",
    "INST": b"(" + plain(TOUCH) + b"ios\nsystem\n",
    "OBJ": b"(" + name("os", "system") + plain(TOUCH) + b"o",
    "NEWOBJ": name("subprocess", "Popen") + tuple_of(plain(["touch", "ran"])) + b"\x81",
    "STACK_GLOBAL": plain("os") + plain("system") + b"\x93" + tuple_of(plain(TOUCH)) + b"R",
    "open": call("io", "open", plain("ran"), plain("w")),
    "popen": call("os", "popen", plain(TOUCH)),
    "_spawnvef": call("os", "spawnvp", plain(0), plain("touch"), plain(["touch", "ran"])),
    "timeit": call("timeit", "timeit", plain(f"__import__('os').system({TOUCH!r})"), plain(""), name("time", "time"), plain(1)),
    "cProfile": call("cProfile", "run", plain(f"__import__('os').system({TOUCH!r})")),
    "runpy": call("runpy", "_run_code", plain(""), plain({})),
    "pydoc": call("pydoc", "pipepager", plain(""), plain(TOUCH)),
    "pty": call("pty", "spawn", plain(["touch", "ran"])),
    "methodcaller": call("operator", "methodcaller", plain("system"), plain(TOUCH)) + tuple_of(name("os", "__name__")) + b"R",
    "torch.save": call("torch", "save", plain([1]), plain("ran")),
    "torch.hub": call("torch.hub", "load", plain("."), plain("mine"), plain("local")),
    "CDLL": call("ctypes", "CDLL", plain("./ran.so")),
    "code": call("code", "interact", plain("")),
}
"""Gadgets: what pickles are known to call."""
CALLS = {
    "import": call("importlib", "import_module", plain("antigravity")),
    "_reconstructor of a type": call("copyreg", "_reconstructor", name("builtins", "object"), name("builtins", "object"), b"N"),
    "_reconstructor of a set": call("copyreg", "_reconstructor", name("builtins", "set"), name("builtins", "object"), b"N"),
    "a path through globals": plain("probekit.models.checkpoint") + plain("io.open") + b"\x93",
    "a path from a type": plain("torch") + plain("float32.__class__") + b"\x93",
    "a path from a container": plain("collections") + plain("OrderedDict.fromkeys") + b"\x93",
    "a path in pathlib's module": plain("torch_utils") + plain("persistence") + b"\x93",
    "a look-alike of a trainer": name("pathlib_evil", "Path"),
    "a module under torch": call("torch.serialization", "load", plain("other.pt")),
    "torch.load": call("torch", "load", plain("other.pt")),
    "torch.from_file": call("torch", "from_file", plain("ran"), plain(True), plain(16)),
    "a storage of a file": call("torch", "UntypedStorage.from_file", plain("ran"), plain(True), plain(16)),
    "numpy's memmap": call("numpy.lib", "_load_from_anything", plain("ran")) + b"0" + call("os", "remove", plain("ran")),
    "STACK_GLOBAL of numbers": plain(1) + plain(2) + b"\x93",
    "STACK_GLOBAL of bytes": b"C\x02os" + b"C\x06system" + b"\x93",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "a persistent id": plain("x") + b"Q",
    "a buffer out of band": b"\x97",
    "a bytearray that is not there": b"\x96" + struct.pack("<Q", 2**50),
    "bytes that are not there": b"\x8e" + struct.pack("<Q", 2**50),
    "a name with a zero": name("pathlib", "Pa\0th"),
    "a callable number": plain(3) + tuple_of() + b"R",
    "an empty stack": b"R",
    "a state for a type": name("pathlib", "Path") + b"}" + plain("name") + plain("x") + b"sb",
    "a state for a list": b"]}" + plain("append") + plain(1) + b"sb",
}


def test_the_payloads_do_run_where_a_pickle_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for body in (
        "posix.system",
        "eval",
        "exec",
        "check_output",
        "INST",
        "OBJ",
        "STACK_GLOBAL",
        "open",
        "partial",
        "getattr",
        "timeit",
    ):
        pickle.loads(whole(RUN[body]))
        assert (tmp_path / "ran").exists(), body
        (tmp_path / "ran").unlink()


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_pickle_that_runs_something_is_refused(container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"hostile.{container}"
    for key, body in (RUN | CALLS).items():
        for wrap in WRAPPED:
            file.write_bytes(CONTAINERS[container](wrap(body)))
            assert "file" in refused(file, "is no checkpoint, or damaged"), key
            assert list(tmp_path.iterdir()) == [file], key


def test_what_pickles_may_name_they_cannot_change(tmp_path: Path) -> None:
    """Functions take attributes, and numpy's and torch's are the whole process's."""
    kept = {
        f: (f.__name__, f.__defaults__, dict(vars(f))) for f in vars(torch._utils).values() if isinstance(f, types.FunctionType)
    }
    for container, wrapped in CONTAINERS.items():
        for function in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"):
            change = b"N}" + plain("__name__") + plain("other") + b"s" + plain("__defaults__") + plain((1, 2)) + b"s\x86b"
            (tmp_path / f"change.{container}").write_bytes(wrapped(name("torch._utils", function) + change))
            refused(tmp_path / f"change.{container}")
    try:
        assert {f: (f.__name__, f.__defaults__, dict(vars(f))) for f in kept} == kept
    finally:
        for function, (called, defaults, attributes) in kept.items():
            function.__name__, function.__defaults__ = called, defaults
            vars(function).clear()
            vars(function).update(attributes)


# what may end the process, fill its memory or write files is loaded in another one, under a limit

CHILD = """
import json, resource, sys, warnings
warnings.simplefilter("ignore")
import torch
import probekit
torch.set_num_threads(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, -1))
for file in sys.argv[1:]:
    print(json.dumps([file, "died", ""]), flush=True)
    try:
        said = ["loaded", repr(probekit.load(file, device="cpu"))]
    except probekit.ProbekitError as error:
        said = ["refused", str(error)[:1000]]
    except BaseException as error:
        said = ["traceback", repr(error)[:1000]]
    print(json.dumps([file, *said]), flush=True)
"""


def storage(count: int, kind: str = "FloatStorage", *more: Any) -> bytes:
    return tuple_of(plain("storage"), name("torch", kind), plain("0"), plain("cpu"), plain(count), *map(plain, more)) + b"Q"


def tensor(of: bytes, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    hooks = call("collections", "OrderedDict")
    return call("torch._utils", "_rebuild_tensor_v2", of, plain(0), plain(size), plain(stride), plain(False), hooks)


def under(key: str, body: bytes) -> bytes:
    return b"}" + plain(key) + body + b"s"


def nested_lists(depth: int) -> bytes:
    """2**depth words, of which one is in the file: nobody may write them out."""
    return b"]" + plain("x" * 1000) + b"a" + depth * b"q\x000](h\x00h\x00e"


def numpy_array(size: tuple[int, ...], kind: str, *buffer: bytes) -> bytes:
    return call("numpy", "ndarray", plain(size), plain(kind), *buffer)


ADDRESS = b"\x8e" + struct.pack("<Q", 8) + struct.pack("<Q", 0x4141414141414140)
BOMBS: dict[str, bytes] = {
    # an address of the file's choice as an object's
    "numpy objects.pkl": whole(call("builtins", "set", numpy_array((1,), "O", ADDRESS))),
    "numpy scalar.pkl": whole(
        call("numpy.core.multiarray", "scalar", call("numpy", "dtype", plain([("a", "O")])), numpy_array((1,), "i8", ADDRESS))
    ),
    "storage beyond its record.pt": zip_format(under("a", tensor(storage(2**26), (2**26,), (1,))), {"0": bytes(16)}),
    # memory
    "memo.pkl": whole(b"]r" + struct.pack("<I", 2**27)),
    "numpy of 2**50.pkl": whole(numpy_array((2**50,), "u1")),
    "numpy of None.pkl": whole(numpy_array((2**28,), "O")),
    "items of a tensor.pt": zip_format(call("builtins", "set", tensor(storage(4), (2**24,), (0,))), {"0": bytes(16)}),
    "written out.pkl": whole(call("copyreg", "_reconstructor", nested_lists(24))),
    "written out by numpy.pkl": whole(call("numpy", "dtype", nested_lists(24))),
    "inflated.pt": zip_format(under("a", tensor(storage(2**28), (2**28,), (1,))), {"0": bytes(2**30)}, zipfile.ZIP_DEFLATED),
    "legacy storage.pt": legacy_format(under("a", tensor(storage(2**30, "FloatStorage", None), (2**30,), (1,)))),
    "legacy tensor.pt": legacy_format(under("a", tensor(storage(4, "FloatStorage", None), (2**30,), (1,))), {"0": bytes(16)}),
    "a tensor of one value.pt": zip_format(under("enc.in_conv.weight", tensor(storage(4), (2**40,), (0,))), {"0": bytes(16)}),
    # methods of torch's and of containers, replaced
    "items.pkl": whole(call("collections", "OrderedDict") + under("items", plain(5)) + b"b"),
    # files
    "patch.pt": legacy_format(
        tuple_of(
            plain("module"),
            name("torch._utils", "_rebuild_tensor_v2") + b"N" + plain({"dump_patches": True, "__name__": "written"}) + b"\x86b",
            plain("x.py"),
            plain("a line\n"),
        )
        + b"Q"
    ),
}


def ones(*shape: int) -> Tensor:
    return torch.zeros(shape)


FIRST = "blocks.0.flows.0."
GLOW = {
    f"{FIRST}actnorm.loc": ones(1, 12, 1, 1),
    f"{FIRST}coupling.net.0.weight": ones(4, 6, 3, 3),
    f"{FIRST}coupling.net.4.conv.weight": ones(12, 4, 3, 3),
}
TWO = {"enc_block_str": "4d4,4t1", "enc_channel_str": "4:4,1:4", "dec_block_str": "1u4,1t4", "dec_channel_str": "4:4,1:4"}
VAE = {"enc.in_conv.weight": ones(1), "enc.mu.weight": ones(1), "dec.last_conv.weight": ones(1)}
GAN = {
    "synthesis.b4.const": ones(1),
    "mapping.w_avg": ones(1),
    "synthesis.b4.torgb.weight": ones(3, 1, 1, 1),
    "mapping.fc0.weight": ones(4, 4),
} | {f"synthesis.b{4 * 2**i}.conv1.weight": ones(1, 1, 1, 1) for i in range(4)}
ERMON = {"temb.dense.0.weight": ones(128, 32), "conv_in.weight": ones(32, 3, 3, 3), "conv_out.weight": ones(3, 32, 3, 3)}
OPENAI = openai_state((32, 64), (False, True), scale_shift=True)


def hyper(**changes: str) -> dict[str, Any]:
    return {"state_dict": VAE, "hyper_parameters": TWO | {"input_res": 4} | changes}


# networks that a few bytes ask for
SIZES: dict[str, Any] = {
    "glow of many blocks": GLOW | {f"blocks.{i}.x": ones(1) for i in range(14)},
    "glow of wide couplings": GLOW | {f"{FIRST}coupling.net.0.weight": ones(2**15, 0)},
    "glow of 2**40": GLOW | {f"{FIRST}coupling.net.0.weight": ones(2**40, 0)},
    "glow of many channels": GLOW | {f"{FIRST}actnorm.loc": ones(0, 2**17)},
    "vae of a width": hyper(enc_channel_str="4:40000,1:4"),
    "vae of a huge width": hyper(enc_channel_str=f"4:{10**7},1:4"),
    "vae of many blocks": hyper(enc_block_str="4x100000000,4d4,4t1"),
    "vae at a far place": {"state_dict": VAE | {"enc.block_mod.10000000000.weight": ones(1)}},
    "vae of flat tensors": VAE
    | {f"{key}.weight": ones(1) for key in ("enc.block_mod.0.c1", "enc.block_mod.1", "dec.block_mod.1")},
    "gan of 65536 pixels": GAN | {f"synthesis.b{4 * 2**i}.conv1.weight": ones(1, 1, 1, 1) for i in range(15)},
    "gan of nothing": GAN | {"mapping.fc0.weight": ones(2**16, 0)},
    "gan of 2**40": GAN | {"mapping.fc0.weight": ones(2**40, 0)},
    "ddim of wide levels": ERMON | {"down.0.block.0.conv1.weight": ones(2**14, 0)},
    "ddim of 2**35": ERMON | {"down.0.block.0.conv1.weight": ones(2**35, 0)},
    "ddim of many times": ERMON | {"down.0.block.0.conv1.weight": ones(32, 0), "temb.dense.0.weight": ones(2**40, 0)},
    "openai of wide levels": OPENAI | {"input_blocks.1.0.out_layers.3.weight": ones(2**14, 0)},
    "openai of many times": OPENAI | {"time_embed.0.weight": ones(2**40, 32, 0)},
}


def torchscript(folder: Path) -> bytes:
    """A program that torch.load would start: TorchScript's own reader calls its __setstate__, which may write files."""
    source = folder / "script_module.py"
    source.write_text(
        "import torch\n"
        "class Writer(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a = torch.zeros(4)\n"
        "    @torch.jit.export\n"
        "    def __getstate__(self):\n"
        "        return (self.a, self.training)\n"
        "    @torch.jit.export\n"
        "    def __setstate__(self, state: tuple[torch.Tensor, bool]):\n"
        "        self.training = state[1]\n"
        "        self.a = torch.from_file('written', True, 16, dtype=torch.uint8).float()\n"
        "    def forward(self, x):\n"
        "        return x\n"
    )
    sys.path.insert(0, str(folder))
    try:
        import script_module  # type: ignore[import-not-found]

        made = io.BytesIO()
        torch.jit.save(torch.jit.script(script_module.Writer()), made)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("script_module", None)
        source.unlink()
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    return made.getvalue()


def tar_format(victim: Path) -> bytes:
    """torch's first format, begun like its second; a hard link in it passes the archive's mode on to the file it names."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("X" * 10))
        link = tarfile.TarInfo("storages")
        link.type, link.linkname, link.mode = tarfile.LNKTYPE, str(victim), 0o777
        archive.addfile(link)
    raw = bytearray(made.getvalue())
    raw[:10] = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """What loading each hostile file came to; and under "files" what was written meanwhile."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("the limit of memory is set as on Linux")
    folder = tmp_path_factory.mktemp("hostile")
    contents = dict(BOMBS)
    for key, content in SIZES.items():
        made = io.BytesIO()
        torch.save(content, made)
        contents[f"{key}.pt"] = made.getvalue()
    with pytest.warns(FutureWarning):  # torch would rather have it exported
        contents["script.pt"] = torchscript(folder)
    for kind in ("UNet2DModel", "VQModel"):
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(json.dumps({"_class_name": kind}))
    victim = folder / "victim"
    victim.write_text("secret")
    victim.chmod(0o600)
    contents["tar.pt"] = tar_format(victim)
    for key, content in contents.items():
        (folder / key).write_bytes(content)
    before = {path.name for path in folder.iterdir()}
    found: dict[str, tuple[str, str]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    stderr = ""
    while left := [key for key in (*contents, "UNet2DModel", "VQModel") if key not in found]:
        command = [sys.executable, "-c", CHILD, *left]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert lines, done.stderr
        stderr += done.stderr
        found |= {file: (outcome, said) for file, outcome, said in lines}
    found["files"] = ("refused", " ".join(sorted({path.name for path in folder.iterdir()} - before)))
    found["stderr"] = ("refused", stderr)
    found["mode"] = ("refused", oct(victim.stat().st_mode & 0o777))
    return found


@pytest.mark.parametrize("file", [*BOMBS, *(f"{key}.pt" for key in SIZES), "script.pt", "tar.pt", "UNet2DModel", "VQModel"])
def test_a_file_made_to_crash_fill_or_write_is_refused(file: str, answers: dict[str, tuple[str, str]]) -> None:
    outcome, said = answers[file]
    assert outcome == "refused", (outcome, said)
    assert "\n" not in said and len(said) < 1000, said
    # refused before it was tried
    assert not re.search("memory|allocate", said, re.IGNORECASE), said


def test_nothing_was_written_or_said_meanwhile(answers: dict[str, tuple[str, str]]) -> None:
    assert answers["files"][1] == ""
    assert answers["mode"][1] == "0o600"
    # libraries' own reports would make a command's error more than one line
    assert answers["stderr"][1] == ""


# --- the command line --------------------------------------------------------------------------------------------------


def test_the_commands_list_or_refuse_in_one_line(tmp_path: Path, reference: Pickled) -> None:
    flow, _ = glow_file(tmp_path, reference)
    unet, _ = unet_folder(tmp_path, reference)
    before = sorted(tmp_path.rglob("*"))
    shown, listed = probekit("models", flow), probekit("layers", unet)
    assert shown.returncode == 0, shown.stderr
    lines = [line for line in shown.stdout.splitlines() if " yes " in line]
    assert [re.search(r" (z|eps) ", line)[1] for line in lines] == ["z", "eps"]  # type: ignore[index]
    assert "glow" in lines[0] and "64x64" in lines[0]
    assert listed.returncode == 0, listed.stderr
    for layer in ("conv_in", "down_blocks.0.resnets.0", "down_blocks.1.attentions.0", "mid_block", "up_blocks.1", "conv_out"):
        assert f" {layer} " in listed.stdout, listed.stdout
    assert "a glow; layers are those of denoisers" in refused_by_the_commands("layers", flow)
    assert sorted(tmp_path.rglob("*")) == before

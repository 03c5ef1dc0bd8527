"""What several files of tests need: the command line, golden tensors, tiny models of every family with random weights."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import json
import multiprocessing
import os
import pickle
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jaxtyping
import numpy as np
import pytest
import torch
import torchsde as torchsde  # before nnsight, which gives every object a `save` that its import stumbles over
from safetensors import safe_open
from torch import Tensor

import probekit as package
from probekit.cli import main
from probekit.zoo.scene_clip import MAX_TOKENS, tokenizer

os.environ.update(RAY_worker_niceness="0")  # Ray's workers, nice 15 otherwise, would wait for those of pytest

# --- the command line --------------------------------------------------------------------------------------------------


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str
    error: BaseException | None
    """What ended it."""


def probekit(*arguments: object, cwd: Path | str = ".") -> Done:
    """The command line, in this process: a process of its own takes seconds to import torch. What is no error of the user's
    is raised."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["probekit", *map(str, arguments)]),
        mock.patch.dict(os.environ, COLUMNS="200"),  # tables are not wrapped
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return Done(int(ended.value.code or 0), out.getvalue(), err.getvalue(), ended.value.__context__)


def refused(*arguments: object, cwd: Path | str = ".") -> str:
    """What the command line says where it refuses: one line, with exit code 2."""
    done = probekit(*arguments, cwd=cwd)
    assert done.returncode == 2, done
    assert done.stderr.startswith("probekit: ") and done.stderr.count("\n") == 1, done.stderr
    assert "\n" not in str(done.error)  # which the command line would have made one line of
    return done.stderr


def process(*arguments: object, cwd: Path | str = ".") -> subprocess.Popen[str]:
    """The command line in a process of its own, which can be killed, and whose start and end are those that a user sees."""
    command = [sys.executable, "-c", "from probekit.cli import main; main()", *map(str, arguments)]
    # a shell has what it starts in the background ignore SIGINT, and so would what that starts
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heard)


@functools.cache
def imported() -> Any:
    """What makes processes by forking one that has imported everything: a fresh one takes seconds of a core to do so."""
    made = multiprocessing.get_context("forkserver")
    own = [module.name for module in pkgutil.walk_packages(package.__path__, "probekit.") if "__main__" not in module.name]
    made.set_forkserver_preload([*own, "diffusers", "transformers", "pandas", "matplotlib.pyplot", "pyarrow.parquet", "zarr"])
    return made


_FORKED = """
import os, sys
os.chdir(cwd)
for number in (1, 2):
    os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), number)
sys.argv = ["probekit", *arguments]
from probekit.cli import main
main()
"""


@contextlib.contextmanager
def forked(*arguments: object, cwd: Path | str = ".") -> Iterator[tuple[multiprocessing.process.BaseProcess, Path]]:
    """The command line in a process of its own, there at once and without checks of shapes, and the file of what it says."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        said.touch()
        names = {"cwd": str(cwd), "said": str(said), "arguments": [str(argument) for argument in arguments]}
        run = imported().Process(target=exec, args=(_FORKED, names))
        run.start()
        try:
            yield run, said
        finally:
            run.kill()
            run.join()


def killed(*arguments: object, cwd: Path, when: Callable[[], bool]) -> None:
    """Start a run and kill it, as soon as may be after `when`."""
    with forked(*arguments, cwd=cwd) as (run, said):
        while run.is_alive() and not when():
            time.sleep(0.002)
        run.kill()
        run.join()
        assert run.exitcode == -9 and when(), f"it was over before it could be killed: {run.exitcode}, {said.read_text()}"


def killed_once(arguments: Sequence[object], cwd: Path, out: str, *, again: Sequence[object] | None = None) -> dict[Path, int]:
    """Start a run, kill it after its first unit, start it (or `again`) again; the first units and when they were written."""
    units = cwd / out / "units"
    killed(*arguments, "--out", out, cwd=cwd, when=lambda: any(units.glob("*.parquet")))
    assert not (cwd / out / "results.parquet").exists(), "it was over before it could be killed"
    finished = {path: path.stat().st_mtime_ns for path in units.glob("*.parquet")}
    second = probekit(*(again or arguments), "--out", out, cwd=cwd)
    assert second.returncode == 0, second.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # what was done is not done again
    return finished


# --- shapes and golden tensors -----------------------------------------------------------------------------------------


@pytest.fixture
def any_shape() -> Iterator[None]:
    """For what is called with other than its annotations say, and must cope: shapes are not checked meanwhile."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Golden(NamedTuple):
    """What a paper's own code gave: its network's weights, the tensors that went in and came out, and its configuration."""

    state: dict[str, Tensor]
    case: dict[str, Tensor]
    config: dict[str, Any]


def golden(name: str) -> Golden:
    with safe_open(Path(__file__).parent / "golden" / f"{name}.safetensors", "pt") as file:
        config = {key: json.loads(value) for key, value in file.metadata().items()}
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    state = {key.removeprefix("state/"): value for key, value in held.items() if key.startswith("state/")}
    return Golden(state, {key: value for key, value in held.items() if not key.startswith("state/")}, config)


# --- models ------------------------------------------------------------------------------------------------------------


def scramble(module: torch.nn.Module) -> torch.nn.Module:
    """Give zero-initialised gates and output layers values, the same in every process, so that every layer has an effect."""
    generator = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        drawn = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.data = drawn * (1.2 / p[0].numel() ** 0.5)
        else:  # biases begin as torch's own random numbers, scales as ones
            p.data = 0.05 * drawn + (0 if name.endswith("bias") else p.data)
    return module.eval()


def tiny_vae() -> Any:
    from diffusers import AutoencoderKL

    return scramble(
        AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            shift_factor=0.0,
        )
    )


def tiny(**options: Any) -> Any:
    """A UNet2DModel of two levels."""
    from diffusers import UNet2DModel

    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(0)
    return scramble(UNet2DModel(**config | options))


def smooth() -> Any:
    """A network whose prediction changes little with its input, as a trained one's."""
    unet = tiny()
    for p in unet.conv_out.parameters():
        p.data *= 0.1
    return unet


@pytest.fixture(scope="session")
def tiny_sd() -> Any:
    """A StableDiffusionPipeline with two resnets a down block and attention on the upper level, as SD 1 and 2."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    words = tokenizer()
    end = words.eos_token_id
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        eos_token_id=end,
        pad_token_id=end,
        bos_token_id=words.bos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=2,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=scramble(CLIPTextModel(text)),
        tokenizer=words,
        unet=scramble(unet),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def tiny_sd3() -> Any:
    """A StableDiffusion3Pipeline that is given embeddings: its last block has no text stream."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=scramble(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def tiny_flux() -> Any:
    """A FluxPipeline that is given embeddings."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
    )
    pipeline = FluxPipeline(
        transformer=scramble(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def ldm_folder(tmp_path: Path) -> Path:
    """An LDMPipeline, as CompVis/ldm-celebahq-256."""
    from diffusers import DDIMScheduler, LDMPipeline, VQModel

    torch.manual_seed(0)
    vq = VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=16,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
    )
    pipeline = LDMPipeline(vqvae=scramble(vq), unet=tiny(), scheduler=DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path / "ldm")
    return tmp_path / "ldm"


@pytest.fixture
def dit_folder(tmp_path: Path) -> Path:
    """A DiTPipeline with classes."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
        norm_num_groups=1,  # DiTPipeline's empty class is number 1000
    )
    pipeline = DiTPipeline(scramble(dit), tiny_vae(), DDIMScheduler(clip_sample=False), id2label={3: "dog"})
    pipeline.save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


def embedded(seed: int, *, negative: bool) -> dict[str, Any]:
    """A row for the pipelines that are given embeddings."""
    generator = torch.Generator().manual_seed(seed)
    row: dict[str, Any] = {
        "prompt_embeds": torch.randn(1, 5, 16, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 8, generator=generator),
    }
    if negative:
        row |= {"negative_prompt_embeds": torch.zeros(1, 5, 16), "negative_pooled_prompt_embeds": torch.zeros(1, 8)}
    return row | {"generator": torch.Generator().manual_seed(7)}


def quick_spaces(model: Any, steps: int = 2) -> dict[str, Any]:
    """Every space of a model, those that sample or invert with few steps."""
    stepping = {name for name, maker in model.makers.items() if "steps" in inspect.signature(maker).parameters}
    return {name: model.space(name, **{"steps": steps} if name in stepping else {}) for name in model.makers}


# --- a pickle of StyleGAN2-ADA ------------------------------------------------------------------------------------------

SOURCE = "class Generator: pass\nclass SynthesisNetwork: pass"


@pytest.fixture
def reference() -> Iterator[Callable[..., bytes]]:
    """Pickles a generator as stylegan2-ada-pytorch does (torch_utils/persistence.py), its modules importable only meanwhile."""

    class EasyDict(dict):
        def __getattr__(self, name: str) -> Any:
            if name not in self:
                raise AttributeError(name)
            return self[name]

    def _reconstruct_persistent_obj(meta: Any) -> Any:
        raise AssertionError("a reader must not call it")

    persistence, dnnlib = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    for made, module in ((_reconstruct_persistent_obj, persistence), (EasyDict, dnnlib)):
        made.__module__, made.__qualname__ = module.__name__, made.__name__
        setattr(module, made.__name__, made)
    stand_ins = {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": persistence}
    stand_ins |= {"dnnlib": types.ModuleType("dnnlib"), "dnnlib.util": dnnlib}

    def decorated(base: type, name: str, source: str) -> type:
        def __reduce__(self: Any) -> Any:
            state = torch.nn.Module.__reduce__(self)[2]
            meta = {"type": "class", "version": 6, "module_src": source, "class_name": name, "state": state}
            return (_reconstruct_persistent_obj, (meta,), None)

        return type(name, (base,), {"__reduce__": __reduce__})

    def disguise(module: torch.nn.Module, source: str, clamp: float | None, **kwargs: Any) -> None:
        for child in module.children():
            disguise(child, source, clamp)
        module.__class__ = decorated(type(module), type(module).__name__.lstrip("_"), source)
        # what beside tensors is found in a reference module's __dict__
        module._init_args, module._init_kwargs = (), kwargs
        module.act_gain = np.sqrt(2)
        if hasattr(module, "noise_const"):
            module.activation, module.conv_clamp = "lrelu", clamp
        if hasattr(module, "bias_gain"):
            module.weight_gain = np.float64(module.weight_gain)
            module.activation = "lrelu" if module.bias_gain == 0.01 else "linear"

    def pickled(
        made: Any,
        *,
        source: str = SOURCE,
        clamp: float | None = 256,
        protocol: int = 3,
        change: Callable[[Any], None] = lambda g: None,
    ) -> bytes:
        original = copy.deepcopy(made).requires_grad_(False)
        options = EasyDict(num_layers=2), EasyDict(channel_base=160, conv_clamp=clamp)
        disguise(original, source, clamp, z_dim=12, c_dim=0, mapping_kwargs=options[0], synthesis_kwargs=options[1])
        original.num_ws, original.img_resolution = made.num_ws, made.image_size
        change(original)
        snapshot = {"G": original, "D": None, "G_ema": original, "augment_pipe": None}
        sys.modules.update(stand_ins)
        try:
            return pickle.dumps(snapshot | {"training_set_kwargs": EasyDict(path="avatars.zip", xflip=True)}, protocol)
        finally:
            for name in stand_ins:
                del sys.modules[name]

    yield pickled
    assert not stand_ins.keys() & sys.modules.keys()

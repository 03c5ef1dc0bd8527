"""Published models: their variants, repositories behind a licence, weights that wait on the CPU, and memory that ends."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import accelerate
import pytest
import torch

from probekit import hooks, load
from probekit.checksums import sealed, unsealed
from probekit.models import Model, hub, memory
from tests.conftest import probekit, process, refused
from tests.pipelines import PIPELINES

O = ("a small white moon at the right on a dotted green ground", 0)  # noqa: E741
E = ("a large red fish at the left on a plain blue ground", 0)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as publishers save them: `plain`, `both` with fp16 beside, `fp16` alone; fp16's weights are twice as large."""
    folder = tmp_path_factory.mktemp("published")
    pipeline = PIPELINES["sd"].make().to(torch.float16)
    pipeline.save_pretrained(folder / "plain")
    pipeline.save_pretrained(folder / "both")
    for name in ("unet", "text_encoder", "vae"):
        with torch.no_grad():
            for p in getattr(pipeline, name).parameters():
                p.mul_(2)
    for place in ("both", "fp16"):
        pipeline.save_pretrained(folder / place, variant="fp16")
    return folder


def largest(model: Model) -> float:
    return model.denoiser.get_parameter("conv_in.weight").abs().max().item()


def test_fp16_is_found_where_it_serves(published: Path) -> None:
    plain = largest(load(published / "plain", device="cpu"))
    assert largest(load(published / "both", device="cpu")) == plain  # float32 on the CPU: the plain form
    assert largest(load(published / "both", device="cpu", dtype="float16")) == 2 * plain
    assert largest(load(published / "both", device="cpu", dtype="float32", variant="fp16")) == 2 * plain
    assert largest(load(published / "fp16", device="cpu")) == 2 * plain  # nothing else is there
    assert largest(load(published / "plain", device="cpu", dtype="float16")) == plain


def test_a_variant_that_is_not_there_is_refused(published: Path) -> None:
    assert "--variant 'fp8': model 'both' has none; it has fp16" in refused("layers", "both", "--variant", "fp8", cwd=published)
    assert "it has its plain weights only" in refused("layers", "plain", "--variant", "fp16", cwd=published)
    assert "--variant 'fp16': is for text-to-image pipelines; model 'avatar-vae' is a vae" in refused(
        "layers", "avatar-vae", "--variant", "fp16"
    )


# --- the hub, over the wire --------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of Hugging Face's hub as loading asks of it: one public repository, one behind a licence, others not there."""

    folder: Path
    asked: list[str]
    GATED, THERE = "lab/gated", "lab/model"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).removeprefix("/")
        self.asked.append(path)
        api = re.fullmatch(r"api/models/(\w+/\w+)(/.*)?", path)
        file = re.fullmatch(r"(\w+/\w+)/resolve/[^/]+/(.+)", path)
        found = (api or file or [None, ""])[1]
        if found not in (self.GATED, self.THERE):
            return self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        if api:
            files = [str(f.relative_to(self.folder)) for f in sorted(self.folder.rglob("*")) if f.is_file()]
            if (api[2] or "").startswith("/tree"):
                told: Any = [{"type": "file", "path": f, "size": 1, "oid": "0" * 40} for f in files]
            else:
                told = {"id": found, "sha": "1" * 40, "siblings": [{"rfilename": f} for f in files], "private": False}
            return self._answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})
        assert file is not None
        if found == self.GATED:
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        place = self.folder / file[2]
        if not place.is_file():
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self._answer(200, place.read_bytes(), {"ETag": f'"{file[2]}"', "X-Repo-Commit": "1" * 40})

    def _answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def served(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine that processes started now will ask, with a cache of its own."""
    kind = type("Served", (Hub,), {"folder": published / "both", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }.items():
        monkeypatch.setenv(name, value)
    yield kind
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_of_the_hub_only_the_variant_is_fetched_and_what_may_not_be_read_is_named(served: type[Hub], tmp_path: Path) -> None:
    with process("layers", Hub.THERE, "--dtype", "float16", "--device", "cpu", cwd=tmp_path) as run:
        out, err = run.communicate()
    assert run.returncode == 0, err
    assert "conv_in" in out
    fetched = {path for path in served.asked if path.endswith((".safetensors", ".bin"))}
    assert len(fetched) == 3 and all(".fp16." in path for path in fetched)
    for name, said in {
        Hub.GATED: "is gated; accept its licence at https://huggingface.co/lab/gated",
        "lab/nowhere": "the hub has no such repository, or a private one",
    }.items():
        with process("layers", name, "--device", "cpu", cwd=tmp_path) as run:
            _, err = run.communicate()
        assert run.returncode == 2 and err.startswith(f"probekit: model '{name}': {said}") and err.count("\n") == 1, err


# --- offloading ----------------------------------------------------------------------------------------------------------


def offloaded(how: str) -> Model:
    """mini-sd as a GPU has it with `--offload`, but that here the CPU stands for the GPU."""
    model = load("mini-sd", device="cpu")
    if how == "model":
        hub.put_on(model.pipeline, torch.device("cpu"), how)
    else:
        # `put_on` would say cpu:0 to accelerate, which does not know it for the CPU
        for part in model.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
        assert next(model.denoiser.parameters()).is_meta
    return model


@pytest.mark.slow
@pytest.mark.parametrize("how", ["model", "sequential"])
def test_an_offloaded_pipeline_is_the_same_model(how: str) -> None:
    plain, moved = load("mini-sd", device="cpu"), offloaded(how)
    assert moved.digest == plain.digest
    inside = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    rules = [[], [hooks.Injection("mid_block")], [hooks.Injection(f"{inside}:heads=0")], [hooks.Injection(f"{inside}.to_v")]]
    expected, got = (model.sweep(O, E, rules, num_inference_steps=2) for model in (plain, moved))
    assert torch.equal(got.images, expected.images) and not torch.equal(got.images[0], got.images[1])
    images = expected.images[:2]
    for space in ("code", "inverted:steps=2"):
        assert torch.equal(moved.space(space).encode(images), plain.space(space).encode(images)), space


def test_offloading_to_the_cpu_itself_is_refused() -> None:
    assert "--offload 'model': keeps weights on the CPU until a GPU needs them" in refused(
        "layers", "mini-sd", "--device", "cpu", "--offload", "model"
    )
    assert "--offload 'disk': choose none, model, sequential" in refused("layers", "mini-sd", "--offload", "disk")


# --- memory ----------------------------------------------------------------------------------------------------------------


def test_what_a_row_takes_is_what_more_rows_take_more() -> None:
    painter = load("mini-sd", device="cpu").painter
    row = memory.of_a_row(painter, guidance_scale=3.0)
    with memory._Alive(memory._weights(painter)) as alive:
        painter.generate([""] * 8, range(8), num_inference_steps=1, guidance_scale=3.0)
    assert alive.most == pytest.approx(8 * row, rel=0.02)
    assert memory.of_weights(painter) == sum(
        tensor.nbytes
        for part in ("unet", "vae", "text_encoder")
        for tensor in (*getattr(painter.pipeline, part).parameters(), *getattr(painter.pipeline, part).buffers())
    )


@pytest.mark.slow
def test_a_sweep_says_beforehand_what_it_takes(tmp_path: Path) -> None:
    sweep = (
        "inject",
        "sweep",
        "--pairs",
        1,
        "--factors",
        "content",
        "--layers",
        "mid_block",
        "--num-steps",
        1,
        "--device",
        "cpu",
    )
    done = probekit(*sweep, "--out", "run", cwd=tmp_path)
    said = re.match(
        r"1 pair of 3 pictures, at most 64 at a time; weights take 37.9 MiB, a picture about [\d.]+ MiB, ", done.stdout
    )
    assert done.returncode == 0 and said, done.stdout
    again = probekit(*sweep, "--out", "run", cwd=tmp_path)
    assert "at a time" not in again.stdout  # nothing is left to do
    file = tmp_path / "run" / "config.json"
    config = unsealed(file.read_bytes())
    del config["options"]["variant"]
    file.write_bytes(sealed(config))
    older = probekit("describe", "run", cwd=tmp_path)
    assert older.returncode == 0, older.stderr  # a run from before there was that option


_WITHOUT_MEMORY = """
import resource, sys
from pathlib import Path
import torch
from probekit import hooks, load
torch.set_num_threads(1)
model = load("mini-sd", device="cpu")
layers = hooks.select(model.layers, hooks.default_layers(model.denoiser))
rules = [[hooks.Injection(layer.name)] for layer in layers] * 4
original, edit = ("a small white moon at the right", 0), ("a large red fish at the left", 0)
if int(sys.argv[1]) > 1:
    expected = model.sweep(original, edit, rules, batch_size=8, num_inference_steps=1).images
model.sweep(original, edit, rules[:4], num_inference_steps=1)
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (taken, taken))
done = []
made = model.sweep(original, edit, rules, num_inference_steps=1, on_batch=done.append).images
print(len(rules), sum(done), max(done), (made - expected).abs().max().item())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what a process has taken is read from Linux's /proc")
def test_batches_shrink_where_memory_ends() -> None:
    # what a batch has taken is given back, not kept for others of its size, so that half of it finds as much free
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    asked = functools.partial(subprocess.run, capture_output=True, text=True, env=environment)
    run = asked([sys.executable, "-c", _WITHOUT_MEMORY, "200"])
    assert run.returncode == 0, run.stderr
    rules, done, largest, apart = (float(word) for word in run.stdout.split())
    assert rules == done == 72 and largest < 72 and apart < 1e-4
    run = asked([sys.executable, "-c", _WITHOUT_MEMORY, "1"])
    assert "memory does not suffice for 2 rows" in run.stderr.splitlines()[-1]

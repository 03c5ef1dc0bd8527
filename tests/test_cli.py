from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from probekit import hooks
from probekit.metrics.lpips import distance, features
from probekit.report.images import load_png
from tests.conftest import killed, probekit, process, refused


@pytest.fixture(scope="session")
def tiny_folder(tiny_sd: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    tiny_sd.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.yaml"
    file.write_text(
        "- {original: a red fish, edit: a red star, factor: content}\n"
        "- {original: a blue ring, edit: a blue tree, factor: content, seed: 7}\n"
        "- {original: a red fish at the left, edit: a red fish at the right, factor: structure, unrelated: a moon}\n"
    )
    return file


def test_help_and_import_answer_without_torch() -> None:
    heavy = ("torch", "diffusers", "transformers", "matplotlib", "pandas", "numpy")
    code = f"import sys, probekit, probekit.cli; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    shown = process("--help")
    said, _ = shown.communicate()
    assert shown.returncode == 0 and "inject" in said and "layers" in said


@pytest.mark.slow
def test_a_sweep_of_ones_own_pairs_from_start_to_report(tiny_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    layers = ["--layers", "@mid", "--layers", "@attentions"]
    sweep = ["inject", "sweep", "--model", tiny_folder, "--pairs-file", pairs_file, "--num-steps", "2", *layers, "--out", out]
    done = probekit(*sweep)
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(out / "results.parquet")
    assert set(rows.factor) == {"content", "structure"} and set(rows.donor) == {"edit", "unrelated"}
    assert rows.groupby("pair").seed.first().tolist() == [0, 7, 2]
    last = rows[(rows.layer == "up_blocks.1.attentions.2") & (rows.descriptor == "lpips") & (rows.donor == "edit")]
    assert (last.transfer > 0.99).all() and (last.damage < 0.01).all()  # the last layer's picture is E's
    for pair in ("content-00", "structure-02"):
        e, injected, untouched = (
            load_png(out / "images" / pair / f"{name}.png") for name in ("E", "all_up_blocks.1.attentions.2", "O")
        )
        assert (e - injected).abs().max() < 0.02 < (e - untouched).abs().max(), pair
    page = (out / "report.html").read_text()
    # the page fetches nothing (the figures' metadata name vocabularies by address, which nothing opens)
    assert "mid_block" in page and not re.search(r'(src|href)="(?!data:|#|\$)|url\((?!#)|@import|fetch\(', page)
    assert sorted(p.name for p in (out / "figures").iterdir()) == ["layers.png", "layers.svg", "roles.png", "roles.svg"]

    kept = {p: p.read_bytes() for p in out.rglob("*.parquet")}
    again = probekit(*sweep)
    assert again.returncode == 0 and {p: p.read_bytes() for p in out.rglob("*.parquet")} == kept
    described = probekit("describe", out)
    assert described.returncode == 0 and "mid_block" in described.stdout

    assert "seed 0 there, 5 here" in refused(*sweep, "--seed", "5")
    assert {p: p.read_bytes() for p in out.rglob("*.parquet")} == kept


MIDDLE = ["down_blocks.1.resnets.0", "mid_block.attentions.0", "up_blocks.0.resnets.0"]


def test_what_a_sweep_writes_under_a_layers_name_is_of_that_layer_and_window(
    tiny_sd: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    original, edit = "a red fish", "a blue star"
    prompts = ["--prompt-original", original, "--prompt-edit", edit]
    options = ["--guidance", "2", "--num-steps", "4", "--by-time", "--windows", "2", *(f"--layers={name}" for name in MIDDLE)]
    assert probekit("inject", "sweep", "--model", tiny_folder, *prompts, *options, "--out", tmp_path).returncode == 0
    rows = pd.read_parquet(tmp_path / "results.parquet").set_index(["layer", "window", "donor", "descriptor"])
    windows = {"all": (0, 1, 2, 3), "0%-50%": (0, 1), "50%-100%": (2, 3)}
    made = {}
    for (layer, window), chosen in {(la, window): steps for la in MIDDLE for window, steps in windows.items()}.items():
        rule = {1: [hooks.Injection(layer, steps=hooks.Steps(indices=chosen))]}
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        with hooks.inject(tiny_sd.unet, rule, schedule=tiny_sd.scheduler, rows=2):
            call = tiny_sd([edit, original], generator=generators, num_inference_steps=4, guidance_scale=2.0, output_type="pt")
        of_e, of_o = call.images * 2 - 1
        made[layer, window] = of_o
        written = load_png(tmp_path / "images" / "own-00" / f"{window.replace('%', 'pct')}_{layer}.png")
        assert (written - of_o).abs().max() <= 1.02 / 255, (layer, window)  # half a grey level of 2 / 255
        lpips = distance(*features(torch.stack([of_e, of_o])))
        assert rows.to_edit[layer, window, "edit", "lpips"] == pytest.approx(lpips, abs=1e-4), (layer, window)
    apart = {pair: (made[pair[0]] - made[pair[1]]).abs().max().item() for pair in itertools.combinations(made, 2)}
    assert min(apart.values()) > 2.1 / 255, min(apart, key=lambda pair: apart[pair])  # or a swap could not be seen


def test_by_time_gives_a_map_of_layers_and_windows(tiny_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    sweep = ["inject", "sweep", "--model", tiny_folder, "--pairs-file", pairs_file, "--num-steps", "4", "--layers", "@mid"]
    done = probekit(*sweep, "--by-time", "--windows", "2", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert set(pd.read_parquet(tmp_path / "run" / "results.parquet").window) == {"all", "0%-50%", "50%-100%"}
    assert sorted(p.name for p in (tmp_path / "run" / "figures").glob("*.svg")) == ["layers.svg", "roles.svg", "time.svg"]


@pytest.mark.slow
def test_killed_and_started_again_the_result_is_that_of_an_uninterrupted_run(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    sweep = ["inject", "sweep", "--model", tiny_folder, "--pairs-file", pairs_file, "--num-steps", "4", "--layers", "@resnets"]
    whole = probekit(*sweep, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"
    first = out / "units" / "content-00.parquet"
    killed(*sweep, "--out", out, cwd=tmp_path, when=first.exists)
    assert not (out / "results.parquet").exists()
    finished = {p: p.stat().st_mtime_ns for p in (out / "units").glob("*.parquet")}
    assert probekit(*sweep, "--out", out).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in finished} == finished  # not computed twice
    for name in ("results.parquet", "figures/roles.svg", "figures/roles.png"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    pictures = sorted(p.relative_to(out) for p in (out / "images").rglob("*.png"))
    assert pictures == sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole" / "images").rglob("*.png"))
    assert all((out / p).read_bytes() == (tmp_path / "whole" / p).read_bytes() for p in pictures)


def test_one_custom_injection_and_one_by_a_script(tiny_folder: Path, tmp_path: Path) -> None:
    prompts = ["--prompt-original", "a red fish", "--prompt-edit", "a blue star"]
    prompts += ["--model", tiny_folder, "--num-steps", "2", "--layers", "mid_block"]
    blended = probekit("inject", "image", *prompts, "--operation", "blend", "--weight", "0.5", "--out", tmp_path / "a.png")
    assert blended.returncode == 0, blended.stderr
    script = tmp_path / "mine.py"
    script.write_text("def operation(target, source, context):\n    return target + 0.5 * (source - target)\n")
    assert probekit("inject", "script", script, *prompts, "--out", tmp_path / "b.png").returncode == 0
    # the same picture, to the rounding of two ways to write it
    assert (load_png(tmp_path / "a.png") - load_png(tmp_path / "b.png")).abs().max() <= 1.01 / 127.5
    script.write_text("def operation(target, source, context):\n    return target[0]\n")
    assert "returned" in refused("inject", "script", script, *prompts, "--out", tmp_path / "c.png")
    script.write_text("def operation(target, source, context):\n    return source.nonsense\n")
    broken = refused("inject", "script", script, *prompts, "--out", tmp_path / "c.png")
    assert "mine.py" in broken and "nonsense" in broken and not (tmp_path / "c.png").exists()


def test_layers_are_listed(tiny_folder: Path) -> None:
    listed = probekit("layers", tiny_folder)
    assert listed.returncode == 0, listed.stderr
    line = next(line for line in listed.stdout.splitlines() if "down_blocks.0.attentions.1" in line)
    assert "attention" in line and "both, main, skip" in line and "8x16x16" in line


def bad_inputs(tiny: Path, tmp: Path) -> dict[str, tuple[list[Any], str]]:
    sweep = ["inject", "sweep", "--model", tiny, "--num-steps", "2", "--prompt-original", "a", "--prompt-edit", "b"]
    missing, no_yaml, truncated = tmp / "missing.yaml", tmp / "no.yaml", tmp / "truncated"
    missing.write_text("- {original: a red fish}\n")
    no_yaml.write_text("- {original: [\n")
    seedless = tmp / "seedless.yaml"
    seedless.write_text("- {original: a, edit: b}\n- {original: a, edit: b, seed: x}\n")
    shutil.copytree(tiny, truncated)
    weights = truncated / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp / "empty").mkdir()
    (tmp / "file").write_text("x")
    return {
        "unknown model": (["inject", "sweep", "--model", "mini-sb"], "mini-sd"),
        "unknown hub id": (["layers", "nobody/nothing"], "could not be loaded"),
        "a folder that is no pipeline": (["layers", tmp / "empty"], "model_index.json"),
        "a truncated file": (["layers", truncated], "could not be loaded"),
        "no such layer": ([*sweep, "--layers", "mid_block.resnet.0"], "nearest: mid_block.resnets.0"),
        "no such stream": ([*sweep, "--stream", "text"], "it has"),
        "no such factor": (["inject", "sweep", "--factors", "style"], "structure, content, surface"),
        "steps outside": ([*sweep, "--steps", "5-9", "--out", tmp / "steps"], "steps 0 to 1"),
        "steps that are none": ([*sweep, "--steps", "early"], "0%-50%"),
        "a missing key": ([*sweep[:6], "--pairs-file", missing], "pair 1: the key 'edit' is missing"),
        "a seed that is none": ([*sweep[:6], "--pairs-file", seedless], "pair 2: seed 'x' must be a whole number"),
        "timesteps outside": ([*sweep, "--steps", "t5000-4000", "--out", tmp / "steps"], "none of the schedule's 2 steps"),
        "windows that hold no step": ([*sweep, "--by-time", "--windows", "4"], "--windows 4"),
        "no yaml": ([*sweep[:6], "--pairs-file", no_yaml], "is no YAML"),
        "no pairs file": ([*sweep[:6], "--pairs-file", tmp / "nowhere.yaml"], "cannot be read"),
        "one prompt": ([*sweep[:-2]], "give both"),
        "no permission": ([*sweep, "--layers", "@mid", "--out", tmp / "file" / "run"], "cannot be written"),
        "a folder of one's own": ([*sweep, "--layers", "@mid", "--out", tmp], "is no run folder"),
        "device": (["layers", tiny, "--device", "tpu9"], "device 'tpu9'"),
        "dtype": (["layers", tiny, "--dtype", "int8"], "dtype 'int8'"),
        "no run": (["describe", tmp / "empty"], "no config.json"),
        "no zoo model": (["zoo", "evaluate", "mini-s"], "mini-sd"),
        "pairs of one's own prompts": ([*sweep, "--pairs", "3"], "--pairs 3"),
        "windows without a map": ([*sweep, "--windows", "3"], "--by-time"),
        "operation": (["inject", "image", *sweep[2:], "--layers", "@mid", "--operation", "mix"], "replace, blend, add"),
        "a weight of nothing": (["inject", "image", *sweep[2:], "--layers", "@mid", "--weight", "2"], "--weight 2"),
        "an image without layers": (["inject", "image", *sweep[2:]], "--layers"),
        "no script": (["inject", "script", tmp / "no.py", *sweep[2:], "--layers", "@mid"], "cannot be read"),
        "a number that is none": ([*sweep, "--seed", "x"], "--seed"),
        "no such option": ([*sweep, "--sed", "1"], "--sed"),
        "no such command": (["injct"], "injct"),
        "an argument that is missing": (["describe"], "'run'"),
    }


# whose error comes from where libraries have something to say of their own
TALKATIVE = ("unknown hub id", "a truncated file", "no such layer", "a number that is none")


@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_code_2(tiny_folder: Path, tmp_path: Path) -> None:
    cases = bad_inputs(tiny_folder, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name, (arguments, said) in cases.items():
        assert said in refused(*arguments, cwd=tmp_path), name
    for name in TALKATIVE:
        arguments, said = cases[name]
        with process(*arguments, cwd=tmp_path) as run:
            _, stderr = run.communicate()
        assert run.returncode == 2 and said in stderr and stderr.count("\n") == 1, (name, stderr)
    assert sorted(tmp_path.rglob("*")) == before

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from probekit import ProbekitError, hooks, seeds
from probekit.experiments import InjectSweep
from probekit.experiments.inject_picture import InjectImage
from probekit.experiments.inject_sweep import APART, read_pairs, scene_pairs
from probekit.images import load_png, to_uint8
from probekit.metrics.lpips import distance, features
from probekit.models import load
from probekit.models.painter import Painter
from tests.conftest import forked, killed, probekit, process, refused

MARKUP = "a red fish at the right</script><b>"


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
        "- {original: a blue ring, edit: a blue tree, factor: content, noise: 7}\n"
        f"- {{original: a red fish at the left, edit: '{MARKUP}', factor: structure, unrelated: a moon}}\n"
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
    sweep = ["inject", "sweep", "--model", tiny_folder, "--pairs-file", pairs_file, "--num-steps", "2", "--out", out]
    sweep += ["--layers", "@mid", "--layers", "@attentions"]
    done = probekit(*sweep)
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(out / "results.parquet")
    assert set(rows.factor) == {"content", "structure"} and set(rows.donor) == {"edit", "unrelated"}
    assert rows.groupby("pair").noise.first().tolist() == [0, 7, 2]
    last = rows[(rows.layer == "up_blocks.1.attentions.2") & (rows.descriptor == "lpips") & (rows.donor == "edit")]
    assert (last.transfer > 0.99).all() and (last.damage < 0.01).all()  # the last layer's picture is E's
    for pair in ("content-00", "structure-02"):
        e, injected, untouched = (
            load_png(out / "images" / pair / f"{name}.png") for name in ("E", "all_up_blocks.1.attentions.2", "O")
        )
        assert (e - injected).abs().max() < 0.02 < (e - untouched).abs().max(), pair
    page = (out / "report.html").read_text()
    # the page may fetch nothing, and names nothing (the figures' metadata name vocabularies by address, which nothing opens)
    assert (
        "mid_block" in page and """Content-Security-Policy" content="default-src 'none'; img-src data: blob:; style""" in page
    )
    assert not re.search(r'(src|href)="(?!data:|#|\$)|url\((?!#)|@import', page)
    # without the attribute `live`, and with all pictures there, the element asks no server; prompts are no markup
    (data,) = re.findall(r'<probekit-inspector><script type="application/json">(.*?)</script>', page)
    (seen,) = json.loads(data)["runs"]
    assert seen["lazy"] is None and seen["pairs"][2]["edit"] == MARKUP and MARKUP not in page
    assert all(set(pair["pictures"]["all"]) == set(rows.layer) for pair in seen["pairs"])
    assert sorted(p.name for p in (out / "figures").iterdir()) == ["layers.png", "layers.svg", "roles.png", "roles.svg"]

    kept = {p: p.read_bytes() for p in out.rglob("*.parquet")}
    again = probekit(*sweep)
    assert again.returncode == 0 and {p: p.read_bytes() for p in out.rglob("*.parquet")} == kept
    described = probekit("describe", out)
    assert described.returncode == 0 and "mid_block" in described.stdout
    assert re.sub("<pre>.*?</pre>", "", (out / "report.html").read_text()) == re.sub("<pre>.*?</pre>", "", page)
    # what they were given and what only says how fast is no other run; the pairs are kept with it
    assert probekit(*sweep, "--batch-size", "3").returncode == 0

    assert "seed 0 there, 5 here" in refused(*sweep, "--seed", "5")
    assert {p: p.read_bytes() for p in out.rglob("*.parquet")} == kept


def test_a_finished_run_is_not_made_again_and_is_shown_without_its_file_of_pairs(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = shutil.copy(pairs_file, tmp_path / "mine.yaml")
    sweep = ["inject", "sweep", "--model", tiny_folder, "--pairs-file", mine, "--num-steps", "1", "--layers", "mid_block"]
    first = probekit(*sweep, "--out", "run", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    beforehand, found = first.stdout.lstrip().split("\n", 1)
    assert "at a time; weights take" in beforehand

    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("it was all done")

    monkeypatch.setattr(Painter, "sweep", fail)
    assert probekit(*sweep, "--out", "run", cwd=tmp_path).stdout.lstrip() == found.lstrip()  # the bar leaves a line
    mine.unlink()
    assert probekit("describe", "run", cwd=tmp_path).stdout.lstrip() == found.lstrip()
    (tmp_path / "run" / "images" / "content-00" / "O.png").unlink()
    assert "O.png of content-00 is missing; the same command makes it again" in refused("describe", "run", cwd=tmp_path)


def test_from_python_a_sweep_gives_its_findings(tiny_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    options = {"model": str(tiny_folder), "pairs_file": pairs_file, "num_steps": 2, "layers": ["mid_block"], "by_time": True}
    found = InjectSweep(**options, windows=2).run(out=tmp_path / "run")
    assert found.rows.equals(pd.read_parquet(tmp_path / "run" / "results.parquet"))
    assert found.figures == ("layers", "roles", "time")
    shown, page = found._repr_html_(), (tmp_path / "run" / "report.html").read_text()
    assert shown.count("<svg") == 3 and "No layer can have a role: one pair of a factor" in shown
    assert "CLIP similarity is left out" in shown and "CLIP similarity is left out" in page
    (table,) = found.tables
    assert table.columns == ["steps", "layer", "structure", "content", "damage", "role"] and len(table.rows) == 3
    assert {row[-1] for row in table.rows} == {"no role"} and set(table.styles.values()) == {"dim"}


def test_shards_give_what_one_run_gives(tiny_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    sweep = InjectSweep(model=str(tiny_folder), pairs_file=pairs_file, num_steps=2, layers=["@mid"])
    sweep.run(out=tmp_path / "whole")
    parts = [sweep.run(out=tmp_path / "parts", shard=shard) for shard in ("3/3", "1/3", "2/3")]
    assert parts[:2] == [None, None] and parts[2] is not None
    for name in ("results.parquet", "figures/layers.png", "figures/roles.svg"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("separate", [False, True])
def test_a_pair_is_made_from_the_noise_of_its_number_and_the_run_s_seed(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path, separate: bool
) -> None:
    options = {"model": str(tiny_folder), "pairs_file": pairs_file, "num_steps": 2, "layers": ["mid_block"], "guidance": 2.0}
    InjectSweep(**options, seed=4, separate_noise=separate).run(out=tmp_path / "run")
    painter = load(tiny_folder, device="cpu").painter
    prompts, numbers = ["a blue ring", "a blue tree"], [7, 7 + APART * separate]
    made = painter.generate(prompts, numbers, seed=4, num_inference_steps=2, guidance_scale=2.0)
    for name, picture in zip("OE", made, strict=True):
        written = load_png(tmp_path / "run" / "images" / "content-01" / f"{name}.png")
        assert (written - picture).abs().max() <= 1.02 / 255, name
    apart = painter.generate(prompts[:1], numbers[:1], seed=0, num_inference_steps=2, guidance_scale=2.0)
    assert (apart - made[0]).abs().max() > 2.1 / 255


def test_controlled_pairs_have_noises_of_their_own_number_whatever_the_seed() -> None:
    factors = ["structure", "content", "surface"]
    first, second = (scene_pairs(factors, 3, seed) for seed in (0, 1))
    numbers = [1009 * k + i for k in range(3) for i in range(3)]
    assert [p.noise for p in first] == numbers == [p.noise for p in second]
    assert [p.original for p in first] != [p.original for p in second]
    # a factor's pairs are the same ones beside others and alone
    assert scene_pairs(["content"], 2, 0) == [p for p in first if p.factor == "content"][:2]


def test_pairs_of_a_file_have_the_number_they_name_else_that_of_their_place(pairs_file: Path) -> None:
    pairs = read_pairs(pairs_file)
    assert [(p.name, p.noise) for p in pairs] == [("content-00", 0), ("content-01", 7), ("structure-02", 2)]
    assert [p.unrelated for p in pairs] == ["a blue tree", "a red star", "a moon"]


MIDDLE = ["down_blocks.1.resnets.0", "mid_block.attentions.0", "up_blocks.0.resnets.0"]


@pytest.mark.slow
def test_what_a_sweep_writes_under_a_layers_name_is_of_that_layer_and_window(
    tiny_sd: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    original, edit = "a red fish", "a blue star"
    sweep = ["inject", "sweep", "--model", tiny_folder, "--prompt-original", original, "--prompt-edit", edit, "--guidance", "4"]
    sweep += ["--num-steps", "4", "--by-time", "--windows", "2", "--seed", "5", *(f"--layers={name}" for name in MIDDLE)]
    assert probekit(*sweep, "--out", tmp_path).returncode == 0
    rows = pd.read_parquet(tmp_path / "results.parquet").set_index(["layer", "window", "donor", "descriptor"])
    windows = {"all": (0, 1, 2, 3), "0%-50%": (0, 1), "50%-100%": (2, 3)}
    made = {}
    for (layer, window), chosen in {(la, window): steps for la in MIDDLE for window, steps in windows.items()}.items():
        rule = {1: [hooks.Injection(layer, steps=hooks.Steps(indices=chosen))]}
        generators = [seeds.numbered(5, 0) for _ in range(2)]
        with hooks.inject(tiny_sd.unet, rule, schedule=tiny_sd.scheduler, rows=2):
            call = tiny_sd([edit, original], generator=generators, num_inference_steps=4, guidance_scale=4.0, output_type="pt")
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


@pytest.mark.slow
def test_one_custom_injection_and_one_by_a_script(tiny_folder: Path, tmp_path: Path) -> None:
    prompts = ["--model", tiny_folder, "--prompt-original", "a red fish", "--prompt-edit", "a blue star", "--num-steps", "2"]
    prompts += ["--layers", "mid_block"]
    blended = probekit("inject", "image", *prompts, "--operation", "blend", "--weight", "0.5", "--out", tmp_path / "a")
    assert blended.returncode == 0, blended.stderr
    script = tmp_path / "mine.py"
    script.write_text("def operation(target, source, context):\n    return target + 0.5 * (source - target)\n")
    assert probekit("inject", "script", script, *prompts, "--out", tmp_path / "b").returncode == 0
    # the same picture, to the rounding of two ways to write it
    result = Path("images") / "together" / "result.png"
    assert (load_png(tmp_path / "a" / result) - load_png(tmp_path / "b" / result)).abs().max() <= 1.01 / 127.5
    # from Python the same, and O and E are those of noise 0 of the seed
    options = {"model": str(tiny_folder), "prompt_original": "a red fish", "prompt_edit": "a blue star", "num_steps": 2}
    InjectImage(**options, layers=["mid_block"], operation="blend", weight=0.5).run(out=tmp_path / "d")
    for end in ("O", "E", "result"):
        file = result.with_name(f"{end}.png")
        assert (tmp_path / "d" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()
    InjectImage(**options, layers=["mid_block"], seed=6).run(out=tmp_path / "e")
    painter = load(tiny_folder, device="cpu").painter
    made = painter.generate(["a red fish", "a blue star"], [0, 0], seed=6, num_inference_steps=2)
    for image, end in zip(made, "OE", strict=True):
        written = to_uint8(load_png(tmp_path / "e" / result.with_name(f"{end}.png")))
        assert abs(written.astype(int) - to_uint8(image)).max() <= 1
    script.write_text("def operation(target, source, context):\n    return target[0]\n")
    assert "returned" in refused("inject", "script", script, *prompts, "--out", tmp_path / "c")
    script.write_text("def operation(target, source, context):\n    return source.nonsense\n")
    broken = refused("inject", "script", script, *prompts, "--out", tmp_path / "d2")
    assert "mine.py" in broken and "nonsense" in broken and not [*(tmp_path / "d2" / "units").iterdir()]


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
    noises = {name: tmp / f"{name}.yaml" for name in ("noise: x", "noise: -1", "noise: true", "seed: 3")}
    for given, file in noises.items():
        file.write_text(f"- {{original: a, edit: b}}\n- {{original: a, edit: b, {given}}}\n")
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
        "a noise that is none": ([*sweep[:6], "--pairs-file", noises["noise: x"]], "pair 2: noise 'x' must be a whole number"),
        "a noise below 0": ([*sweep[:6], "--pairs-file", noises["noise: -1"]], "pair 2: noise -1 must be a whole number"),
        "a noise that is yes": ([*sweep[:6], "--pairs-file", noises["noise: true"]], "pair 2: noise True must be"),
        "a pair's own seed": ([*sweep[:6], "--pairs-file", noises["seed: 3"]], "pair 2: seed 3: write noise, the number"),
        "a model without prompts": (["inject", "sweep", "--model", "avatar-vae"], "takes no prompt"),
        "a seed out of reach": ([*sweep, "--seed", str(2**32)], "--seed"),
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
        "operation": (["inject", "image", *sweep[2:], "--layers", "@mid", "--operation", "mix"], "replace, blend, add, bypass"),
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
        with forked(*arguments, cwd=tmp_path) as (run, file):
            run.join()
            stderr = file.read_text()
        assert run.exitcode == 2 and said in stderr and stderr.count("\n") == 1, (name, stderr)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"factors": "style"}, "--factors 'style': choose from structure, content, surface"),
        ({"prompt_original": "a"}, "give both"),
        ({"prompt_original": "a", "prompt_edit": "b", "pairs": 3}, "--pairs 3: is for controlled pairs"),
        ({"pairs_file": "mine.yaml", "factors": "content"}, "--factors 'content': is for controlled pairs"),
        ({"windows": 3}, "--windows 3: goes with --by-time"),
        ({"by_time": True, "num_steps": 3}, "--windows 4: some hold no step"),
        ({"by_time": True, "steps": "0-3"}, "--steps '0-3': with --by-time, give percents"),
        ({"steps": "early"}, "0%-50%"),
        ({"num_steps": 2, "steps": "5-9"}, "steps 0 to 1"),
    ],
)
def test_bad_options_are_refused_from_python_as_on_the_command_line(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ProbekitError, match=re.escape(said)) as error:
        InjectSweep(**options)
    given = [part for name, value in options.items() for part in _as_typed(name, value)]
    assert refused("inject", "sweep", *given, cwd=tmp_path) == f"probekit: {error.value}\n"
    assert not any(tmp_path.iterdir())


def _as_typed(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    return [flag] if value is True else [flag, str(value)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_steps": 0}, "--num-steps 0: at least 1"),
        ({"seed": -1}, "--seed -1: at least 0"),
        ({"layers": "mid_block"}, "--layers 'mid_block': a list"),
        ({"batch_size": 1}, "--batch-size 1: at least 3"),
    ],
)
def test_values_that_typer_would_refuse_are_refused_from_python_too(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ProbekitError, match=re.escape(said)):
        InjectSweep(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": []}, "--layers: name at least one"),
        ({"words": " "}, "--words ' ': is empty"),
        ({"mask": "2x2:88"}, "--mask '2x2:88': write height x width"),
        ({"mask": "2x2:0"}, "nothing lies inside it"),
        ({"windows": 2}, "--windows 2: goes with --apart"),
        ({"operation": "bypass", "weight": 2.0}, "--weight 2: bypass has none"),
        ({"steps": "9", "num_steps": 2}, "steps 9: the schedule has steps 0 to 1"),
        ({"operation": "mix"}, "replace, blend, add"),
        ({"weight": 2.0}, "--weight 2: replace has none"),
    ],
)
def test_an_injection_that_cannot_be_is_refused_before_a_model_is_loaded(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ProbekitError, match=re.escape(said)):
        InjectImage(**{"prompt_original": "a", "prompt_edit": "b", "layers": ["@mid"], "model": "nowhere"} | options)

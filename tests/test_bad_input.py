"""What comes from outside: options, files, folders, code of one's own, a hub that does not answer; each refused in one line.

`tests/hardening/inputs.py` has hundreds of such inputs, each in a process under a limit; here are some of every kind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from probekit import ProbekitError, checked, load
from probekit.experiments import EXPERIMENTS, find
from probekit.experiments.inject_sweep import read_pairs
from probekit.experiments.latents_encode import LatentsEncode
from probekit.files import file_name
from probekit.latents.probes import fit_probes
from probekit.models import configs, hub
from probekit.models.families.custom import load_class
from probekit.report.figures import save_figure, style
from probekit.report.findings import Table
from probekit.report.terminal import print_models, print_table
from probekit.runs.experiment import options_of
from tests.conftest import probekit, refused
from tests.hardening import bad_files
from tests.pipelines import PIPELINES

# --- options -----------------------------------------------------------------------------------------------------------

NEEDED = {"prompt_original": "a", "prompt_edit": "b", "layers": ["@mid"], "file": "script.py", "model": "mini-sd"}
TEXTS = ("", "  ", "\udc80", "a\x1b[31m", "a\0b", "x" * 20_000, 5, True, b"x")
NUMBERS = (float("nan"), float("inf"), 10**20, -(10**20), "5", True, [1], 10**400)


def _bad(option: Any) -> Iterator[Any]:
    if option.kinds[0] is bool:
        yield from ("yes", 1, "")
    elif int in option.kinds or float in option.kinds:
        yield from (*NUMBERS, option.most + 1, option.least - 1)
        if float not in option.kinds:
            yield 1.5
    elif list in option.kinds:
        yield from ([text] for text in TEXTS)
        yield "@mid"
    else:
        yield from TEXTS
    if type(None) not in option.kinds:
        yield None


@pytest.mark.parametrize("name", [*EXPERIMENTS, "latents-encode"])
def test_every_option_refuses_what_is_none_of_its_kind_by_name(name: str) -> None:
    made: Any = LatentsEncode if name == "latents-encode" else find(name)
    options = options_of(made)
    needed = {key: value for key, value in NEEDED.items() if key in {option.field for option in options}}
    for option in options:
        for value in _bad(option):
            with pytest.raises(ProbekitError) as error:
                made(**needed | {option.field: value})
            said = str(error.value)
            assert said.startswith(f"{option.flag} ") and "\n" not in said and len(said) < 500, (option, value, said[:500])
            said.encode()  # a terminal can show it


def test_paths_are_paths_and_numbers_of_their_kind_whoever_gives_them() -> None:
    made: Any = find("inject-sweep")(pairs_file="mine.yaml", guidance=3)
    assert made.pairs_file == Path("mine.yaml") and type(made.guidance) is float
    assert made == find("inject-sweep")(pairs_file=Path("mine.yaml"), guidance=3.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inject", "sweep", "--out", ""], "--out '': is empty"),
        (["inject", "sweep", "--factors", ""], "--factors '': is empty"),
        (["inject", "sweep", "--layers", " "], "--layers ' ': is empty"),
        (["layers", ""], "model '': is empty"),
        (["describe", ""], "run '': is empty"),
        (["layers", "mini-sd", "--device", "meta"], "device 'meta': not available"),
        (["zoo", "train", "avatar-vae", "--seed", str(2**32)], "--seed"),
        (["zoo", "evaluate", "avatar-vae", "--n", str(10**20)], "--n"),
        (["zoo", "train", "avatar-vae", "--out", "/dev/null/x"], "--out '/dev/null/x': cannot be written"),
        (["zoo", "train", "avatar-vae", "--out", "new", "--checkpoints", "taken"], "--checkpoints 'taken': cannot be written"),
        (["probe", "run", "--workers", "100000"], "--workers"),
        (["latents", "encode", "avatar-vae:"], "ends with a colon"),
        (["inject", "calibrate", "--num-steps", "1001"], "--num-steps 1001: the model's schedule has 1000 timesteps"),
        (["invert", "interpolate", "--pictures", "0," + "9" * 5000], "--pictures"),
        (["noise-map", "run", "--steps", "٣"], "--steps '٣': write numbers of steps"),
        (["probe", "layers", "--timesteps", "875,875"], "875 stands there twice"),
        (["latents", "encode", "avatar-vae", "--data", "a" * 300], "File name too long"),
    ],
)
def test_the_command_line_refuses_before_it_works(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    line = refused(*arguments, cwd=tmp_path)
    assert said in line and len(line) < 2000
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# --- files -------------------------------------------------------------------------------------------------------------


def _nowhere(folder: Path) -> dict[str, Path]:
    """Paths of what is no plain file."""
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "folder").mkdir()
    with (folder / "large").open("wb") as file:
        file.truncate(2**40)
    made = {name: folder / name for name in ("pipe", "loop", "folder", "large", "nowhere")}
    return made | {"device": Path("/dev/zero"), "long": folder / ("a" * 300), "zero": folder / "a\0b"}


def test_what_is_no_plain_file_is_refused_wherever_one_is_read(tmp_path: Path) -> None:
    from probekit.data import load_data
    from probekit.data.folder import read_images, read_rows

    for name, path in _nowhere(tmp_path).items():
        readers: tuple[Callable[[Path], Any], ...] = (
            lambda path: checked.content("x", path, 2**30),
            lambda path: read_images([path], 8),
            lambda path: list(read_rows(path)),
            read_pairs,
            lambda path: load_class(path, "Mine"),
        )
        for read in readers:
            with pytest.raises(ProbekitError) as error:
                read(path)
            assert "\n" not in str(error.value), name
        if name not in ("folder", "zero"):
            with pytest.raises(ProbekitError):
                load_data(f"folder:{path}", 8)


def test_a_pipe_among_pictures_is_named(tmp_path: Path) -> None:
    from PIL import Image

    from probekit.data import load_data

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(ProbekitError, match=r"b\.png': is no file"):
        load_data(str(tmp_path), 8)


def test_a_picture_that_is_larger_than_memory_is_refused_by_its_header(tmp_path: Path) -> None:
    from probekit.data.folder import read_images

    for side in (9000, 60_000, 2**31 - 1):
        (tmp_path / "x.png").write_bytes(bad_files._png(side, side))
        with pytest.raises(ProbekitError, match=r"pixels|limit|is no PNG"):
            read_images([tmp_path / "x.png"], 8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 3000 + "]" * 3000, "nested more than 20 deep|is no YAML"),
        ("a0: &a0 [x, x]\na1: &a1 [*a0, *a0]\n", "has an alias .*a0. in line 2"),
        (f"- {{original: a, edit: b, noise: {'9' * 5000}}}", "is no YAML"),
        ("- {original: a, edit: b, noise: true}", "noise True must be a whole number"),
        ('- {original: "\\ud800", edit: b}', "half a character|is no YAML"),
        ('- {original: "a\\e[31m", edit: b}', "control character"),
        ("- {original: '', edit: b}", "original '': is empty"),
        (f"- {{original: a, edit: b, factor: {'a' * 250}}}", "at most 100 characters"),
        ("- {original: a, edit: b}\n" * 3000, "has 3,000 pairs"),
        ("- !!python/object/apply:os.system [touch ran]", "is no YAML"),
    ],
)
def test_pairs_that_would_crash_or_fill_the_memory_are_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.yaml").write_text(text)
    with pytest.raises(ProbekitError, match=said) as error:
        read_pairs(tmp_path / "pairs.yaml")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("header", "cells", "said"),
    [
        ("file,image", ["1", "0"], "column 'image' is the images' own"),
        (f"file,{'a' * 250}", ["1", "0"], "at most 100 characters"),
        ("file,a", ["1.5", "2.5", "3.5", "1e400"], "1e400' in line 5 is no number"),
        ("file,a", ["1.5", "2.5", "3.5", "1e300"], "1e300' in line 5: at most 1e\\+15"),
        ("file,a", ["1", "a\x00b"], "line 3: has a control character"),
        ("file," + ",".join(f"a{i}" for i in range(1001)), [",".join("1" * 1001)], "has 1,001 labels"),
    ],
)
def test_labels_that_nothing_can_be_made_of_are_refused(header: str, cells: list[str], said: str, tmp_path: Path) -> None:
    from PIL import Image

    from probekit.data import load_data

    names = [f"{i}.png" for i in range(4)]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    lines = [header, *(f"{name},{cells[min(i, len(cells) - 1)]}" for i, name in enumerate(names))]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    with pytest.raises(ProbekitError, match=said):
        load_data(f"folder:{tmp_path},labels=labels.csv", 8)


def test_labels_of_numbers_are_no_classes(any_shape: None) -> None:
    x = np.random.default_rng(0).normal(size=(40, 3))
    for kind in ("logistic", "lasso", "ridge"):
        with pytest.raises(ProbekitError, match="a probe takes bool or classes"):
            fit_probes(x, pd.DataFrame({"a": x[:, 0]}), kind=kind)
        with pytest.raises(ProbekitError, match="alpha nan"):
            fit_probes(x, pd.DataFrame({"a": x[:, 0] > 0}), kind=kind, alpha=float("nan"))


# --- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "sd"
    PIPELINES["sd"].make().save_pretrained(folder)
    configs.check(folder, "sd")
    return folder


# what is refused before anything is built of it; the rest is refused by diffusers
LOOKED_THROUGH: list[tuple[str, dict[str, Any], str]] = [
    ("unet/config.json", {"sample_size": 10**9}, "a whole number from 1 to 2048"),
    ("unet/config.json", {"sample_size": -16}, "a whole number from 1 to 2048"),
    ("unet/config.json", {"sample_size": "16"}, "a whole number from 1 to 2048"),
    ("unet/config.json", {"layers_per_block": 10**5}, "at most 256 layers"),
    ("unet/config.json", {"layers_per_block": [1, 10**5]}, "at most 256 layers"),
    ("unet/config.json", {"layers_per_block": "2"}, "a number is needed"),
    ("unet/config.json", {"norm_num_groups": -1}, "a number from 0"),
    ("unet/config.json", {"block_out_channels": [8] * 1000}, "has 1,000 items"),
    ("unet/config.json", {"in_channels": 10**50}, "is no number that a model has"),
    ("unet/config.json", {"act_fn": 5}, "text is needed"),
    ("unet/config.json", {"center_input_sample": "yes"}, "true or false"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "from 1 to 10,000"),
    ("scheduler/scheduler_config.json", {"timestep_spacing": "nonsense"}, "choose leading, linspace, trailing"),
    ("scheduler/scheduler_config.json", {"prediction_type": "nonsense"}, "choose epsilon"),
    ("scheduler/scheduler_config.json", {"beta_start": float("nan")}, "is no number that a model has"),
    ("text_encoder/config.json", {"num_hidden_layers": 10**5}, "at most 256 layers"),
    ("model_index.json", {"unet": ["os", "system"]}, "nothing is imported but diffusers and transformers"),
    ("model_index.json", {"unet": ["mine", "Mine"]}, "nothing is imported but diffusers and transformers"),
    ("model_index.json", {"text_encoder": ["transformers", "AutoModel"]}, "may run code of the folder's"),
    ("model_index.json", {"_class_name": ["pipeline", "Mine"]}, "the name of a pipeline"),
]


@pytest.mark.parametrize(("file", "change", "said"), LOOKED_THROUGH)
def test_a_pipeline_s_configs_are_looked_through(file: str, change: Any, said: str, pipeline: Path, tmp_path: Path) -> None:
    folder = bad_files._changed(pipeline, tmp_path / "changed", file, change)
    with pytest.raises(ProbekitError, match=f"^model .*'{file}'.*{said}"):
        load(folder, device="cpu")


def test_a_tokenizer_without_words_is_refused(pipeline: Path, tmp_path: Path) -> None:
    folder = bad_files._copied(pipeline, tmp_path / "changed")
    for file in (folder / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(ProbekitError, match="'tokenizer' has no vocabulary"):
        load(folder, device="cpu")


def test_a_folder_with_a_pipeline_of_its_own_runs_none(pipeline: Path, tmp_path: Path) -> None:
    folder, marker = bad_files._copied(pipeline, tmp_path / "changed"), tmp_path / "ran"
    for place in (folder / "pipeline.py", folder / "unet" / "mine.py", folder / "text_encoder" / "modeling_mine.py"):
        place.write_text(f"open({str(marker)!r}, 'w').close()\nclass Mine: pass\n")
    told = json.loads((folder / "text_encoder" / "config.json").read_text())
    told["auto_map"] = {"AutoModel": "modeling_mine.Mine", "AutoConfig": "modeling_mine.Mine"}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(told))
    load(folder, device="cpu")  # its own pipeline.py and what auto_map names are left alone
    index = folder / "model_index.json"
    whole = json.loads(index.read_text())
    for change in (
        {"_class_name": ["pipeline", "Mine"]},
        {"unet": ["mine", "Mine"]},
        {"text_encoder": ["transformers", "AutoModel"]},
    ):
        index.write_text(json.dumps(whole | change))
        with pytest.raises(ProbekitError):
            load(folder, device="cpu")
    assert not marker.exists()


@pytest.mark.parametrize("place", ["../../../..", "/etc", 5, "nonsense"])
def test_parts_are_borrowed_from_bundled_models_alone(place: Any, pipeline: Path, tmp_path: Path) -> None:
    folder = bad_files._copied(pipeline, tmp_path / "changed")
    (folder / "borrowed.json").write_text(json.dumps({"vae": place}))
    with pytest.raises(ProbekitError, match="which no bundled model has"):
        load(folder, device="cpu")


def test_where_the_hub_does_not_answer_it_is_asked_once(monkeypatch: pytest.MonkeyPatch, pipeline: Path) -> None:
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[str] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise OSError("no network")

    def of(place: Path | None) -> Callable[..., str]:
        def snapshot(name: str, local_files_only: bool) -> str:
            assert local_files_only
            if place is None:
                raise LocalEntryNotFoundError("not there")
            return str(place)

        return snapshot

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", of(None))
    hub._answers.cache_clear()
    for _ in range(2):
        assert "could not be loaded (https://huggingface.co cannot be reached, and nothing of it is kept here)" in refused(
            "layers", "nobody/nothing"
        )
    assert asked == [constants.ENDPOINT]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", of(pipeline))
    assert load("lab/kept", device="cpu").name == "lab/kept"
    hub._answers.cache_clear()


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [10**12, 512]},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [10**9, 512]}}},
        {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip", "configuration": {"level": 5}}]},
        {"data_type": "complex128"},
    ],
)
def test_latents_described_as_larger_than_they_are_or_inflated_otherwise_are_not_read(change: Any, tmp_path: Path) -> None:
    from probekit.data import load_data
    from probekit.latents.store import LatentStore
    from probekit.models import load_space

    space, data = load_space("random"), load_data("scenes", 8)
    LatentStore(tmp_path / "store", space, data).encode([0])
    LatentStore(tmp_path / "store", space, data).read([0])  # as it was written it is
    described = tmp_path / "store" / "latents" / "zarr.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | change))
    with pytest.raises(ProbekitError, match=r"zarr\.json is damaged|cannot be opened"):
        LatentStore(tmp_path / "store", space, data)


OWN = """
import sys
class Mine:
    image_size = {size}
    def __init__(self):
        {made}
    def encode(self, x):
        {encoded}
"""


@pytest.mark.parametrize(
    ("size", "made", "encoded", "said"),
    [
        ("16", "raise SystemExit(0)", "return x", "SystemExit: 0"),
        ("16", "sys.exit(3)", "return x", "SystemExit: 3"),
        ("16", "raise BaseException('a\\nb')", "return x", "BaseException: a b"),
        ("16", "raise GeneratorExit", "return x", "GeneratorExit"),
        ("16", "pass", "raise SystemExit(0)", "encode: SystemExit: 0"),
        ("10**6", "pass", "return x", "needs image_size, 1 to 4096 pixels"),
        ("True", "pass", "return x", "needs image_size"),
    ],
)
def test_a_class_of_one_s_own_ends_nothing(size: str, made: str, encoded: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN.format(size=size, made=made, encoded=encoded))
    assert said in refused("models", f"{file}:Mine")


# --- names -------------------------------------------------------------------------------------------------------------

NAMES = ("[/x]", "[red]a[/red]", "$\\frac$", "$x^2$", "a_b^c", "<b>&amp;", "%s {0}", "\\", "a" * 250)


def test_names_are_text_in_tables_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(Table("[/x]", NAMES[:2], [NAMES[:2], NAMES[2:4]], text=NAMES[:1], styles={0: "dim"}))
    said = capsys.readouterr().out
    assert all(name in said for name in NAMES[:4])
    with plt.rc_context(style()):
        figure, axes = plt.subplots()
        axes.set_title(NAMES[2])
        axes.set_xticks(range(len(NAMES)), NAMES)
        axes.text(0, 0, NAMES[3])
        assert not any(label.get_parse_math() for label in axes.get_xticklabels())
    save_figure(figure, tmp_path / "figure")
    plt.close(figure)


def test_a_model_whose_name_looks_like_markup_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a[" / "x]$\\frac$"
    folder.mkdir(parents=True)
    (folder / "mine.py").write_text(OWN.format(size=16, made="pass", encoded="return x.flatten(1)"))
    spec = f"{folder / 'mine.py'}:Mine"
    assert spec in "".join(probekit("models", spec).stdout.split())
    print_models([load(spec, device="cpu")])
    assert "custom" in capsys.readouterr().out


def test_long_names_are_cut_and_stay_apart() -> None:
    names = [file_name("a" * 300), file_name("a" * 299 + "b"), file_name("é" * 300), file_name("\udc80" * 300)]
    assert len(set(names)) == 4 and all(len(name.encode()) <= 160 for name in names)
    assert file_name("avatar-vae:mean") == "avatar-vae_mean"

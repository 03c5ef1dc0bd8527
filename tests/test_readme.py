"""What README and the pages of the site show is so: their code runs, their commands and links exist."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from probekit.cli import app, groups
from probekit.experiments import EXPERIMENTS, find
from tests.conftest import probekit

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").glob("*.md"))
SLOW = {"latents.md", "layers.md", "noise-map.md", "properties.md", "python.md", "stitch.md", "README.md", "engines.md"}
"""Pages whose blocks take more than 5 seconds together."""


class Block(NamedTuple):
    """A fenced block of code."""

    language: str
    title: str
    """The file that it is to be."""
    code: str


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    found = re.findall(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [Block(*parts) for parts in found]


def prose(page: Path) -> str:
    """A page without its blocks, with what it takes from other files."""
    text = re.sub(r'^--8<-- "(.+)"$', lambda match: (ROOT / match[1]).read_text(), page.read_text(), flags=re.MULTILINE)
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def inline(page: Path) -> list[str]:
    """What stands between backticks in a page's prose, where a line may end inside."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def named(pages: list[Path]) -> list[Any]:
    """Pages as parameters of a test."""
    return [pytest.param(page, id=page.name) for page in pages]


# --- code --------------------------------------------------------------------------------------------------------------

WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.name, marks=[pytest.mark.slow] if p.name in SLOW else []) for p in WITH_PYTHON]
)
def test_every_python_block_runs_by_itself(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.title:
            (tmp_path / block.title).write_text(block.code)
    for number, block in enumerate(blocks(page)):
        if block.language == "python":
            script = tmp_path / f"block{number}.py"  # nnsight reads a script's source
            script.write_text(block.code)
            runpy.run_path(str(script), run_name="__main__")
    # the pictures that are said to be made are made
    for made in re.findall(r'save_png\(.*"(\w+\.png)"\)', page.read_text()):
        assert (tmp_path / made).stat().st_size > 1000, made


def test_the_pages_have_code() -> None:
    assert {"README.md", "python.md", "models.md", "latents.md"} <= {page.name for page in WITH_PYTHON}


@pytest.mark.slow
def test_the_script_and_the_pairs_of_the_page_on_injections_are_taken(tmp_path: Path) -> None:
    (script,), (pairs,) = (
        [b for b in blocks(ROOT / "docs" / "inject.md") if b.title == name] for name in ("mine.py", "pairs.yaml")
    )
    (tmp_path / script.title).write_text(script.code)
    (tmp_path / pairs.title).write_text(pairs.code)
    prompts = ["--prompt-original", "a small white moon at the right on a dotted green ground"]
    prompts += ["--prompt-edit", "a large red fish at the top left on a striped blue ground", "--num-steps", "2"]
    shown = probekit("inject", "script", script.title, "--layers", "up_blocks.2.attentions.1", *prompts, cwd=tmp_path)
    assert shown.returncode == 0 and [*tmp_path.glob("runs/inject-script/*/images/together/result.png")], shown.stderr
    asked = ["--pairs-file", pairs.title, "--layers", "mid_block", "--num-steps", "2", "--out", "run"]
    swept = probekit("inject", "sweep", *asked, cwd=tmp_path)
    assert swept.returncode == 0 and (tmp_path / "run" / "report.html").exists(), swept.stderr


# --- commands ----------------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """Every command that a page shows, in a block or in its prose."""
    shown = [line for b in blocks(page) for line in b.code.replace("\\\n", " ").splitlines() if line.startswith("probekit ")]
    for code in inline(page):
        first, second, *_ = [*code.split(), "", ""]
        if first == "probekit" and second:
            shown.append(code)
        elif first in groups and second in {command.name for command in groups[first].registered_commands}:
            shown.append(f"probekit {code}")
    return shown


@pytest.mark.parametrize("page", named([page for page in PAGES if commands(page)]))
def test_every_command_can_be_given_so(page: Path) -> None:
    for shown in commands(page):
        words, path = shlex.split(shown, comments=True)[1:], []
        command: Any = typer.main.get_command(app)
        while words and words[0] in getattr(command, "commands", {}):
            path.append(words.pop(0))
            command = command.commands[path[-1]]
        if words == ["--help"]:
            continue
        assert not hasattr(command, "commands"), f"{shown}: no such command"
        if not words:  # a command that is named only may need arguments
            continue
        given = command.make_context(shown, list(words)).params  # refuses options that it does not have
        if (name := "-".join(path)) in EXPERIMENTS:
            experiment = find(name)
            experiment(**{option: value for option, value in given.items() if option in experiment.__dataclass_fields__})


def test_every_option_in_prose_is_one_of_some_command() -> None:
    known, waiting = {"--help"}, [typer.main.get_command(app)]
    while waiting:
        command: Any = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        known |= {option for parameter in command.params for option in parameter.opts}
    for page in PAGES:
        for code in inline(page):
            if code.startswith("--") and not code.startswith("--mapped"):  # the benchmarks' is no command's
                assert {*re.findall(r"--[a-z-]+", code)} <= known, (page.name, code)


def test_the_experiments_that_a_page_names_are_all_there_are() -> None:
    named = {name for name in re.findall(r"`([A-Z]\w+)`", prose(ROOT / "docs" / "python.md"))}
    classes = {place.rpartition(":")[2] for place in EXPERIMENTS.values()}
    assert classes <= named
    for name in EXPERIMENTS:
        group = next(group for group in groups if name.startswith(f"{group}-"))
        assert f"`{group} {name.removeprefix(f'{group}-')}`" in prose(ROOT / "docs" / "python.md"), name


# --- links -------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What a page's headings are linked by."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", named(PAGES))
def test_every_link_and_picture_is_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_file(), link
        assert not anchor or anchor in anchors(there), link


def test_every_picture_is_shown() -> None:
    shown = "".join(page.read_text() for page in PAGES)
    assert [p.name for p in (ROOT / "docs" / "pictures").iterdir() if f"pictures/{p.name})" not in shown] == []


# --- the site ----------------------------------------------------------------------------------------------------------


def test_the_site_is_built_without_a_warning_and_loads_nothing_from_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("material", reason="the extra docs is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True))
    written = [file for file in (tmp_path / "site").rglob("*") if file.suffix in (".html", ".css")]
    assert {file.name for file in written} >= {page.with_suffix(".html").name for page in (ROOT / "docs").glob("*.md")}
    for file in written:
        elements = r'<(?:script|link|img|iframe)[^>]+(?:src|href)="?(?:https?:)?//[^">]+'
        elsewhere = re.findall(rf"{elements}|(?:@import|url\()\W*https?://\S+", file.read_text())
        assert elsewhere == [], (file.name, elsewhere)

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import probekit

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_every_python_block_of_the_readme_runs_and_makes_its_picture(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    for number, block in enumerate(blocks):
        script = tmp_path / f"block{number}.py"
        script.write_text(block)
        ran = subprocess.run([sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "custom.png").stat().st_size > 1000


def test_every_picture_and_file_the_readme_names_is_there() -> None:
    text = README.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", text):
        path = link[0] or link[1]
        if not path.startswith("http"):
            assert (README.parent / path).exists(), path


def test_every_command_of_the_readme_has_the_options_it_is_given() -> None:
    commands = re.findall(r"^probekit (?:[a-z-]+ )+.*(?:\\\n.*)*", README.read_text(), flags=re.MULTILINE)
    assert len(commands) >= 6
    for command in commands:
        words = command.replace("\\\n", " ").split()[1:]
        options = [i for i, word in enumerate(words) if word.startswith("-")]
        verbs = [word for word in words[: options[0] if options else None] if re.fullmatch(r"[a-z][a-z-]*", word)]
        # words after the command are its arguments
        helps = (probekit(*verbs[:count], "--help") for count in range(len(verbs), 0, -1))
        shown = next((help.stdout for help in helps if help.returncode == 0), "")
        assert shown and "COMMAND [ARGS]" not in shown, command  # not the help of a group, which knows no such command
        for option in re.findall(r"--[a-z-]+", command):
            assert option in shown, (option, command)

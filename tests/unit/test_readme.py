"""What README says is so: commands and options exist, code blocks run."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from cacp_ray.cli import app

README = Path("README.md").read_text()
COMMANDS = re.findall(r"^cacp-ray .+$", README, re.MULTILINE)


def test_readme_has_commands():
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_line_parses(line):
    _, name, *arguments = shlex.split(line, comments=True)
    group = typer.main.get_command(app)
    command = group.commands[name]
    command.make_context(name, arguments, resilient_parsing=False)


def test_every_linked_file_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"docs/\w+\.md", README):
        assert Path(target).exists(), target


def test_the_analysis_example_runs(capsys):
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "analyze" in b)
    exec(compile(block, "README.md", "exec"), {})
    assert "channel groups" in capsys.readouterr().out

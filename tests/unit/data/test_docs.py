"""Commands and example of docs/data.md are valid."""

import re
import shlex
from pathlib import Path

import typer.main
import yaml

from cacp_ray.cli import app
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import DataConfig

PAGE = Path("docs/data.md").read_text()


def test_commands_parse():
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    group = typer.main.get_command(app).commands["data"]
    lines = block.strip().splitlines()
    assert len(lines) == 4
    for line in lines:
        _, _, name, *arguments = shlex.split(line)
        group.commands[name].make_context(name, arguments, resilient_parsing=False)


def test_the_examples_load():
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    gray, drawn = (load_config(DataConfig, yaml.safe_load(block)["data"]) for block in blocks)
    assert (gray.mean, gray.std) == ((0.13,), (0.31,))
    assert drawn.search.images_per_class == 5

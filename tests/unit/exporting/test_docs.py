"""Every command and code block of docs/export.md runs, in the order of the page."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from cacp_ray.cli import main
from tests.unit.exporting.folders import DEPTHWISE, make_folder

PAGE = Path("docs/export.md").read_text()


def test_every_command_and_code_block_runs(tmp_path, monkeypatch, capfd):
    make_folder(tmp_path / "runs/mine/subnets/rate-0.50", DEPTHWISE, 8)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^cacp-ray export .+$", PAGE, re.MULTILINE)
    assert len(commands) == 4
    for line in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capfd.readouterr()
        assert (caught.value.code, err) == (0, "")
        assert out.count("\n") == 1  # the exporters' own output is hidden
        assert re.search(r"weights after the search, \d\.\d\d MB, .*batch sizes 1 and 3$", out)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for block in blocks:
        exec(compile(block, "export.md", "exec"), names)
    assert len(blocks) == 5
    assert names["logits"].shape == (4, 5)
    assert names["done"].path.exists()

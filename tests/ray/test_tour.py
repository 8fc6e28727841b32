"""docs/tour.md, run as it stands: every command and code block, in its order."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from cacp_ray.cli import main

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

PAGE = Path("docs/tour.md").read_text()
BLOCKS = re.findall(r"```(bash|yaml|python)\n(.*?)```", PAGE, re.DOTALL)
# Smaller than the page's: what is tried is that it goes through, not what comes out.
SMALL = {
    "evaluations": 12,
    "finetune": {"epochs": 1},
    "data": {
        "train": {"path": "embedded:train", "rows": [0, 300]},
        "search": {"path": "embedded:search", "rows": [0, 300]},
    },
    "evaluation": {"images": 200},
    "pruning": {"calibration_images": 100, "sequential": False},
}


def test_the_tour_goes_through_from_its_first_line_to_its_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    printed = {}
    for kind, text in BLOCKS:
        if kind == "yaml":
            config = yaml.safe_load(text)
            assert set(config) - {"name", "rates"} <= set(SMALL)
            (tmp_path / "tour.yaml").write_text(yaml.safe_dump(config | SMALL))
        elif kind == "bash":
            for line in text.strip().splitlines():
                monkeypatch.setattr(sys, "argv", shlex.split(line))
                with pytest.raises(SystemExit) as caught:
                    main()
                printed[line], err = capsys.readouterr()
                assert caught.value.code == 0, f"{line}: {err}"
        else:
            exec(compile(text, "tour.md", "exec"), {})
            printed["python"] = capsys.readouterr().out
    assert len(printed) == 11
    assert "12 channel groups" in printed["cacp-ray search tour.yaml --dry-run"]
    assert "torch.Size([1, 10])" in printed["python"]
    folders = {path.name for path in (tmp_path / "runs/tour/subnets").iterdir()}
    assert folders == {"rate-0.40", "rate-0.45", "rate-0.50", "rate-0.60"}
    for name in ("report.html", "figures/accuracy.svg", "subnets/rate-0.60/finetuned.safetensors"):
        assert (tmp_path / "runs/tour" / name).exists()
    assert (tmp_path / "comparison/comparison.png").exists()

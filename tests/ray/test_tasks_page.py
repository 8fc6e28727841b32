"""The Python and the YAML of docs/tasks.md run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig

pytestmark = pytest.mark.ray

PAGE = Path("docs/tasks.md").read_text()


@pytest.mark.slow
def test_the_page_s_python_runs(tmp_path):
    first, second = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "page.py").write_text(f"{first}\n{second}")
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs/upscaler/report.html").exists()
    assert (tmp_path / "runs/upscaler/subnets/rate-0.30/finetuned.safetensors").exists()
    assert (tmp_path / "half/subnet.json").exists()


def test_the_page_s_yaml_loads():
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    config = load_config(RunConfig, yaml.safe_load(text))
    assert config.model.kwargs == {"width": 24}
    assert config.task == "mynet:Upscaling"

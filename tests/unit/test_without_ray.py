"""Who only loads, exports or benchmarks a network needs no Ray."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.unit.exporting.folders import make_folder

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).parent / "uv"
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is not installed here")

sys.meta_path.insert(0, Block())
import cacp_ray
"""
LOADING = ("ray", "gymnasium", "pyarrow", "matplotlib", "torchvision", "typer", "rich", "jinja2")


def run(python, code, folder):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), "-c", code], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_subnet_loads_where_neither_ray_nor_what_reports_need_is_installed(tmp_path):
    folder = make_folder(tmp_path / "rate-0.50", "resnet20", 32)
    load = f"print(type(cacp_ray.load_subnet({str(folder)!r})).__name__)"
    assert run(sys.executable, BLOCK.format(blocked=LOADING) + load, ROOT) == "CifarResNet\n"


def test_export_and_benchmark_do_not_import_ray(tmp_path):
    folder = make_folder(tmp_path / "rate-0.50", "resnet20", 32)
    code = (
        BLOCK.format(blocked=("ray", "gymnasium"))
        + "import cacp_ray.workflows.benchmark\n"
        + f"print(cacp_ray.export({str(folder)!r}, 'state-dict').size > 0)"
    )
    assert run(sys.executable, code, ROOT) == "True\n"


@pytest.mark.slow
def test_a_wheel_without_ray_loads_a_network_in_a_fresh_environment(tmp_path):
    folder = make_folder(tmp_path / "rate-0.50", "resnet20", 32)
    source = tmp_path / "source"
    source.mkdir()
    for name in ("cacp_ray", "tune_configs", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)

    def uv(*arguments):
        subprocess.run([UV, *map(str, arguments)], check=True, cwd=tmp_path, capture_output=True)

    uv("build", "--wheel", "--out-dir", tmp_path / "wheels", source)
    uv("venv", "--python", sys.executable, tmp_path / "fresh")
    python = tmp_path / "fresh" / "bin" / "python"
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert "cacp_ray/tune_configs/quickstart.yaml" in zipfile.ZipFile(wheel).namelist()
    uv("pip", "install", "--python", python, "--no-deps", wheel)
    uv("pip", "install", "--python", python, "torch", "numpy", "safetensors", "pydantic", "pyyaml")
    code = f"""
import cacp_ray, importlib.util
assert importlib.util.find_spec("ray") is None
net = cacp_ray.load_subnet({str(folder)!r})
print(sum(p.numel() for p in net.parameters()) > 0)
"""
    assert run(python, code, tmp_path) == "True\n"

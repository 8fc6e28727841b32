"""A subnet folder cannot bring code, and names only code that the caller trusts."""

import json
import os
import subprocess
import sys
import types

import pytest

from cacp_ray.config.reading import load_config, resolved
from cacp_ray.config.run import RunConfig
from cacp_ray.config.saved import read_run_config
from cacp_ray.errors import ConfigError
from cacp_ray.io import code
from cacp_ray.io.files import write_yaml
from cacp_ray.models.factory import build_model
from cacp_ray.pruning.subnet import load_subnet
from tests.unit.exporting.folders import make_folder

CODE = """
from pathlib import Path
from tests.unit.pruning.networks import Plain

Path(__file__).with_suffix(".ran").touch()


def make(num_classes):
    return Plain(num_classes)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that is nowhere yet; its folder `code` is on Python's path."""
    name = "a_network_of_ones_own"
    (tmp_path / "code").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def subnet(tmp_path, module):
    """A subnet folder that names the module's factory."""
    folder = make_folder(tmp_path / "subnet", "tests.unit.pruning.networks:Plain", 16)
    file = folder / "subnet.json"
    named = file.read_text().replace("tests.unit.pruning.networks:Plain", f"{module}:make")
    file.write_text(named)
    return folder


def test_code_is_imported_by_those_who_trust_it(subnet, module, tmp_path):
    code = tmp_path / "code" / f"{module}.py"
    code.write_text(CODE)
    with pytest.raises(ConfigError, match=rf"`import {module}` first"):
        load_subnet(subnet)
    assert not code.with_suffix(".ran").exists()
    load_subnet(subnet, trust=True)
    assert code.with_suffix(".ran").exists()


def test_what_the_caller_has_imported_is_trusted(subnet, module, tmp_path):
    (tmp_path / "code" / f"{module}.py").write_text(CODE)
    __import__(module)
    load_subnet(subnet)


@pytest.mark.parametrize("is_package", [False, True])
def test_code_in_the_folder_itself_is_never_taken(subnet, module, is_package, monkeypatch):
    code = subnet / module / "__init__.py" if is_package else subnet / f"{module}.py"
    code.parent.mkdir(exist_ok=True)
    code.write_text(CODE)
    monkeypatch.chdir(subnet)
    monkeypatch.syspath_prepend("")  # as in `python -c`, started in the folder
    with pytest.raises(ConfigError, match="may not bring code"):
        load_subnet(subnet, trust=True)
    with pytest.raises(ConfigError, match="may not bring code"):
        load_subnet(".")
    assert not code.with_suffix(".ran").exists()


@pytest.mark.parametrize("place", ["subnet", "run"])
@pytest.mark.parametrize("form", ["a link", "a part of a package", "timm"])
def test_no_way_of_bringing_code_works(form, place, module, tmp_path, monkeypatch):
    run = tmp_path / "run"
    folder = run / "subnets" / "rate-0.50"
    make_folder(folder, "tests.unit.pruning.networks:Plain", 16)
    home = folder if place == "subnet" else run
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\n" + CODE.replace("Path(__file__)", "Path('x')")
    if form == "a link":
        (tmp_path / "elsewhere.py").write_text(code)
        (home / f"{module}.py").symlink_to(tmp_path / "elsewhere.py")
        name = f"{module}:make"
    elif form == "a part of a package":  # `module` is a package without code, known already
        (home / module).mkdir()
        (home / module / "evil.py").write_text(code)
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        sys.modules[module].__path__ = [str(home / module)]
        name = f"{module}.evil:make"
    else:
        (home / "timm.py").write_text(code)
        monkeypatch.delitem(sys.modules, "timm", raising=False)
        name = "timm:resnet18"
    file = folder / "subnet.json"
    file.write_text(file.read_text().replace("tests.unit.pruning.networks:Plain", name))
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend("")
    with pytest.raises(ConfigError, match=r"may not bring code|first if that is yours"):
        load_subnet(folder)
    with pytest.raises(ConfigError, match="may not bring code"):
        load_subnet(folder, trust=True)
    assert not ran.exists()


@pytest.mark.parametrize("key", ["model.name", "strategy", "pruning.criterion"])
def test_code_in_a_run_is_not_taken_either(key, module, tmp_path, monkeypatch):
    values = resolved(RunConfig(name="x"))
    section, _, name = key.rpartition(".")
    (values[section] if section else values)[name] = f"{module}:make"
    if key == "model.name":
        values["model"]["weights"] = "w.safetensors"
    write_yaml(tmp_path / "code" / "config.yaml", values)
    read_run_config(tmp_path / "code")
    (tmp_path / "code" / f"{module}.py").write_text(CODE)
    with pytest.raises(ConfigError, match=f"names {module}:make, and holds its code"):
        read_run_config(tmp_path / "code")


def test_code_beside_a_configuration_serves_its_names_and_no_subnet(
    subnet, module, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(code, "_folders", [])
    home = tmp_path / "home"
    home.mkdir()
    (home / f"{module}.py").write_text(CODE)
    write_yaml(home / "own.yaml", {"model": {"name": f"{module}:make", "weights": "x"}})
    config = load_config(RunConfig, home / "own.yaml")
    assert code.code_variable() == {code.VARIABLE: str(home)}
    with pytest.raises(ConfigError, match="may not bring code"):
        load_subnet(subnet, trust=True)
    assert not (home / f"{module}.ran").exists()
    build_model(config.model.name, 5)
    load_subnet(subnet)  # now that the user's own configuration has led to it


@pytest.mark.parametrize("name", ["os:abort", "torch:seed", "numpy.testing:test", "ray:shutdown"])
def test_functions_that_make_no_network_are_not_called(name, subnet):
    file = subnet / "subnet.json"
    description = json.loads(file.read_text()) | {"model": name}
    file.write_text(json.dumps(description))
    with pytest.raises(ConfigError, match="of no package of yours that is imported"):
        load_subnet(subnet)


def test_the_users_folders_come_last_in_processes_that_are_started(tmp_path):
    """A file of theirs must not hide an installed module of the same name."""
    (tmp_path / "numpy.py").write_text("raise RuntimeError")
    (tmp_path / "only_here.py").write_text("")
    script = "import cacp_ray, numpy.linalg, only_here, sys; print(sys.path[-1])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, code.VARIABLE: str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(tmp_path)


def test_reading_a_run_adds_no_folder_and_imports_nothing(module, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(code, "_folders", [])
    (tmp_path / "code" / f"{module}.py").write_text(CODE)
    run = tmp_path / "run"
    run.mkdir()
    values = RunConfig.model_validate({"model": {"name": f"{module}:make", "weights": "x"}})
    write_yaml(run / "config.yaml", resolved(values))
    read_run_config(run)
    assert not code.code_folders()
    assert not (tmp_path / "code" / f"{module}.ran").exists()

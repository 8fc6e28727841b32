"""uv.lock is of this pyproject.toml, and names the public index alone."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = tomllib.loads(Path("uv.lock").read_text())
PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]
PACKAGES = {(package["name"], package.get("version")): package for package in LOCK["package"]}
OURS = PACKAGES["cacp-ray", None]


def files(package):
    return [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else ())]


def test_every_file_is_on_the_public_index_with_its_hash():
    for name, package in PACKAGES.items():
        if package is OURS:
            continue
        assert package["source"] == {"registry": "https://pypi.org/simple"}, name
        assert files(package), name
        for file in files(package):
            # The folder of a file there is named by a hash that no mirror could invent.
            place = (
                r"https://files\.pythonhosted\.org/packages/[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{60}/"
            )
            assert re.match(place, file["url"]), file["url"]
            assert re.fullmatch(r"sha256:[0-9a-f]{64}", file["hash"]), file["url"]


def asked():
    """(Name, version limits, extras) of all requirements, as pyproject.toml has them."""
    extras = PROJECT["optional-dependencies"]
    for text in (*PROJECT["dependencies"], *(text for part in extras.values() for text in part)):
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        yield name, str(requirement.specifier), tuple(sorted(requirement.extras))


def test_the_lock_is_of_this_pyproject():
    locked = {
        (each["name"], str(Requirement(f"x{each.get('specifier', '')}").specifier),
         tuple(sorted(each.get("extras", ()))))
        for each in OURS["metadata"]["requires-dist"]
    }  # fmt: skip
    ours = {each for each in asked() if each[0] != "cacp-ray"}
    assert {each for each in locked if each[0] != "cacp-ray"} == ours
    assert set(OURS["metadata"]["provides-extras"]) == set(PROJECT["optional-dependencies"])
    assert LOCK["requires-python"] == PROJECT["requires-python"]


@pytest.mark.parametrize("name", ["torch", "torchvision", "ray"])
def test_a_locked_version_is_one_that_pyproject_allows(name):
    [version] = [version for other, version in PACKAGES if other == name]
    [limits] = [limits for other, limits, _ in asked() if other == name]
    assert Requirement(f"{name}{limits}").specifier.contains(version)

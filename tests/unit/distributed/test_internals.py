"""What may change in any version of Ray is imported in one place."""

import ast
from pathlib import Path

import pytest

import cacp_ray

PACKAGE = Path(cacp_ray.__file__).parent
INTERNALS = PACKAGE / "distributed" / "internals.py"


def imported_names(source: str) -> set[str]:
    """Dotted names that the source imports, and those it reads from `ray`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


def is_private(name: str) -> bool:
    ray, *parts = name.split(".")
    return ray == "ray" and (
        any(part.startswith("_") and not part.endswith("__") for part in parts)
        or parts[:2] == ["core", "generated"]
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from ray._private.state import state", True),
        ("from ray import _raylet", True),
        ("import ray.core.generated.gcs_pb2", True),
        ("import ray\nray._private.worker._global_node", True),
        ("import ray\nray.nodes()", False),
        ("from ray.util.placement_group import PlacementGroup", False),
    ],
)
def test_private_names_are_told_apart(source: str, expected: bool) -> None:
    assert any(map(is_private, imported_names(source))) is expected


def test_one_module_alone_imports_private_modules_of_ray() -> None:
    importers = {
        path
        for path in PACKAGE.rglob("*.py")
        if any(map(is_private, imported_names(path.read_text())))
    }
    assert importers == {INTERNALS}

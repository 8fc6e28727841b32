"""What may change in any version of Ray is imported in one place."""

import ast
from importlib import import_module
from importlib.metadata import version
from operator import attrgetter
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


# What internals.py takes from Ray's private modules: where each is, and what it has.
USED = (
    "ray._private.services:resolve_ip_for_localhost",
    "ray._private.state:state.get_draining_nodes",
    "ray._private.state:state._connect_and_get_accessor",
    "ray._private.utils:get_num_cpus",
    "ray._raylet:AuthenticationTokenLoader.instance",
    "ray._raylet:AuthenticationTokenLoader.has_token",
    "ray._raylet:AuthenticationTokenLoader.reset_cache",
    "ray._raylet:Config.initialize",
    "ray._raylet:GcsClient",
    "ray.core.generated.gcs_pb2:PlacementGroupTableData.FromString",
    "ray.core.generated.gcs_pb2:PlacementGroupTableData.REMOVED",
)
FIELDS = {
    "creator_actor_dead", "creator_actor_id", "creator_job_id", "is_detached",
    "placement_group_id", "state",
}  # fmt: skip


@pytest.mark.parametrize("used", USED)
def test_ray_has_what_is_used_of_its_private_modules(used: str) -> None:
    module, _, path = used.partition(":")
    try:
        attrgetter(path)(import_module(module))
    except (ImportError, AttributeError) as error:
        pytest.fail(
            f"Ray {version('ray')} has no {module}.{path}, which cacp_ray/distributed/internals.py "
            f"uses ({error}): find where it went, and change that module"
        )


def test_each_private_import_is_named_here() -> None:
    private = set(filter(is_private, imported_names(INTERNALS.read_text())))
    named = [used.replace(":", ".") for used in USED]
    assert {name for name in private if not any(f"{u}.".startswith(f"{name}.") for u in named)} == (
        set()
    )


def test_ray_s_messages_on_placement_groups_have_the_fields_that_are_used() -> None:
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    missing = FIELDS - set(PlacementGroupTableData.DESCRIPTOR.fields_by_name)
    assert not missing, f"Ray {version('ray')}: placement_groups_of_dead_creators needs {missing}"

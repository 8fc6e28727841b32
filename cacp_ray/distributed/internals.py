"""All that this package uses of Ray's private modules; written for Ray 2.60.0, tried with no other.

Ray may change these in any version, which is why pyproject.toml allows 2.60 alone. `make
test-ray-next` tries the newest version. Each function says why no public one serves.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import ray
from ray._private import services
from ray._private.state import state
from ray._private.utils import get_num_cpus
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient  # type: ignore[attr-defined]
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError
from ray.util.placement_group import PlacementGroup

AUTH_MODE = "RAY_AUTH_MODE"


def count_cpus() -> int:
    """CPUs that a local Ray would count on this machine: no more than its container may use.

    `os.cpu_count` does not know a container's limit, and `ray.nodes` needs a running Ray.
    """
    return max(1, int(get_num_cpus()))


def draining_nodes() -> set[str]:
    """Ids of the nodes whose end the cloud or the autoscaler has announced.

    `ray.nodes` does not tell them; Ray Train reads them as this does.
    """
    return set(state.get_draining_nodes())


LOOPBACK = "127.0.0.1"


@contextlib.contextmanager
def bound_to_loopback() -> Iterator[None]:
    """Has `ray.init(_node_ip_address=LOOPBACK)` bind every port there, as on macOS and Windows.

    On Linux, Ray turns the address into one that other machines reach, and binds to all of them.
    """
    resolve = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = resolve


def read_token_again() -> None:
    """Has Ray look at RAY_AUTH_MODE and RAY_AUTH_TOKEN anew; it reads them once a process."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def has_token() -> bool:
    """Whether this machine has a token: RAY_AUTH_TOKEN, or a file."""
    return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))


def is_let_in(address: str, mode: str) -> bool:
    """Whether the head at an address answers this process under a RAY_AUTH_MODE.

    `ray.init` fails without a token where one is asked for. But with a token where none is asked
    for it succeeds, and all actors die at once, as the cluster cannot call the driver back.
    """
    before = os.environ.get(AUTH_MODE)
    os.environ[AUTH_MODE] = mode
    read_token_again()
    try:
        with _quiet():
            GcsClient(address=address)
    except AuthenticationError:
        return False
    finally:
        if before is None:
            del os.environ[AUTH_MODE]
        else:
            os.environ[AUTH_MODE] = before
        read_token_again()
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what Ray's C++ writes to this process's standard error."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def placement_groups_of_dead_creators() -> Iterator[PlacementGroup]:
    """Placement groups of this job that outlived the actor that made them.

    Ray removes them at the end of the job only. `ray.util.placement_group_table` leaves out who
    made a group, and `ray.util.state` needs a dashboard.
    """
    job = ray.get_runtime_context().get_job_id()
    for row in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(row)
        # Ray calls the creator dead for groups of the driver too, but they have no creator's id.
        is_orphan = group.creator_actor_dead and not ray.ActorID(group.creator_actor_id).is_nil()
        is_held = group.state != group.REMOVED and not group.is_detached
        if group.creator_job_id.hex() == job and is_orphan and is_held:
            yield PlacementGroup(ray.PlacementGroupID(group.placement_group_id))

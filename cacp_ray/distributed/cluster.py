"""Joins a Ray cluster, or starts Ray on this machine, quickly and quietly.

`ray.init` waits 80 s and more for an address where nothing answers, so a cluster's port is tried
first. Its own start is mostly the start of Python processes: see `_fast_start`.
"""

import atexit
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import ray
from ray._private import worker
from ray._private.authentication import authentication_token_setup
from ray._private.utils import get_num_cpus

from cacp_ray.errors import ConfigError

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
BYTECODE_FOLDER = Path.home() / ".cache" / "cacp_ray" / "bytecode"

# An HTTP/2 client's first bytes (RFC 9113, 3.4) and an empty SETTINGS frame. Every gRPC server, so
# every Ray head, answers with a SETTINGS frame of its own.
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
FRAME_HEADER_BYTES = 9
SETTINGS_FRAME = 4


def connect(address: str | None, *, num_cpus: int | None = None) -> None:
    """Joins a cluster or starts a local Ray; returns at once where Ray is connected already.

    Args:
        address: HOST:PORT, `auto` or `local`; None: RAY_ADDRESS, else `local`.
        num_cpus: CPUs of a local Ray; None takes all of the machine.

    Raises:
        ConfigError: Nothing answers there, or Ray refuses; within 30 s.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else ray.init warns
    if address == "local":
        with _fast_start():
            _init(address, num_cpus=num_cpus, include_dashboard=False)
        logger.debug("Ray's own messages: %s", _log_folder())
        atexit.register(logger.info, "Ray's own messages: %s", _log_folder())
        return
    target = check_address(address)
    _use_token()
    _init(target)


def check_address(address: str | None) -> str:
    """Tries the port of a cluster that is to be joined; takes seconds and starts nothing.

    Args:
        address: See `connect`.

    Returns:
        What Ray is to be given.

    Raises:
        ConfigError: Nothing answers there.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if ray.is_initialized():
        return address
    # As Ray resolves it; in a job, RAY_ADDRESS is the job's own cluster.
    noted = os.environ.get("RAY_ADDRESS") or _last_started()
    target = noted or address if address == "auto" else address
    if target not in ("auto", "local"):
        _require_answer(target)
    return target


def disconnect() -> None:
    """Leaves the cluster; stops a local Ray."""
    ray.shutdown()


def check_room(
    cpus: int,
    gpus: float | str,
    address: str | None,
    *,
    actors: int = 1,
    asked_by: str = "cluster.cpus_per_evaluator, gpus_per_evaluator",
) -> None:
    """Refuses actors that this machine can never run at once; a cluster may still grow.

    A local Ray need not be started for it.

    Args:
        cpus: Of an actor.
        gpus: Of an actor; `auto` asks for none.
        address: As of `connect`.
        actors: That have to run at once.
        asked_by: Settings that the message names.

    Raises:
        ConfigError: More CPUs or GPUs than this machine has.
    """
    if (address or os.environ.get("RAY_ADDRESS") or "local") != "local":
        return
    if ray.is_initialized():
        has = [node["Resources"] for node in ray.nodes()]
    else:
        import torch

        has = [{"CPU": count_cpus(), "GPU": torch.cuda.device_count()}]
    on_gpus = gpus if isinstance(gpus, float | int) else 0.0
    for kind, asked in (("CPU", cpus * actors), ("GPU", on_gpus * actors)):
        there = max((each.get(kind, 0) for each in has), default=0)
        if asked > there:
            raise ConfigError(
                f"{asked:g} {kind}s at once are asked for ({asked_by}), there are {there:g} on "
                "this machine: lower it, or join a cluster by --address"
            )


def count_cpus() -> int:
    """Of this machine, as a local Ray would count them: no more than a container may use."""
    return max(1, int(get_num_cpus()))


def _log_folder() -> str:
    node = cast(Any, worker)._global_node
    return node.get_logs_dir_path()


def _init(address: str, **options: Any) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises many kinds here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if address == "local":
            step = "free memory and disk under /dev/shm and /tmp/ray, then try again"
        elif address == "auto":
            step = "start one with `ray start --head`, or leave out the address for a local Ray"
        else:
            step = (
                "check that this machine runs a node of that cluster, has the same Ray version, "
                "and the head's ~/.ray/auth_token"
            )
        raise ConfigError(f"Ray at address {address!r} does not work ({reason}): {step}") from error


def _use_token() -> None:
    """Shows the cluster this machine's token, if it has one and nothing says otherwise.

    `ray start` asks for it wherever the file exists; `ray.init` with an address would not send it.
    """
    quiet = logging.getLogger(authentication_token_setup.__name__)
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        authentication_token_setup.maybe_enable_token_auth_if_token_available(False)
    finally:
        quiet.setLevel(level)


def _last_started() -> str | None:
    """The address that `ray start` on this machine last noted, which may be stale."""
    folder = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    note = folder / "ray" / "ray_current_cluster"
    return note.read_text().strip() or None if note.exists() else None


def _require_answer(address: str) -> None:
    """Tries the port and, without TLS, whether a gRPC server is behind it.

    Raises:
        ConfigError: The address cannot be read, or nothing like Ray answers.
    """
    if "://" in address:
        raise ConfigError(
            f"Ray address {address!r}: a search does not run over a Ray client; give HOST:PORT of "
            "the head from a machine of the cluster, or use `ray job submit` (clusters/README.md)"
        )
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise ConfigError(
            f"Ray address {address!r} is not HOST:PORT: give the head's address, such as "
            "10.0.0.5:6379"
        )
    try:
        with socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") in ("1", "true"):
                return
            connection.sendall(HTTP2_PREFACE)
            header = connection.recv(FRAME_HEADER_BYTES)
    except UnicodeError:
        reason = "no such host name"
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
    else:
        if len(header) == FRAME_HEADER_BYTES and header[3] == SETTINGS_FRAME:
            return
        reason = "something else than Ray listens there"
    raise ConfigError(
        f"no Ray cluster at {address} ({reason}): check the address with `ray status` on the head, "
        "or leave it out for a local Ray"
    )


@contextlib.contextmanager
def _fast_start() -> Iterator[None]:
    """Environment in which a local Ray starts soonest (measured on 2 loaded cores: 8.0 to 3.3 s).

    - Ray's idle first workers are not started (0.7 s): evaluators have processes of their own.
    - Where Python was told not to write bytecode and Ray has none, each of Ray's processes would
      compile Ray, and each evaluator torch, anew (5 s): they get a bytecode folder.
    """
    wanted = {"RAY_prestart_worker_first_driver": "0"}
    if sys.dont_write_bytecode and not Path(cache_from_source(ray.__file__)).exists():
        wanted |= {"PYTHONPYCACHEPREFIX": str(BYTECODE_FOLDER), "PYTHONDONTWRITEBYTECODE": ""}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value

"""Joins a Ray cluster, or starts Ray on this machine, quickly and quietly.

`ray.init` waits 80 s and more for an address where nothing answers, so the port is tried first. A
local Ray mostly waits for Python processes to start: see `_fast_start`. All that can talk to a Ray
can run code in it, so a local one listens on the loopback address alone, and asks for a token that
only this process and those of its Ray know.
"""

import atexit
import contextlib
import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Mapping
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import ray

from cacp_ray.distributed.internals import (
    AUTH_MODE,
    LOOPBACK,
    bound_to_loopback,
    count_cpus,
    has_token,
    is_let_in,
    read_token_again,
)
from cacp_ray.errors import ConfigError, first_line
from cacp_ray.io.code import code_variable

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
BYTECODE_FOLDER = Path.home() / ".cache" / "cacp_ray" / "bytecode"

_connected = contextlib.ExitStack()  # puts back at the end what a connection has set

# An HTTP/2 client's first bytes (RFC 9113, 3.4) and an empty SETTINGS frame. Every gRPC server, so
# every Ray head, answers with a SETTINGS frame of its own.
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
FRAME_HEADER_BYTES = 9
SETTINGS_FRAME = 4


def connect(
    address: str | None,
    *,
    num_cpus: int | None = None,
    runtime_env: Mapping[str, Any] | None = None,
) -> None:
    """Joins a cluster or starts a local Ray; returns at once where Ray is connected already.

    Args:
        address: HOST:PORT, `auto` or `local`; None takes RAY_ADDRESS, else `local`.
        num_cpus: CPUs of a local Ray; None takes all of the machine.
        runtime_env: Ray's runtime environment for all processes of this job.

    Raises:
        ConfigError: Nothing answers there, or Ray refuses; within 30 s.
    """
    if ray.is_initialized():
        return
    _connected.close()  # what a connection that `ray.shutdown` ended has set
    options = {"runtime_env": dict(runtime_env)} if runtime_env else {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else ray.init warns
    if is_local(address):
        with environment(_fast_start() | _own_token() | code_variable()), bound_to_loopback():
            read_token_again()
            session = _init(
                "local",
                num_cpus=num_cpus,
                include_dashboard=False,
                _node_ip_address=LOOPBACK,
                **options,
            )
        logs = os.path.join(session, "logs")
        logger.debug("Ray's own messages: %s", logs)
        atexit.register(logger.info, "Ray's own messages: %s", logs)
        return
    target = check_address(address)
    if target != "auto":  # there is none, as `ray.init` tells
        _connected.enter_context(environment({AUTH_MODE: _agree_on_token(target)}))
        read_token_again()
    try:
        _init(target, **options)
    except ConfigError:
        _connected.close()
        raise


def is_local(address: str | None) -> bool:
    """Whether `connect` would start a local Ray for this address."""
    return _resolve(address) == "local"


def check_address(address: str | None) -> str:
    """Tries the port of the cluster that `connect` would join; starts nothing.

    Returns:
        The address for `ray.init`.

    Raises:
        ConfigError: Nothing answers there; within seconds.
    """
    address = _resolve(address)
    if ray.is_initialized():
        return address
    # As Ray resolves it; in a job, RAY_ADDRESS is the job's own cluster.
    noted = os.environ.get("RAY_ADDRESS") or _last_started()
    target = noted or address if address == "auto" else address
    if target not in ("auto", "local"):
        _require_answer(target)
    return target


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables, and puts back what was there before."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)


def disconnect() -> None:
    """Leaves the cluster; stops a local Ray and forgets its token."""
    ray.shutdown()
    _connected.close()
    read_token_again()


def check_room(
    cpus: int,
    gpus: float | str,
    address: str | None,
    *,
    actors: int = 1,
    asked_by: str = "cluster.cpus_per_evaluator, gpus_per_evaluator",
) -> None:
    """Refuses actors that this machine can never run at once; a cluster may still grow.

    A local Ray need not be started for it. `gpus` of `auto` asks for none; `asked_by` names the
    settings in the message.

    Raises:
        ConfigError: More CPUs or GPUs are asked for than this machine has.
    """
    if not is_local(address):
        return
    if ray.is_initialized():
        nodes = [node["Resources"] for node in ray.nodes()]
    else:
        import torch

        nodes = [{"CPU": count_cpus(), "GPU": torch.cuda.device_count()}]
    gpus = gpus if isinstance(gpus, float | int) else 0.0
    for kind, asked in (("CPU", cpus * actors), ("GPU", gpus * actors)):
        present = max((node.get(kind, 0) for node in nodes), default=0)
        if asked > present:
            raise ConfigError(
                f"{asked:g} {kind}s at once are asked for ({asked_by}), there are {present:g} on "
                "this machine: lower it, or join a cluster by --address"
            )


def _resolve(address: str | None) -> str:
    return address or os.environ.get("RAY_ADDRESS") or "local"


def _init(address: str, **options: Any) -> str:
    """Calls `ray.init` without its messages; returns the folder of the session."""
    try:
        context = ray.init(
            address=address, log_to_driver=False, logging_level=logging.ERROR, **options
        )
    except Exception as error:  # Ray raises many kinds here
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
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
    return cast(Any, context).address_info["session_dir"]


def _last_started() -> str | None:
    """Address that `ray start` last noted on this machine; it may be stale."""
    folder = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    note = folder / "ray" / "ray_current_cluster"
    return note.read_text().strip() or None if note.exists() else None


def _require_answer(address: str) -> None:
    """Tries the port and, without TLS, whether a gRPC server listens there.

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


def _agree_on_token(address: str) -> str:
    """The RAY_AUTH_MODE with which this process and the cluster can talk to each other.

    Ray's own defaults differ with its version, with files in the home folder, and between
    `ray start` and `ray.init`.

    Raises:
        ConfigError: The cluster asks for a token that this machine does not have, or RAY_AUTH_MODE
            says other than the cluster.
    """
    mode = os.environ.get(AUTH_MODE, "").lower()
    try:
        is_open = is_let_in(address, "disabled")
        # Ray ends a process that shall send a token and has none.
        is_known = not is_open and has_token() and is_let_in(address, "token")
    except Exception as error:  # Ray raises many kinds here
        raise ConfigError(
            f"Ray at {address} does not answer as a head should ({first_line(error)}): check the "
            "address, and that this machine has the same Ray version"
        ) from error
    if is_open:
        if mode == "token":
            raise ConfigError(
                f"Ray at {address} asks for no token, but {AUTH_MODE}=token is set here, with which"
                f" every evaluator would die at once: unset {AUTH_MODE} here, or start the cluster "
                "with it"
            )
        return "disabled"
    if mode not in ("", "token"):
        raise ConfigError(
            f"Ray at {address} asks for a token, but {AUTH_MODE}={mode} is set here: unset it"
        )
    own = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
    if not has_token():
        raise ConfigError(
            f"Ray at {address} asks for a token, and this machine has none ({own}): copy the head's"
            " ~/.ray/auth_token"
        )
    if not is_known:
        raise ConfigError(
            f"Ray at {address} has another token than this machine ({own}): copy the head's "
            "~/.ray/auth_token"
        )
    return "token"


def _own_token() -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _fast_start() -> dict[str, str]:
    """Environment in which a local Ray starts soonest (on 2 loaded cores in 3.3 s, not 8.0).

    - Ray does not start idle workers first (0.7 s): evaluators have processes of their own.
    - Where Python writes no bytecode and Ray has none, each of Ray's processes would compile Ray,
      and each evaluator torch, anew (5 s): they get a folder for bytecode.
    """
    variables = {"RAY_prestart_worker_first_driver": "0"}
    if sys.dont_write_bytecode and not Path(cache_from_source(ray.__file__)).exists():
        variables |= {"PYTHONPYCACHEPREFIX": str(BYTECODE_FOLDER), "PYTHONDONTWRITEBYTECODE": ""}
    return variables

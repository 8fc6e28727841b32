"""Tells Ray that this spot machine is about to be taken away, where nothing else does.

Clouds announce it to the machine itself: AWS two minutes before, Google and Azure thirty seconds.
KubeRay and Anyscale pass it on to Ray; machines that Ray's cluster launcher started do not. This
watcher polls the cloud's metadata service and drains its own node: Ray starts nothing new there,
evaluators take no new candidates, and what is under way may finish.

Sources: the clouds' documentation of spot instance actions (AWS, IMDSv2), of preemption (Google),
and of scheduled events (Azure, API of 2020-07-01).
"""

import json
import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from cacp_ray.errors import ConfigError, one_line

logger = logging.getLogger(__name__)

Cloud = Literal["aws", "gcp", "azure"]
METADATA: dict[Cloud, str] = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
    "azure": "http://169.254.169.254",
}
SHORTEST_SECONDS = 30.0  # of the notice of Google, which names no time
POLL_SECONDS = 5.0
ANSWER_SECONDS = 2.0


def read_notice(cloud: Cloud, metadata: str) -> float | None:
    """Seconds until the machine is taken away; None while nothing is announced.

    Raises:
        OSError: The metadata service does not answer.
    """
    return {"aws": _read_aws, "gcp": _read_gcp, "azure": _read_azure}[cloud](metadata)


def find_cloud() -> Cloud:
    """The cloud that this machine runs in.

    Raises:
        ConfigError: No metadata service answers.
    """
    for cloud, metadata in METADATA.items():
        try:
            read_notice(cloud, metadata)
        except (OSError, ValueError, KeyError):
            continue
        return cloud
    raise ConfigError(
        "no metadata service of AWS, Google or Azure answers here: run it on a machine of one of "
        "them, or name --cloud and --metadata"
    )


def watch(
    cloud: Cloud,
    metadata: str,
    drain: Callable[[float], object],
    *,
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Waits for a notice, and calls `drain` with the seconds that are left."""
    is_heard = True
    while True:
        try:
            seconds = read_notice(cloud, metadata)
        except (OSError, ValueError, KeyError) as error:
            if is_heard:
                logger.warning("%s does not answer (%s); asking on", metadata, one_line(error))
            is_heard, seconds = False, None
        else:
            is_heard = True
        if seconds is not None:
            logger.warning("this machine is taken away in %.0f s: its node is drained", seconds)
            drain(seconds)
            return
        time.sleep(poll_seconds)


def drain_this_node(address: str, seconds: float, node: str | None = None) -> None:
    """Drains the Ray node of this machine.

    Args:
        address: Of the cluster, `auto` for the one that this machine is part of.
        seconds: Until the machine is gone.
        node: Id of the node; None asks Ray.

    Raises:
        ConfigError: Ray refuses.
    """
    if node is None or address == "auto":
        import ray

        from cacp_ray.distributed.cluster import connect

        connect(address)
        context = ray.get_runtime_context()
        node, address = node or context.get_node_id(), context.gcs_address
        ray.shutdown()
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address]
    command += ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "announced by the cloud"]
    command += ["--deadline-remaining-seconds", str(max(1, round(seconds)))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no reason given"]
        raise ConfigError(f"Ray does not drain this node ({reason[0]}): is it part of a cluster?")


def _read_aws(metadata: str) -> float | None:
    token = _ask(
        f"{metadata}/latest/api/token",
        {"X-aws-ec2-metadata-token-ttl-seconds": "60"},
        method="PUT",
    )
    try:
        answer = _ask(
            f"{metadata}/latest/meta-data/spot/instance-action",
            {"X-aws-ec2-metadata-token": token},
        )
    except urllib.error.HTTPError as error:
        if error.code == 404:  # nothing is announced
            return None
        raise
    when = datetime.fromisoformat(json.loads(answer)["time"])
    return _until(when)


def _read_gcp(metadata: str) -> float | None:
    answer = _ask(
        f"{metadata}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}
    )
    return SHORTEST_SECONDS if answer.strip() == "TRUE" else None


def _read_azure(metadata: str) -> float | None:
    headers = {"Metadata": "true"}
    events = json.loads(
        _ask(f"{metadata}/metadata/scheduledevents?api-version=2020-07-01", headers)
    )["Events"]
    ends: list[dict[str, Any]] = [event for event in events if event["EventType"] == "Preempt"]
    if not ends:
        return None
    address = f"{metadata}/metadata/instance/compute/name?api-version=2021-02-01&format=text"
    name = _ask(address, headers).strip()  # events name all machines of a scale set
    own = [event for event in ends if name in event["Resources"]]
    if not own:
        return None
    when = own[0]["NotBefore"]
    return _until(parsedate_to_datetime(when)) if when else SHORTEST_SECONDS


def _until(when: datetime) -> float:
    """Seconds until a moment, at least one."""
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(1.0, (when - datetime.now(UTC)).total_seconds())


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    # A proxy of the environment must not be asked for the machine's own metadata.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=ANSWER_SECONDS) as answer:
        return answer.read().decode()

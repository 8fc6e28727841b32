"""Local servers that speak the protocols of object stores.

moto serves S3's protocol. gcp-storage-emulator (`pip install gcp-storage-emulator setuptools<81`)
serves Google's; its tests are skipped where it is not installed.
"""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.machines import free_port

BUCKET = "bucket"
SCHEMES = ("s3", "gs")


@dataclass
class Store:
    """A running server with one bucket.

    Attributes:
        root: URI of the bucket.
        environment: Variables of programs that use the store.
        process: The server.
    """

    root: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes] = field(repr=False)


@contextmanager
def serving(scheme: str, folder: Path) -> Iterator[Store]:
    """A store; the server's output goes to `folder`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    if scheme == "s3":
        command = ["-m", "moto.server", "-p", str(port)]
        root, variable = f"s3://{BUCKET}", "AWS_ENDPOINT_URL"
    else:
        if find_spec("gcp_storage_emulator") is None:
            pytest.skip("gcp-storage-emulator is not installed")
        command = ["-m", "gcp_storage_emulator", "start", "--in-memory", "--port", str(port)]
        command += ["--default-bucket", BUCKET]
        root, variable = f"gs://anonymous@{BUCKET}", "CLOUD_STORAGE_EMULATOR_ENDPOINT"
    environment = {
        variable: url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=log, stderr=log, env=os.environ | environment
        )
    try:
        _wait_for(url, process)
        if scheme == "s3":
            request = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
            urllib.request.urlopen(request, timeout=30).close()
        yield Store(root, environment, process)
    finally:
        process.kill()
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:
            return  # it answers, though without such a page
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"the server of {url} does not answer")

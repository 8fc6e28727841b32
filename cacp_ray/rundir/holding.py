"""A sign in a storage that a driver trains into it, so that no second one does.

Two drivers would remove each other's checkpoints. The clocks of machines differ, so no times are
compared: a living driver changes its sign every few seconds, and a driver that finds a sign watches
whether it changes. A driver that finds another's sign in the place of its own ends.
"""
# pyarrow has no complete types:
# pyright: basic

import json
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from itertools import count

import pyarrow as pa

from cacp_ray.errors import ArtifactError, one_line
from cacp_ray.io.files import parse_json

logger = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
WATCH_SECONDS = 20.0  # a sign that does not change for so long is that of a dead driver


class Hold:
    """This driver's sign, which a thread renews until `release`."""

    def __init__(
        self, uri: str, read: Callable[[], bytes | None], put: Callable[[bytes], None]
    ) -> None:
        """Puts the sign; watches one that is there already.

        Args:
            uri: The storage, for messages.
            read: Content of the sign; None where there is none.
            put: Writes the sign.

        Raises:
            ArtifactError: The driver of another sign lives.
            OSError, pyarrow.ArrowException: The storage fails.
        """
        self._uri, self._read, self._put = uri, read, put
        self._name, self._beats = secrets.token_hex(8), count()
        self._released = threading.Event()
        self._failure: ArtifactError | None = None
        self._refuse_living()
        self._beat()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Does nothing as long as no other driver has put a sign.

        Raises:
            ArtifactError: One has.
        """
        if self._failure is not None:
            raise self._failure

    def release(self) -> bool:
        """Lets the sign be; returns whether it is still this driver's, who may remove it."""
        self._released.set()
        self._thread.join(BEAT_SECONDS)
        return self._failure is None and not self._thread.is_alive()

    def _refuse_living(self) -> None:
        first = self._read()
        if first is None:
            return
        logger.info(
            "storage %s: looking for %.0f s whether %s lives, which trained into it last",
            self._uri,
            WATCH_SECONDS,
            _describe(first),
        )
        for _ in range(int(WATCH_SECONDS / BEAT_SECONDS)):
            self._released.wait(BEAT_SECONDS)
            now = self._read()
            if now is None:  # it has ended
                return
            if now != first:
                raise ArtifactError(
                    f"storage {self._uri}: {_describe(first)} trains into it: wait for it, or end "
                    "it and go on with --resume, or choose another --storage"
                )

    def _renew(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                there = self._read()
                # A sign that is half written says nothing.
                if there is not None and _parse(there).get("driver") not in (None, self._name):
                    self._failure = ArtifactError(
                        f"storage {self._uri}: {_describe(there)} trains into it too: end one of "
                        "the two, then go on with --resume"
                    )
                    return
                self._beat()
            except (OSError, pa.ArrowException) as error:
                logger.debug("the sign in %s is renewed later: %s", self._uri, one_line(error))

    def _beat(self) -> None:
        sign = {
            "driver": self._name,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "beat": next(self._beats),
        }
        self._put(json.dumps(sign).encode())


def _parse(sign: bytes) -> dict[str, object]:
    try:
        content = parse_json(sign)
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {}


def _describe(sign: bytes) -> str:
    content = _parse(sign)
    return f"a driver on {content.get('host')!s:.100} (process {content.get('process')!s:.20})"

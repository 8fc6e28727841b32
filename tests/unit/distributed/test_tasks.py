"""What is refused before it is sent to other processes."""

import re
import threading

import pytest

from cacp_ray.distributed.tasks import check_sendable
from cacp_ray.errors import ConfigError


def test_what_cannot_be_pickled_is_one_line_with_the_reason():
    lock = threading.Lock()

    def score(net):
        return lock

    check_sendable({"score": lambda net: 1.0})
    for others, place in (((), "evaluators"), (("trials",), "trials")):
        with pytest.raises(ConfigError) as caught:
            check_sendable({"loss": len, "score": score}, *others)
        start = f"score cannot be sent to {place} (cannot pickle '_thread.lock' object"
        assert str(caught.value).startswith(start)
        assert re.search(r"\): open files, .* when it is called$", str(caught.value))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 200

"""What is sent to other nodes."""

import pytest

from cacp_ray.errors import ConfigError
from cacp_ray.io import environment
from cacp_ray.io.environment import installed_versions, with_same_versions


def test_a_node_that_joins_with_other_packages_does_not_measure(monkeypatch):
    calls = []
    sent = with_same_versions(lambda *args, **kwargs: calls.append((args, kwargs)) or 7)
    assert sent(1, split="images") == 7
    assert calls == [((1,), {"split": "images"})]
    other = installed_versions() | {"torch": "1.0"}
    monkeypatch.setattr(environment, "installed_versions", lambda: other)
    with pytest.raises(ConfigError, match=r"torch 1\.0 is installed there, .* where the search"):
        sent(1, split="images")
    assert len(calls) == 1

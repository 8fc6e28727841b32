"""What the evaluators of a run ask of a node."""

import pytest

from cacp_ray import evaluators
from cacp_ray.errors import ConfigError
from cacp_ray.evaluators import make_scorer_alike
from cacp_ray.versions import installed_versions


def test_a_node_that_joins_with_other_packages_does_not_score(monkeypatch):
    made = []
    monkeypatch.setattr(evaluators, "make_scorer", lambda **arguments: made.append(arguments))
    make_scorer_alike(installed_versions(), split="images")
    assert made == [{"split": "images"}]
    with pytest.raises(ConfigError, match=r"torch .* is installed there, 1\.0 where"):
        make_scorer_alike(installed_versions() | {"torch": "1.0"}, split="images")

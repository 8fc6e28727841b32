"""Selectors of nodes by their labels: what Ray would take, and which nodes they mean."""

import pytest
from ray._private.label_utils import validate_label_selector

from cacp_ray.config.finetune import FinetuneConfig
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.config.saved import check_unchanged
from cacp_ray.errors import ConfigError
from cacp_ray.io.labels import check_selector, matches

GOOD = [
    {},
    {"zone": "a"},
    {"ray.io/market-type": "spot"},
    {"zone": "!a", "disk": "in(ssd, nvme)"},
    {"zone": "!in(a,b-1)"},
]
BAD = [
    {"": "a"},
    {"zone": ""},
    {"zone": "a b"},
    {"zone": "in()"},
    {"zone": "!!a"},
    {"my zone": "a"},
    {"zone": "in(a, b"},
    {"zone": "-a"},
]


@pytest.mark.parametrize("selector", GOOD, ids=str)
def test_what_is_accepted_ray_accepts_too(selector):
    assert check_selector(selector) == selector
    assert validate_label_selector(selector) is None


@pytest.mark.parametrize("selector", BAD, ids=str)
def test_what_no_node_can_have_is_refused_in_one_line(selector):
    with pytest.raises(ConfigError, match=r"cluster\.label_selector") as caught:
        load_config(RunConfig, {"cluster": {"label_selector": selector}})
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"trials\.label_selector"):
        load_config(FinetuneConfig, {"trials": {"label_selector": selector}})


@pytest.mark.parametrize(
    ("selector", "labels", "expected"),
    [
        ({}, {}, True),
        ({"zone": "a"}, {"zone": "a", "disk": "ssd"}, True),
        ({"zone": "a"}, {"zone": "b"}, False),
        ({"zone": "a"}, {}, False),
        ({"zone": "!a"}, {"zone": "b"}, True),
        ({"zone": "!a"}, {"zone": "a"}, False),
        ({"zone": "!a"}, {}, True),
        ({"zone": "in(a, b)"}, {"zone": "b"}, True),
        ({"zone": "in(a,b)"}, {"zone": "c"}, False),
        ({"zone": "!in(a, b)"}, {"zone": "c"}, True),
        ({"zone": "!in(a, b)"}, {"zone": "a"}, False),
        ({"zone": "a", "disk": "ssd"}, {"zone": "a", "disk": "hdd"}, False),
    ],
)
def test_all_conditions_must_hold(selector, labels, expected):
    assert matches(selector, labels) is expected


def test_a_run_may_go_on_on_other_nodes():
    saved = RunConfig().model_dump(mode="json")
    moved = load_config(RunConfig, {"cluster": {"label_selector": {"zone": "b"}}})
    check_unchanged(saved, moved, "run", "--run-dir")
    fewer = load_config(RunConfig, {"cluster": {"cpus_per_evaluator": 2}})
    with pytest.raises(ConfigError, match=r"cluster\.cpus_per_evaluator"):
        check_unchanged(saved, fewer, "run", "--run-dir")

"""Configuration of the agent's tuning: what is refused, and what a trial's settings become."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from cacp_ray.agent_space import AgentTuningConfig, as_text, read_settings, with_settings
from cacp_ray.config import RunConfig, load_config
from cacp_ray.errors import ConfigError
from cacp_ray.reporting.tuning import rank_correlation, tuning_rows
from cacp_ray.tuning.agents import measure_area


def load(**changes):
    values = {"search": {}, "space": {"agent.lr": {"log_uniform": [1e-4, 1e-2]}}, **changes}
    return load_config(AgentTuningConfig, values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "at least 1 item"),
        ({"space": {"agent.lrr": {"uniform": [0, 1]}}}, "space.agent.lrr: unknown"),
        ({"space": {"rates": {"choice": [[0.5], [0.3]]}}}, "no setting of an agent"),
        ({"space": {"agent.lr": {"uniform": [1, 0]}}}, "low first"),
        ({"space": {"agent.lr": {"log_uniform": [0, 1]}}}, "low first"),
        ({"space": {"agent.lr": {}}}, "give one of"),
        ({"space": {"agent.lr": {"uniform": [0, 1], "choice": [1, 2]}}}, "give one of"),
        ({"space": {"agent.lr": {"uniform": [0.1, 0.2]}}}, "leaves out the value of `search`"),
        ({"space": {"agent.drafts": {"choice": [8, 16]}}}, "leaves out the value of `search`"),
        ({"space": {"agent.lr": {"normal": [0, 1]}}}, "unknown key"),
        ({"search": {"strategy": "random"}}, "has no agent"),
        ({"search": {"rates": [2]}}, "search.rates.0"),
        ({"trials": 1}, "trials"),
        ({"seeds": []}, "seeds"),
        (
            {
                "scheduler": "pbt",
                "space": {"agent.hidden": {"choice": [[64, 64], [32, 32]]}},
            },
            "cannot change while an agent learns",
        ),
    ],
)
def test_what_cannot_be_tried_is_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(**changes)
    assert "\n" not in str(caught.value)


def test_settings_go_into_a_search_and_come_out_again():
    search = load().search
    keys = {"agent.lr": None, "agent.hidden": None, "paper.twin": None}
    assert read_settings(search, keys) == {
        "agent.lr": 1e-3,
        "agent.hidden": [64, 64],
        "paper.twin": False,
    }
    changed = with_settings(
        search, {"agent.lr": 1.5e-05, "agent.hidden": "[8, 4]", "paper.twin": True}, seed=3
    )
    assert isinstance(changed, RunConfig)
    assert changed.agent.lr == 1.5e-05
    assert changed.agent.hidden == (8, 4)
    assert (changed.paper.twin, changed.seed) == (True, 3)
    assert changed.agent.noise == search.agent.noise
    with pytest.raises(ConfigError, match="lr"):
        with_settings(search, {"agent.lr": -1})


def test_lists_travel_as_text():
    assert as_text([64, 32]) == as_text((64, 32)) == "[64, 32]"
    assert as_text(0.5) == 0.5
    assert (
        load(space={"agent.hidden": {"choice": [[64, 64], [9]]}})
        .space["agent.hidden"]
        .holds([64, 64])
    )


def test_area_is_the_mean_over_the_evaluations():
    assert measure_area([(10, 0.5)]) == 0.5
    assert measure_area([(10, 0.5), (40, 0.7)]) == pytest.approx((10 * 0.5 + 30 * 0.7) / 40)


def test_rank_correlation_is_spearmans():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1.0)
    assert rank_correlation(x, -x) == pytest.approx(-1.0)
    assert rank_correlation(x, np.array([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)
    tied = rank_correlation(np.array([1.0, 1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert tied == pytest.approx(0.9486833)
    assert rank_correlation(np.ones(4), x) is None
    assert rank_correlation(x[:2], x[:2]) is None


def test_the_row_of_the_settings_as_they_were_is_marked():
    rows = [
        {
            "name": f"trial-{i}", "settings": {"agent.lr": lr},
            "evaluations": 9, "top1": 0.5, "area": 0.4,
        }
        for i, lr in enumerate((0.001, 0.002))
    ]  # fmt: skip
    found = tuning_rows({"start": {"agent.lr": 0.001}, "trials": rows})
    assert found == [
        ["0 (as it was)", "0.001", "9", "50.00", "40.00"],
        ["1", "0.002", "9", "50.00", "40.00"],
    ]


def test_the_example_of_the_page_loads():
    page = Path("docs/tuning.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    config = load_config(AgentTuningConfig, yaml.safe_load(block))
    assert set(config.space) == {"agent.lr", "agent.noise", "agent.drafts"}

"""Configuration of the agent's tuning: what is refused, and what a trial's settings become."""

import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from ray import tune
from ray.tune.schedulers.pbt import _explore

from cacp_ray.config.agent_tuning import (
    AgentTuningConfig,
    as_text,
    read_settings,
    with_settings,
)
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.io.schema import find_problem
from cacp_ray.reporting.tuning import (
    rank_correlation,
    rank_importance,
    tuning_header,
    tuning_rows,
    write_tuning_report,
)
from cacp_ray.rundir.schema import TuningFile
from cacp_ray.searching.archive import Archive
from cacp_ray.tuning.agents import measure_area, note_settings
from cacp_ray.tuning.experiment import TrialFiles, restore
from cacp_ray.tuning.scheduler import make_scheduler
from cacp_ray.workflows.trial_search import mean_best
from cacp_ray.workflows.tune_agent import known_share, rank_trials, trials_at_once
from tests.unit.searching.test_archive import TOTAL, record


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
        ({"space": {"agent.lr": {"uniform": [0, math.inf]}}}, "finite"),
        ({"space": {"agent.elite_share": {"uniform": [0, 3]}}}, "elite_share allows .*less than"),
        ({"space": {"agent.drafts": {"uniform": [8, 64]}}}, "drafts allows .*integer"),
        ({"space": {"agent.lr": {"choice": [-1, 0.001]}}}, "lr allows -1: .*greater than 0"),
        ({"space": {"agent.hidden": {"choice": [[64, 64], [0]]}}}, r"hidden allows \[0\]"),
        ({"space": {"paper.tau": {"uniform": [0, 1]}}}, "nothing in strategy cacp: .*of agent"),
        (
            {"search": {"strategy": "amc"}, "space": {"agent.lr": {"uniform": [0, 1]}}},
            "nothing in strategy amc: .*of paper",
        ),
        ({"space": {"agent.hidden": {"uniform": [1, 2]}}}, "hidden leaves out the value"),
        ({"trials": 1}, "trials"),
        ({"seeds": [0, 0]}, "one twice"),
        ({"seeds": [-1]}, "seeds"),
        ({"scheduler": "pbt", "algorithm": "optuna"}, "leave algorithm optuna out"),
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
    assert measure_area([(10, 0.5)], 10) == 0.5
    assert measure_area([(10, 0.5), (40, 0.7)], 40) == pytest.approx((10 * 0.5 + 30 * 0.7) / 40)
    # One that ends early, as nothing new is left, keeps what it has found.
    assert measure_area([(10, 0.5), (40, 0.7)], 50) == pytest.approx((10 * 0.5 + 40 * 0.7) / 50)
    assert measure_area([(10, 0.5), (52, 0.7)], 50) == pytest.approx((10 * 0.5 + 42 * 0.7) / 52)


def test_trials_that_came_to_their_end_are_ranked_before_those_stopped():
    def row(name, evaluations, score, is_whole, since=0):
        return {
            "name": name, "evaluations": evaluations, "score": score, "area": 1 - score,
            "is_whole": is_whole, "since": since,
        }  # fmt: skip

    rows = [
        row("stopped late", 70, 0.99, False),
        row("stopped", 54, 0.999, False),
        row("to the end", 100, 0.8, True),
        row("copied", 100, 0.9, True, since=24),
        row("nothing left", 60, 0.9, True),
    ]
    assert [each["name"] for each in rank_trials(rows, "score")] == [
        "nothing left", "copied", "to the end", "stopped late", "stopped",
    ]  # fmt: skip
    assert rank_trials(rows, "area")[0]["name"] == "to the end"


def test_a_rate_without_a_network_counts_as_the_lowest_score():
    archive, rates = Archive(TOTAL), (0.2, 0.5)
    assert mean_best(archive, rates) == 0.0
    archive.add(record(0, 10, -1e30, status="failed"))
    assert mean_best(archive, rates) == 0.0
    for index, (cost, score) in enumerate([(10, -3.0), (9, -7.0), (20, -1.0)], 1):
        archive.add(record(index, cost, score))
    assert mean_best(archive, rates) == pytest.approx((-7.0 - 3.0) / 2)  # 0 would be the best
    archive.add(record(9, 4, -9.0))
    assert mean_best(archive, rates) == pytest.approx((-9.0 - 3.0) / 2)


RESULT = {
    "name": "tuning", "objective": "area", "start": {"agent.lr": 0.001},
    "answers": {"scored": 3, "cached": 1, "joined": 0}, "seconds": {"trials": 2.0},
    "trials": [
        {
            "name": "trial-0", "settings": {"agent.lr": 0.001}, "evaluations": 9, "is_whole": True,
            "score": -0.25, "area": -12.5, "known": 0.5, "since": 0,
        }
    ],
}  # fmt: skip


def test_tables_and_the_report_show_the_score_of_a_task(tmp_path):
    metric = {"name": "PSNR (dB)", "is_share": False}
    own = RESULT | {"metric": metric, "task": "mynet:Upscaling"}
    assert find_problem(own, TuningFile) == ""
    assert tuning_header(own)[1:3] == ["best PSNR (dB)", "mean over time"]
    assert tuning_rows(own) == [["0 (as it was)", "-0.25", "-12.5", "9", "50", "0.001"]]
    (tmp_path / "result.json").write_text(json.dumps(own))
    (tmp_path / "environment.json").write_text("{}")
    for name in ("best.yaml", "config.yaml"):
        (tmp_path / name).write_text("task: mynet:Upscaling\n")
    page = write_tuning_report(tmp_path).read_text()
    assert "PSNR (dB)" in page
    assert "top-1" not in page
    assert "--cache" not in page


def test_a_tuning_of_before_there_were_tasks_is_of_top1():
    assert find_problem(RESULT, TuningFile) == ""
    assert tuning_header(RESULT)[1:3] == ["best top-1 (%)", "mean over time (%)"]
    assert tuning_rows(RESULT)[0][1:3] == ["-25.00", "-1250.00"]


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
            "evaluations": 9, "score": 0.5, "area": 0.4,
        }
        for i, lr in enumerate((0.001, 0.002))
    ]  # fmt: skip
    found = tuning_rows({"start": {"agent.lr": 0.001}, "trials": rows})
    assert found == [
        ["0 (as it was)", "50.00", "40.00", "9", "-", "0.001"],
        ["1", "50.00", "40.00", "9", "-", "0.002"],
    ]


def test_the_example_of_the_page_loads():
    page = Path("docs/tuning.md").read_text()
    whole, own = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    config = load_config(AgentTuningConfig, whole)
    assert set(config.space) == {"agent.lr", "agent.noise", "agent.drafts"}
    assert load_config(AgentTuningConfig, whole | own).search.task == "mynet:Upscaling"


def test_a_population_changes_settings_within_the_space():
    """By Tune's own steps, which multiply values by 0.8 and 1.2."""
    space = {
        "agent.elite_share": tune.uniform(0.2, 0.9),
        "agent.lr": tune.loguniform(3e-4, 1e-2),
        "agent.drafts": tune.choice([8, 16, 32]),
        "agent.noise_decay": tune.uniform(0.95, 1.0),
    }
    scheduler = make_scheduler("pbt", space, {}, 100)
    settings = {"agent.elite_share": 0.85, "agent.lr": 9e-3, "agent.drafts": 32}
    settings["agent.noise_decay"] = 0.99
    seen = set()
    random.seed(0)
    for _ in range(200):
        settings, _ = _explore(
            settings,
            scheduler._hyperparam_mutations,
            scheduler._resample_probability,
            scheduler._perturbation_factors,
            scheduler._custom_explore_fn,
        )
        load_config(RunConfig, {}, [f"{key}={value}" for key, value in settings.items()])
        assert 0.2 <= settings["agent.elite_share"] <= 0.9
        assert 3e-4 <= settings["agent.lr"] <= 1e-2
        assert settings["agent.drafts"] in (8, 16, 32)
        seen.add(settings["agent.elite_share"])
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("changes", "evaluators", "expected"),
    [
        ({}, 2, 4),
        ({}, 64, 24),
        ({"algorithm": "optuna"}, 64, 6),
        ({"algorithm": "optuna", "trials": 3}, 64, 1),
        ({"scheduler": "pbt"}, 2, 24),
    ],
)
def test_trials_that_run_at_once(changes, evaluators, expected):
    assert trials_at_once(load(**{"trials": 24} | changes), evaluators) == expected


def test_the_space_can_be_changed_by_set():
    file = Path("tune_configs/agent_asha.yaml")
    changed = load_config(
        AgentTuningConfig, file, ["space.agent.lr={uniform: [0.0005, 0.002]}"]
    ).space
    plain = load_config(AgentTuningConfig, file).space
    assert changed["agent.lr"].uniform == (0.0005, 0.002)
    assert changed.keys() == plain.keys()
    with pytest.raises(ConfigError, match=r"space\.agent\.foo: unknown; settings are"):
        load_config(AgentTuningConfig, file, ["space.agent.foo={uniform: [0, 1]}"])
    with pytest.raises(ConfigError, match=r"space: agent: give its settings by name"):
        load_config(AgentTuningConfig, file, ["space.agent=3"])


def test_asha_spares_the_settings_that_the_others_are_compared_with():
    start = {"agent.lr": 0.001}
    scheduler = make_scheduler("asha", {}, start, 100)

    def report(name, lr, evaluations, score):
        trial = SimpleNamespace(trial_id=name, config={"agent.lr": lr}, status="RUNNING")
        result = {"evaluations": evaluations, "score": score, "training_iteration": evaluations}
        if name not in scheduler._trial_info:
            scheduler.on_trial_add(None, trial)
        return scheduler.on_trial_result(None, trial, result)

    scheduler.set_search_properties("score", "max")
    for index, score in enumerate((0.9, 0.8, 0.85)):
        report(f"good {index}", 0.002, 54, score)
    assert report("poor", 0.003, 54, 0.2) == "STOP"
    assert report("start", 0.001, 54, 0.1) == "CONTINUE"
    assert report("start", 0.001, 100, 0.1) == "STOP"


def test_a_damaged_experiment_is_one_line(tmp_path):
    (tmp_path / "tuner.pkl").write_bytes(b"no pickle")
    with pytest.raises(ArtifactError, match=r"is damaged .*: remove it"):
        restore(TrialFiles(str(tmp_path)), print, {})


def test_a_trial_s_known_share_is_over_its_seeds():
    counts = {"trial-00001 0": (30, 20), "trial-00001 1": (10, 0), "trial-00012 0": (5, 5)}
    assert known_share("trial-00001", counts) == 0.5
    assert known_share("trial-00012", counts) == 1.0
    assert known_share("trial-00002", counts) is None


def test_settings_that_change_are_noted_with_the_evaluations_of_before(tmp_path):
    file = tmp_path / "settings.json"
    assert note_settings(file, {"agent.lr": 0.001}, 0) == 0
    assert note_settings(file, {"agent.lr": 0.001}, 18) == 0  # gone on with
    assert note_settings(file, {"agent.lr": 0.002}, 24) == 24
    assert note_settings(file, {"agent.lr": 0.002}, 30) == 24
    rows = [
        {
            "name": "trial-1", "settings": {"agent.lr": 0.002}, "evaluations": 1_030,
            "score": 0.5, "area": 0.4, "known": 0.25, "since": since,
        }
        for since in (0, 24)
    ]  # fmt: skip
    found = tuning_rows({"start": {"agent.lr": 0.001}, "trials": rows})
    assert [row[3:] for row in found] == [
        ["1,030", "25", "0", "0.002"],
        ["1,030", "25", "24", "0.002"],
    ]


def make_result(settings, score, since=0):
    rows = [
        {
            "name": f"trial-{i}", "settings": each, "evaluations": 9 - i, "score": y,
            "since": since, "is_whole": True,
        }
        for i, (each, y) in enumerate(zip(settings, score, strict=True))
    ]  # fmt: skip
    short = {
        "name": "stopped", "settings": settings[0], "evaluations": 6, "score": 9.9,
        "since": 0, "is_whole": False,
    }  # fmt: skip
    return {"start": settings[0], "trials": [*rows, short], "objective": "score"}


def test_importance_is_over_numbers_and_the_trials_that_went_to_the_end():
    settings = [
        {"agent.lr": lr, "agent.drafts": drafts, "agent.hidden": "[64, 64]"}
        for lr, drafts in ((0.1, 8), (0.2, 32), (0.3, 16), (0.4, 8), (0.5, 32))
    ]
    found = rank_importance(make_result(settings, [0.9, 0.8, 0.7, 0.6, 0.5]))
    assert found.num_trials == 5
    assert found.values["agent.lr"] == pytest.approx(-1.0)
    assert abs(found.values["agent.drafts"]) < 1
    assert "agent.hidden" not in found.values
    assert found.chance == pytest.approx(0.98)
    assert not rank_importance(make_result(settings, [0.9, 0.8, 0.7, 0.6, 0.5], since=3)).values

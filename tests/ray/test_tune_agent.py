"""Tuning of the agent, on real images with real kills."""

import csv
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

import cacp_ray
from cacp_ray.config.agent_tuning import AgentTuningConfig, with_settings
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import ArtifactError
from cacp_ray.evaluation.cache import CachedEvaluator, MeasurementCache
from cacp_ray.evaluation.measurement import LocalEvaluator
from cacp_ray.io.files import read_json
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.strategy import find_policy
from cacp_ray.workflows.trial_search import TrialSearch
from tests.small import measurement_of

pytestmark = pytest.mark.ray

CONFIG = {
    "name": "tuning",
    "search": {
        "name": "tuned",
        "data": {"search": {"path": "embedded:search", "rows": [0, 50]}},
        "evaluations": 40,
    },
    "trials": 2,
    "evaluations": 24,
    "seeds": [0],
    "scheduler": "asha",
    "space": {
        "agent.lr": {"log_uniform": [3e-4, 1e-2]},
        "agent.hidden": {"choice": [[64, 64], [32, 32]]},
    },
}


def start(config, folder, *options):
    command = [sys.executable, "-m", "cacp_ray.cli", "tune-agent", str(config)]
    return subprocess.Popen(
        [*command, "--run-dir", str(folder), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_progress(line):
    """Evaluations that a line tells of a trial, by its name."""
    found = re.match(r"(trial-\d+) +(\d+) evaluations", line)
    return {found[1]: int(found[2])} if found else {}


@pytest.mark.slow
def test_killed_tuning_resumes_to_settings_that_a_search_takes(tmp_path):
    config, folder = tmp_path / "config.yaml", tmp_path / "tuning"
    config.write_text(yaml.safe_dump(CONFIG))
    running = start(config, folder)
    assert running.stdout is not None
    seen: dict[str, int] = {}
    for line in running.stdout:
        seen |= read_progress(line)
        if "15 evaluations" in line:
            break
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    time.sleep(3)  # Ray's processes notice
    (cache,) = (folder / "cache").glob("*.jsonl")
    num_measured = len(cache.read_text().splitlines())
    assert num_measured >= 9

    with RunDirectory(folder).locked(), pytest.raises(ArtifactError, match="another process"):
        cacp_ray.tune_agent(config, folder, resume=True)
    resumed = start(config, folder, "--resume")
    out, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, out
    result = read_json(folder / "result.json")
    assert [row["evaluations"] for row in result["trials"]].count(24) >= 1
    assert len(result["trials"]) == 2
    assert {"agent.lr": 1e-3, "agent.hidden": "[64, 64]"} in [
        row["settings"] for row in result["trials"]
    ]
    answers = result["answers"]
    # This process asked only for what was missing, and one round of each trial again.
    assert sum(answers.values()) <= 2 * 24 - sum(seen.values()) + 2 * 6
    assert answers["cached"] + answers["joined"] > 0
    assert max(row["known"] for row in result["trials"] if row["known"] is not None) > 0
    best = load_config(RunConfig, folder / "best.yaml")
    assert best == with_settings(
        load_config(AgentTuningConfig, CONFIG).search, result["trials"][0]["settings"]
    )
    # The settings that the search came with are always there to compare with.
    (plain,) = (row for row in result["trials"] if row["settings"] == result["start"])
    assert plain["evaluations"] == 24
    with (folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == [row["score"] for row in result["trials"]]
    report = (folder / "report.html").read_text()
    assert "agent.lr" in report
    assert "as it was" in report


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"scheduler": "pbt"}, {"algorithm": "optuna"}], ids=str)
def test_population_and_optuna_end_with_settings_and_what_they_found(tmp_path, changes):
    config, folder = tmp_path / "config.yaml", tmp_path / "tuning"
    space = {"agent.lr": {"log_uniform": [3e-4, 1e-2]}, "agent.noise": {"uniform": [0.2, 0.8]}}
    few = {"trials": 4, "evaluations": 42, "space": space, "objective": "area"}
    config.write_text(yaml.safe_dump(CONFIG | few | changes))
    running = start(config, folder)
    out, _ = running.communicate(timeout=400)
    assert running.returncode == 0, out
    result = read_json(folder / "result.json")
    rows = result["trials"]
    assert "Warning" not in out
    assert len(rows) == 4
    assert len({row["name"] for row in rows}) == 4
    is_population = "scheduler" in changes
    assert any(row["since"] for row in rows) == is_population
    best = load_config(RunConfig, folder / "best.yaml")
    assert best.agent.lr == pytest.approx(rows[0]["settings"]["agent.lr"])
    whole = [row for row in rows if row["evaluations"] == rows[0]["evaluations"]]
    assert rows[0]["area"] == max(row["area"] for row in whole)
    # Settings that came in the middle of a search win over none that found as much.
    equal = [row["since"] for row in whole if row["area"] == rows[0]["area"]]
    assert rows[0]["since"] == min(equal)


def score(candidate):
    """A formula: wide early layers are good."""
    counts = candidate.keep_counts
    score = sum(count / (i + 1) for i, count in enumerate(counts)) / 300
    return measurement_of(candidate.index, score, 1.0, 1 - score, images=10, seconds=0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_search_goes_on_from_anothers_folder_with_other_settings(tmp_path):
    config = load_config(RunConfig, {"evaluations": 60})
    base = Setup.create(config)

    def begin(name, settings):
        cache = MeasurementCache(tmp_path / "cache", "key")
        evaluator = CachedEvaluator(LocalEvaluator(score), cache, 10)
        setup = dataclasses.replace(base, config=with_settings(config, settings))
        return TrialSearch(setup, evaluator, tmp_path / name)

    first = begin("first", {})
    while first.evaluations < 40:
        first.advance()
    before = first.score, first.evaluations
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    changes = {"agent.lr": 0.005, "agent.noise": 0.9, "agent.drafts": 4}
    second = begin("second", changes)
    assert (second.score, second.evaluations) == before
    agent = find_policy(second._strategy)
    assert dataclasses.asdict(agent.config.settings)["drafts"] == 4
    assert agent.noise(0.5) == pytest.approx(2 * find_policy(first._strategy).noise(0.5))
    second.advance()
    second.advance()
    learner = agent.learner_group._learner
    assert {group["lr"] for _, optimizer in learner.get_optimizers_for_module("default_policy")
            for group in optimizer.param_groups} == {0.005}  # fmt: skip
    while not second.is_done:
        second.advance()
    assert second.evaluations == 60
    rows = RunDirectory(tmp_path / "second").read_records()
    assert len({row.key for row in rows}) == 60

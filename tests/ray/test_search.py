"""A whole search on the embedded sample: its files, its budgets, its repetition after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

import cacp_ray
from cacp_ray.config.run import RunConfig
from cacp_ray.config.saved import read_run_config
from cacp_ray.errors import ArtifactError
from cacp_ray.pruning.verify import count_macs
from cacp_ray.reporting.run_report import report_run
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.workflows.answers import answer_rates, rescore_candidate
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.strategy import find_policy, make_run_strategy, read_policy
from tests.small import SMALL, TINY

pytestmark = pytest.mark.ray

SAME = ("index", "strategy", "rate", "keep_counts", "macs", "params", "score", "loss")


def rows(folder):
    records = sorted(RunDirectory(folder).read_records(), key=lambda record: record.index)
    return [tuple(getattr(record, name) for name in SAME) for record in records]


def test_a_warm_cache_answers_a_whole_search(finished, tmp_path):
    again = cacp_ray.search(SMALL, tmp_path / "run", cache=finished.path.parent / "cache")
    assert rows(again.path) == rows(finished.path)
    records = RunDirectory(again.path).read_records()
    assert all(row.cached and row.seconds == 0 for row in records)
    assert again.result["evaluations"] == finished.result["evaluations"]
    (file,) = (finished.path.parent / "cache").iterdir()
    lines = file.read_text().splitlines()
    distinct = {json.dumps(json.loads(line)["keep_counts"]) for line in lines}
    assert len(distinct) == finished.result["evaluations"]
    assert len(lines) == len(set(lines))


def test_every_subnet_meets_its_budget_and_is_physically_small(finished):
    total = finished.result["base"]["macs"]
    assert set(finished.subnets) == {0.4, 0.7}
    for rate, folder in finished.subnets.items():
        net = cacp_ray.load_subnet(folder)
        macs = count_macs(net, torch.zeros(1, 3, 32, 32))
        description = json.loads((folder / "subnet.json").read_text())
        assert macs == description["macs"]
        assert rate - 0.02 < macs / total <= rate
        assert description["params"] == sum(p.numel() for p in net.parameters())


def test_run_directory_holds_what_the_contract_names(finished):
    names = {path.name for path in finished.path.iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "model.json",
        "journal.jsonl",
        "episodes",
        "checkpoints",
        "subnets",
        "result.json",
    } <= names
    # The policy's own answers at both rates are the last evaluations, where they are new.
    measured = {tuple(row[3]) for row in rows(finished.path)}
    answers = answer_rates(finished.path, SMALL["rates"], 0, save=False)
    assert {tuple(answer["keep_counts"]) for answer in answers} <= measured
    most = SMALL["evaluations"]
    assert most - 2 <= finished.result["evaluations"] == len(measured) <= most
    assert read_run_config(finished.path) == RunConfig.model_validate(SMALL)


def test_a_report_measures_only_what_it_is_told_to(finished):
    result = finished.result
    assert {row["rate"] for row in result["frontier"]} == set(SMALL["rates"])
    assert result["learning"] is None
    assert result["base"].get("latency_ms") is None
    page = report_run(finished.path).read_text()
    assert "rate-0.40" in page
    assert "speed-up" not in page


def test_recorded_accuracy_is_measured_again_from_the_keep_counts(finished):
    record, found, _ = rescore_candidate(finished.path, 7)
    assert found.score == record.score
    with pytest.raises(ArtifactError, match="no candidate 999"):
        rescore_candidate(finished.path, 999)


def test_policy_answers_a_rate_that_was_never_searched(finished, tmp_path):
    path = shutil.copytree(finished.path, tmp_path / "run")
    answers = answer_rates(path, [0.55], 3, save=True)
    assert 0.53 < answers[0]["cost_kept"] <= 0.55
    assert answers[0]["score"] > 0.3
    assert cacp_ray.load_subnet(path / answers[0]["path"]) is not None
    with pytest.raises(ArtifactError, match=r"rate-0\.55 exists"):
        answer_rates(path, [0.55], 0, save=True)
    frontier = answer_rates(path, [0.3, 0.4, 0.5], 0, save=False)
    assert all(a["rate"] - 0.02 < a["cost_kept"] <= a["rate"] for a in frontier)


@pytest.mark.slow
def test_a_policy_answers_alike_from_its_networks_and_what_was_measured(finished):
    path = finished.path
    checkpoint, told = RunDirectory(path).find_checkpoint()
    setup = Setup.create(read_run_config(path), path).prepare()
    restored = make_run_strategy(setup)
    restored.restore(checkpoint / "strategy")
    rates = [0.25, 0.3, 0.45, 0.6]
    expected = find_policy(restored).policy(rates).tolist()
    assert {file.suffix for file in checkpoint.rglob("*.*")} == {".json", ".safetensors"}
    rows = [row for row in RunDirectory(path).read_records()[:told] if not row.is_answer]
    assert read_policy(setup, checkpoint, rows).policy(rates).tolist() == expected
    assert [row["keep_counts"] for row in answer_rates(path, rates, 0, save=False)] == expected


@pytest.mark.slow
def test_a_beam_at_a_searched_rate_is_saved_elsewhere_and_no_worse_than_the_policy(
    finished, tmp_path
):
    with pytest.raises(ArtifactError, match=r"rate-0\.40 exists: .*--out"):
        answer_rates(finished.path, [0.4], 6, save=True)
    saved = {
        number: answer_rates(
            finished.path, [0.4], number, save=True, out=tmp_path / f"of-{number}"
        )[0]
        for number in (0, 6)
    }
    assert saved[6]["scored_score"] >= saved[6]["policy_score"] == saved[0]["scored_score"]
    assert saved[6]["score"] >= saved[0]["score"]  # after the repair, too
    assert cacp_ray.load_subnet(tmp_path / "of-6") is not None


@pytest.mark.slow
def test_rows_are_the_same_for_any_number_of_evaluators(finished, tmp_path):
    one = cacp_ray.search(SMALL | {"cluster": {"max_evaluators": 1}}, tmp_path / "one")
    assert rows(one.path) == rows(finished.path)


def test_killed_search_resumes_to_the_same_rows(finished, tmp_path):
    folder = tmp_path / "killed"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(SMALL))
    command = [sys.executable, "-m", "cacp_ray.cli", "search", str(config)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with subprocess.Popen(
        [*command, "--run-dir", str(folder)],
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        journal = folder / "journal.jsonl"
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and len(journal.read_text().splitlines()) >= 5:
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    before = rows(folder)
    assert 5 <= len(before) < len(rows(finished.path))
    resumed = cacp_ray.search(SMALL, folder, resume=True)
    assert rows(resumed.path) == rows(finished.path)
    found, expected = resumed.result["rates"], finished.result["rates"]
    keys = ("rate", "keep_counts", "macs", "score", "uniform_score")
    assert [[a[k] for k in keys] for a in found] == [[a[k] for k in keys] for a in expected]


@pytest.mark.slow
def test_fine_tuning_completes_the_result_and_the_report(finished, tmp_path):
    path = shutil.copytree(finished.path, tmp_path / "run")
    found = cacp_ray.finetune(path)
    assert found["base"]["test"]["images"] == 200
    for row in found["rates"]:
        assert 0.5 < row["test_score"] <= 1
        assert row["finetuned_score"] >= row["score"] - 0.05
        assert (path / row["path"] / "finetuned.safetensors").exists()
        metrics = json.loads((path / row["path"] / "metrics.json").read_text())
        assert metrics["test_score"] == row["test_score"]
    # What was finished is not done again, and nothing of its result is lost.
    assert cacp_ray.finetune(path, resume=True) == found
    assert cacp_ray.search(SMALL, path, resume=True).result == found
    page = report_run(path).read_text()
    assert "rate-0.40" in page


@pytest.mark.slow  # in tests/unit/searching, every strategy runs on a toy network
@pytest.mark.parametrize("strategy", ["random", "uniform"])
def test_other_strategies_run_on_the_same_pool(strategy, ray_cluster, tmp_path):
    done = cacp_ray.search(TINY | {"strategy": strategy}, tmp_path / "run")
    assert {row[1] for row in rows(done.path)} == {strategy}
    assert set(done.subnets) == {0.5}

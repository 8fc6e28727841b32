"""Runs whose strategy learns widths while the network trains: real trials, real kills."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import cacp_ray
from cacp_ray.io.files import read_json, read_tensors
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.workflows.trained import answer_from_trained
from tests.small import SMALL

CONFIG = SMALL | {
    "name": "widths",
    "strategy": "group_fisher",
    "rates": [0.4, 0.7],
    "widths": {"epochs": 1},
    "finetune": {"epochs": 1, "lr": 0.01, "batch_size": 20},
}

pytestmark = pytest.mark.ray


def test_a_run_has_a_subnet_with_learned_widths_for_every_rate(tmp_path):
    run_dir = tmp_path / "run"
    result = cacp_ray.search(CONFIG, run_dir).result
    assert [row["rate"] for row in result["rates"]] == [0.4, 0.7]
    records = RunDirectory(run_dir).read_records()
    for row, record in zip(result["rates"], records, strict=True):
        assert row["cost_kept"] <= row["rate"]
        assert row["score"] == record.score
        net = cacp_ray.load_subnet(run_dir / row["path"])
        assert sum(p.numel() for p in net.parameters()) == row["params"]
    assert cacp_ray.search(CONFIG, run_dir, resume=True).result == result  # does nothing


@pytest.mark.slow
def test_a_run_with_learned_widths_is_fine_tuned_cut_and_compared_like_any_other(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    cacp_ray.search(CONFIG, first)
    tuned = cacp_ray.finetune(first, overrides=["finetune.order=ladder"])
    assert all(row["test_score"] is not None for row in tuned["rates"])
    (cut,) = answer_from_trained(first, [0.55], save=True)
    assert cut["cost_kept"] <= 0.55
    start = str(first / tuned["rates"][0]["path"])
    config = CONFIG | {
        "strategy": "network_adjustment",
        "rates": [0.4],
        "widths": {"epochs": 1, "start": start},
    }
    cacp_ray.search(config, second)
    assert [run.evaluations for run in cacp_ray.compare([first, second]).runs] == [2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["chex", "dmcp"])
def test_a_killed_driver_goes_on_to_the_same_weights(strategy, tmp_path):
    config = CONFIG | {"strategy": strategy, "widths": {"epochs": 6}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "cacp_ray.cli", "search", str(file), "--run-dir"]
    subprocess.run([*command, "whole"], cwd=tmp_path, check=True, capture_output=True)
    process = subprocess.Popen(
        [*command, "killed"], cwd=tmp_path, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    trials = tmp_path / "killed" / "widths"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not _has_checkpoint(trials):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "result.json").exists()
    subprocess.run([*command, "killed", "--resume"], cwd=tmp_path, check=True, capture_output=True)
    for row in read_json(tmp_path / "whole" / "result.json")["rates"]:
        one, other = (
            read_tensors(tmp_path / run / row["path"] / "model.safetensors")
            for run in ("whole", "killed")
        )
        assert all(other[name].equal(value) for name, value in one.items())


def _has_checkpoint(trials: Path) -> bool:
    return any(trials.glob("rate-*/checkpoint_*/state.pt"))

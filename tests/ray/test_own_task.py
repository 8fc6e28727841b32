"""A network object with its own inputs and score: searched, trained, reported, loaded."""

import copy
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import cacp_ray
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.evaluation.task import FunctionTask, OwnTask
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.tuning.own import TrainContext
from cacp_ray.workflows.problem import Given

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]

SETTINGS = {
    "rates": [0.4, 0.7],
    "evaluations": 10,
    "strategy": "cacp",
    "mode": "rounds",
    "report": {"frontier": False, "learning": False, "latency": False},
}


class Doubler(nn.Module):
    """Doubles the sides of a gray image; its output is a dictionary."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.last, self.shuffle = nn.Conv2d(12, 4, 3, padding=1), nn.PixelShuffle(2)

    def forward(self, small):
        x = self.second(self.first(small).relu()).relu()
        return {"image": self.shuffle(self.last(x))}


def images(seed, number=16):
    torch.manual_seed(seed)
    coarse = torch.rand(number, 1, 4, 4)
    return nn.functional.interpolate(coarse, size=(16, 16), mode="bicubic")


def batches(number=6):
    for seed in range(number):
        large = images(seed)
        yield {"small": nn.functional.avg_pool2d(large, 2), "large": large}


def loss(net, batch):
    return (net(batch["small"])["image"] - batch["large"]).square().mean()


def score(net):
    large = images(99)
    error = loss(net, {"small": nn.functional.avg_pool2d(large, 2), "large": large})
    return {"score": float(-10 * error.detach().log10()), "mse": float(error.detach())}


def fit(net, context, epochs=3, killed=None):
    """Trains, and dies once after its first report where it is told to."""
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    if context.state is not None:
        optimizer.load_state_dict(context.state)
    for _ in range(context.epoch, epochs):
        for batch in batches():
            optimizer.zero_grad()
            loss(net, batch).backward()
            optimizer.step()
        context.report(net, optimizer.state_dict(), lr=3e-3)
        if killed is not None and context.epoch == 1 and not os.path.exists(killed):
            open(killed, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = Doubler()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(15):
        for batch in batches():
            optimizer.zero_grad()
            loss(net, batch).backward()
            optimizer.step()
    return net.eval()


def search(model, folder, **options):
    return cacp_ray.search(
        SETTINGS,
        folder,
        model=model,
        example_inputs={"small": torch.zeros(1, 1, 8, 8)},
        calibration=batches,
        score=score,
        metric="PSNR (dB)",
        **options,
    )


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    return search(model, tmp_path_factory.mktemp("own") / "run")


def test_every_rate_has_a_network_on_its_budget_with_its_score(finished, model):
    assert [row["rate"] for row in finished.result["rates"]] == [0.4, 0.7]
    for row in finished.result["rates"]:
        small = cacp_ray.load_subnet(finished.subnets[row["rate"]], model=model)
        assert row["cost_kept"] <= row["rate"]
        assert score(small)["score"] == pytest.approx(row["score"], rel=1e-4)
    base = finished.result["base"]["search"]
    assert base["score"] == pytest.approx(score(model)["score"], rel=1e-6)
    rows = RunDirectory(finished.path).read_records()
    assert all(set(row.figures) == {"mse"} for row in rows)


def test_the_run_says_what_its_score_is(finished):
    assert finished.result["metric"] == {"name": "PSNR (dB)", "is_share": False}
    page = finished.report().read_text()
    assert "PSNR (dB)" in page
    assert "top-1" not in page.split("<body")[1].split("Words")[0]


def test_another_process_is_told_to_give_the_objects_again(finished):
    folder = finished.subnets[0.4]
    with pytest.raises(ConfigError, match="with model= the whole network"):
        cacp_ray.load_subnet(folder)
    with pytest.raises(ConfigError, match="given in Python"):
        cacp_ray.finetune(finished.path)
    assert "model=whole_network" in (folder / "README.md").read_text()


def test_the_policy_answers_with_the_objects(finished):
    answer = finished.policy(0.55)
    assert answer["cost_kept"] <= 0.55


def test_a_finished_run_is_not_searched_again(finished, model):
    again = search(model, finished.path, resume=True)
    assert again.result["rates"] == finished.result["rates"]


def test_other_weights_than_those_of_the_search_are_refused(finished):
    other = dataclasses.replace(finished, given=Given(Doubler().eval(), finished.given.task))
    with pytest.raises(ArtifactError, match="other weights"):
        other.finetune(fit)
    with pytest.raises(ArtifactError, match="other weights"):
        other.policy(0.5)


def test_all_layers_keep_their_modes_when_a_training_scores_them(model):
    context = TrainContext(
        0.5, 0, None, 0.0, [], OwnTask("x", FunctionTask(None, batches, score)), model, {}
    )
    net = copy.deepcopy(model).train()
    net.second.eval()
    context.score(net)
    assert (net.training, net.first.training, net.second.training) == (True, True, False)


@pytest.mark.slow
def test_a_killed_trial_goes_on_from_its_report(finished, model, tmp_path):
    killed = str(tmp_path / "killed")
    result = finished.finetune(partial(fit, killed=killed))
    assert os.path.exists(killed)
    for row in result["rates"]:
        folder = finished.path / row["path"]
        metrics = json.loads((folder / "metrics.json").read_text())
        assert [line["epoch"] for line in metrics["history"]] == [1, 2, 3]
        assert {"mse", "lr", "search_score"} <= metrics["history"][0].keys()
        reached = [line["search_score"] for line in metrics["history"]]
        best = max(metrics["search_score_before"], *reached)
        assert row["finetuned_score"] == best > row["score"]
        small = cacp_ray.load_subnet(folder, model=model)
        assert score(small)["score"] == pytest.approx(best, rel=1e-4)
    with pytest.raises(ArtifactError, match="finished fine-tuning"):
        finished.finetune(fit)
    small.last.bias.data.add_(1)  # weights of another training
    cacp_ray.save_finetuned(folder, small, {"score": 1.0})
    assert finished.finetune(fit, resume=True)["rates"][-1]["finetuned_score"] == 1.0
    assert "PSNR" in finished.report().read_text()


@pytest.mark.slow
def test_a_ladder_cuts_each_network_from_the_next_larger_trained_one(finished, model, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.path, folder, ignore=shutil.ignore_patterns("finetune"))
    run = dataclasses.replace(finished, path=folder, result={})
    rows = run.finetune(fit, order="ladder")["rates"]
    assert [row["cut_from"] for row in rows] == [0.7, None]
    small = cacp_ray.load_subnet(folder / rows[0]["path"], model=model)
    assert score(small)["score"] == pytest.approx(rows[0]["finetuned_score"], rel=1e-4)
    # The network that was trained is the one that may be trained further elsewhere.
    small.last.bias.data.add_(1)
    cacp_ray.save_finetuned(folder / rows[0]["path"], small, {"score": 1.0})
    again = cacp_ray.load_subnet(folder / rows[0]["path"], model=model)
    assert torch.equal(again.last.bias, small.last.bias)
    assert run.finetune(fit, order="ladder", resume=True)["rates"][0]["finetuned_score"] == 1.0
    with pytest.raises(ArtifactError, match="was begun with another"):
        run.finetune(fit, order="parallel", resume=True)


def test_weights_of_a_training_elsewhere_are_saved(finished, model):
    folder = finished.subnets[0.7]
    net = cacp_ray.load_subnet(folder, model=model, finetuned=False)
    with torch.no_grad():
        net.last.bias.add_(0.125)
    cacp_ray.save_finetuned(folder, net, {"score": 30.5, "epochs_elsewhere": 3})
    again = cacp_ray.load_subnet(folder, model=model)
    assert torch.equal(again.last.bias, net.last.bias)
    with pytest.raises(ConfigError, match="holds another network"):
        cacp_ray.save_finetuned(folder, model, {"score": 1.0})
    with pytest.raises(ConfigError, match="finite number"):
        cacp_ray.save_finetuned(folder, net, {"psnr": 1.0})


def test_what_cannot_be_sent_is_named(model, tmp_path):
    import threading

    lock = threading.Lock()

    def locked(net):
        with lock:
            return 1.0

    with pytest.raises(ConfigError, match=r"^score cannot be sent to evaluators"):
        cacp_ray.search(
            SETTINGS, tmp_path / "run", model=model, calibration=batches, score=locked,
            example_inputs={"small": torch.zeros(1, 1, 8, 8)},
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


class Doubling:
    """The same as a task by name."""

    metric = "PSNR (dB)"
    example_inputs = {"small": torch.zeros(1, 1, 8, 8)}  # noqa: RUF012

    def calibration(self):
        return batches()

    def score(self, net):
        return score(net)

    def train(self, net, context):
        fit(net, context, epochs=1)


def make_doubler():
    torch.manual_seed(0)
    return Doubler()


@pytest.mark.slow
def test_a_task_by_name_needs_no_objects(tmp_path):
    settings = SETTINGS | {"strategy": "random", "rates": [0.5], "evaluations": 4}
    names = {"model": {"name": f"{__name__}:make_doubler"}, "task": f"{__name__}:Doubling"}
    run = cacp_ray.search(load_config(RunConfig, settings | names), tmp_path / "run")
    result = cacp_ray.finetune(run.path)
    assert result["rates"][0]["finetuned_score"] >= result["rates"][0]["score"]
    small = cacp_ray.load_subnet(run.subnets[0.5])
    assert score(small)["score"] == pytest.approx(result["rates"][0]["finetuned_score"], rel=1e-4)


MODULE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=1),
                         nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3))

class Signals:
    example_inputs = torch.zeros(1, 2, 12)
    metric = "agreement"

    def calibration(self):
        torch.manual_seed(1)
        return [torch.randn(32, 2, 12) for _ in range(4)]

    def score(self, net):
        torch.manual_seed(2)
        signals = torch.randn(64, 2, 12)
        return -float((net(signals) - make().eval()(signals)).square().mean())
"""
OWN_YAML = """
name: own
model: {name: "beside:make"}
task: "beside:Signals"
rates: [0.5]
strategy: random
evaluations: 4
report: {frontier: false, learning: false, latency: false}
cluster: {runtime_env: {env_vars: {OWN: "1"}}}
"""


def run_cli(folder, *arguments):
    python = [sys.executable, "-m", "cacp_ray.cli", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        python, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


TUNING_YAML = """
name: tuned
search:
  name: own
  model: {name: "beside:make"}
  task: "beside:Signals"
  rates: [0.3, 0.6]
  pruning: {sequential: false}
trials: 2
evaluations: 10
seeds: [0]
scheduler: none
space: {agent.lr: {log_uniform: [3.0e-4, 1.0e-2]}}
"""


@pytest.mark.slow
def test_the_agent_is_tuned_on_a_task_beside_the_configuration(tmp_path):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (home / "beside.py").write_text(MODULE)
    (home / "tuning.yaml").write_text(TUNING_YAML)
    done = run_cli(elsewhere, "tune-agent", home / "tuning.yaml", "--run-dir", home / "tuned")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best agreement" in done.stdout
    assert "--cache" not in done.stdout
    result = json.loads((home / "tuned" / "result.json").read_text())
    assert result["metric"] == {"name": "agreement", "is_share": False}
    assert result["task"] == "beside:Signals"
    assert len(result["trials"]) == 2
    for row in result["trials"]:
        assert (row["evaluations"], row["is_whole"]) == (10, True)
        assert row["area"] <= row["score"] < 0  # 0 would be the whole network's
    assert result["answers"]["cached"] + result["answers"]["joined"] > 0
    page = (home / "tuned" / "report.html").read_text().split("<body")[1]
    assert "agreement" in page
    assert "top-1" not in page
    best = load_config(RunConfig, home / "tuned" / "best.yaml")
    assert best.task == "beside:Signals"


@pytest.mark.slow
def test_code_beside_the_configuration_is_found_here_and_by_evaluators(tmp_path):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (home / "beside.py").write_text(MODULE)
    (home / "own.yaml").write_text(OWN_YAML)
    done = run_cli(elsewhere, "search", home / "own.yaml", "--run-dir", home / "run")
    assert done.returncode == 0, done.stderr
    assert "agreement" in done.stdout
    shown = run_cli(home, "evaluate", "run")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^0\.50 +-\d.* run/subnets/rate-0\.50$", shown.stdout, re.MULTILINE)
    subnet = "run/subnets/rate-0.50"
    inspected = run_cli(home, "inspect", subnet)
    assert inspected.returncode == 0, inspected.stderr
    exported = run_cli(home, "export", subnet, "--format", "state-dict")
    assert exported.returncode == 0, exported.stderr
    # A subnet folder alone leads to no code, neither from where it lies nor from here.
    (home / "run" / "subnets" / "rate-0.50").rename(home / "alone")
    refused = run_cli(home, "inspect", "./alone")
    assert refused.returncode == 2
    assert "may not bring code" in refused.stderr

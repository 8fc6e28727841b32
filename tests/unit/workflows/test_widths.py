"""What a strategy that learns widths is given, and what it refuses before anything is written."""

import pytest
import typer.testing
import yaml

from cacp_ray.cli import app
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import ConfigError
from cacp_ray.workflows.dry_run import check_search
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.width_problem import check_widths
from tests.small import SMALL

CONFIG = SMALL | {"strategy": "chex", "finetune": {"batch_size": 20}}


def check(*changes):
    config = load_config(RunConfig, CONFIG, [*changes])
    check_widths(Setup.create(config))


@pytest.mark.parametrize("strategy", ["chex", "dmcp", "scp", "network_adjustment", "group_fisher"])
def test_every_method_takes_the_embedded_network(strategy):
    check(f"strategy={strategy}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["widths.epochs=1", "finetune.batch_size=400"], "needs 16 steps of training, and widths"),
        (["cluster.gpus_per_evaluator=auto"], "give a share of a GPU for strategy chex"),
        (["widths.start=runs/x/subnets/rate-0.50"], "is for network_adjustment: leave it out"),
        (["strategy=dmcp", "cost={macs: 1.0, params: 1.5}"], "set cost macs or params"),
        (["finetune.padding=40"], "finetune.padding"),
    ],
)
def test_what_does_not_fit_is_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(*changes)
    assert "\n" not in str(caught.value)


def test_a_folder_to_start_from_that_is_no_subnet_ends_with_code_2(tmp_path):
    file = tmp_path / "config.yaml"
    start = {"strategy": "network_adjustment", "widths": {"start": str(tmp_path / "none")}}
    file.write_text(yaml.safe_dump(CONFIG | start))
    run = tmp_path / "run"
    result = typer.testing.CliRunner().invoke(app, ["search", str(file), "--run-dir", str(run)])
    assert result.exit_code != 0
    assert not run.exists()


def test_a_dry_run_counts_trainings_and_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("cacp_ray.workflows.dry_run.read_cpus", lambda config, address: [2.0])
    config = load_config(RunConfig, CONFIG, ["widths.epochs=3"])
    lines = check_search(config, tmp_path / "run")
    assert "2 trainings of the whole network for 3 epochs, 60 steps each" in lines
    one = check_search(load_config(RunConfig, CONFIG, ["strategy=dmcp"]), tmp_path / "run")
    assert "1 training of the whole network for 8 epochs, 160 steps each" in one

"""Training of a base network can be stopped and resumed, and fills its folder."""

import json

import pytest
from safetensors.torch import load_file

from cacp_ray import api
from cacp_ray.config.run import TrainConfig
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.training.base import read_state
from tests.unit.exporting.folders import DEPTHWISE

ROWS = {"train": [0, 120], "search": [0, 40], "test": [0, 50]}
CONFIG = TrainConfig.model_validate(
    {
        "name": "base",
        "model": {"name": DEPTHWISE},
        "data": {name: {"path": f"embedded:{name}", "rows": rows} for name, rows in ROWS.items()},
        "training": {"epochs": 3, "batch_size": 32, "ema": 0.9, "seed": 2},
    }
)


class Stopped(Exception):
    pass


def stop_after(number):
    def on_epoch(result, seconds):
        if result.epoch + 1 == number:
            raise Stopped

    return on_epoch


def test_one_that_was_stopped_ends_with_the_same_weights(tmp_path):
    whole = api.train_model(CONFIG, tmp_path / "whole")
    with pytest.raises(Stopped):
        api.train_model(CONFIG, tmp_path / "stopped", on_epoch=stop_after(2))
    assert not (tmp_path / "stopped" / "result.json").exists()
    epochs = []
    again = api.train_model(
        CONFIG,
        tmp_path / "stopped",
        resume=True,
        on_epoch=lambda result, seconds: epochs.append(result.epoch),
    )
    assert epochs == [2]
    assert again == whole
    assert whole["epochs"] == 3
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped")]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])
    rows = [json.loads(row) for row in (tmp_path / "stopped" / "progress.jsonl").open()]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert rows[-1]["images"] == 40


def test_a_folder_is_not_trained_over_nor_gone_on_with_by_another_recipe(tmp_path):
    with pytest.raises(Stopped):
        api.train_model(CONFIG, tmp_path, on_epoch=stop_after(1))
    with pytest.raises(ArtifactError, match="pass --resume"):
        api.train_model(CONFIG, tmp_path)
    changed = CONFIG.model_copy(update={"name": "other"})
    with pytest.raises(ConfigError, match="changed: name"):
        api.train_model(changed, tmp_path, resume=True)
    (tmp_path / "state.pt").write_bytes(b"cut short")
    with pytest.raises(ArtifactError, match="delete it to start again"):
        read_state(tmp_path / "state.pt")

"""What was trained elsewhere is saved whole, or refused with nothing written."""

import json
import math

import numpy as np
import pytest
import torch

from cacp_ray.errors import ConfigError
from cacp_ray.pruning.subnet import load_subnet
from cacp_ray.rundir.finetuned import save_finetuned
from tests.unit.exporting.folders import DEPTHWISE, make_folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "rate-0.50", DEPTHWISE, 8)


@pytest.mark.parametrize("score", [0.5, np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])])
def test_what_a_score_may_return_is_saved(folder, score):
    save_finetuned(folder, load_subnet(folder), {"score": score, "epochs": 3, "mae": 0.25})
    found = json.loads((folder / "metrics.json").read_text())
    assert found == {"score": 0.5, "epochs": 3, "mae": 0.25, "search_score": 0.5}
    assert load_subnet(folder, finetuned=True)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (0.5, "is of type float: give a mapping"),
        ({"psnr": 1.0}, "needs the network's `score`"),
        ({"score": math.nan}, "score is nan: give finite numbers"),
        ({"score": 1.0, "x": math.inf}, "x is inf"),
        ({"score": 1.0, "x": "much"}, "x is of type str"),
        ({"score": 1.0, "x": {1, 2}}, "x is of type set"),
        ({"score": 1.0, "history": 5}, "history is a name of our own"),
        ({"score": 1.0, "epochs": 0.5}, "epochs"),
        ({"score": 1.0, "rate": 7.5}, "rate"),
    ],
)
def test_other_metrics_are_one_line_and_write_nothing(folder, metrics, message):
    before = sorted(folder.iterdir())
    with pytest.raises(ConfigError, match=message) as caught:
        save_finetuned(folder, load_subnet(folder), metrics)
    assert "\n" not in str(caught.value)
    assert sorted(folder.iterdir()) == before


def test_spoiled_weights_and_what_is_no_network_are_refused(folder):
    net = load_subnet(folder)
    with torch.no_grad():
        next(net.parameters()).fill_(math.nan)
    with pytest.raises(ConfigError, match="of the trained network has NaN"):
        save_finetuned(folder, net, {"score": 1.0})
    with pytest.raises(ConfigError, match=r"of type NoneType: give a torch\.nn\.Module"):
        save_finetuned(folder, None, {"score": 1.0})
    assert not (folder / "finetuned.safetensors").exists()

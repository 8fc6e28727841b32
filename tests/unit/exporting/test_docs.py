"""Every command and code block of docs/export.md runs, in the order of the page."""

import re
import shlex
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from cacp_ray.cli import main
from tests.unit.exporting.folders import DEPTHWISE, make_folder

PAGE = Path("docs/export.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_command_and_code_block_runs(tmp_path, monkeypatch, capfd):
    make_folder(tmp_path / "runs/mine/subnets/rate-0.50", DEPTHWISE, 8)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^cacp-ray export .+$", PAGE, re.MULTILINE)
    assert len(commands) == 7
    for line in commands:
        if "--int8" in line:  # `tests/ray/test_export.py` has a run for them
            continue
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capfd.readouterr()
        assert (caught.value.code, err) == (0, "")
        assert out.count("\n") == 1  # the exporters' own output is hidden
        assert re.search(r"weights after the search, \d\.\d\d MB, .*batch sizes 1 and 3$", out)
    names: dict[str, object] = {}
    assert len(BLOCKS) == 6
    for block in BLOCKS[:-1]:  # the last needs a detector
        exec(compile(block, "export.md", "exec"), names)
    assert names["logits"].shape == (4, 5)
    assert names["done"].path.exists()


class TinyDetector(torch.nn.Module):
    """The parts of a detector that the page names."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = Features(), Heads()


class Features(torch.nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 3, stride=4)

    def forward(self, x):
        return {"0": super().forward(x)}


class Heads(torch.nn.Conv2d):
    def __init__(self):
        super().__init__(4, 6, 1)

    def forward(self, features):
        boxes, scores = super().forward(features[0]).flatten(2).mT.split([4, 2], 2)
        return {"bbox_regression": boxes, "cls_logits": scores}


def ssdlite():
    return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)


@pytest.mark.parametrize("make", [TinyDetector, pytest.param(ssdlite, marks=pytest.mark.slow)])
def test_backbone_and_head_of_a_detector_are_exported_as_the_page_has_it(
    make, tmp_path, monkeypatch
):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "small": make().eval()}
    exec(compile(BLOCKS[-1], "export.md", "exec"), names)
    session = onnxruntime.InferenceSession(tmp_path / "raw.onnx")
    images = torch.randn(3, 3, 128, 128)
    with torch.no_grad():
        expected = names["raw"](images)
    got = session.run(None, {"image": images.numpy()})
    for one, other in zip(got, expected.values(), strict=True):
        torch.testing.assert_close(torch.as_tensor(one), other, rtol=1e-4, atol=1e-5)

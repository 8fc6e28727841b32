"""Images of ImageNet's shape from folders to an exported network, as a user would go.

Real images (CIFAR-10, enlarged to 224-256 pixels, as JPEG), ten of a thousand classes, a hundred
shards. The weights are random: it is the way that is tried, not accuracy.
"""

import json
import shlex
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file

from cacp_ray.cli import main
from cacp_ray.data.images import read_parquet
from cacp_ray.models.factory import build_model

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

CLASSES = [f"n{number:08d}" for number in range(0, 1000, 100)]
TRAIN, VALIDATION, SHARDS, A_CLASS = 400, 100, 100, 3


@pytest.fixture
def call(monkeypatch, capsys):
    def call(line):
        monkeypatch.setattr(sys, "argv", ["cacp-ray", *shlex.split(line)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        assert caught.value.code == 0, f"{line}: {err}"
        return out

    return call


def write_folders(root, first, count):
    """An image a file, a folder a class; 990 classes have none."""
    rng = np.random.default_rng(first)
    split = read_parquet("embedded:train", (first, first + count))
    for number in range(1000):
        (root / f"n{number:08d}").mkdir(parents=True)
    for number, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
        size = tuple(rng.integers(224, 257, size=2).tolist())
        large = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        large.save(root / CLASSES[label] / f"{number:05d}.JPEG", quality=90)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
def test_from_folders_to_an_export(name, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folders(tmp_path / "folders/train", 0, TRAIN)
    write_folders(tmp_path / "folders/val", TRAIN, VALIDATION)
    converted = call(f"data convert folders/train data --shards {SHARDS}")
    assert f"{TRAIN} images in {SHARDS} shards" in converted
    call("data convert folders/val data --shards 4 --prefix validation")
    inspected = call("data inspect 'data/train-*.parquet' --all")
    assert f"{TRAIN}" in inspected
    assert "1,000 classes" in inspected
    save_file(build_model(f"torchvision:{name}", 1000).state_dict(), tmp_path / "w.safetensors")
    config = {
        "name": name,
        "model": {"name": f"torchvision:{name}", "weights": "w.safetensors"},
        "data": {
            "train": {"path": "data/train-*.parquet"},
            "search": {"path": "data/train-*.parquet", "images_per_class": A_CLASS},
            "test": {"path": "data/validation-*.parquet"},
            "resize": 232,
            "crop": 224,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "stream": True,
        },
        "rates": [0.5],
        "evaluations": 4,
        "strategy": "random",
        "pruning": {"calibration_images": 32, "round_to": 8, "sequential": False},
        "finetune": {"epochs": 1, "batch_size": 32},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert "30 images" in call("search c.yaml --dry-run")
    call("search c.yaml")
    call(f"finetune runs/{name}")
    result = json.loads((tmp_path / f"runs/{name}/result.json").read_text())
    (row,) = result["rates"]
    assert row["cost_kept"] <= 0.5
    assert row["test_images"] == VALIDATION
    assert "MB" in call(f"export runs/{name}/subnets/rate-0.50 --format onnx")

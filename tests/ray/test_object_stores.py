"""Data, killed searches, fine-tunings and tunings from buckets, by commands, as in clouds."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from PIL import Image
from pyarrow import fs

from cacp_ray.data.images import read_parquet
from cacp_ray.data.sources import open_place
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.rundir.mirror import LATEST, SIGN
from tests.object_stores import SCHEMES, serving

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TUNING = {
    "name": "tuning",
    "search": {"data": {"search": {"path": "embedded:search", "rows": [0, 50]}}},
    "trials": 2,
    "evaluations": 24,
    "seeds": [0],
    "scheduler": "none",
    "space": {"agent.lr": {"log_uniform": [3e-4, 1e-2]}},
}
EVALUATIONS, PATIENCE_SECONDS = 1000, 240.0  # a checkpoint comes after 30 s


@pytest.mark.parametrize("scheme", SCHEMES)
def test_from_a_bucket_of_images_to_a_run_in_a_bucket(scheme, tmp_path, monkeypatch):
    with serving(scheme, tmp_path) as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)

        filesystem, _ = open_place(store.root)
        upload("embedded:train", filesystem, "bucket/folders")
        check(start(f"data convert {store.root}/folders {store.root}/data --shards 8"))
        assert "800 images of 10 classes" in check(start(f"data inspect {store.root}/data --all"))
        shards = f"{store.root}/data/train-*.parquet"
        config = {
            "name": "far",
            "data": {
                "train": {"path": shards},
                "search": {"path": shards, "images_per_class": 20},
                "test": {"path": "embedded:test"},
                "mean": [0.4914, 0.4822, 0.4465],
                "std": [0.247, 0.2435, 0.2616],
                "stream": True,
            },
            "rates": [0.5],
            "strategy": "random",
            "evaluations": EVALUATIONS,
            "mode": "rounds",
            "round_size": 4,
            "pruning": {"calibration_images": 64, "criterion": "l1"},
            "finetune": {"epochs": 1},
        }
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        search = f"search c.yaml --storage {store.root}/runs/far --resume --run-dir"
        doomed = start(f"{search} first")
        deadline = time.monotonic() + PATIENCE_SECONDS
        latest = f"bucket/runs/far/{LATEST}"
        while not is_there(filesystem, latest) and time.monotonic() < deadline:
            assert doomed.poll() is None, doomed.stderr.read()
            time.sleep(0.2)
        doomed.kill()
        doomed.communicate()
        killed_at = time.time()
        num_measured = len(RunDirectory(tmp_path / "first").read_records())
        assert 0 < num_measured < EVALUATIONS
        shutil.rmtree(tmp_path / "first")
        check(start(f"{search} second"))
        rows = RunDirectory(tmp_path / "second").read_records()
        assert len({row.index for row in rows}) == len(rows) == EVALUATIONS
        assert {row.status for row in rows} == {"ok"}
        assert any(row.finished_at < killed_at for row in rows)
        assert is_there(filesystem, "bucket/runs/far/result.json")
        check(start(f"finetune second --storage {store.root}/runs/far"))
        assert is_there(filesystem, "bucket/runs/far/subnets/rate-0.50/finetuned.safetensors")
        (row,) = json.loads((tmp_path / "second/result.json").read_text())["rates"]
        assert row["test_score"] > 0


def upload(path, filesystem, folder):
    """A file an image, a folder a class."""
    split = read_parquet(path, (0, 800))
    for number, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
        name = f"{folder}/{split.classes[label]}/{number:05d}.png"
        with filesystem.open_output_stream(name) as stream:
            Image.fromarray(image).save(stream, "PNG")


def is_there(filesystem, path):
    return filesystem.get_file_info(path).type == fs.FileType.File


@pytest.mark.parametrize(("order", "workers"), [("parallel", 1), ("ladder", 1), ("parallel", 2)])
def test_a_killed_fine_tuning_goes_on_elsewhere_from_the_bucket_alone(
    order, workers, tmp_path, monkeypatch
):
    with serving("s3", tmp_path) as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        filesystem, _ = open_place(store.root)
        storage = f"{store.root}/runs/far"
        settings = "name=far rates=[0.3,0.6] strategy=uniform evaluations=6"
        settings += " data.train.path=embedded:train data.train.rows=[0,640]"
        settings += f" report.frontier=false finetune.epochs=4 finetune.order={order}"
        check(start(f"search {settings} --storage {storage} --run-dir first"))
        shutil.copytree("first", "undisturbed")
        more = f"--set trials.workers={workers}"
        check(start(f"finetune undisturbed {more}"))
        trials = "bucket/runs/far/trials"
        doomed = start(f"finetune first --storage {storage} {more}")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not has_checkpoint(filesystem, trials) and time.monotonic() < deadline:
            assert doomed.poll() is None, doomed.stderr.read()
            time.sleep(0.2)
        doomed.kill()
        doomed.communicate()
        assert not is_there(filesystem, "bucket/runs/far/finetune/chosen.json")
        shutil.rmtree("first")
        refused = start(f"finetune second --storage {storage} {more}")
        assert "--resume" in refused.communicate(timeout=600)[1]
        assert refused.returncode == 2
        check(start(f"finetune second --storage {storage} --resume {more}"))
        for rate in ("0.30", "0.60"):
            name = f"subnets/rate-{rate}/finetuned.safetensors"
            assert (tmp_path / "second" / name).read_bytes() == (
                tmp_path / "undisturbed" / name
            ).read_bytes()
            assert is_there(filesystem, f"bucket/runs/far/{name}")
        assert is_there(filesystem, "bucket/runs/far/report.html")
        assert not (tmp_path / "second/trials").exists()
        assert not has_checkpoint(filesystem, trials)
        assert not is_there(filesystem, f"bucket/runs/far/{SIGN}")
        # What has ended is not trained again, although its checkpoints are gone.
        weights = tmp_path / "second/subnets/rate-0.30/finetuned.safetensors"
        trained_at = weights.stat().st_mtime_ns
        check(start(f"finetune second --storage {storage} --resume {more}"))
        assert weights.stat().st_mtime_ns == trained_at


def test_a_killed_tuning_goes_on_elsewhere_from_the_bucket_alone(tmp_path, monkeypatch):
    with serving("s3", tmp_path) as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        filesystem, _ = open_place(store.root)
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(TUNING))
        tune = f"tune-agent c.yaml --storage {store.root}/runs/tuning --run-dir"
        doomed = start(f"{tune} first")
        curves = "bucket/runs/tuning/trials/tune"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(read_curves(filesystem, curves)) < 2 and time.monotonic() < deadline:
            assert doomed.poll() is None, doomed.stderr.read()
            time.sleep(0.2)
        doomed.kill()
        doomed.communicate()
        seen = read_curves(filesystem, curves)
        assert min(seen.values()) > 0
        shutil.rmtree("first")
        refused = start(f"{tune} second")
        assert "holds a run: pass --resume" in refused.communicate(timeout=600)[1]
        assert refused.returncode == 2
        check(start(f"{tune} second --resume"))
        result = json.loads((tmp_path / "second/result.json").read_text())
        assert [row["evaluations"] for row in result["trials"]] == [24, 24]
        # It asked only for what was missing, and one round of each trial again.
        assert sum(result["answers"].values()) <= 2 * 24 - sum(seen.values()) + 2 * 6
        for name in ("best.yaml", "trials.csv", "result.json", "report.html"):
            assert is_there(filesystem, f"bucket/runs/tuning/{name}")
        assert not read_curves(filesystem, curves)
        assert not (tmp_path / "second/tune").exists()
        assert not (tmp_path / "second/trials").exists()
        without = start("tune-agent c.yaml --run-dir second --resume")
        check(without)  # it has ended, so nothing is begun


def read_curves(filesystem, folder):
    """Evaluations of the last checkpoint of each trial of a tuning, by its name."""
    selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
    seen = {}
    for info in filesystem.get_file_info(selector):
        if info.base_name == "curve.json":
            with filesystem.open_input_stream(info.path) as stream:
                evaluations = json.loads(stream.read())[-1][0]
            trial = info.path.split("/")[-3]
            seen[trial] = max(evaluations, seen.get(trial, 0))
    return seen


def has_checkpoint(filesystem, folder):
    selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
    return any(info.base_name == "state.pt" for info in filesystem.get_file_info(selector))


def start(line):
    return subprocess.Popen(
        [sys.executable, "-m", "cacp_ray.cli", *line.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def check(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, f"{process.args}: {err}"
    return out

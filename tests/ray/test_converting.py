"""Image folders become shards with the same images, whatever is killed in between."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from cacp_ray.data.images import Rows, read_images, read_parquet
from cacp_ray.data.sources import open_source
from cacp_ray.distributed.converting import convert
from cacp_ray.errors import ArtifactError, ConfigError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Real images, a folder a class."""
    root = tmp_path_factory.mktemp("images")
    split = read_parquet("embedded:test", (0, 120))
    for number, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
        place = root / split.classes[label]
        place.mkdir(exist_ok=True)
        Image.fromarray(image).save(place / f"{number:03d}.png")
    return root


def test_shards_hold_the_images_of_the_folder(folder, tmp_path):
    seen = []
    out = tmp_path / "shards"
    assert convert(str(folder), str(out), 7, "train", lambda *done: seen.append(done)) == 120
    assert [row[:2] for row in seen] == [(number, 7) for number in range(8)]
    assert sum(images for _, _, images in seen) == 120
    files = sorted(out.iterdir())
    assert files[0].name == "train-00000-of-00007.parquet"
    assert len(files) == 7
    before = read_images(open_source(str(folder)), Rows())
    after = read_images(open_source(str(out)), Rows())
    assert after.classes == before.classes

    def content(split):
        pairs = zip(split.images, split.labels.tolist(), strict=True)
        return sorted((image.tobytes(), label) for image, label in pairs)

    assert content(after) == content(before)
    labels = pq.read_table(files[0])["label"].to_pylist()
    assert len(set(labels)) > 5, "a shard has images of few classes"
    assert labels != sorted(labels)


def test_what_is_whole_is_left_alone_and_what_is_not_is_written_again(folder, tmp_path):
    out = tmp_path / "shards"
    convert(str(folder), str(out), 4, "train", lambda *done: None)
    whole = read_images(open_source(str(out)), Rows())
    first, second, third, _ = sorted(out.iterdir())
    second.write_bytes(second.read_bytes()[:1000])
    third.unlink()
    os.utime(first, (1, 1))
    seen = []
    convert(str(folder), str(out), 4, "train", lambda *done: seen.append(done))
    assert sorted(images for _, _, images in seen) == [0, 0, 0, 30, 30]
    again = read_images(open_source(str(out)), Rows())
    assert np.array_equal(again.images, whole.images)
    assert first.stat().st_mtime == 1
    assert second.stat().st_mtime > 1


def test_a_killed_conversion_goes_on(folder, tmp_path):
    out = tmp_path / "shards"
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "cacp_ray.cli", "data", "convert", "imagefolder"]
    command += [str(folder), str(out), "--shards", "40", "--address", address]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not (out / "train-00002-of-00040.parquet").exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not all((out / f"train-{i:05d}-of-00040.parquet").exists() for i in range(40))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "120 images in 40 shards" in done.stdout
    assert len(read_images(open_source(str(out)), Rows())) == 120


def test_what_cannot_be_converted_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="give 1 to 120"):
        convert(str(folder), str(tmp_path / "out"), 121, "train", lambda *done: None)
    with pytest.raises(ArtifactError, match="no such file"):
        convert(str(tmp_path / "nothing"), str(tmp_path / "out"), 2, "train", lambda *done: None)
    assert not (tmp_path / "out").exists()

"""Image folders become shards with the same images, even if the conversion is killed."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from cacp_ray.data.images import Rows, read_images, read_parquet
from cacp_ray.data.sources import open_source
from cacp_ray.distributed import converting
from cacp_ray.distributed.converting import convert
from cacp_ray.errors import ArtifactError, ConfigError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Real images, one folder for each class."""
    root = tmp_path_factory.mktemp("images")
    split = read_parquet("embedded:test", (0, 120))
    for number, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
        place = root / split.classes[label]
        place.mkdir(exist_ok=True)
        Image.fromarray(image).save(place / f"{number:03d}.png")
    return root


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder that a test may change."""
    return shutil.copytree(folder, tmp_path / "copy")


def content(path):
    """Images with the names of their classes, in any order."""
    split = read_images(open_source(str(path)), Rows())
    pairs = zip(split.images, split.labels.tolist(), strict=True)
    return sorted((image.tobytes(), split.classes[label]) for image, label in pairs)


def shard_sizes(path, out, shards):
    """The images that `convert` writes into each shard; 0 for shards that were whole."""
    seen = []
    convert(str(path), str(out), shards, "train", lambda *done: seen.append(done))
    return sorted(images for _, _, images in seen[1:])


def command_line(*arguments):
    command = [sys.executable, "-m", "cacp_ray.cli", "data", "convert"]
    return [*command, *map(str, arguments)]


def test_shards_hold_the_images_of_the_folder(folder, tmp_path):
    seen = []
    out = tmp_path / "shards"
    assert convert(str(folder), str(out), 7, "train", lambda *done: seen.append(done)) == 120
    assert [row[:2] for row in seen] == [(number, 7) for number in range(8)]
    assert sum(images for _, _, images in seen) == 120
    files = sorted(out.iterdir())
    assert files[0].name == "train-00000-of-00007.parquet"
    assert len(files) == 7
    assert open_source(str(out)).classes == open_source(str(folder)).classes
    assert content(out) == content(folder)
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


@pytest.mark.slow
def test_a_killed_conversion_goes_on(folder, tmp_path):
    out = tmp_path / "shards"
    command = command_line(folder, out, "--shards", 40)
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


def test_a_conversion_that_waits_for_cpus_says_so(folder, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="cacp_ray")  # others may have set it
    monkeypatch.setattr(converting, "SAY_SECONDS", 0.5)
    sleepers = [ray.remote(num_cpus=1)(lambda: time.sleep(1.5)).remote() for _ in range(2)]
    assert shard_sizes(folder, tmp_path / "out", 2) == [60, 60]
    assert "no shard for 0 s: they are large, or wait for CPUs, of which 0 are free" in caplog.text
    ray.get(sleepers)


def test_a_mended_image_and_one_of_another_class_are_written_again(copy, tmp_path):
    out = tmp_path / "shards"
    first, second, *_ = sorted(copy.glob("*/*.png"))
    assert shard_sizes(copy, out, 4) == [30] * 4
    shutil.copy(second, first)
    assert shard_sizes(copy, out, 4) == [0, 0, 0, 30]
    assert content(out) == content(copy)
    first.rename(copy / "truck" / first.name)
    assert max(shard_sizes(copy, out, 4)) == 30
    assert content(out) == content(copy)
    assert shard_sizes(copy, out, 4) == [0] * 4


def test_an_image_that_is_added_during_a_conversion_shifts_no_labels(copy, tmp_path):
    out = tmp_path / "shards"
    before = content(copy)
    first = min(copy.glob("*/*.png"))

    def add(done, *_):
        if not done:
            shutil.copy(first, first.with_name("!.png"))

    assert convert(str(copy), str(out), 4, "train", add) == 120
    assert content(out) == before


def test_zeros_in_a_shard_are_found(folder, tmp_path):
    out = tmp_path / "shards"
    convert(str(folder), str(out), 2, "train", lambda *done: None)
    shard = out / "train-00001-of-00002.parquet"
    whole = shard.read_bytes()
    for start in (100, len(whole) // 2):
        shard.write_bytes(whole[:start] + bytes(2500) + whole[start + 2500 :])
        assert shard_sizes(folder, out, 2) == [0, 60]
        assert shard.read_bytes() == whole


def test_row_groups_are_small(folder, tmp_path):
    convert(str(folder), str(tmp_path), 1, "train", lambda *done: None)
    metadata = pq.ParquetFile(tmp_path / "train-00000-of-00001.parquet").metadata
    assert metadata.num_row_groups == 8
    assert all(metadata.row_group(i).num_rows <= 16 for i in range(8))


def test_one_folder_holds_one_conversion_of_a_prefix(folder, tmp_path):
    out = tmp_path / "shards"
    convert(str(folder), str(out), 4, "train", lambda *done: None)
    names = sorted(out.iterdir())
    with pytest.raises(ArtifactError, match=r"train-00000-of-00004\.parquet.*another conversion"):
        convert(str(folder), str(out), 3, "train", lambda *done: None)
    assert sorted(out.iterdir()) == names
    convert(str(folder), str(out), 3, "test", lambda *done: None)
    assert len(list(out.iterdir())) == 7


@pytest.mark.parametrize("place", ["", "shards", "truck/../../copy/shards"])
def test_shards_do_not_go_into_what_is_converted(copy, place):
    before = sorted(copy.rglob("*"))
    for out in (f"{copy}/{place}", f"file://{copy}/{place}"):
        with pytest.raises(ConfigError, match="lies in"):
            convert(str(copy), out, 2, "train", lambda *done: None)
    assert sorted(copy.rglob("*")) == before


def test_what_is_parquet_already_is_not_converted(folder, tmp_path):
    convert(str(folder), str(tmp_path / "a"), 2, "train", lambda *done: None)
    with pytest.raises(ConfigError, match="Parquet files already"):
        convert(str(tmp_path / "a"), str(tmp_path / "b"), 2, "train", lambda *done: None)


def test_a_failure_is_one_line(copy, tmp_path, run):
    command = ("data", "convert", copy)
    code, _, err = run(*command, "/proc/x", "--shards", 8)
    assert (code, err.count("\n")) == (1, 1), err
    assert "/proc/x: a shard cannot be written" in err
    for image in sorted(copy.glob("*/*.png"))[::10]:
        image.write_text("no image")
    code, _, err = run(*command, tmp_path / "out", "--shards", 8)
    assert (code, err.count("\n")) == (2, 1), err
    assert ".png: not an image" in err
    assert not list(tmp_path.glob("out/*.tmp"))


def test_an_image_that_cannot_be_read_is_named(copy, tmp_path):
    def remove(done, *_):
        if not done:
            (copy / "truck" / min(os.listdir(copy / "truck"))).unlink()

    with pytest.raises(ArtifactError, match=r"copy/truck/\d+\.png: cannot be read"):
        convert(str(copy), str(tmp_path / "out"), 4, "train", remove)


def test_two_conversions_at_once_do_not_disturb_each_other(folder, tmp_path):
    def run(_):
        return convert(str(folder), str(tmp_path / "out"), 12, "train", lambda *done: None)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [120, 120]
    assert len(list((tmp_path / "out").iterdir())) == 12
    assert content(tmp_path / "out") == content(folder)


def test_what_a_killed_conversion_left_is_removed_once_all_is_whole(folder, tmp_path):
    old, new, other = (
        tmp_path / f"{name}.tmp"
        for name in ("train-00000-of-00002.parquet.a", "train-00000-of-00002.parquet.b", "c")
    )
    for file in (old, new, other):
        file.write_text("half")
    os.utime(old, (1, 1))
    os.utime(other, (1, 1))
    convert(str(folder), str(tmp_path), 2, "train", lambda *done: None)
    assert sorted(tmp_path.glob("*.tmp")) == sorted([new, other])

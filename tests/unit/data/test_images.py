"""Parquet files become uint8 arrays, and every broken file is refused with its name and row."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cacp_ray.data import images
from cacp_ray.data.images import Rows, read_images, read_parquet
from cacp_ray.data.sources import open_source
from cacp_ray.errors import ArtifactError, ConfigError


def png(value, side=4):
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, images, labels, *, plain=False, metadata=None, label="label"):
    column = images if plain else [{"bytes": b, "path": None} for b in images]
    kind = pa.binary() if plain else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"img": pa.array(column, kind), label: pa.array(labels, pa.int64())})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return str(path)


NAMES = {"class_names": json.dumps(["cat", "dog"])}
HUGGING_FACE = {
    "huggingface": json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"]}}}})
}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("metadata", [NAMES, HUGGING_FACE])
def test_both_image_columns_and_both_class_names_are_read(tmp_path, plain, metadata):
    path = write(tmp_path / "a.parquet", [png(1), png(2)], [0, 1], plain=plain, metadata=metadata)
    split = read_parquet(path)
    assert split.images.tolist() == [[[[v] * 3] * 4] * 4 for v in (1, 2)]
    assert split.labels.tolist() == [0, 1]
    assert split.classes == ("cat", "dog")


def test_rows_and_evenly_spaced_counts(tmp_path):
    path = write(tmp_path / "a.parquet", [png(v) for v in range(10)], [0] * 10)
    assert read_parquet(path, (2, 6)).images[:, 0, 0, 0].tolist() == [2, 3, 4, 5]
    assert read_parquet(path, (2, 8), count=3).images[:, 0, 0, 0].tolist() == [2, 4, 6]
    assert len(read_parquet(path, count=100)) == 10


def test_label_outside_the_classes_names_file_and_row(tmp_path):
    path = write(tmp_path / "a.parquet", [png(1)] * 3, [0, 1, 2], metadata=NAMES)
    with pytest.raises(ArtifactError, match=r"a\.parquet, row 2: label 2 is outside the 2 classes"):
        read_parquet(path, (1, 3))


def test_numbered_classes_may_be_more_than_the_largest_label_and_begin_at_0(tmp_path):
    path = write(tmp_path / "a.parquet", [png(1)] * 3, [1, 2, 3])
    few = read_images(open_source(path), Rows())
    more = read_images(open_source(path), Rows(num_classes=7))
    assert (len(few.classes), len(more.classes)) == (4, 7)
    with pytest.raises(ArtifactError, match=r"outside the 3 .* labels begin at 1 here: subtract 1"):
        read_images(open_source(path), Rows(num_classes=3))
    named = write(tmp_path / "b.parquet", [png(1)] * 2, [0, 1], metadata=NAMES)
    with pytest.raises(ConfigError, match="names 2 classes; leave it out"):
        read_images(open_source(named), Rows(num_classes=3))


def test_labels_must_be_integers_and_there(tmp_path):
    path = tmp_path / "a.parquet"
    for labels, message in (([0.5, 1.0], "must be integers"), ([1, None], "row 1: no label")):
        pq.write_table(pa.table({"img": [png(1), png(2)], "label": labels}), path)
        with pytest.raises(ArtifactError, match=message):
            read_parquet(str(path))


def test_broken_image_names_file_and_row(tmp_path):
    path = write(tmp_path / "a.parquet", [png(1), png(2)[:40], b""], [0, 0, 0])
    with pytest.raises(ArtifactError, match=r"a\.parquet, row 1: cannot decode"):
        read_parquet(path)


def test_missing_truncated_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no such file"):
        read_parquet(str(tmp_path / "nothing.parquet"))
    path = tmp_path / "a.parquet"
    write(path, [png(1)], [0])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match="not a readable Parquet file"):
        read_parquet(str(path))
    with pytest.raises(ArtifactError, match="none of the columns label"):
        read_parquet(write(tmp_path / "b.parquet", [png(1)], [0], label="target"))


def test_rows_outside_the_file_and_unknown_samples_are_refused(tmp_path):
    path = write(tmp_path / "a.parquet", [png(1)], [0])
    with pytest.raises(ConfigError, match="outside its 1 rows"):
        read_parquet(path, (0, 2))
    with pytest.raises(ConfigError, match="did you mean train"):
        read_parquet("embedded:trian")


@pytest.mark.parametrize(("name", "rows"), [("train", 2500), ("search", 1500), ("test", 1000)])
def test_embedded_sample_is_balanced(name, rows):
    split = read_parquet(f"embedded:{name}")
    assert split.images.shape == (rows, 32, 32, 3)
    assert np.bincount(split.labels).tolist() == [rows // 10] * 10
    assert split.classes[3] == "cat"


def test_embedded_splits_share_no_image():
    images = [read_parquet(f"embedded:{name}").images for name in ("train", "search", "test")]
    keys = [{image.tobytes() for image in split} for split in images]
    assert len(set.union(*keys)) == sum(len(split) for split in images)


def test_long_reading_says_how_far_it_is(monkeypatch, caplog):
    monkeypatch.setattr(images, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(images, "DECODED_TOGETHER", 40)
    with caplog.at_level("INFO"):
        read_parquet("embedded:search", (0, 100))
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "40 of 100 images read",
        "80 of 100 images read",
    ]

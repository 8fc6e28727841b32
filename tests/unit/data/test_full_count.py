"""A data set with as many rows as ImageNet, of which little is read and held."""

import subprocess
import sys

import pytest

SCRIPT = """
import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cacp_ray.config.reading import load_config
from cacp_ray.config.run import DataConfig
from cacp_ray.data.inspecting import summarize
from cacp_ray.data.parquet import ParquetSource
from cacp_ray.data.sources import open_source
from cacp_ray.io.environment import peak_memory
from cacp_ray.workflows.splits import Splits

folder, ROWS, SHARDS, CLASSES, PER_CLASS = Path(sys.argv[1]), 1_281_167, 256, 1000, 5
rng = np.random.default_rng(0)
buffer = io.BytesIO()
Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "PNG")
labels = rng.permutation(np.arange(ROWS) % CLASSES)
kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
for number, part in enumerate(np.array_split(labels, SHARDS)):
    images = pa.array([{"bytes": buffer.getvalue(), "path": None}] * len(part), kind)
    table = pa.table({"image": images, "label": part})
    pq.write_table(table, folder / f"train-{number:05d}.parquet", row_group_size=100)
data = load_config(DataConfig, {
    "train": {"path": str(folder)}, "stream": True,
    "search": {"path": f"{folder}/train-*.parquet", "images_per_class": PER_CLASS},
    "test": {"path": str(folder), "rows": [0, 10]},
    "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2],
})
try:
    Splits(data).check()
except Exception as error:
    print(str(error).split(":")[0])
read = []
one_group = pq.ParquetFile.read_row_group
pq.ParquetFile.read_row_group = lambda *args, **kw: read.append(1) or one_group(*args, **kw)
search = Splits(data).read("search")
print(len(search), np.bincount(search.labels).min(), len(read))
print(len(Splits(data).open("train")), summarize(open_source(str(folder)), 100).rows)
print(peak_memory() / 2**30)
"""


@pytest.mark.slow
def test_1_281_167_rows_are_never_loaded(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    refused, drawn, whole, gigabytes = done.stdout.splitlines()
    assert refused == "data.test and data.train share rows of " + str(tmp_path)
    images, least, groups = map(int, drawn.split())
    assert (images, least) == (5000, 5)
    assert groups < 250  # of 12,904
    assert whole == "1276167 1281167"
    assert float(gigabytes) < 2

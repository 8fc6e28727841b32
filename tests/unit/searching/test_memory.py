"""A search that continues 100,000 measurements takes less than 2 GB."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cacp_ray.evaluation.racing import encode_hits
from cacp_ray.io.environment import peak_memory
from cacp_ray.models.factory import build_model
from cacp_ray.pruning.planner import make_plan
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.rundir.records import SCHEMA
from cacp_ray.rundir.directory import RunDirectory

folder, PARTS, ROWS = Path(sys.argv[1]), 10, 10_000
plan = make_plan(build_model("resnet56", 10).eval(), torch.zeros(1, 3, 32, 32))
whole, rng = plan.cost_model.num_channels, np.random.default_rng(0)
(folder / "episodes").mkdir()
for part in range(PARTS):
    columns = {
        "index": np.arange(part * ROWS, (part + 1) * ROWS),
        "keep_counts": [rng.integers(1, whole + 1).tolist() for _ in range(ROWS)],
        "hits": [encode_hits(rng.random(5000) < 0.8) for _ in range(ROWS)],
        "rate": np.full(ROWS, 0.5), "cost_kept": rng.uniform(0.4, 0.5, ROWS),
        "status": ["ok"] * ROWS, "cached": [False] * ROWS,
        "is_answer": [False] * ROWS,
        "figures": [list(zip(("top1", "top5", "loss"), rng.random(3))) for _ in range(ROWS)],
    }
    for field in SCHEMA:
        if field.name not in columns:
            is_text = pa.types.is_string(field.type)
            value = rng.random(ROWS) if pa.types.is_floating(field.type) else np.arange(ROWS)
            columns[field.name] = [f"{field.name}-1"] * ROWS if is_text else value
    table = pa.table(columns, schema=SCHEMA)
    pq.write_table(table, folder / "episodes" / f"part-{part:05d}.parquet")


class Nothing:
    name, capacity, num_alive = "nothing", 2, 2

    def ask(self, count): return []
    def tell(self, results): self.told = len(results)
    def save(self, folder): pass
    def submit(self, candidate): pass
    def results(self, timeout): return []


nothing = Nothing()
run = RunDirectory(folder)
loop = SearchLoop(nothing, plan.cost_model, run, rates=(0.5,), evaluations=200_000, mode="async")
loop.restore(nothing)
loop.checkpoint(nothing)
peak = peak_memory() / 2**30
print(nothing.told, loop.progress.evaluations, len(run.read_records()), peak)
"""


@pytest.mark.slow
def test_a_search_with_100_000_measurements_fits_in_two_gigabytes(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told, known, read, gigabytes = done.stdout.split()
    assert (int(told), int(known), int(read)) == (100_000, 100_000, 100_000)
    assert float(gigabytes) < 2

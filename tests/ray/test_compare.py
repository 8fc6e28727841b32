"""Several strategies in one command: stopped between two and resumed, compared, measured once."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from cacp_ray.cli import main
from cacp_ray.rundir.directory import RunDirectory
from tests.small import TINY

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_killed_between_two_strategies_and_resumed_it_compares_all_and_measures_once(
    ray_cluster, tmp_path, monkeypatch, capsys
):
    folder, config = tmp_path / "runs", tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(TINY))
    command = ["search", str(config), "--run-dir", str(folder), "--strategy"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with subprocess.Popen(
        [sys.executable, "-m", "cacp_ray.cli", *command, "random,uniform"],
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (folder / "random" / "result.json").exists():
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    first = (folder / "random" / "result.json").read_bytes()
    assert not (folder / "uniform" / "result.json").exists()

    strategies = ["random", "uniform", "noise"]
    resumed = ["cacp-ray", "--quiet", *command, ",".join(strategies), "--resume"]
    monkeypatch.setattr(sys, "argv", resumed)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert (folder / "random" / "result.json").read_bytes() == first  # it was not searched again
    found = json.loads((folder / "comparison" / "comparison.json").read_text())
    assert [run["strategy"] for run in found["runs"]] == strategies
    assert (folder / "comparison" / "comparison.png").exists()
    out = capsys.readouterr().out
    for run in found["runs"]:
        result = json.loads((folder / run["strategy"] / "result.json").read_text())
        (row,) = result["rates"]
        assert run["search_score"] == {"0.50": row["search_score"]}
        assert run["evaluations"] == result["evaluations"]
        assert f"{100 * row['search_score']:.2f}" in out

    # `noise` starts from the uniform candidates, which `uniform` has measured.
    measured = {row.key: row for row in RunDirectory(folder / "uniform").read_records()}
    noise = RunDirectory(folder / "noise").read_records()
    shared = [row for row in noise if row.key in measured]
    assert found["runs"][2]["known"] == len({row.key for row in shared}) >= 1
    assert found["runs"][2]["evaluations"] == 4
    for row in shared:
        assert row.cached
        assert (row.score, row.loss) == (measured[row.key].score, measured[row.key].loss)

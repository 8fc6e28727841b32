"""A subnet of a run becomes an INT8 file, calibrated and judged by the images of the run."""

import json
import shutil

import pytest

pytestmark = pytest.mark.ray


@pytest.mark.slow  # tests/unit/exporting/test_int8.py has the file itself
def test_an_int8_file_is_made_of_a_subnet_of_a_run(finished, tmp_path, run):
    folder = tmp_path / "run"
    shutil.copytree(finished.path, folder)
    subnet = folder / finished.result["rates"][-1]["path"]
    code, out, err = run("export", subnet, "--format", "onnx", "--int8", "--max-drop", 20)
    assert code == 0, err
    assert "search split: " in out
    assert out.count("top-1 in") == 2
    assert (subnet / "subnet.int8.onnx").stat().st_size > 0


@pytest.mark.slow
def test_base_and_subnets_are_benchmarked_and_the_report_shows_it(finished, tmp_path, run):
    folder = tmp_path / "run"
    shutil.copytree(finished.path, folder)
    code, out, err = run("benchmark", folder, "--format", "torch,onnx-int8", "--batch", "2,1")
    assert code == 0, err
    content = json.loads((folder / "benchmark.json").read_text())
    rates = sorted((row["rate"] for row in finished.result["rates"]), reverse=True)
    names = ["base", *(f"{rate:g}" for rate in rates)]
    found = [(row["network"], row["format"]) for row in content["rows"]]
    assert found == [(name, kind) for name in names for kind in ("torch", "onnx-int8")]
    assert all([timed["batch"] for timed in row["latency"]] == [1, 2] for row in content["rows"])
    first, *others = content["rows"]
    assert first["score"] == pytest.approx(finished.result["base"]["search"]["score"], abs=1e-6)
    assert [timed["speedup"] for timed in first["latency"]] == [1.0, 1.0]
    searched = {f"{row['rate']:g}": row["score"] for row in finished.result["rates"]}
    for row in others:
        if row["format"] == "torch":
            assert row["score"] == pytest.approx(searched[row["network"]], abs=1e-6)
        else:
            assert 0 < row["size"] < 0.6 * first["size"]
    assert out.count("the fastest within 1 point of the base network") == 2
    code, _, err = run("report", folder)
    assert code == 0, err
    assert "Where it is deployed" in (folder / "report.html").read_text()
    assert (folder / "figures" / "benchmark.png").exists()

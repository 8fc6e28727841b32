"""A subnet of a run becomes an INT8 file, calibrated and judged by the images of the run."""

import shutil

import pytest

pytestmark = pytest.mark.ray


def test_an_int8_file_is_made_of_a_subnet_of_a_run(finished, tmp_path, run):
    folder = tmp_path / "run"
    shutil.copytree(finished.path, folder)
    subnet = folder / finished.result["rates"][-1]["path"]
    code, out, err = run("export", subnet, "--format", "onnx", "--int8", "--max-drop", 20)
    assert code == 0, err
    assert "search split: " in out
    assert out.count("top-1 in") == 2
    assert (subnet / "subnet.int8.onnx").stat().st_size > 0

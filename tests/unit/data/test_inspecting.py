"""Summaries of data sets, and the first broken image."""

import io

import numpy as np
import pytest
from PIL import Image

from cacp_ray.data.inspecting import describe, summarize
from cacp_ray.data.sources import open_source


@pytest.fixture
def folder(tmp_path):
    for name, number, size in (("cat", 3, (8, 4)), ("dog", 1, (6, 6))):
        place = tmp_path / name
        place.mkdir()
        for index in range(number):
            buffer = io.BytesIO()
            mode = "L" if name == "dog" else "RGB"
            Image.new(mode, size).save(buffer, "PNG")
            (place / f"{index}.png").write_bytes(buffer.getvalue())
    return tmp_path


def test_classes_sizes_and_colours_are_counted(folder):
    summary = summarize(open_source(str(folder)), None)
    assert (summary.rows, summary.classes, summary.decoded) == (4, ("cat", "dog"), 4)
    assert summary.per_class.tolist() == [3, 1]
    assert dict(summary.sizes) == {(8, 4): 3, (6, 6): 1}
    assert dict(summary.modes) == {"RGB": 3, "L": 1}
    lines = describe("x", summary)
    assert lines[0] == "x: 4 images of 2 classes"
    assert "1 (dog) to 3 (cat)" in lines[1]
    assert lines[-1] == "all of them decode"


def test_the_first_broken_image_is_named_and_the_command_fails(folder, run):
    (folder / "cat" / "1.png").write_bytes(b"nothing")
    (folder / "cat" / "2.png").write_bytes(b"")
    code, out, err = run("data", "inspect", folder, "--all")
    assert code == 2
    assert "all of them decode" not in out
    assert "cat/1.png" in err
    assert "2.png" not in err
    assert err.count("\n") == 1


def test_the_embedded_sample_is_whole(run):
    code, out, _ = run("data", "inspect", "embedded:test", "--all")
    assert code == 0
    assert "1,000 images of 10 classes" in out
    assert "100 (airplane) to 100" in out
    assert np.all([word in out for word in ("1 sizes", "width 32 to 32", "RGB 1,000")])

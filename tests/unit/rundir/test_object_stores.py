"""Runs are copied to servers with the protocols of S3 and Google, and images are read from them."""

import os
import shutil
import signal

import numpy as np
import pytest

from cacp_ray.data.images import Rows, read_images
from cacp_ray.data.sources import open_place, open_source
from cacp_ray.errors import ConfigError
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.rundir.mirror import RunMirror
from tests.object_stores import SCHEMES, serving
from tests.unit.data.test_sources import folders, shards  # noqa: F401
from tests.unit.rundir.test_mirror import names, search, uninterrupted  # noqa: F401
from tests.unit.searching.test_loop import Killed, rows


@pytest.fixture(scope="module", params=SCHEMES)
def server(request, tmp_path_factory):
    with serving(request.param, tmp_path_factory.mktemp("server")) as store:
        yield store


@pytest.fixture
def store(server, monkeypatch):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


def listed(uri):
    """Names of the files below a URI."""
    from pyarrow import fs

    filesystem, root = open_place(uri)
    entries = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    return {entry.path.removeprefix(f"{root}/") for entry in entries if entry.is_file}


def test_a_run_whose_machine_is_lost_goes_on_from_a_bucket(store, tmp_path, uninterrupted):  # noqa: F811
    uri = f"{store.root}/runs/lost"
    with pytest.raises(Killed):
        search(tmp_path / "lost", RunMirror(uri), stop_at=3)
    shutil.rmtree(tmp_path / "lost")
    again = RunMirror(uri)
    assert again.config
    again.pull(tmp_path / "new")
    assert RunDirectory(tmp_path / "new").find_checkpoint() is not None
    search(tmp_path / "new", again)
    assert rows(tmp_path / "new") == uninterrupted
    assert listed(uri) == names(tmp_path / "new")


def test_a_store_that_hangs_holds_up_no_search(
    store,
    tmp_path,
    uninterrupted,  # noqa: F811
    monkeypatch,
):
    uri = f"{store.root}/runs/hangs"
    copy = RunMirror(uri)
    os.kill(store.process.pid, signal.SIGSTOP)

    finish = copy.finish

    def answer_and_finish(folder):
        os.kill(store.process.pid, signal.SIGCONT)
        finish(folder)

    monkeypatch.setattr(copy, "finish", answer_and_finish)
    search(tmp_path / "run", copy, push=RunMirror.push)
    assert rows(tmp_path / "run") == uninterrupted
    assert listed(uri) == names(tmp_path / "run")


def test_shards_and_folders_are_read_alike_here_and_there(store, shards, folders):  # noqa: F811
    filesystem, root = open_place(store.root)
    for place in (shards, folders):
        for file in place.rglob("*"):
            if file.is_file():
                path = f"{root}/data/{file.relative_to(place.parent)}"
                with filesystem.open_output_stream(path) as stream:
                    stream.write(file.read_bytes())
    draw = Rows(per_class=2, seed=1)
    for name in ("shards", "shards/train-*.parquet", "shards/train-00001-of-00003.parquet"):
        there, here = (
            open_source(f"{place}/{name}") for place in (f"{store.root}/data", shards.parent)
        )
        assert there.labels.tolist() == here.labels.tolist()
        images, expected = read_images(there, draw), read_images(here, draw)
        assert np.array_equal(images.images, expected.images)
    there, here = open_source(f"{store.root}/data/folders"), open_source(str(folders))
    assert there.classes == here.classes
    assert np.array_equal(read_images(there, draw).images, read_images(here, draw).images)


def test_a_bucket_that_is_not_there_is_one_line(store):
    uri = store.root.replace("bucket", "elsewhere")
    with pytest.raises(ConfigError, match=r"storage .*elsewhere/run cannot be written to"):
        RunMirror(f"{uri}/run")

"""Converts a folder of images into Parquet shards, in parallel on Ray.

Images keep their bytes. The folder is listed once, and a fixed seed shuffles its images over the
shards, so that any shard has images of all classes. A shard gets its name when it is whole. One
that was made of the same files and reads without a fault is left alone, so a killed conversion goes
on.
"""

import hashlib
import io
import json
import logging
import os
import posixpath
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray
from PIL import Image
from pyarrow import fs
from ray.exceptions import RayTaskError

from cacp_ray.data.image_folder import FolderSource
from cacp_ray.data.sources import open_place, open_source
from cacp_ray.distributed.tasks import run_tasks
from cacp_ray.errors import ArtifactError, CacpError, ConfigError, EvaluationError, first_line

logger = logging.getLogger(__name__)

SAY_SECONDS = 30.0
SEED = 0
ROWS_A_GROUP = 16  # a reader of few rows reads little more
DIGEST = b"cacp_ray.rows"
IN_FLIGHT = 2  # shards a CPU, so that none waits for the driver
ABANDONED_SECONDS = 600.0  # no conversion still writes to a temporary file this old
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class _Item(NamedTuple):
    """An image of a shard, as it was listed."""

    file: str
    size: int
    modified: int  # ns
    label: int


class _Job(NamedTuple):
    """What the tasks of all shards share."""

    source: fs.FileSystem
    target: fs.FileSystem
    folder: str
    classes: tuple[str, ...]


def convert(
    path: str, out: str, num_shards: int, prefix: str, on_shard: Callable[[int, int, int], object]
) -> int:
    """Writes `PREFIX-00000-of-NNNNN.parquet` ... of images and labels; returns how many images.

    Every node must be able to read `path`, which has a folder of images for each class, and to
    write to `out`, a folder or URI. `on_shard` is called before the first shard and after each with
    the number of whole shards, the number of all, and the images written to the last one; 0 if it
    was there already.

    Raises:
        ConfigError: More shards than images, no folder of images, or `out` lies in `path`.
        CacpError: Images cannot be read, or shards cannot be written.
    """
    target, folder = open_place(out)
    _check_places(path, out)
    source = open_source(path)
    if not isinstance(source, FolderSource):
        raise ConfigError(f"data {path}: Parquet files already; give a folder of class folders")
    count = len(source.files)
    if not 1 <= num_shards <= count:
        raise ConfigError(f"--shards {num_shards}: give 1 to {count}, the number of images")
    names = [f"{prefix}-{i:05d}-of-{num_shards:05d}.parquet" for i in range(num_shards)]
    _check_others(out, prefix, names)
    parts = np.array_split(np.random.default_rng(SEED).permutation(count), num_shards)
    job = ray.put(_Job(source.filesystem, target, folder, source.classes))
    write: Any = ray.remote(num_cpus=1)(_write_shard)

    def begin(shard: tuple[str, NDArray[np.int64]]) -> Any:
        name, rows = shard
        infos = [(source.files[row], int(source.labels[row])) for row in rows]
        return write.remote(job, name, [_Item(i.path, i.size, i.mtime_ns, n) for i, n in infos])

    outcomes = run_tasks(
        begin,
        list(zip(names, parts, strict=True)),
        limit=max(2, IN_FLIGHT * int(ray.cluster_resources().get("CPU", 1))),
        say=_say_waiting,
        say_seconds=SAY_SECONDS,
        kills=False,  # a task that is interrupted removes its temporary file
    )
    on_shard(0, num_shards, 0)
    with closing(outcomes):
        for done, (_, outcome) in enumerate(outcomes, start=1):
            on_shard(done, num_shards, _images_written(outcome, out))
    _remove_abandoned(target, folder, names)
    return count


def _say_waiting(_: int) -> None:
    free = ray.available_resources().get("CPU", 0)
    logger.info(
        "no shard for %.0f s: they are large, or wait for CPUs, of which %g are free",
        SAY_SECONDS,
        free,
    )


def _check_places(path: str, out: str) -> None:
    """Refuses shards inside the folder that is converted."""
    (source, inside), (target, folder) = open_place(path), open_place(out)
    if isinstance(source, fs.LocalFileSystem):
        inside, folder = os.path.realpath(inside), os.path.realpath(folder)
    if source == target and f"{folder}/".startswith(f"{inside.rstrip('/')}/"):
        raise ConfigError(f"data {out}: lies in {path}, which is converted; name another folder")


def _check_others(out: str, prefix: str, names: Sequence[str]) -> None:
    """Refuses a folder with shards of the same prefix and another number of them."""
    shard = re.compile(re.escape(prefix) + r"-\d+-of-\d+\.parquet")
    try:
        present = {posixpath.basename(info.path) for info in _list(*open_place(out))}
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(
            f"data {out}: cannot be listed ({first_line(error)}); name another folder"
        ) from error
    if others := sorted(name for name in present - set(names) if shard.fullmatch(name)):
        raise ArtifactError(
            f"data {out}: holds {others[0]} of another conversion; remove those shards, or give "
            "their number with --shards, another folder, or another --prefix"
        )


def _list(filesystem: fs.FileSystem, folder: str) -> list[fs.FileInfo]:
    return filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))


def _images_written(outcome: Any, out: str) -> int:
    """The result of a task, or its error in words.

    Raises:
        CacpError: The task failed.
    """
    if not isinstance(outcome, Exception):
        return outcome
    cause = outcome.cause if isinstance(outcome, RayTaskError) else outcome
    if isinstance(cause, CacpError):
        raise cause from outcome
    raise EvaluationError(
        f"{out}: a shard cannot be written ({first_line(cause)}): name a folder that every node "
        "can write to, then run the command again"
    ) from outcome


def _remove_abandoned(filesystem: fs.FileSystem, folder: str, names: Sequence[str]) -> None:
    """Removes temporary files of conversions that were killed."""
    known, oldest = set(names), time.time() - ABANDONED_SECONDS
    with suppress(OSError, pa.ArrowException):  # the shards themselves are whole
        for info in _list(filesystem, folder):
            shard, *_, suffix = posixpath.basename(info.path).rsplit(".", 2)
            if shard in known and suffix == "tmp" and info.mtime.timestamp() < oldest:
                filesystem.delete_file(info.path)


def _write_shard(job: _Job, name: str, items: Sequence[_Item]) -> int:
    """Writes one shard and reads it back, unless it is whole; returns the images written."""
    file = posixpath.join(job.folder, name)
    features = {
        "label": {"names": list(job.classes), "_type": "ClassLabel"},
        "image": {"_type": "Image"},
    }
    metadata = {
        b"huggingface": json.dumps({"info": {"features": features}}).encode(),
        DIGEST: hashlib.sha256(json.dumps(items).encode()).hexdigest().encode(),
    }
    schema = pa.schema([("image", IMAGE), ("label", pa.int64())], metadata=metadata)
    if _is_whole(job.target, file, schema, len(items)):
        return 0
    temporary = f"{file}.{uuid.uuid4().hex}.tmp"  # another conversion may write the same shard
    try:
        job.target.create_dir(job.folder, recursive=True)
        _write_rows(job, temporary, schema, items)
        job.target.move(temporary, file)
    except BaseException:  # also a task that is cancelled
        with suppress(OSError, pa.ArrowException):
            job.target.delete_file(temporary)
        raise
    if not _is_whole(job.target, file, schema, len(items)):
        raise ArtifactError(f"{file}: not as it was written; is the disk full or faulty?")
    return len(items)


def _write_rows(job: _Job, file: str, schema: pa.Schema, items: Sequence[_Item]) -> None:
    """Writes the Parquet file; memory holds one row group."""
    with (
        job.target.open_output_stream(file) as stream,
        pq.ParquetWriter(
            stream,
            schema,
            compression="none",  # images are compressed
            use_dictionary=False,  # no two are the same
            write_statistics=False,  # they would be images, which no checksum covers
            write_page_checksum=True,
        ) as writer,
    ):
        for start in range(0, len(items), ROWS_A_GROUP):
            group = items[start : start + ROWS_A_GROUP]
            images = [
                {"bytes": _read_image(job.source, file), "path": posixpath.basename(file)}
                for file in (item.file for item in group)
            ]
            labels = [item.label for item in group]
            columns = [pa.array(images, IMAGE), pa.array(labels, pa.int64())]
            writer.write_table(pa.table(columns, schema=schema))


def _read_image(filesystem: fs.FileSystem, file: str) -> bytes:
    """The bytes of an image file; only the header is checked."""
    try:
        with filesystem.open_input_file(file) as opened:
            data = opened.read()
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(
            f"data {file}: cannot be read ({first_line(error)}); mend or remove it, then run the "
            "command again"
        ) from error
    try:
        Image.open(io.BytesIO(data)).close()
    except Exception as error:  # a broken header raises anything
        raise ArtifactError(
            f"data {file}: not an image; mend or remove it, then run the command again"
        ) from error
    return data


def _is_whole(filesystem: fs.FileSystem, file: str, schema: pa.Schema, num_rows: int) -> bool:
    """Whether a shard was made of these files and every page fits its checksum."""
    if filesystem.get_file_info(file).type == fs.FileType.NotFound:
        return False
    try:
        with (
            filesystem.open_input_file(file) as opened,
            pq.ParquetFile(opened, page_checksum_verification=True) as shard,
        ):
            if not shard.schema_arrow.equals(schema, check_metadata=True):
                return False
            for group in range(shard.num_row_groups):
                shard.read_row_group(group)
            return shard.metadata.num_rows == num_rows
    except (pa.ArrowException, OSError):
        return False

"""Folders of images into Parquet shards, in parallel on Ray.

Images keep their bytes. Rows are shuffled over the shards by a fixed seed, so that any shard has
images of all classes. A shard gets its name when it is whole, and one that is there already is left
alone if it holds what it should: a conversion that was killed goes on.
"""

import hashlib
import json
import posixpath
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray
from pyarrow import fs
from ray.exceptions import RayTaskError

from cacp_ray.data.images import Rows, read_labels
from cacp_ray.data.sources import absolute, open_source
from cacp_ray.errors import ArtifactError, ConfigError, EvaluationError

SEED = 0
ROWS_A_GROUP = 256  # a reader of few rows reads little more
DIGEST = b"cacp_ray.rows"
IN_FLIGHT = 2  # shards a CPU, so that none waits for the driver


def convert(
    path: str, out: str, num_shards: int, prefix: str, on_shard: Callable[[int, int, int], object]
) -> int:
    """Writes `PREFIX-00000-of-NNNNN.parquet` ... with a column `image` and a column `label`.

    Args:
        path: See `cacp_ray.data.sources`; readable on every node.
        out: Folder or URI of the shards, writable on every node.
        num_shards: Files.
        prefix: Of their names.
        on_shard: Called before the first shard and after each with how many are whole, of how many,
            and how many images the last one was given; 0 for one that was there already.

    Returns:
        Rows in all.

    Raises:
        ConfigError: More shards than images.
        CacpError: Images cannot be read, or shards cannot be written.
    """
    source = open_source(path)
    path, out = absolute(path), absolute(out)  # workers may run elsewhere
    rows, labels, classes = read_labels(source, Rows())
    if not 1 <= num_shards <= len(rows):
        raise ConfigError(f"--shards {num_shards}: give 1 to {len(rows)}, the number of images")
    order = np.random.default_rng(SEED).permutation(len(rows))
    parts = np.array_split(order, num_shards)
    shared = ray.put((path, labels, classes))
    files = [f"{prefix}-{i:05d}-of-{num_shards:05d}.parquet" for i in range(num_shards)]
    write: Any = ray.remote(num_cpus=1)(_write_shard)
    waiting = list(zip(files, parts, strict=True))[::-1]
    limit = max(2, IN_FLIGHT * int(ray.cluster_resources().get("CPU", 1)))
    flights: list[ray.ObjectRef] = []
    done = 0
    on_shard(done, num_shards, 0)
    while waiting or flights:
        while waiting and len(flights) < limit:
            file, part = waiting.pop()
            flights.append(write.remote(shared, out, file, part))
        finished, flights = ray.wait(flights, num_returns=1)
        try:
            (written,) = ray.get(finished)
        except RayTaskError as error:
            if isinstance(error.cause, ArtifactError):
                raise error.cause from error
            raise EvaluationError(
                f"{out}: a shard cannot be written ({error.cause}): name a folder that every node "
                "can write to, then run the command again"
            ) from error
        done += 1
        on_shard(done, num_shards, written)
    return len(rows)


def _write_shard(
    shared: tuple[str, NDArray[np.int64], tuple[str, ...]],
    out: str,
    name: str,
    rows: NDArray[np.int64],
) -> int:
    """Writes one shard, unless it is there, and reads it back; returns the images written."""
    path, labels, classes = shared
    filesystem, folder = (
        fs.FileSystem.from_uri(out) if "://" in out else (fs.LocalFileSystem(), out)
    )
    file = posixpath.join(folder, name)
    digest = hashlib.sha256(f"{path} {classes}".encode() + rows.tobytes()).hexdigest().encode()
    if _is_whole(filesystem, file, digest, len(rows)):
        return 0
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {
        "label": {"names": list(classes), "_type": "ClassLabel"},
        "image": {"_type": "Image"},
    }
    metadata = {
        b"huggingface": json.dumps({"info": {"features": features}}).encode(),
        DIGEST: digest,
    }
    schema = pa.schema([("image", kind), ("label", pa.int64())], metadata=metadata)
    source = open_source(path)
    filesystem.create_dir(folder, recursive=True)
    with (
        filesystem.open_output_stream(f"{file}.tmp") as stream,
        pq.ParquetWriter(stream, schema, compression="none") as writer,  # images are compressed
    ):
        for chunk in np.array_split(rows, -(-len(rows) // ROWS_A_GROUP)):
            images = dict(source.read(chunk))
            names = {row: posixpath.basename(source.where(row)) for row in chunk.tolist()}
            items = [{"bytes": images[row], "path": names[row]} for row in chunk.tolist()]
            columns = [pa.array(items, kind), pa.array(labels[chunk])]
            writer.write_table(pa.table(columns, schema=schema))
    filesystem.move(f"{file}.tmp", file)
    if not _is_whole(filesystem, file, digest, len(rows)):
        raise ArtifactError(f"{file}: not as it was written; is the disk full or faulty?")
    return len(rows)


def _is_whole(filesystem: fs.FileSystem, file: str, digest: bytes, num_rows: int) -> bool:
    if filesystem.get_file_info(file).type == fs.FileType.NotFound:
        return False
    try:
        found = pq.ParquetFile(filesystem.open_input_file(file))
    except (pa.ArrowException, OSError):
        return False
    metadata = found.schema_arrow.metadata or {}
    return metadata.get(DIGEST) == digest and found.metadata.num_rows == num_rows

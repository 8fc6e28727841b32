"""Image sets of several domains in one Parquet file that a configuration can name.

`dataclasses.replace(images, labels=...)` makes an image set of pseudo-labelled images.
"""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cacp_ray.data.images import ImageSet
from cacp_ray.errors import ConfigError
from cacp_ray.io.files import write_file


def mix(first: ImageSet, second: ImageSet, seed: int) -> ImageSet:
    """Images of both sets in random order, so that evenly spaced images represent both.

    Raises:
        ConfigError: Their classes, image sizes or normalisations differ.
    """
    for name in ("classes", "mean", "std"):
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            raise ConfigError(f"image sets of different {name} cannot be mixed: {one} and {other}")
    if first.images.shape[1:] != second.images.shape[1:]:
        raise ConfigError(
            f"images of {first.images.shape[1:]} and {second.images.shape[1:]} cannot be mixed: "
            "resize one of the sets first"
        )
    order = np.random.default_rng(seed).permutation(len(first) + len(second))
    return dataclasses.replace(
        first,
        images=np.concatenate([first.images, second.images])[order],
        labels=np.concatenate([first.labels, second.labels])[order],
    )


def write_parquet(path: Path, images: ImageSet) -> None:
    """Writes PNG images, labels and class names in the Hugging Face layout.

    Mean and standard deviation are not in the file: they belong in the configuration (`data`).
    """
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": list(images.classes)},
    }
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = [{"bytes": _encode(image), "path": None} for image in images.images]
    table = pa.table({"image": rows, "label": images.labels}, schema=schema)
    write_file(path, lambda temporary: pq.write_table(table, temporary))


def _encode(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()

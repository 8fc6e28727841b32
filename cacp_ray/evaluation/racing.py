"""Racing: a candidate that falls behind the best of its rate is not scored to the end.

A candidate is scored on growing parts of the search split and compared with the best network of its
rate on the same images. The difference of two networks on the same images varies far less than
their accuracies. It stops where the mean difference is more than `PATIENCE` standard errors below
zero; its accuracy is then estimated as that of the best plus the mean difference.

The images of which the whole network is least sure come first: two networks cut from it differ
there and hardly anywhere else, so that little is left to overturn the verdict of the first images.
`bench/racing.py` shows what order and patience are worth.

Racing is successive comparison as in F-Race (Birattari et al., 2002) and Hoeffding races (Maron and
Moore, 1993); the paired estimate, the single opponent and the order of the images are ours.
"""

import base64
import zlib

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

NUM_PARTS = 16  # of the images, between which a candidate may stop
PATIENCE = 0.5

Bools = NDArray[np.bool_]


def encode_hits(hits: Bools) -> str:
    """Which images were right, as text: some 500 characters for 5,000 images."""
    packed = zlib.compress(np.packbits(hits).tobytes(), 9)
    return base64.b85encode(len(hits).to_bytes(4) + packed).decode()


def decode_hits(text: str) -> Bools:
    """What `encode_hits` was given."""
    data = base64.b85decode(text)
    bits = np.frombuffer(zlib.decompress(data[4:]), np.uint8)
    return np.unpackbits(bits, count=int.from_bytes(data[:4])).astype(bool)


def hardest_first(logits: Tensor, labels: Tensor) -> NDArray[np.int64]:
    """Places of the images (N,), rising by how far the right class is from the next or the best.

    Args:
        logits: Of the whole network, (N, classes).
        labels: (N,).
    """
    right = labels[:, None]
    others = logits.scatter(1, right, float("-inf")).max(dim=1).values
    margins = (logits.gather(1, right)[:, 0] - others).abs()
    return margins.argsort(stable=True).numpy()


def prefixes(num_images: int) -> list[int]:
    """Images after which a candidate is compared, rising."""
    return sorted({num_images * part // NUM_PARTS for part in range(1, NUM_PARTS)} - {0})


def has_fallen_behind(hits: Bools, best: Bools) -> bool:
    """Whether to stop, from the same images of both (M,)."""
    differences = hits.astype(float) - best
    error = differences.std() / np.sqrt(len(differences))
    return bool(differences.mean() + PATIENCE * error < 0)


def estimate(hits: Bools, best: Bools) -> float:
    """Accuracy on all images of `best` (N,), from `hits` on the first of them (M,)."""
    accuracy = best.mean() + hits.mean() - best[: len(hits)].mean()
    return float(np.clip(accuracy, 0.0, 1.0))

"""Racing: a candidate that falls behind the best of its rate is not scored to the end.

A candidate is scored on growing prefixes of the search split and compared with the best network of
its rate on the same images. The difference of two networks on the same images varies far less than
their accuracies. Scoring stops where the mean difference is more than `PATIENCE` standard errors
below zero; the accuracy is then estimated as that of the best plus the mean difference.
`bench/racing.py` shows the effect of parts and patience.

Racing is successive comparison as in F-Race (Birattari et al., 2002) and Hoeffding races (Maron and
Moore, 1993); the paired estimate and the single opponent are ours.
"""

import base64
import zlib

import numpy as np
from numpy.typing import NDArray

NUM_PARTS = 16  # a candidate may stop between parts of the images
PATIENCE = 1.0

Bools = NDArray[np.bool_]


def encode_hits(hits: Bools) -> str:
    """The set of correctly classified images as text: some 500 characters for 5,000 images."""
    packed = zlib.compress(np.packbits(hits).tobytes(), 9)
    return base64.b85encode(len(hits).to_bytes(4) + packed).decode()


def decode_hits(text: str) -> Bools:
    """The hits that `encode_hits` wrote."""
    data = base64.b85decode(text)
    bits = np.frombuffer(zlib.decompress(data[4:]), np.uint8)
    return np.unpackbits(bits, count=int.from_bytes(data[:4])).astype(bool)


def prefixes(num_images: int) -> list[int]:
    """Numbers of images after which a candidate is compared, rising."""
    return sorted({num_images * part // NUM_PARTS for part in range(1, NUM_PARTS)} - {0})


def has_fallen_behind(hits: Bools, best: Bools) -> bool:
    """Whether to stop, from the hits of both networks on the same images (M,)."""
    differences = hits.astype(float) - best
    error = differences.std() / np.sqrt(len(differences))
    return bool(differences.mean() + PATIENCE * error < 0)


def estimate(hits: Bools, best: Bools) -> float:
    """Accuracy on all images of `best` (N,), from `hits` on the first of them (M,)."""
    accuracy = best.mean() + hits.mean() - best[: len(hits)].mean()
    return float(np.clip(accuracy, 0.0, 1.0))

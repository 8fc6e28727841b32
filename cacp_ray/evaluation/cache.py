"""Measurements kept across runs: what would be scored alike is scored once.

A file for each content key holds a line a measurement. Everything that a score depends on is in the
key, so that a cache folder can serve any runs, and several at once: lines are appended whole.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from cacp_ray.data.images import ImageSet
from cacp_ray.errors import ArtifactError
from cacp_ray.evaluation.computation import hash_computation
from cacp_ray.evaluation.measurement import Candidate, Evaluator, Measurement, Subnet
from cacp_ray.evaluation.preparation import Prepared
from cacp_ray.versions import installed_versions

logger = logging.getLogger(__name__)

VERSION = 2  # to be raised when the same candidate scores otherwise

# What was scored, on how many images; of one that was stopped, against which hits instead.
Key = tuple[Subnet, int | str]


def key_of_scores(prepared: Prepared, split: ImageSet, *, recovery: str, dtype: str) -> str:
    """sha256 of all that a score depends on beside the candidate.

    Args:
        prepared: Of the network.
        split: The search split.
        recovery: Of candidates.
        dtype: What they are computed in, and the device where it is no CPU.
    """
    digest = hashlib.sha256(f"{VERSION} {installed_versions()} {dtype} {recovery}\n".encode())
    digest.update(f"{prepared.model}\n{split.mean} {split.std}\n".encode())
    digest.update(hash_computation(prepared.model, split.take(1).tensors()[0]).encode())
    for (name, dimension), axis in sorted(prepared.plan.axes.items()):
        _update(digest, f"{name} {dimension}", axis.group)
    for each in (prepared, *(prepared.others[name] for name in sorted(prepared.others))):
        for name in sorted(each.tensors):
            _update(digest, name, each.tensors[name])
        for name in sorted(each.factors):
            for field, value in vars(each.factors[name]).items():
                _update(digest, f"{name} {field}", value)
    if recovery == "bn":
        _update(digest, "calibration", prepared.calibration.images)
    _update(digest, "images", split.images)
    _update(digest, "labels", split.labels)
    return digest.hexdigest()


def _update(digest: Any, name: str, value: np.ndarray[Any, Any]) -> None:
    digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
    digest.update(np.ascontiguousarray(value).data)


def check_folder(folder: Path) -> None:
    """Makes the folder of a cache, before a search begins.

    Raises:
        ArtifactError: Measurements cannot be kept there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cache {folder}: {error.strerror}; name a folder") from error
    if not os.access(folder, os.W_OK):
        raise ArtifactError(f"cache {folder} cannot be written to; name a folder of your own")


class MeasurementCache:
    """What was measured under one key."""

    def __init__(self, folder: Path, key: str) -> None:
        """Reads what is there; a line that a kill cut short is left out.

        Raises:
            ArtifactError: The file cannot be read.
        """
        self._file = folder / f"{key}.jsonl"
        self._known: dict[Key, Measurement] = {}
        try:
            text = self._file.read_text(errors="replace") if self._file.exists() else ""
        except OSError as error:
            raise ArtifactError(f"{self._file}: {error.strerror}; move it away") from error
        self._is_cut = bool(text) and not text.endswith("\n")
        for line in filter(None, text.splitlines()):
            try:
                where, measurement = _read_line(line)
            except (ValueError, KeyError, TypeError):
                logger.warning("%s: a damaged line is left out", self._file)
                continue
            self._known[where] = measurement

    def __len__(self) -> int:
        return len(self._known)

    def get(self, candidate: Candidate, images: int) -> Measurement | None:
        """A measurement of the candidate on the first `images` images, under its index.

        Of one that races, also how it was stopped by the same opponent.
        """
        found = self._known.get((candidate.subnet, images))
        if found is None and candidate.best:
            found = self._known.get((candidate.subnet, _hash(candidate.best)))
        return None if found is None else dataclasses.replace(found, index=candidate.index)

    def on(self, images: int) -> dict[Subnet, Measurement]:
        """All measurements on the first `images` images."""
        return {subnet: each for (subnet, count), each in self._known.items() if count == images}

    def add(self, candidate: Candidate, measurement: Measurement) -> None:
        """Keeps a measurement that did not fail; the disk has it when this returns."""
        if measurement.status == "failed":
            return
        against = _hash(candidate.best) if measurement.status == "stopped" else ""
        key = candidate.subnet, against or measurement.images
        if key in self._known:
            return
        self._known[key] = measurement
        row = {
            "keep_counts": candidate.keep_counts,
            "order": candidate.order,
            "against": against,
            "measurement": dataclasses.asdict(measurement),
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        line = "\n" * self._is_cut + json.dumps(row) + "\n"
        file = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())  # whole: other runs may write there too
        finally:
            os.close(file)
        self._is_cut = False


def _hash(hits: str) -> str:
    return hashlib.sha256(hits.encode()).hexdigest()[:16]


def _read_line(line: str) -> tuple[Key, Measurement]:
    """Of a file of the cache.

    Raises:
        ValueError, KeyError, TypeError: It is none.
    """
    row = json.loads(line)
    found = Measurement(**row["measurement"])
    counts, order, against = tuple(row["keep_counts"]), row["order"], row["against"]
    is_sound = (
        all(isinstance(count, int) for count in counts)
        and isinstance(order, str)
        and isinstance(found.images, int)
        and found.images > 0
        and all(0 <= share <= 1 for share in (found.top1, found.top5))
        and math.isfinite(found.loss)
        and found.status == ("stopped" if against else "ok")
    )
    if not is_sound:
        raise ValueError(line)
    return ((counts, order), str(against) or found.images), found


class CachedEvaluator:
    """An evaluator that asks the cache first; implements the Evaluator port."""

    def __init__(self, evaluator: Evaluator, cache: MeasurementCache, images: int) -> None:
        """Puts the cache before `evaluator`.

        Args:
            evaluator: Scores what is not known.
            cache: Of the same content.
            images: That score a candidate which does not say how many.
        """
        self._evaluator, self._cache, self._images = evaluator, cache, images
        self._answered: deque[Measurement] = deque()
        self._submitted: dict[int, Candidate] = {}

    @property
    def capacity(self) -> int:
        """That of the evaluator."""
        return self._evaluator.capacity

    @property
    def num_alive(self) -> int:
        """That of the evaluator."""
        return self._evaluator.num_alive

    def submit(self, candidate: Candidate) -> None:
        """Answers from the cache, or queues the candidate."""
        found = self._cache.get(candidate, candidate.images or self._images)
        if found is not None:
            self._answered.append(found)
            return
        self._submitted[candidate.index] = candidate
        self._evaluator.submit(candidate)

    def results(self, timeout: float) -> list[Measurement]:
        """What the cache has answered, else what the evaluator has."""
        if self._answered:
            found, self._answered = list(self._answered), deque()
            return found
        measurements = self._evaluator.results(timeout)
        for measurement in measurements:
            candidate = self._submitted.pop(measurement.index, None)
            if candidate is not None:
                self._cache.add(candidate, measurement)
        return measurements

    def close(self) -> None:
        """Frees the evaluators."""
        self._evaluator.close()

"""Measurements kept across runs: what would be scored alike is scored once.

A file for each content key holds a line a measurement. The key covers everything that a score
depends on, so that a cache folder can serve any runs, and several at once: lines are appended
whole.
"""

import dataclasses
import hashlib
import inspect
import json
import logging
import math
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from cacp_ray.data.images import ImageSet
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.evaluation.computation import hash_computation
from cacp_ray.evaluation.measurement import Candidate, Evaluator, Measurement, SubnetKey
from cacp_ray.evaluation.preparation import Prepared
from cacp_ray.evaluation.task import OwnTask
from cacp_ray.io.environment import installed_versions
from cacp_ray.io.files import parse_json
from cacp_ray.io.jsonl import append_line, read_lines
from cacp_ray.pruning.calibration import update_hash
from cacp_ray.pruning.inputs import Inputs

logger = logging.getLogger(__name__)

VERSION = 4  # raise it when the same candidate scores otherwise, or a line has other fields

# The subnet, with the images that scored it, or the hash of the opponent that stopped it.
Key = tuple[SubnetKey, int | str]


def key_of_scores(prepared: Prepared, split: ImageSet, *, recovery: str, dtype: str) -> str:
    """sha256 of all that a score depends on, apart from the candidate.

    Args:
        prepared: What candidates share.
        split: The search split.
        recovery: How candidates are repaired.
        dtype: Precision of their computation; with the device where it is no CPU.
    """
    about = f"{split.mean} {split.std}"
    digest = _hash_network(prepared, split.take(1).tensors()[0], about, recovery, dtype)
    _update(digest, "images", split.images)
    _update(digest, "labels", split.labels)
    return digest.hexdigest()


def key_of_own_scores(
    prepared: Prepared, task: OwnTask, inputs: Inputs, *, recovery: str, device: str
) -> str:
    """The same for a task of the user's own, whose code takes the place of the images.

    The key covers the source of the module that the task is named by, and of the one that defines
    its class; neither modules that these import, nor data that the score reads.

    Args:
        prepared: What candidates share.
        task: The task, given by its name.
        inputs: What the network is called with, for one example.
        recovery: How candidates are repaired.
        device: Kind of device that scores.

    Raises:
        ConfigError: The source cannot be read.
    """
    digest = _hash_network(prepared, inputs, f"task {task.name}", recovery, device)
    for module in sorted({task.name.partition(":")[0], type(task.content).__module__}):
        try:
            source = inspect.getsource(sys.modules[module])
        except (KeyError, OSError, TypeError) as error:
            raise ConfigError(
                f"task {task.name}: the source of module {module} cannot be read, by which known "
                "measurements are told from others: define the task in a .py file"
            ) from error
        digest.update(f"{module}\n{source}\n".encode())
    return digest.hexdigest()


def _hash_network(
    prepared: Prepared, inputs: Inputs, about: str, recovery: str, computed: str
) -> Any:
    """A hash of the network and its repair; the caller adds what scores it."""
    digest = hashlib.sha256(f"{VERSION} {installed_versions()} {computed} {recovery}\n".encode())
    digest.update(f"{prepared.model}\n{about}\n".encode())
    digest.update(hash_computation(prepared.model, inputs).encode())
    for (name, dimension), axis in sorted(prepared.plan.axes.items()):
        _update(digest, f"{name} {dimension}", axis.group)
    for ordered in (prepared, *(prepared.others[name] for name in sorted(prepared.others))):
        for name in sorted(ordered.tensors):
            _update(digest, name, ordered.tensors[name])
        for name in sorted(ordered.factors):
            for field, value in vars(ordered.factors[name]).items():
                _update(digest, f"{name} {field}", value)
    if recovery == "bn":
        update_hash(digest, prepared.calibration)
    return digest


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
            rows, damaged = read_lines(self._file, _read_line)
        except OSError as error:
            raise ArtifactError(f"{self._file}: {error.strerror}; move it away") from error
        self._known.update(rows)
        for number in damaged:
            logger.warning("%s: line %d is damaged and left out", self._file, number)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, candidate: Candidate, images: int) -> Measurement | None:
        """The measurement of the candidate on the first `images` images, marked as cached.

        For a candidate that races, being stopped by the same opponent counts as well.
        """
        known = self._known.get((candidate.key, images))
        if known is None and candidate.opponent:
            known = self._known.get((candidate.key, _hash(candidate.opponent)))
        if known is None:
            return None
        return dataclasses.replace(
            known, index=candidate.index, cached=True, seconds=0.0, finished_at=time.time()
        )

    def add(self, candidate: Candidate, measurement: Measurement) -> None:
        """Keeps a measurement that did not fail; the disk has it when this returns."""
        if measurement.status == "failed":
            return
        against = _hash(candidate.opponent) if measurement.status == "stopped" else ""
        key = candidate.key, against or measurement.images
        if key in self._known:
            return
        self._known[key] = measurement
        row = {
            "keep_counts": candidate.keep_counts,
            "criterion": candidate.criterion,
            "against": against,
            "measurement": dataclasses.asdict(measurement),
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        append_line(self._file, json.dumps(row))


def _hash(hits: str) -> str:
    return hashlib.sha256(hits.encode()).hexdigest()[:16]


def _read_line(line: bytes) -> tuple[Key, Measurement]:
    """A line of a cache file.

    Raises:
        ValueError, KeyError, TypeError: It holds no sound measurement.
    """
    row = parse_json(line)
    measurement = Measurement(**row["measurement"])
    counts, criterion, against = tuple(row["keep_counts"]), row["criterion"], row["against"]
    is_sound = (
        all(isinstance(count, int) for count in counts)
        and isinstance(criterion, str)
        and isinstance(row["measurement"]["images"], int)
        and measurement.images >= 0
        and all(map(math.isfinite, (measurement.score, *dict(measurement.figures).values())))
        and measurement.status == ("stopped" if against else "ok")
    )
    if not is_sound:
        raise ValueError(line)
    return ((counts, criterion), str(against) or measurement.images), measurement


class CachedEvaluator:
    """An evaluator that asks the cache first; implements the Evaluator port."""

    def __init__(self, evaluator: Evaluator, cache: MeasurementCache, images: int) -> None:
        """Puts the cache before `evaluator`.

        Args:
            evaluator: Scores what is not known.
            cache: Measurements under the key of that evaluator's content.
            images: Number of images that score a candidate which names none.
        """
        self._evaluator, self._cache, self._images = evaluator, cache, images
        self._answered: deque[Measurement] = deque()
        self._submitted: dict[int, Candidate] = {}

    @property
    def capacity(self) -> int:
        """Candidates that keep every evaluator busy now."""
        return self._evaluator.capacity

    @property
    def num_alive(self) -> int:
        """Evaluators ready to score."""
        return self._evaluator.num_alive

    def submit(self, candidate: Candidate) -> None:
        """Answers from the cache, or queues the candidate."""
        known = self._cache.get(candidate, candidate.images or self._images)
        if known is not None:
            self._answered.append(known)
            return
        self._submitted[candidate.index] = candidate
        self._evaluator.submit(candidate)

    def results(self, timeout: float) -> list[Measurement]:
        """What the cache has answered, else what the evaluator has."""
        if self._answered:
            answered, self._answered = list(self._answered), deque()
            return answered
        measurements = self._evaluator.results(timeout)
        for measurement in measurements:
            candidate = self._submitted.pop(measurement.index, None)
            if candidate is not None:
                self._cache.add(candidate, measurement)
        return measurements

    def close(self) -> None:
        """Frees the evaluators."""
        self._evaluator.close()

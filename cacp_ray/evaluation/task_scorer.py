"""Scores candidates by a user's own task, in an evaluator."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from cacp_ray.evaluation.classification import Classification
from cacp_ray.evaluation.gpu import open_gpu
from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.evaluation.preparation import Prepared, cut_networks
from cacp_ray.evaluation.scorer import Scorer
from cacp_ray.evaluation.task import OwnTask
from cacp_ray.pruning.resizable import copy_as


class TaskScorer:
    """Cuts, repairs and hands each candidate to the task's `score`; a `ScoreFunction`.

    Every candidate is a network of its own, so that whatever a score does to it ends with it.
    """

    def __init__(
        self,
        prepared: Prepared,
        task: OwnTask,
        *,
        recovery: str,
        threads: int | None = None,
        gpu: float = 0.0,
    ) -> None:
        """Loads the network onto the device that scores; a share of a GPU, or 0 for the CPU.

        Raises:
            EvaluationError: torch cannot use a GPU here.
        """
        self._made_by = partial(
            TaskScorer, prepared, task, recovery=recovery, threads=threads, gpu=gpu
        )
        if threads is not None:
            torch.set_num_threads(threads)
        if gpu:
            open_gpu(gpu)
        self._task, self._model = task, prepared.model
        self._network = cut_networks(prepared, recovery, "cuda" if gpu else "cpu")

    def __reduce__(self) -> tuple[Callable[[], "TaskScorer"], tuple[()]]:
        """Another process loads the network anew."""
        return self._made_by, ()

    def __call__(self, candidate: Candidate) -> Measurement:
        """Scores a candidate.

        Raises:
            EvaluationError, ConfigError: The score is no finite number.
        """
        started = time.perf_counter()
        network = self._network(candidate.criterion)
        scored = self._task.measure(copy_as(self._model, network.load(candidate.keep_counts)))
        return Measurement(
            **vars(scored),
            index=candidate.index,
            seconds=time.perf_counter() - started,
            finished_at=time.time(),
        )


def make_scorer(
    prepared: Prepared,
    task: Classification | OwnTask,
    *,
    recovery: str,
    threads: int | None = None,
    gpu: float = 0.0,
    **of_images: Any,
) -> Scorer | TaskScorer:
    """What scores candidates of a task; `of_images` are further arguments of `Scorer`."""
    shared: dict[str, Any] = {"recovery": recovery, "threads": threads, "gpu": gpu}
    if isinstance(task, OwnTask):
        return TaskScorer(prepared, task, **shared)
    return Scorer(prepared, task.split, **shared, **of_images)

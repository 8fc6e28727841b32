"""One search of a tuning's trial: in rounds, checkpointed after every one."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cacp_ray.config.agent_tuning import with_settings
from cacp_ray.evaluation.measurement import Evaluator
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.searching.archive import Archive
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.strategy import make_run_strategy


class TrialSearch:
    """One search of a trial, in rounds; its folder holds all after every round."""

    def __init__(self, setup: Setup, evaluator: Evaluator, folder: Path) -> None:
        """Begins the search, or continues what the folder holds."""
        folder.mkdir(parents=True, exist_ok=True)
        config = setup.config
        self._loop = SearchLoop(
            evaluator,
            setup.plan.cost_model,
            RunDirectory(folder),
            rates=config.rates,
            evaluations=config.evaluations,
            cost=config.cost,
            mode="rounds",
            round_size=config.round_size,
            checkpoint_seconds=math.inf,
        )
        self._strategy = make_run_strategy(setup)
        self._loop.restore(self._strategy)

    @property
    def evaluations(self) -> int:
        """Distinct candidates so far."""
        return self._loop.progress.evaluations

    @property
    def score(self) -> float:
        """Mean over rates of the best so far, see `mean_best`."""
        return mean_best(self._loop.archive, self._loop.progress.best)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self._loop.done

    def advance(self) -> None:
        """One round, and the learning from it."""
        self._loop.tick(self._strategy)
        self._loop.checkpoint(self._strategy)


def mean_best(archive: Archive, rates: Iterable[float]) -> float:
    """Mean over rates of the best score; the lowest of all stands for a rate that has none.

    On a scale of any signs, 0 might be better than all scores. It is the mean where nothing was
    measured yet.
    """
    lowest = 0.0 if archive.lowest is None else archive.lowest
    best = [archive.best(rate) for rate in rates]
    return float(np.mean([lowest if record is None else record.score for record in best]))


def begin_search(
    setup: Setup, settings: Mapping[str, Any], seed: int, evaluator: Evaluator, folder: Path
) -> TrialSearch:
    """The search of a trial with these settings of its agent."""
    config = with_settings(setup.config, settings, seed=seed)
    return TrialSearch(replace(setup, config=config), evaluator, folder)

"""Optuna's TPE sampler on the offsets of each rate: an off-the-shelf optimiser as a competitor.

Source: Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011, as Optuna
implements it (Akiba et al., KDD 2019). The extra `optuna` installs it. Offsets from a sound prior
are ours; their ranges include the allocations that other strategies find.
"""

from typing import Any

import numpy as np

from cacp_ray.errors import ConfigError
from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.searching.strategies.offsets import Offsets, OffsetStrategy
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategy import Counts

WIDEST = 1.5  # largest offset: keep ratios from a third to three times the prior's


class OptunaTPE(OffsetStrategy):
    """One study a rate.

    Every draw has a sampler of its own, seeded by our generator, so that a restored search repeats.
    """

    name = "optuna"

    def __init__(self, problem: Problem) -> None:
        """Makes the studies.

        Raises:
            ConfigError: Optuna is not installed.
        """
        try:
            import optuna
        except ImportError as error:
            raise ConfigError(
                "strategy optuna needs Optuna: pip install 'cacp-ray[optuna]'"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        super().__init__(problem)
        self._optuna: Any = optuna
        self._ranges = {
            f"{group:04d}": optuna.distributions.FloatDistribution(-WIDEST, WIDEST)
            for group in range(self._space.num_offsets)
        }
        self._studies: dict[float, Any] = {
            rate: optuna.create_study(direction="maximize") for rate in problem.rates
        }
        self._told: list[tuple[float, float, Counts]] = []  # rate, score, keep counts

    def _note(self, candidate: Candidate, measurement: Measurement) -> None:
        if measurement.status == "ok":
            self._add(candidate.rate, measurement.score, candidate.keep_counts)

    def _add(self, rate: float, score: float, keep_counts: Counts) -> None:
        # Offsets of the keep counts measured: rounding and the budget may have moved those drawn.
        offsets = self._space.encode([rate], [keep_counts])[0]
        values = np.clip(offsets, -WIDEST, WIDEST).tolist()
        params = dict(zip(self._ranges, values, strict=True))
        self._studies[rate].add_trial(
            self._optuna.trial.create_trial(params=params, distributions=self._ranges, value=score)
        )
        self._told.append((rate, score, keep_counts))

    def _draw(self, rate: float, growth: float) -> Offsets:
        """(P,) offsets of a new trial."""
        study = self._studies[rate]
        study.sampler = self._optuna.samplers.TPESampler(seed=int(self._rng.integers(2**32)))
        trial = study.ask(self._ranges)
        # This trial only carries the draw; its measurement comes back as a trial of its own.
        study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        return np.array(list(trial.params.values()))

    def _get_memory(self) -> Any:
        return self._told

    def _set_memory(self, memory: Any) -> None:
        for rate, score, counts in memory:
            self._add(rate, score, tuple(counts))

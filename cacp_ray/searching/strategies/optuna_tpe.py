"""Optuna's TPE sampler on the offsets of each rate: an off-the-shelf optimiser as a competitor.

Source: Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011, as Optuna
implements it (Akiba et al., KDD 2019). Needs the extra `optuna`. Offsets from a sound prior are
ours; the ranges are wide enough for what the other strategies find.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cacp_ray.errors import ConfigError
from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.files import read_json, write_json
from cacp_ray.searching.strategies.hill_climb import Counts, Offsets, Proposer
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategy import Proposal

WIDEST = 1.5  # largest offset: keep ratios from a third to three times the prior's


class OptunaTPE:
    """One study a rate; never waits and never ends.

    Every draw has a sampler of its own, seeded by ours, so that a restored search repeats.
    """

    name = "optuna"

    def __init__(self, problem: Problem) -> None:
        """Starts from the prior at every rate.

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
        self._optuna: Any = optuna
        self._proposer = Proposer(problem)
        groups = range(self._proposer.space.num_offsets)
        self._ranges = {
            f"{group:04d}": optuna.distributions.FloatDistribution(-WIDEST, WIDEST)
            for group in groups
        }
        self._studies: dict[float, Any] = {
            rate: optuna.create_study(direction="maximize") for rate in problem.rates
        }
        self._told: list[tuple[float, float, Counts]] = []  # rate, top1, keep counts

    def ask(self, count: int) -> list[Proposal]:
        """The next `count` proposals."""
        return self._proposer.propose(count, self._draw)

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Adds finished trials; failures are ignored."""
        for candidate, measured in results:
            self._proposer.note(candidate)
            if measured.status == "ok":
                self._add(candidate.rate, measured.top1, candidate.keep_counts)

    def _add(self, rate: float, top1: float, keep_counts: Counts) -> None:
        # What was measured, which rounding and the budget may have moved from what was drawn.
        offsets = self._proposer.space.encode([rate], [keep_counts])[0]
        values = np.clip(offsets, -WIDEST, WIDEST).tolist()
        self._studies[rate].add_trial(
            self._optuna.trial.create_trial(
                params=dict(zip(self._ranges, values, strict=True)),
                distributions=self._ranges,
                value=top1,
            )
        )
        self._told.append((rate, top1, keep_counts))

    def _draw(self, rate: float, growth: float) -> Offsets:
        """(P,) offsets of a new trial."""
        study = self._studies[rate]
        study.sampler = self._optuna.samplers.TPESampler(
            seed=int(self._proposer.rng.integers(2**32))
        )
        trial = study.ask(self._ranges)
        # It comes back as a finished trial: this one only carried the draw.
        study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        return np.array(list(trial.params.values()))

    def save(self, folder: Path) -> None:
        """Writes the finished trials and what was proposed."""
        state = {"told": self._told, "proposer": self._proposer.get_state()}
        write_json(folder / "state.json", state)

    def restore(self, folder: Path) -> None:
        """Goes on where `save` stood."""
        state = read_json(folder / "state.json")
        for rate, top1, counts in state["told"]:
            self._add(rate, top1, tuple(counts))
        self._proposer.set_state(state["proposer"])

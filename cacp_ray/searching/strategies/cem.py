"""Cross-entropy method: at every rate, a Gaussian over offsets that moves to its best samples.

It is a baseline for the agent. Without learning it is a control: noise around the prior, which
shows what the prior and the number of evaluations achieve alone.

Source: Rubinstein and Kroese, "The Cross-Entropy Method", 2004, with their smoothed updates. Every
update adds some variance so that no group freezes, after Szita and Lorincz, "Learning Tetris Using
the Noisy Cross-Entropy Method", 2006. Offsets from a sound prior, and drawing while measurements
are out, are ours.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.searching.budget import Floats
from cacp_ray.searching.strategies.offsets import SCALE, Offsets, OffsetStrategy
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategy import Counts

POPULATION = 15  # measurements of a rate for one update
ELITE = 4  # best of them that the Gaussian moves to
SPREAD = 0.25  # first standard deviation of log keep ratio
ADDED_SPREAD = 0.02  # in log keep ratio; its square is added to the variance at every update
SMOOTHING = 0.8  # weight of the elite in an update


@dataclass(frozen=True)
class Gaussian:
    """Independent normal offsets, by mean (P,) and variance (P,)."""

    mean: Floats
    variance: Floats


def refit(old: Gaussian, elite: Offsets) -> Gaussian:
    """The old Gaussian moved to the elite's offsets (E, P)."""
    return Gaussian(
        (1 - SMOOTHING) * old.mean + SMOOTHING * elite.mean(axis=0, dtype=np.float64),
        (1 - SMOOTHING) * old.variance
        + SMOOTHING * elite.var(axis=0, dtype=np.float64)
        + (ADDED_SPREAD / SCALE) ** 2,
    )


class CEM(OffsetStrategy):
    """Draws from each rate's present Gaussian.

    A generation is the next POPULATION measurements told for a rate, including those drawn before
    the last update. The elite's offsets are those of the keep counts measured, not the ones drawn.
    Both choices found more in a simulation (8 and 20 groups, 300 evaluations, 0 to 32 out at once).
    """

    def __init__(self, problem: Problem, *, learn: bool = True) -> None:
        """Starts around the prior; without `learn` it stays there, as a control."""
        super().__init__(problem)
        self.name = "cem" if learn else "noise"
        self._is_learning = learn
        shape = self._space.num_offsets
        first = Gaussian(np.zeros(shape), np.full(shape, (SPREAD / SCALE) ** 2))
        self._gaussians = dict.fromkeys(problem.rates, first)
        # Top1 and keep counts told since the last update.
        self._generations: dict[float, list[tuple[float, Counts]]] = {
            rate: [] for rate in problem.rates
        }

    def _note(self, candidate: Candidate, measurement: Measurement) -> None:
        """Updates the rate's Gaussian with every full generation."""
        if not self._is_learning:
            return
        rate = candidate.rate
        generation = self._generations[rate]
        generation.append((measurement.score, candidate.keep_counts))
        if len(generation) == POPULATION:
            best = sorted(generation, key=lambda member: -member[0])[:ELITE]
            offsets = self._space.encode([rate] * ELITE, [counts for _, counts in best])
            self._gaussians[rate] = refit(self._gaussians[rate], offsets)
            self._generations[rate] = []

    def _draw(self, rate: float, growth: float) -> Offsets:
        gaussian = self._gaussians[rate]
        deviation = growth * np.sqrt(gaussian.variance)
        return gaussian.mean + deviation * self._rng.standard_normal(len(deviation))

    def _get_memory(self) -> Any:
        return [
            [rate, gaussian.mean.tolist(), gaussian.variance.tolist(), self._generations[rate]]
            for rate, gaussian in self._gaussians.items()
        ]

    def _set_memory(self, memory: Any) -> None:
        for rate, mean, variance, generation in memory:
            self._gaussians[rate] = Gaussian(np.array(mean), np.array(variance))
            self._generations[rate] = [(score, tuple(counts)) for score, counts in generation]

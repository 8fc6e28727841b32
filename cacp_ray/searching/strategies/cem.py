"""Cross-entropy method: at every rate, a Gaussian over offsets that moves to its best samples.

A baseline for the agent. Without learning it is a control: noise around the prior, which shows what
is due to the prior and the number of evaluations alone.

Source: Rubinstein and Kroese, "The Cross-Entropy Method", 2004, with their smoothed updates. The
variance that every update adds, so that no group freezes, follows Szita and Lorincz, "Learning
Tetris Using the Noisy Cross-Entropy Method", 2006. Offsets from a sound prior, and drawing while
measurements are out, are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.files import read_json, write_json
from cacp_ray.searching.budget import Floats
from cacp_ray.searching.strategies.hill_climb import SCALE, Counts, Offsets, Proposer
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategy import Proposal

POPULATION = 15  # measurements of a rate to an update
ELITE = 4
SPREAD = 0.25  # first standard deviation of log keep ratio
ADDED_SPREAD = 0.02  # of log keep ratio; its square is added to the variance at every update
SMOOTHING = 0.8  # weight of the elite in an update


@dataclass(frozen=True)
class Gaussian:
    """Independent normal offsets.

    Attributes:
        mean: (P,).
        variance: (P,).
    """

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


class CEM:
    """Draws from each rate's present Gaussian; never waits and never ends.

    A generation is the next POPULATION measurements told of a rate, those drawn before the last
    update included, and the elite's offsets are those of the keep counts measured, not the ones
    drawn. Both found more in a simulation (8 and 20 groups, 300 evaluations, 0 to 32 out at once).
    """

    def __init__(self, problem: Problem, *, learn: bool = True) -> None:
        """Starts around the prior at every rate.

        Args:
            problem: The search.
            learn: False never updates: noise around the prior, a control.
        """
        self.name = "cem" if learn else "noise"
        self._learn = learn
        self._proposer = Proposer(problem)
        shape = self._proposer.space.num_offsets
        first = Gaussian(np.zeros(shape), np.full(shape, (SPREAD / SCALE) ** 2))
        self._gaussians = dict.fromkeys(problem.rates, first)
        # Top1 and keep counts told since the last update.
        self._generations: dict[float, list[tuple[float, Counts]]] = {
            rate: [] for rate in problem.rates
        }

    def ask(self, count: int) -> list[Proposal]:
        """The next `count` proposals."""
        return self._proposer.propose(count, self._draw)

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Updates a rate's Gaussian with every full generation; failures are ignored."""
        for candidate, measured in results:
            self._proposer.note(candidate)
            if self._learn and measured.status != "failed":
                generation = self._generations[candidate.rate]
                generation.append((measured.top1, candidate.keep_counts))
                if len(generation) == POPULATION:
                    self._update(candidate.rate)

    def _update(self, rate: float) -> None:
        generation = sorted(self._generations[rate], key=lambda member: -member[0])
        elite = [keep_counts for _, keep_counts in generation[:ELITE]]
        offsets = self._proposer.space.encode([rate] * ELITE, elite)
        self._gaussians[rate] = refit(self._gaussians[rate], offsets)
        self._generations[rate] = []

    def _draw(self, rate: float, growth: float) -> Offsets:
        """(P,) offsets."""
        gaussian, rng = self._gaussians[rate], self._proposer.rng
        deviation = growth * np.sqrt(gaussian.variance)
        return gaussian.mean + deviation * rng.standard_normal(len(deviation))

    def save(self, folder: Path) -> None:
        """Writes the Gaussians, the open generations, what was proposed, and the random state."""
        rates = [
            [rate, found.mean.tolist(), found.variance.tolist(), self._generations[rate]]
            for rate, found in self._gaussians.items()
        ]
        write_json(folder / "state.json", {"rates": rates, "proposer": self._proposer.get_state()})

    def restore(self, folder: Path) -> None:
        """Goes on where `save` stood."""
        state = read_json(folder / "state.json")
        for rate, mean, variance, generation in state["rates"]:
            self._gaussians[rate] = Gaussian(np.array(mean), np.array(variance))
            self._generations[rate] = [(top1, tuple(counts)) for top1, counts in generation]
        self._proposer.set_state(state["proposer"])

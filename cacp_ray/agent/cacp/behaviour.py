"""The choice of candidates: drafts around good allocations, screened by the critics.

A draft is the mean of good allocations with noise, or a good allocation of this or another rate
with some groups changed: offsets from the prior carry over between rates. For every candidate
several drafts are made, and the one that the critics value most is measured. A network that
chooses among cheap proposals is that of the Wolpertinger policy (Dulac-Arnold et al., 2015), whose
proposals come from an actor; elites are those of evolution. CACP measures its actor's answer with
noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cacp_ray.evaluation.measurement import Candidate
from cacp_ray.searching.allocation import AllocationSpace, Float32s
from cacp_ray.searching.budget import Floats, Ints, spend
from cacp_ray.searching.settings import AgentSettings
from cacp_ray.searching.strategy import Counts, make_candidates

OWN_RATE_SHARE = 0.75  # of elites; the others are of another rate
NUM_ELITES = 10  # best distinct allocations kept a rate
NUM_AVERAGED = 5  # elites in an answer without evaluations and learning
MAX_CHANGED = 4  # groups of an elite
FINALISTS = 4  # drafts of a candidate that are rounded exactly and valued again
NOISE_FLOOR = 0.05
MAX_RETRIES = 8  # for a candidate that was asked before, each with more noise
NOISE_GROWTH = 1.4  # factor on the noise of a retry
# An answer without evaluations averages the most valued of many drafts with little noise.
ANSWER_DRAFTS = 256
ANSWER_NOISE = 0.1
ANSWER_AVERAGED = 16

Value = Callable[[Ints | Floats], Float32s]  # keep counts (N, G) -> (N,)


@dataclass(frozen=True)
class Elite:
    """A good allocation."""

    score: float
    keep_counts: Counts
    offsets: Float32s  # (P,)


class Behaviour:
    """Chooses rates and candidates; remembers which were asked and which were best."""

    def __init__(
        self,
        settings: AgentSettings,
        space: AllocationSpace,
        rates: Sequence[float],
        value: Value,
        seed: int,
    ) -> None:
        self._settings = settings
        self._space = space
        self._value = value
        # Critics that never learn cannot choose, so one draft is enough.
        self.num_drafts = settings.drafts if settings.updates_per_episode else 1
        self._rng = np.random.default_rng([seed, 1])
        self.num_asked = dict.fromkeys(rates, 0)
        self.asked: dict[float, set[Counts]] = {rate: set() for rate in rates}
        self.elites: dict[float, list[Elite]] = {rate: [] for rate in rates}

    def noise(self, rate: float) -> float:
        """Standard deviation of the action noise: every rate has its own clock."""
        decayed = self._settings.noise * self._settings.noise_decay ** self.num_asked[rate]
        return max(NOISE_FLOOR, decayed)

    def propose(self, count: int) -> list[Candidate]:
        """Returns `count` candidates, new for their rates where `MAX_RETRIES` retries suffice."""
        rates: list[float] = []
        drafts: list[Float32s] = []  # (M, P) for every candidate
        for _ in range(count):
            rate = min(self.num_asked, key=lambda rate: (self.num_asked[rate], rate))
            episode, noise = self.num_asked[rate], self.noise(rate)
            self.num_asked[rate] += 1
            rates.append(rate)
            shape = (1, self._space.num_offsets)
            if episode == 0:
                drafts.append(np.zeros(shape, np.float32))
            elif episode <= self._settings.warmup:
                drafts.append((noise * self._rng.standard_normal(shape)).astype(np.float32))
            else:
                drafts.append(self.draft(rate, noise, self.num_drafts, self._rng))
        ranked = self._rank(rates, drafts, FINALISTS)
        return make_candidates(rates, [*map(self._choose, rates, ranked)])

    def draft(self, rate: float, noise: float, count: int, rng: np.random.Generator) -> Float32s:
        """(M, P) offsets of elites with some groups changed, or of their mean with noise."""
        num_offsets = self._space.num_offsets
        drafts = np.tile(self.between([rate]), (count, 1))
        drafts += noise * rng.standard_normal(drafts.shape).astype(np.float32)
        for i in np.flatnonzero(rng.random(count) < self._settings.elite_share):
            elite = self._choose_elite(rate, rng)
            if elite is not None:
                drafts[i] = elite.offsets
                size = int(rng.integers(1, min(MAX_CHANGED, num_offsets) + 1))
                groups = rng.choice(num_offsets, size=size, replace=False)
                drafts[i, groups] += noise * rng.standard_normal(size)
        return drafts

    def screen(self, rate: float, drafts: Float32s, count: int) -> list[Counts]:
        """At most `count` distinct keep counts from drafts (M, P), the most valued first."""
        (ranked,) = self._rank([rate], [drafts], count)
        return ranked

    def favoured(self, rate: float) -> Float32s:
        """(P,) mean offsets of the most valued of many drafts, the same drafts in every call."""
        drafts = self.draft(rate, ANSWER_NOISE, ANSWER_DRAFTS, np.random.default_rng(0))
        values = self._value(self._space.scaled(np.full(len(drafts), rate), drafts))
        return drafts[np.argsort(-values, kind="stable")[:ANSWER_AVERAGED]].mean(axis=0)

    def between(self, rates: ArrayLike) -> Float32s:
        """(N, P) mean offsets of the best elites of the nearest rates, interpolated in between.

        Rates outside those that have elites get the offsets of the nearest. While no measurement
        has succeeded, the offsets are zero: the prior.
        """
        known = sorted(rate for rate, elites in self.elites.items() if elites)
        if not known:
            return np.zeros((np.size(rates), self._space.num_offsets), np.float32)
        means = np.array(
            [
                np.mean([elite.offsets for elite in self.elites[rate][:NUM_AVERAGED]], axis=0)
                for rate in known
            ]
        )
        columns = [np.interp(np.asarray(rates), known, column) for column in means.T]
        return np.stack(columns, axis=1).astype(np.float32)

    def adopt(self, candidate: Candidate, score: float, offsets: Float32s) -> None:
        """Offers a measured candidate with its offsets (P,) to the elites of its rate."""
        known = self.elites.setdefault(candidate.rate, [])
        if all(elite.keep_counts != candidate.keep_counts for elite in known):
            known.append(Elite(score, candidate.keep_counts, offsets))
            known.sort(key=lambda elite: -elite.score)
            del known[NUM_ELITES:]

    def _rank(
        self, rates: Sequence[float], drafts: Sequence[Float32s], most: int
    ) -> list[list[Counts]]:
        """For every rate at most `most` distinct candidates of its drafts, the most valued first.

        Drafts are valued before the last channels are spent, as spending costs ten times as much;
        the best of them are then spent and valued again.
        """
        sizes = [len(rows) for rows in drafts]
        rough = self._space.scaled(np.repeat(np.array(rates), sizes), np.concatenate(drafts))
        values = np.split(self._value(rough), np.cumsum(sizes)[:-1])
        chosen: list[Floats] = []
        for rows, own in zip(np.split(rough, np.cumsum(sizes)[:-1]), values, strict=True):
            best = np.argsort(-own, kind="stable")
            _, places = np.unique(rows[best], axis=0, return_index=True)
            chosen.append(rows[best[np.sort(places)[:most]]])
        sizes = [len(rows) for rows in chosen]
        repeated = np.repeat(np.array(rates), sizes)
        counts = spend(self._space.budget, np.concatenate(chosen), repeated)
        final = self._value(counts)
        ranked: list[list[Counts]] = []
        for end, size in zip(np.cumsum(sizes), sizes, strict=True):
            order = end - size + np.argsort(-final[end - size : end], kind="stable")
            ranked.append(list(dict.fromkeys(map(tuple, counts[order].tolist()))))
        return ranked

    def _choose(self, rate: float, ranked: Sequence[Counts]) -> Counts:
        """The most valued candidate that was not asked before, else one near the most valued."""
        asked = self.asked[rate]
        chosen = next((counts for counts in ranked if counts not in asked), None)
        offsets = self._space.encode([rate], [ranked[0]])[0]
        noise = self.noise(rate)
        for _ in range(MAX_RETRIES):
            if chosen is not None:
                break
            noise *= NOISE_GROWTH
            near = offsets + noise * self._rng.standard_normal(len(offsets))
            counts = tuple(self._space.decode([rate], near[None])[0].tolist())
            chosen = None if counts in asked else counts
        chosen = chosen or ranked[0]
        asked.add(chosen)
        return chosen

    def _choose_elite(self, rate: float, rng: np.random.Generator) -> Elite | None:
        others = [other for other, elites in self.elites.items() if elites and other != rate]
        is_own = bool(self.elites.get(rate)) and (rng.random() < OWN_RATE_SHARE or not others)
        if not is_own and not others:
            return None
        elites = self.elites[rate if is_own else others[int(rng.integers(len(others)))]]
        # Better elites are drawn more often: the best of ten nearly every third time.
        return elites[int(len(elites) * rng.random() ** 2)]

    def get_state(self) -> dict[str, Any]:
        """Clocks, memory, elites and the random state, ready for JSON."""
        return {
            "rates": [
                {
                    "rate": rate,
                    "asked": number,
                    "known": sorted(self.asked[rate]),
                    "elites": [
                        [elite.score, elite.keep_counts, elite.offsets.tolist()]
                        for elite in self.elites[rate]
                    ],
                }
                for rate, number in self.num_asked.items()
            ],
            "random": self._rng.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes what `get_state` gave."""
        rows = state["rates"]
        self.num_asked = {row["rate"]: row["asked"] for row in rows}
        self.asked = {row["rate"]: set(map(tuple, row["known"])) for row in rows}
        self.elites = {
            row["rate"]: [
                Elite(score, tuple(counts), np.array(offsets, np.float32))
                for score, counts, offsets in row["elites"]
            ]
            for row in rows
        }
        self._rng.bit_generator.state = state["random"]

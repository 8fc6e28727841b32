"""AMC (He et al., 2018): one of the paper's agents for each rate; they share nothing.

It is the baseline of conditional pruning: the same evaluations, split evenly over the rates.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from cacp_ray.agent.ddpg.algorithm import DDPG, DDPGConfig
from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.searching.mdp import AllocationMDP
from cacp_ray.searching.settings import PaperSettings


class AMC:
    """One agent for each rate, as one strategy."""

    name = "amc"

    def __init__(
        self,
        settings: PaperSettings,
        mdp: AllocationMDP,
        rates: Sequence[float],
        seed: int,
        evaluations: int,
    ) -> None:
        """Builds the agents, with seeds of their own; the first rates get the odd evaluations."""
        share, odd = divmod(evaluations, len(rates))
        self.agents: dict[float, DDPG] = {}
        for i, rate in enumerate(rates):
            own_seed = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
            agent = cast(DDPG, DDPGConfig().agent(settings, seed=own_seed).build_algo())
            agent.attach(mdp, (rate,), own_seed, share + (i < odd))
            self.agents[rate] = agent

    def ask(self, count: int) -> list[Candidate]:
        """Asks the agents that were asked least for `count` candidates in all."""
        asked = {rate: agent.num_asked for rate, agent in self.agents.items()}
        wanted = dict.fromkeys(self.agents, 0)
        for _ in range(count):
            rate = min(asked, key=lambda rate: asked[rate])
            asked[rate] += 1
            wanted[rate] += 1
        asked_now = (self.agents[rate].ask(number) for rate, number in wanted.items() if number)
        return list(itertools.chain.from_iterable(asked_now))

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Tells every agent of its own rate alone."""
        for rate, agent in self.agents.items():
            own = [result for result in results if result[0].rate == rate]
            if own:
                agent.tell(own)

    def learn(self) -> dict[str, float]:
        """Every agent takes all gradient steps that its episodes have earned."""
        figures = [agent.learn(agent.pending_updates) for agent in self.agents.values()]
        return {"updates": sum(row["updates"] for row in figures)}

    def save(self, folder: Path) -> None:
        """Writes the checkpoint of every agent to a folder named after its rate."""
        for rate, agent in self.agents.items():
            agent.save(folder / str(rate))

    def restore(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        for rate, agent in self.agents.items():
            agent.restore(folder / str(rate))

    def stop(self) -> None:
        """Frees all agents."""
        for agent in self.agents.values():
            agent.stop()

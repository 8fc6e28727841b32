"""AMC (He et al., 2018): the paper's agent, one for each rate, which share nothing.

What conditional pruning is measured against: the same evaluations, split evenly over the rates.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from cacp_ray.agent.ddpg.algorithm import DDPG, DDPGConfig
from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.searching.mdp import AllocationMDP
from cacp_ray.searching.settings import PaperSettings
from cacp_ray.searching.strategy import Proposal


class AMC:
    """A strategy. It learns when told, not between the turns of a loop as one agent does."""

    name = "amc"

    def __init__(
        self,
        settings: PaperSettings,
        mdp: AllocationMDP,
        rates: Sequence[float],
        seed: int,
        evaluations: int,
    ) -> None:
        """Builds the agents.

        Args:
            settings: Of every agent.
            mdp: The arithmetic of an episode.
            rates: One agent each.
            seed: From which every agent gets its own.
            evaluations: Distinct candidates over all rates; the first rates get the odd ones.
        """
        share, odd = divmod(evaluations, len(rates))
        self.agents: dict[float, DDPG] = {}
        for i, rate in enumerate(rates):
            own_seed = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
            agent = cast(DDPG, DDPGConfig().agent(settings, seed=own_seed).build_algo())
            agent.attach(mdp, (rate,), own_seed, share + (i < odd))
            self.agents[rate] = agent

    def ask(self, count: int) -> list[Proposal]:
        """`count` proposals, of those agents that were asked least."""
        asked = {rate: agent.num_asked for rate, agent in self.agents.items()}
        wanted = dict.fromkeys(self.agents, 0)
        for _ in range(count):
            rate = min(asked, key=lambda rate: asked[rate])
            asked[rate] += 1
            wanted[rate] += 1
        return [
            proposal
            for rate, number in wanted.items()
            if number
            for proposal in self.agents[rate].ask(number)
        ]

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Every agent is told of its own rate alone, and learns at once."""
        for rate, agent in self.agents.items():
            own = [result for result in results if result[0].rate == rate]
            if own:
                agent.tell(own)
                agent.learn(agent.pending_updates)

    def save(self, folder: Path) -> None:
        """Writes the checkpoint of every agent, in a folder named after its rate."""
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

"""Proposals a second of the agent on one core, and what a gradient step costs.

OMP_NUM_THREADS=1 python bench/proposals.py

The agent proposes for all groups of ResNet-56 in batches of 16, after the warm-up: every proposal
is the best of 32 drafts by the critics. Accuracies are a formula, so only the agent is timed.
"""

import argparse
import logging
import time

import numpy as np
import torch
from report import print_environment, print_table

from cacp_ray.agent.cacp.algorithm import CACPConfig
from cacp_ray.config.run import PruningConfig
from cacp_ray.evaluation.measurement import Measurement
from cacp_ray.models.factory import build_model
from cacp_ray.pruning.planner import make_plan
from cacp_ray.searching.allocation import uniform_prior
from cacp_ray.searching.mdp import AllocationMDP
from cacp_ray.searching.settings import AgentSettings
from cacp_ray.workflows.setup import make_budget

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    plan = make_plan(build_model(options.model, 10).eval(), torch.zeros(1, 3, 32, 32))
    channels = plan.cost_model.num_channels
    settings = AgentSettings()
    config = CACPConfig().agent(settings, num_actions=len(channels))
    agent = config.build_algo()
    budget = make_budget(plan, "macs", PruningConfig())
    rates = (0.3, 0.5, 0.7)
    prior = uniform_prior(len(channels))
    mdp = AllocationMDP(plan.cost_model, budget, prior, settings.action_scale)
    agent.attach(mdp, rates, 0, 10_000)
    asking, learning, updates = [], [], 0
    for turn in range(options.rounds):
        started = time.process_time()
        proposals = agent.ask(BATCH)
        middle = time.process_time()
        results = []
        for index, proposal in enumerate(proposals, start=BATCH * turn):
            score = float(np.mean(proposal.keep_counts / channels))
            results.append((proposal, Measurement(index=index, score=score, images=1, seconds=0)))
        agent.tell(results)
        updates += agent.update(agent.pending_updates)
        if turn >= 2:  # the first episodes are noise around the prior, without drafts
            asking.append(middle - started)
            learning.append(time.process_time() - middle)
    agent.stop()
    steps = updates / options.rounds
    print_table(
        f"{options.model}, {len(channels)} groups, batches of {BATCH}, time of one core",
        ["proposals a second", "ms a gradient step", "ms learning an episode"],
        [
            [
                f"{BATCH / np.median(asking):.0f}",
                f"{1000 * np.median(learning) / steps:.2f}",
                f"{1000 * np.median(learning) / BATCH:.0f}",
            ]
        ],
    )
    print_environment(0)


if __name__ == "__main__":
    main()

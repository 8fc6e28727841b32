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

from cacp_ray.agent.cacp.agent import CACP
from cacp_ray.config.run import PruningConfig
from cacp_ray.evaluation.measurement import Measurement
from cacp_ray.models.factory import build_model
from cacp_ray.pruning.planner import make_plan
from cacp_ray.searching.allocation import AllocationSpace, uniform_prior
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
    budget = make_budget(plan, "macs", PruningConfig())
    rates = (0.3, 0.5, 0.7)
    space = AllocationSpace(budget, uniform_prior(len(channels)), settings.action_scale)
    agent = CACP(settings, space, rates, 0)
    asking, learning = [], []
    for turn in range(options.rounds):
        started = time.process_time()
        proposals = agent.ask(BATCH)
        middle = time.process_time()
        results = []
        for index, proposal in enumerate(proposals, start=BATCH * turn):
            score = float(np.mean(proposal.keep_counts / channels))
            results.append((proposal, Measurement(index=index, score=score, images=1, seconds=0)))
        agent.tell(results)
        agent.learn()
        if turn >= 2:  # the first episodes are noise around the prior, without drafts
            asking.append(middle - started)
            learning.append(time.process_time() - middle)
    steps = agent.num_updates / options.rounds
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

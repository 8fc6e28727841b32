"""Where the time goes: python bench/profiles.py.

- One evaluator: the operators of its process while it scores candidates of a network, from stored
  images to accuracy, with the share of each in all processor time (torch.profiler).
- The driver: functions of the search loop with the learning agent, while evaluators answer at once
  (cProfile), and its memory at several moments of a long search.
"""

import argparse
import cProfile
import logging
import pstats
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from report import print_environment, print_table
from scale import RATES, pretend
from torch.profiler import ProfilerActivity, profile

from cacp_ray.agent.cacp.agent import CACP
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import PruningConfig, RunConfig
from cacp_ray.evaluation.measurement import Candidate, LocalEvaluator
from cacp_ray.evaluation.scorer import Scorer
from cacp_ray.models.factory import build_model
from cacp_ray.pruning.planner import make_plan
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.searching.allocation import AllocationSpace, uniform_prior
from cacp_ray.searching.budget import uniform
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.searching.settings import AgentSettings
from cacp_ray.workflows.setup import Setup, make_budget

TOP = 10
CANDIDATES = 20
MOMENTS = 5


def profile_evaluator() -> None:
    """Profiles scoring of ResNet-20 on the embedded search split, with recovery."""
    setup = Setup.create(load_config(RunConfig, {})).prepare()
    score = Scorer(setup.prepared, setup.search, recovery="compensate", dtype="auto", threads=1)
    rates = np.linspace(0.3, 0.7, CANDIDATES)
    counts = uniform(setup.budget, rates, np.ones(len(setup.plan.groups))).tolist()
    score(Candidate(0.5, tuple(counts[0]), index=0))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for index, row in enumerate(counts):
            score(Candidate(float(rates[index]), tuple(row), index=index))
    operators = sorted(profiled.key_averages(), key=lambda operator: -operator.self_cpu_time_total)
    total = sum(operator.self_cpu_time_total for operator in operators)
    rows = [
        [
            operator.key,
            f"{100 * operator.self_cpu_time_total / total:.1f} %",
            f"{operator.self_cpu_time_total / 1000 / CANDIDATES:.2f}",
            f"{operator.count / CANDIDATES:.0f}",
        ]
        for operator in operators[:TOP]
    ]
    images = len(setup.search)
    title = f"An evaluator: ResNet-20, {images:,} images, {CANDIDATES} candidates"
    print_table(title, ["operator", "share", "ms a candidate", "calls a candidate"], rows)


def profile_driver(episodes: int) -> None:
    """Profiles a search of ResNet-56 whose candidates are measured at once."""
    plan = make_plan(build_model("resnet56", 10).eval(), torch.zeros(1, 3, 32, 32))
    settings = AgentSettings()
    channels = plan.cost_model.num_channels
    budget = make_budget(plan, "macs", PruningConfig())
    space = AllocationSpace(budget, uniform_prior(len(channels)), settings.action_scale)
    agent = CACP(settings, space, RATES, 0)
    memory: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        loop = SearchLoop(
            LocalEvaluator(partial(pretend, mean_seconds=0.0)),
            plan.cost_model,
            RunDirectory(Path(folder)),
            rates=RATES,
            evaluations=episodes,
            mode="async",
        )
        loop.restore(agent)
        watch = cProfile.Profile()
        watch.enable()
        while not loop.done:
            loop.tick(agent)
            if loop.progress.evaluations >= episodes * (len(memory) + 1) // MOMENTS:
                memory.append([f"{loop.progress.evaluations:,}", f"{read_memory():.0f}"])
        watch.disable()
    stats = pstats.Stats(watch)
    entries = sorted(stats.stats.items(), key=lambda item: -item[1][2])  # type: ignore[attr-defined]
    rows = [
        [
            f"{Path(file).name}:{name}" if line else name,
            f"{100 * own / stats.total_tt:.1f} %",  # type: ignore[attr-defined]
            f"{1000 * own / episodes:.2f}",
            f"{calls / episodes:.1f}",
        ]
        for (file, line, name), (_, calls, own, _, _) in entries[:TOP]
    ]
    title = f"The driver: ResNet-56, {episodes:,} episodes with learning, measured at once"
    print_table(title, ["function", "share", "ms an episode", "calls an episode"], rows)
    print_table("Memory of the driver", ["episodes", "resident MB"], memory)


def read_memory() -> float:
    """Resident memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--episodes", type=int, default=5000)
    options = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    profile_evaluator()
    profile_driver(options.episodes)
    print_environment(0)


if __name__ == "__main__":
    main()

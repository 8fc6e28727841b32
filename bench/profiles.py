"""Where the time goes: python bench/profiles.py.

- one evaluator: the operators of its process while it scores candidates of a network, from images
  on the shelf to accuracy, with the share of each in all processor time (torch.profiler);
- the driver: functions of the search loop with the learning agent, while evaluators answer at once
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

from cacp_ray.agent.cacp.algorithm import CACPConfig
from cacp_ray.config import PruningConfig, RunConfig, load_config
from cacp_ray.evaluation.measurement import Candidate, LocalEvaluator
from cacp_ray.evaluation.scorer import make_scorer
from cacp_ray.loading import load_base, make_budget, prepare_base
from cacp_ray.models.factory import build_model
from cacp_ray.pruning.plan import make_plan
from cacp_ray.searching.allocation import uniform_prior
from cacp_ray.searching.budget import uniform
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.searching.mdp import AllocationMDP
from cacp_ray.searching.run_directory import RunDirectory
from cacp_ray.searching.settings import AgentSettings

TOP = 10
CANDIDATES = 20
MOMENTS = 5


def profile_evaluator() -> None:
    """ResNet-20 on the embedded search split, with recovery."""
    base = load_base(load_config(RunConfig, {}))
    prepared = prepare_base(base, load_config(RunConfig, {}))
    score = make_scorer(prepared, base.search, recovery="compensate", dtype="auto", threads=1)
    rates = np.linspace(0.3, 0.7, CANDIDATES)
    counts = uniform(base.budget, rates, np.ones(len(base.plan.groups))).tolist()
    score(Candidate(0, 0.5, tuple(counts[0])))
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for index, row in enumerate(counts):
            score(Candidate(index, float(rates[index]), tuple(row)))
    events = sorted(found.key_averages(), key=lambda each: -each.self_cpu_time_total)
    total = sum(each.self_cpu_time_total for each in events)
    rows = [
        [
            each.key,
            f"{100 * each.self_cpu_time_total / total:.1f} %",
            f"{each.self_cpu_time_total / 1000 / CANDIDATES:.2f}",
            f"{each.count / CANDIDATES:.0f}",
        ]
        for each in events[:TOP]
    ]
    images = len(base.search)
    title = f"An evaluator: ResNet-20, {images:,} images, {CANDIDATES} candidates"
    print_table(title, ["operator", "share", "ms a candidate", "calls a candidate"], rows)


def profile_driver(episodes: int) -> None:
    """A search of ResNet-56 whose candidates are measured at once."""
    plan = make_plan(build_model("resnet56", 10).eval(), torch.zeros(1, 3, 32, 32))
    settings = AgentSettings()
    channels = plan.cost_model.num_channels
    agent = CACPConfig().agent(settings, num_actions=len(channels)).build_algo()
    budget = make_budget(plan, "macs", PruningConfig())
    mdp = AllocationMDP(
        plan.cost_model, budget, uniform_prior(len(channels)), settings.action_scale
    )
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
        agent.attach(mdp, RATES, 0, episodes, loop.tick)
        loop.restore(agent)
        watch = cProfile.Profile()
        watch.enable()
        while not loop.done:
            agent.train()
            if loop.progress.evaluations >= episodes * (len(memory) + 1) // MOMENTS:
                memory.append([f"{loop.progress.evaluations:,}", f"{read_memory():.0f}"])
        watch.disable()
        agent.stop()
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

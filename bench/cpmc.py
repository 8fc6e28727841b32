"""Exponents of the cost in a global ranking by weight: python bench/cpmc.py.

One threshold cuts all groups by the weight that vanishes with a channel, as it is or relative to
its group, divided by powers of the MACs and parameters that the channel frees. Candidates are
repaired at once and scored. Uniform widths stand beside them.
"""

import numpy as np
import torch
from experiment import make_parser, run_values
from report import print_environment, print_table

from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.pruning.cost import freed_by_one_channel
from cacp_ray.pruning.criteria import score_channels
from cacp_ray.pruning.statistics import Statistics
from cacp_ray.searching.budget import Ints, uniform
from cacp_ray.searching.ranking import cut_at_threshold
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.winners import build_here

POWERS = (
    *((0.0, 0.0), (0.05, 0.0), (0.0, 0.05), (0.1, 0.0), (0.0, 0.1), (0.25, 0.25), (0.25, 0.5)),
    *((0.5, 0.0), (1.0, 0.0)),
)


def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--test", default="embedded:test")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {"criterion": "l1", "sequential": False}
    config = load_config(RunConfig, run_values(options) | {"pruning": settings})
    setup = Setup.create(config).prepare()
    budget, rates = setup.budget, config.rates
    scores = score_channels("cpmc", setup.plan, setup.model.state_dict(), Statistics(), 0)
    whole = budget.num_channels
    macs, params = (
        freed / freed.max()
        for freed in (freed_by_one_channel(c, whole) for c in (setup.plan.macs, setup.plan.params))
    )
    rows = [["uniform", "", *_score(setup, uniform(budget, rates, np.ones(len(whole))))]]
    for first, second in POWERS:
        cost = macs**first * params**second
        shares = [score / each for score, each in zip(scores, cost, strict=True)]
        counts = cut_at_threshold(budget, shares, rates)
        rows.append([f"{first:g}", f"{second:g}", *_score(setup, counts)])
    title = f"{options.model}, top-1 in % on {len(setup.search):,} search images"
    print_table(title, ["power of MACs", "of parameters", *(f"{rate:g}" for rate in rates)], rows)
    print_environment(options.seed)


def _score(setup: Setup, counts: Ints) -> list[str]:
    built = build_here(setup)([(tuple(row), "") for row in counts.tolist()])
    return [f"{100 * each.scored.score:.1f}" for each in built]


if __name__ == "__main__":
    main()

"""Names of the strategies, and what the search must know of each; `table` makes them."""

STRATEGIES = (
    *("hill_climb", "cem", "noise", "evolution", "optuna", "random", "uniform", "pcp", "greedy"),
    *("cap", "cpmc", "adapruner", "global", "sensitivity"),
)
# These learn widths while the network trains (`cacp_ray.searching.widths`).
WIDTH_STRATEGIES = ("chex", "dmcp", "scp", "network_adjustment", "group_fisher")
AGENTS = ("cacp", "cacp-paper", "amc")  # on Ray; `cacp_ray.workflows.strategy` makes them
ALL_STRATEGIES = (*AGENTS, *STRATEGIES, *WIDTH_STRATEGIES)
FROM_A_PRIOR = frozenset({"hill_climb", "cem", "noise", "evolution", "optuna"})
# Each rate is searched on its own, with its share of the evaluations.
SEPARATE = FROM_A_PRIOR | {"random", "amc", "cap"} | {*WIDTH_STRATEGIES} - {"dmcp"}
# These only need to know whether a candidate beats the best of its rate, so candidates may race.
RACING = frozenset({"cacp", "hill_climb", "cem", "noise", "evolution", "random"})

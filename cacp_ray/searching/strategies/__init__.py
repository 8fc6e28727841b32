"""Names of the strategies, and what the search must know of each; `table` makes them."""

STRATEGIES = (
    *("hill_climb", "cem", "noise", "evolution", "optuna", "random", "uniform", "pcp", "greedy"),
    *("cap", "cpmc", "adapruner", "global", "sensitivity"),
)
AGENTS = ("cacp", "cacp-paper", "amc")  # on Ray; `cacp_ray.workflows.strategy` makes them
FROM_A_PRIOR = frozenset({"hill_climb", "cem", "noise", "evolution", "optuna"})
# Each rate is searched on its own, with its share of the evaluations.
SEPARATE = FROM_A_PRIOR | {"random", "amc", "cap"}
# These only need to know whether a candidate beats the best of its rate, so candidates may race.
RACING = frozenset({"cacp", "hill_climb", "cem", "noise", "evolution", "random"})

"""How a tuning draws settings, and which trials it stops or changes: by Tune's own ways."""

from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.sample import Categorical, Float

from cacp_ray.errors import ConfigError

# Of trials at ASHA's only rung: agents begin to learn after dozens of evaluations, and say nothing
# about their settings before.
REDUCTION = 2
PERTURBATION_ROUNDS = 3

Scheduler = Literal["asha", "pbt", "none"]
Algorithm = Literal["random", "optuna"]
Settings = Mapping[str, Any]  # key path of a configuration -> value


def make_searcher(
    algorithm: Algorithm, start: Settings, seed: int, max_concurrent: int
) -> Searcher | SearchAlgorithm:
    """Tune's, which draws `start` first; arguments as of `tune_agents`."""
    first = [dict(start)]
    if algorithm == "random":
        return BasicVariantGenerator(
            points_to_evaluate=first, random_state=seed, max_concurrent=max_concurrent
        )
    from ray.tune.search.optuna import OptunaSearch

    return ConcurrencyLimiter(OptunaSearch(points_to_evaluate=first, seed=seed), max_concurrent)


def check_algorithm(algorithm: Algorithm) -> None:
    """Refuses one that is not installed.

    Raises:
        ConfigError: It is not.
    """
    if algorithm == "optuna" and find_spec("optuna") is None:
        raise ConfigError(
            "algorithm optuna is not installed: pip install 'cacp_ray[optuna]', or use random"
        )


class SparingASHA(ASHAScheduler):
    """Stops poor trials but the one of the start, which the others are compared with."""

    def __init__(self, start: Settings, **options: Any) -> None:
        super().__init__(**options)
        self._start = dict(start)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Tune's decision, after it has taken the result for its own comparisons."""
        decision = super().on_trial_result(tune_controller, trial, result)
        is_whole = result["evaluations"] >= self._max_t
        return self.CONTINUE if trial.config == self._start and not is_whole else decision


def make_scheduler(
    scheduler: Scheduler, space: Mapping[str, Any], start: Settings, evaluations: int
) -> TrialScheduler | None:
    """Tune's; None leaves the trials alone."""
    if scheduler == "asha":
        return SparingASHA(
            start,
            time_attr="evaluations",
            max_t=evaluations,
            grace_period=evaluations // REDUCTION + 1,
            reduction_factor=REDUCTION,
        )
    if scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr="training_iteration",
            perturbation_interval=PERTURBATION_ROUNDS,
            # Tune would multiply a choice, as it does other values, by 0.8 or 1.2.
            hyperparam_mutations={
                key: list(each.categories) if isinstance(each, Categorical) else each
                for key, each in space.items()
            },
            custom_explore_fn=partial(keep_inside, space),
        )
    return None


def keep_inside(space: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Changed settings of a population, where they left the space at its nearest end."""
    inside = dict(settings)
    for key, domain in space.items():
        if isinstance(domain, Float):
            inside[key] = min(max(settings[key], domain.lower), domain.upper)
    return inside

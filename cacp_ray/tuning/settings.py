"""Settings that a tuning tries, and how Tune draws them."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal

from ray import tune
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.sample import Domain

from cacp_ray.errors import ConfigError

Algorithm = Literal["random", "optuna"]
Settings = Mapping[str, Any]  # key path of a configuration -> value


def make_domain(
    *,
    choice: Sequence[Any] | None = None,
    uniform: tuple[float, float] | None = None,
    log_uniform: tuple[float, float] | None = None,
) -> Domain:
    """The domain that Tune draws a setting from; give one of the three."""
    if choice is not None:
        return tune.choice(choice)
    if uniform is not None:
        return tune.uniform(*uniform)
    assert log_uniform is not None
    return tune.loguniform(*log_uniform)


def make_searcher(
    algorithm: Algorithm, start: Settings, seed: int, max_concurrent: int
) -> Searcher | SearchAlgorithm:
    """Makes Tune's searcher, which tries `start` first; `tune_agents` explains the arguments."""
    first = [dict(start)]
    if algorithm == "random":
        return BasicVariantGenerator(
            points_to_evaluate=first, random_state=seed, max_concurrent=max_concurrent
        )
    from ray.tune.search.optuna import OptunaSearch

    return ConcurrencyLimiter(OptunaSearch(points_to_evaluate=first, seed=seed), max_concurrent)


def check_algorithm(algorithm: Algorithm) -> None:
    """Raises ConfigError for an algorithm that is not installed."""
    if algorithm == "optuna" and find_spec("optuna") is None:
        raise ConfigError(
            "algorithm optuna is not installed: pip install 'cacp_ray[optuna]', or use random"
        )

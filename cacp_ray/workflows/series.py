"""Several strategies on one network: their searches one after another, then their comparison."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cacp_ray.config.reading import load_config, resolved
from cacp_ray.config.run import RunConfig
from cacp_ray.config.saved import is_run, open_folder
from cacp_ray.errors import ArtifactError, ConfigError, nearest_names
from cacp_ray.reporting.comparison import Comparison
from cacp_ray.reporting.comparison_figure import check_out, write_comparison
from cacp_ray.reporting.progress import SearchProgress
from cacp_ray.searching.strategies import ALL_STRATEGIES
from cacp_ray.workflows.compare import compare
from cacp_ray.workflows.search import Run, search
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.start import check_run


@dataclass(frozen=True)
class Series:
    """Searches of one configuration by several strategies, each in a folder of its own.

    Attributes:
        folder: Holds a run directory for each strategy, `comparison/`, and the measurements that
            the searches share in `cache/`.
        configs: Configuration by run directory, in the order they are run.
        resume: Whether to go on with what is there.
    """

    folder: Path
    configs: dict[Path, RunConfig]
    resume: bool

    def search(self, run_dir: Path, *, cache: Path | None = None, **options: Any) -> Run:
        """One of the searches; what another has measured alike is not measured again.

        Scores of a task of the user's own are measured anew by each.

        Args:
            run_dir: A key of `configs`.
            cache: Folder of measurements; default: `cache` in the folder of the series.
            **options: `address` and `on_progress` of `search`.
        """
        own = self.configs[run_dir].task is not None
        return search(
            self.configs[run_dir],
            run_dir,
            resume=self.resume and is_run(run_dir),
            cache=None if own else cache or self.folder / "cache",
            **options,
        )


def plan_series(
    config: RunConfig, strategies: Sequence[str], folder: Path, *, resume: bool = False
) -> Series:
    """Checks all names and folders before anything runs.

    Raises:
        ConfigError: An unknown or repeated name, or a run under another configuration.
        ArtifactError: A folder is in use, or there is nothing to resume.
    """
    known = ALL_STRATEGIES
    for name, count in Counter(strategies).items():
        if name not in known and ":" not in name:
            raise ConfigError(f"strategy {name or 'without a name'}: {nearest_names(name, known)}")
        if count > 1:
            raise ConfigError(f"strategy {name} is named {count} times: name each once")
    if is_run(folder):
        raise ArtifactError(f"{folder} is a run itself: choose another --run-dir for several")
    check_out(folder / "comparison")
    values = resolved(config)
    configs = {
        folder / name.replace(":", "-"): load_config(RunConfig, values | {"strategy": name})
        for name in strategies
    }
    if resume and not any(map(is_run, configs)):
        raise ArtifactError(f"{folder} holds no run of these: start them without --resume")
    for path, own in configs.items():
        open_folder(path, own, resume=resume and is_run(path))
    return Series(folder, configs, resume)


def check_series(series: Series) -> str:
    """Checks the input of all searches; returns one line about what they would search.

    Raises:
        CacpError: The first thing that does not fit.
    """
    config = next(iter(series.configs.values()))
    setup = Setup.create(config)
    for other in series.configs.values():
        check_run(replace(setup, config=other))
    number = f"{len(series.configs)} searches with {config.evaluations} evaluations each"
    return f"{setup.describe()}; {number}"


def search_each(
    config: RunConfig | dict[str, Any] | str | Path,
    strategies: Sequence[str],
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
    on_progress: Callable[[SearchProgress], object] | None = None,
) -> Comparison:
    """Searches by several strategies, one after another, and compares them.

    What one search has measured answers the same candidate of another.

    Args:
        config: A configuration, its content, or the path of its YAML file; its strategy is not
            used.
        strategies: Names, each once.
        folder: See `plan_series`; default: runs/NAME.
        resume: Whether to skip what has ended, go on with what was begun, and begin the others.
        address: Address of a Ray cluster, see `search`.
        on_progress: Called while the searches go on.

    Raises:
        CacpError: Bad input, before anything is written, or a failed run.
    """
    settings = config if isinstance(config, RunConfig) else load_config(RunConfig, config)
    where = Path(folder) if folder is not None else Path("runs") / settings.name
    series = plan_series(settings, strategies, where, resume=resume)
    check_series(series)
    for run_dir in series.configs:
        series.search(run_dir, address=address, on_progress=on_progress)
    comparison = compare(series.configs)
    write_comparison(comparison, where / "comparison")
    return comparison

"""Several strategies on one network: their searches one after another, and runs side by side."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacp_ray.api import Run, search
from cacp_ray.comparing import compare_runs, find_known, find_runs, hash_base
from cacp_ray.config import RunConfig, load_config, resolved
from cacp_ray.describing import describe_base
from cacp_ray.errors import ArtifactError, ConfigError, nearest_names
from cacp_ray.folders import is_run, open_folder, read_run_config
from cacp_ray.loading import load_base
from cacp_ray.reporting.comparison import Comparison
from cacp_ray.reporting.comparison_figure import check_out, write_comparison
from cacp_ray.searching.search_progress import SearchProgress
from cacp_ray.searching.strategies import AGENTS, STRATEGIES
from cacp_ray.starting import check_run


@dataclass(frozen=True)
class Series:
    """Searches of one configuration by several strategies, each in a folder of its own.

    Attributes:
        folder: Holds a run directory a strategy, and `comparison/`.
        configs: By run directory, in the order they are run.
        resume: Go on with what is there.
    """

    folder: Path
    configs: dict[Path, RunConfig]
    resume: bool

    def search(self, run_dir: Path, **options: Any) -> Run:
        """One of them; what the others have measured by now is not measured again.

        Args:
            run_dir: A key of `configs`.
            **options: `address`, `on_progress` and `cache` of `search`.
        """
        config, is_begun = self.configs[run_dir], is_run(run_dir)
        others = {path: other for path, other in self.configs.items() if path != run_dir}
        known = {}
        if not (run_dir / "result.json").exists() and any(map(is_run, others)):
            known = find_known(config, hash_base(config), others)
        return search(config, run_dir, resume=self.resume and is_begun, known=known, **options)


def plan_series(
    config: RunConfig, strategies: Sequence[str], folder: Path, *, resume: bool = False
) -> Series:
    """Checks all names and folders before anything runs.

    Args:
        config: Of all searches, but for the strategy.
        strategies: Names, each once.
        folder: For `folder/NAME` and `folder/comparison`.
        resume: Skip what has ended, go on with what was begun, begin the others.

    Raises:
        ConfigError: An unknown or repeated name, or a run under another configuration.
        ArtifactError: A folder is in use, or there is nothing to resume.
    """
    known = (*AGENTS, *STRATEGIES)
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
    for path, each in configs.items():
        open_folder(path, each, resume=resume and is_run(path))
    return Series(folder, configs, resume)


def check_series(series: Series) -> str:
    """As `check_search` of one: one line about what all would search.

    Raises:
        CacpError: The first thing that does not fit.
    """
    config = next(iter(series.configs.values()))
    base = load_base(config)
    for each in series.configs.values():
        check_run(each, base)
    number = f"{len(series.configs)} searches with {config.evaluations} evaluations each"
    return f"{describe_base(base, config)}; {number}"


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

    What one has measured answers the same candidate of another.

    Args:
        config: As of `search`; its strategy is not used.
        strategies: Names, each once.
        folder: For a run directory a strategy, and `comparison/`; default: runs/NAME.
        resume: Skip what has ended, go on with what was begun, begin the others.
        address: As of `search`.
        on_progress: As of `search`.

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


def compare(runs: Iterable[str | Path]) -> Comparison:
    """What runs on the same network, data and settings have found, side by side.

    Args:
        runs: Run directories, or folders of them. One that has not ended is read as far as it is.

    Raises:
        ArtifactError: No run, a damaged one, or one that has measured nothing yet.
        ConfigError: Runs that cannot be compared, with the keys that differ.
    """
    folders = find_runs([Path(run) for run in runs])
    return compare_runs({folder: read_run_config(folder) for folder in folders})

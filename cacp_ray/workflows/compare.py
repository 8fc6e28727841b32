"""Runs side by side: which runs may be compared, and what each has to show."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cacp_ray.config.reading import resolved
from cacp_ray.config.run import RunConfig
from cacp_ray.config.saved import read_run_config
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.evaluation.measurement import Metric
from cacp_ray.io.files import changed_keys
from cacp_ray.io.schema import read_checked
from cacp_ray.pruning.cost import describe_cost
from cacp_ray.reporting.comparison import ComparedRun, Comparison, Point
from cacp_ray.reporting.comparison_figure import JSON_FILE
from cacp_ray.rundir.directory import RunDirectory, read_result
from cacp_ray.rundir.records import EpisodeRecord
from cacp_ray.rundir.schema import ComparedFile, ComparedModel
from cacp_ray.searching.archive import Archive
from cacp_ray.searching.strategies import SEPARATE


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run directories: a folder that is none, but holds some, stands for those.

    Folders of comparisons are passed over, so that `runs/mine/*` works as well.

    Raises:
        ArtifactError: Neither a run nor a folder of runs, or a run is named twice.
    """
    folders: list[Path] = []
    for path in paths:
        if (path / "config.yaml").exists():
            folders.append(path)
        elif inner := sorted(file.parent for file in path.glob("*/config.yaml")):
            folders += inner
        elif not (path / JSON_FILE).exists():
            raise ArtifactError(f"{path} holds no run (no config.yaml): check the path")
    places = [path.resolve() for path in folders]
    for path, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise ArtifactError(f"{path} is named twice: name each run once")
    if not folders:
        raise ArtifactError("no run among the folders: name the run directories to compare")
    return folders


def compare(runs: Iterable[str | Path]) -> Comparison:
    """Compares runs on the same network, data and settings.

    Args:
        runs: Run directories, or folders of them. One that has not ended is read as far as it is.

    Raises:
        ArtifactError: No run, a damaged one, or one that has measured nothing yet.
        ConfigError: Runs that cannot be compared, with the keys that differ.
    """
    configs = {path: read_run_config(path) for path in find_runs([Path(run) for run in runs])}
    models = {path: _read_model(path) for path in configs}
    settings = {
        path: _read_settings(config, models[path]["sha256"]) for path, config in configs.items()
    }
    first, *others = configs
    differing = [
        f"{path} in {', '.join(keys)}"
        for path in others
        if (keys := changed_keys(settings[first], settings[path]))
    ]
    if differing:
        raise ConfigError(
            f"not comparable with {first}: {'; '.join(differing)}; compare runs that share these"
        )
    records = {path: RunDirectory(path).read_records() for path in configs}
    labels = _label(configs)
    compared = [
        _summarise(path, labels[path], config, records[path], models[path]["base"])
        for path, config in configs.items()
    ]
    base = models[first]["base"]
    images = max((row.images for rows in records.values() for row in rows), default=0)
    cost, accuracy = describe_cost(configs[first].cost), base["search"]
    metric = Metric(**models[first]["metric"])
    return Comparison(cost, metric, accuracy["score"], accuracy["images"], images, tuple(compared))


def _read_model(run_dir: Path) -> dict[str, Any]:
    if not (run_dir / "model.json").exists():
        raise ArtifactError(
            f"{run_dir} has measured nothing yet (no model.json): go on with --resume"
        )
    return read_checked(run_dir / "model.json", ComparedModel)


def _read_settings(config: RunConfig, sha256: str) -> dict[str, Any]:
    """Settings that comparable runs share: what a score depends on, and what may be searched.

    The batch size changes the last digits at most; `sequential` changes only saved subnets.
    """
    values = resolved(config)
    del values["data"]["test"], values["evaluation"]["batch_size"], values["evaluation"]["racing"]
    del values["pruning"]["sequential"]
    return {
        "model": {"name": config.model.name, "weights (sha256)": sha256},
        "task": config.task,
        "data": values["data"],
        "pruning": values["pruning"],
        "evaluation": values["evaluation"],
        "cost": [config.cost, config.latency_table if "latency" in config.cost else None],
    }


def _label(configs: Mapping[Path, RunConfig]) -> dict[Path, str]:
    """The strategy; with the folder's name, or where that is not enough its path, if shared."""
    strategies = Counter(config.strategy for config in configs.values())
    names = Counter(path.resolve().name for path in configs)
    labels = {}
    for path, config in configs.items():
        name = path.resolve().name
        where = f" ({name if names[name] == 1 else path})"
        labels[path] = config.strategy + (where if strategies[config.strategy] > 1 else "")
    return labels


def _summarise(
    path: Path,
    label: str,
    config: RunConfig,
    records: Sequence[EpisodeRecord],
    base: Mapping[str, Any],
) -> ComparedRun:
    archive = Archive(base.get("cost") or base[str(config.cost)])
    for row in records:
        archive.add(row)
    best = {rate: archive.best(rate) for rate in config.rates}
    winners = {rate: _point(row) for rate, row in best.items() if row is not None}
    result = read_result(path, ComparedFile) if (path / "result.json").exists() else None
    if result is None:
        search = {rate: None if row is None else row.score for rate, row in best.items()}
        evaluations = len({row.key for row in records})
        policy, policy_points = {}, {}
    else:
        rows = {row["rate"]: row for row in result["rates"]}
        search = {rate: rows[rate].get("search_score") for rate in rows}
        evaluations = result["evaluations"]
        policy = {rate: row["policy_score"] for rate, row in rows.items() if "policy_score" in row}
        answers = {row["rate"]: (row["cost_kept"], row["score"]) for row in result["frontier"]}
        policy_points = {rate: answers[rate] for rate in policy if rate in answers}
    own = {row.key for row in records if not row.cached}
    return ComparedRun(
        label=label,
        path=str(path),
        strategy=config.strategy,
        is_finished=result is not None,
        searched="separately" if config.strategy in SEPARATE else "together",
        evaluations=evaluations,
        asked=config.evaluations,
        known=len({row.key for row in records} - own),
        seconds=None if result is None else result["seconds"].get("search"),
        search_score=search,
        policy_score=policy,
        winners=winners,
        policy_points=policy_points,
        frontier=tuple(_point(row) for row in archive.frontier),
    )


def _point(row: EpisodeRecord) -> Point:
    return row.cost_kept, row.score

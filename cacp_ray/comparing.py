"""Runs side by side: what may be compared, what they say, what need not be measured twice."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cacp_ray.config import RunConfig, resolved
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.evaluation.measurement import Measurement, Subnet
from cacp_ray.evaluation.preparation import hash_weights
from cacp_ray.files import changed_keys, read_object
from cacp_ray.loading import load_model, read_split
from cacp_ray.pruning.cost import describe_cost
from cacp_ray.reporting.comparison import ComparedRun, Comparison, Point
from cacp_ray.reporting.comparison_figure import JSON_FILE
from cacp_ray.results import read_result
from cacp_ray.searching.archive import Archive
from cacp_ray.searching.records import EpisodeRecord, as_result
from cacp_ray.searching.run_directory import RunDirectory
from cacp_ray.searching.strategies import SEPARATE

Known = Mapping[Subnet, Measurement]


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run directories: a folder that is none, but holds some, stands for those.

    Folders of comparisons are passed over, so that `runs/mine/*` works as well.

    Raises:
        ArtifactError: Neither a run nor a folder of runs, or a run is named twice.
    """
    found: list[Path] = []
    for path in paths:
        if (path / "config.yaml").exists():
            found.append(path)
        elif inner := sorted(file.parent for file in path.glob("*/config.yaml")):
            found += inner
        elif not (path / JSON_FILE).exists():
            raise ArtifactError(f"{path} holds no run (no config.yaml): check the path")
    places = [path.resolve() for path in found]
    for path, place in zip(found, places, strict=True):
        if places.count(place) > 1:
            raise ArtifactError(f"{path} is named twice: name each run once")
    if not found:
        raise ArtifactError("no run among the folders: name the run directories to compare")
    return found


def compare_runs(configs: Mapping[Path, RunConfig]) -> Comparison:
    """Reads what runs have found, those that have not ended from their records.

    Args:
        configs: By run directory.

    Raises:
        ArtifactError: A run has not begun to measure, or its files are damaged.
        ConfigError: Runs that cannot be compared, with the keys that differ.
    """
    models = {path: _read_model(path) for path in configs}
    settings = {
        path: _measured(config, models[path]["sha256"])
        | {"cost": _limits(config), "pruning": _search_space(config)}
        for path, config in configs.items()
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
    runs = [
        _summarise(path, labels[path], config, records[path], models[path]["base"])
        for path, config in configs.items()
    ]
    base = models[first]["base"]
    images = max((row.images for rows in records.values() for row in rows), default=0)
    found = base["search"]
    cost = describe_cost(configs[first].cost)
    return Comparison(cost, found["top1"], found["images"], images, tuple(runs))


def find_known(config: RunConfig, sha256: str, run_dirs: Mapping[Path, RunConfig]) -> Known:
    """What other runs have measured and this one need not measure again.

    Only runs alike in all that a measurement depends on count, and of those only what they have
    measured themselves, with success.

    Args:
        config: Of the run that will ask.
        sha256: Of its base weights.
        run_dirs: Configurations of other runs by directory; those that have not begun are skipped.
    """
    wanted = _measured(config, sha256) | {"seed": config.seed}
    known: dict[Subnet, Measurement] = {}
    for path, other in run_dirs.items():
        if not (path / "model.json").exists():
            continue
        if _measured(other, _read_model(path)["sha256"]) | {"seed": other.seed} != wanted:
            continue
        for row in RunDirectory(path).read_records():
            if row.status == "ok" and not row.cached:
                known.setdefault(row.subnet, as_result(row)[1])
    return known


def hash_base(config: RunConfig) -> str:
    """sha256 of the weights that `config` names, as model.json has it."""
    classes = read_split(config.data, "search", 1).classes
    return hash_weights(load_model(config.model, len(classes)).state_dict())


def _read_model(run_dir: Path) -> dict[str, Any]:
    if not (run_dir / "model.json").exists():
        raise ArtifactError(
            f"{run_dir} has measured nothing yet (no model.json): go on with --resume"
        )
    return read_object(run_dir / "model.json", ("sha256",))


def _measured(config: RunConfig, sha256: str) -> dict[str, Any]:
    """Settings that the score of a candidate depends on, but for the seed.

    The batch size changes the last digits at most, `sequential` only the subnets that are saved.
    """
    values = resolved(config)
    del values["data"]["test"], values["evaluation"]["batch_size"], values["evaluation"]["racing"]
    pruning = {
        key: values["pruning"][key] for key in ("criterion", "recovery", "calibration_images")
    }
    return {
        "model": {"name": config.model.name, "weights (sha256)": sha256},
        "data": values["data"],
        "pruning": pruning,
        "evaluation": values["evaluation"],
    }


def _search_space(config: RunConfig) -> dict[str, Any]:
    """The pruning section, but for `sequential`."""
    return resolved(config)["pruning"] | {"sequential": None}


def _limits(config: RunConfig) -> Any:
    """What a rate limits, with the table that latency is read from."""
    names = [config.cost] if isinstance(config.cost, str) else list(config.cost)
    table = [config.latency_table] if "latency" in names else []
    return [config.cost, *table] if table else config.cost


def _label(configs: Mapping[Path, RunConfig]) -> dict[Path, str]:
    """The strategy; with the folder's name, or where that is not enough its path, if shared."""
    strategies = [config.strategy for config in configs.values()]
    names = [path.resolve().name for path in configs]
    labels = {}
    for path, config in configs.items():
        folder = path.resolve().name
        if strategies.count(config.strategy) == 1:
            labels[path] = config.strategy
        else:
            labels[path] = f"{config.strategy} ({folder if names.count(folder) == 1 else path})"
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
    result = read_result(path) if (path / "result.json").exists() else None
    if result is None:
        search = {rate: None if row is None else row.top1 for rate, row in best.items()}
        evaluations = len({row.subnet for row in records})
        policy, policy_points = {}, {}
    else:
        rows = {row["rate"]: row for row in result["rates"]}
        search = {rate: rows[rate].get("search_top1") for rate in rows}
        evaluations = result["evaluations"]
        policy = {rate: row["policy_top1"] for rate, row in rows.items() if "policy_top1" in row}
        answers = {row["rate"]: (row["cost_kept"], row["top1"]) for row in result["frontier"]}
        policy_points = {rate: answers[rate] for rate in policy if rate in answers}
    own = {row.subnet for row in records if not row.cached}
    return ComparedRun(
        label=label,
        path=str(path),
        strategy=config.strategy,
        is_finished=result is not None,
        searched="separately" if config.strategy in SEPARATE else "together",
        evaluations=evaluations,
        asked=config.evaluations,
        known=len({row.subnet for row in records} - own),
        seconds=None if result is None else result["seconds"].get("search"),
        search_top1=search,
        policy_top1=policy,
        winners=winners,
        policy_points=policy_points,
        frontier=trace_frontier(records),
    )


def trace_frontier(records: Iterable[EpisodeRecord]) -> tuple[Point, ...]:
    """(cost kept, top-1) of all that no cheaper or equally costly measurement equals."""
    frontier: list[Point] = []
    measured = [row for row in records if row.status == "ok"]
    for row in sorted(measured, key=lambda row: (row.cost_kept, -row.top1)):
        if not frontier or row.top1 > frontier[-1][1]:
            frontier.append(_point(row))
    return tuple(frontier)


def _point(row: EpisodeRecord) -> Point:
    return row.cost_kept, row.top1

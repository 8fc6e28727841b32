"""What a Python user calls and the command line calls too: the one place that wires objects."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cacp_ray import agent_tuning
from cacp_ray.agent_space import AgentTuningConfig
from cacp_ray.analysis import Analysis, analyze
from cacp_ray.config import RunConfig, TrainConfig, load_config, resolved
from cacp_ray.describing import describe_base
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.evaluation.cache import check_folder
from cacp_ray.evaluation.measurement import Measurement, Subnet
from cacp_ray.exporting.subnet import export_subnet as export
from cacp_ray.file_systems import overlaps
from cacp_ray.files import describe_environment, read_json, write_json, write_yaml
from cacp_ray.finetune_config import FinetuneConfig
from cacp_ray.finetuning import finetune_folder, finetune_run
from cacp_ray.folders import check_unchanged, is_run, open_folder, read_run_config
from cacp_ray.loading import (
    Sources,
    check_padding,
    check_splits,
    load_base,
    load_model,
    open_split,
    read_split,
)
from cacp_ray.pruning.subnet import load_subnet
from cacp_ray.reporting.tuning import write_tuning_report
from cacp_ray.results import answer_rates, read_result, report_run
from cacp_ray.run import run_search
from cacp_ray.searching.search_progress import SearchProgress
from cacp_ray.starting import check_run, estimate, find_room
from cacp_ray.storage import RunStorage
from cacp_ray.training.base import train_base
from cacp_ray.training.loop import EpochResult

logger = logging.getLogger(__name__)

__all__ = [
    "Analysis",
    "Run",
    "analyze",
    "export",
    "finetune",
    "load_subnet",
    "search",
    "train_model",
    "tune_agent",
]


def train_model(
    config: TrainConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    on_epoch: Callable[[EpochResult, float], None] | None = None,
) -> dict[str, Any]:
    """Trains a base network, on a GPU where there is one.

    `cacp_ray.training.base` says what the folder holds.

    Raises:
        CacpError: Bad input, in one line, before anything is written.
    """
    open_folder(run_dir, config, resume=resume)
    sources: Sources = {}
    train, test = (open_split(config.data, name, sources) for name in ("train", "test"))
    search = read_split(config.data, "search", sources=sources)
    check_splits({"train": train, "search": search, "test": test})
    check_padding(config.training, search, "training.padding")
    torch.manual_seed(config.training.seed)
    model = load_model(config.model, len(train.classes))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    write_yaml(run_dir / "config.yaml", resolved(config))
    write_json(run_dir / "environment.json", describe_environment(config.training.seed))
    return train_base(
        model,
        train,
        search,
        test,
        config.training,
        run_dir,
        on_epoch=on_epoch,
    )


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: Its directory.
        result: The content of result.json.
        storage: What it was copied to, if anything; its `finish` copies what came later.
    """

    path: Path
    result: dict[str, Any]
    storage: RunStorage | None = None

    @property
    def subnets(self) -> dict[float, Path]:
        """Subnet folder of every rate; `load_subnet` reads one."""
        return {row["rate"]: self.path / row["path"] for row in self.result["rates"]}

    def policy(self, rate: float, evaluations: int = 0) -> dict[str, Any]:
        """The policy's subnet for any rate; see `cacp_ray.results.answer_rates`."""
        config = read_run_config(self.path)
        return answer_rates(config, self.path, [rate], evaluations, save=False)[0]

    def report(self) -> Path:
        """Writes report.html."""
        return report_run(self.path)


def search(
    config: RunConfig | dict[str, Any] | str | Path,
    run_dir: str | Path | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
    on_progress: Callable[[SearchProgress], object] | None = None,
    known: Mapping[Subnet, Measurement] | None = None,
    cache: str | Path | None = None,
    storage: str | Path | None = None,
) -> Run:
    """Searches a smaller network for every rate at once.

    Args:
        config: A configuration, its content, or the path of its YAML file.
        run_dir: Default: runs/NAME.
        resume: Go on with what `run_dir` holds.
        address: Of a Ray cluster; None takes RAY_ADDRESS, else starts a local Ray.
        on_progress: Called while the search goes on.
        known: What runs alike have measured, see `cacp_ray.comparing.find_known`; a candidate
            found there is not measured again and counts as an evaluation.
        cache: Folder where measurements are kept for other runs; what is scored alike, whatever
            the run, is scored once.
        storage: Folder, s3:// or gs:// URI that the run is copied to at every checkpoint. With
            `resume`, what it holds is fetched and gone on with; the search begins where it holds
            nothing yet, so that one call serves the first start and every other.

    Raises:
        CacpError: Bad input, before anything is written, or a failed run.
    """
    settings = config if isinstance(config, RunConfig) else load_config(RunConfig, config)
    folder = Path(run_dir) if run_dir is not None else Path("runs") / settings.name
    copy = None if storage is None else _open_storage(str(storage), folder, settings, resume)
    is_first = copy is not None and not copy.holds_run and not is_run(folder)
    open_folder(folder, settings, resume=resume and not is_first)
    if (folder / "result.json").exists():
        if copy is not None:
            copy.finish(folder)
        # Finished before: fine-tuning may have added to it.
        return Run(folder, read_result(folder), copy)
    if cache is not None:
        check_folder(Path(cache))
    result = run_search(
        settings,
        folder,
        address=address,
        on_progress=on_progress,
        say=logger.info,
        known=known,
        cache=None if cache is None else Path(cache),
        storage=copy,
    )
    return Run(folder, result, copy)


def _open_storage(uri: str, folder: Path, config: RunConfig, resume: bool) -> RunStorage:
    """The storage of a run; what it holds is in the folder afterwards."""
    if overlaps(uri, folder):
        raise ConfigError(
            f"storage {uri} and {folder}, which it shall be a copy of, lie in each other: choose "
            "another"
        )
    storage = RunStorage(uri)
    if resume:
        if (saved := storage.config) is not None:
            check_unchanged(saved, config, f"storage {uri}", "--storage")
        storage.pull(folder)
    elif storage.holds_run:
        raise ArtifactError(
            f"storage {uri} holds a run: pass --resume to continue it, or choose another --storage"
        )
    return storage


def check_search(
    config: RunConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    address: str | None = None,
    price: float | None = None,
) -> str:
    """Does all that a search does before it writes anything, but for starting a local Ray.

    Args:
        config: Of the search.
        run_dir: That it would write.
        resume: As of `search`.
        address: As of `search`.
        price: Of a core, or where GPUs score of a GPU, for an hour, in any currency; told is then
            what the evaluations would cost.

    Returns:
        Lines about what it would search, and what that would take.

    Raises:
        CacpError: The first thing that does not fit.
    """
    open_folder(run_dir, config, resume=resume)
    cpus = find_room(config, address)
    base = load_base(config)
    check_run(config, base)
    return "\n".join([describe_base(base, config), *estimate(config, base, cpus, address, price)])


def tune_agent(
    config: AgentTuningConfig | dict[str, Any] | str | Path,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
    on_progress: Callable[[Any], object] | None = None,
) -> dict[str, Any]:
    """Finds the agent's settings that search best; `cacp_ray.agent_tuning` says what is written.

    Args:
        config: A configuration, its content, or the path of its YAML file.
        folder: Default: runs/NAME.
        resume: Go on with what `folder` holds.
        address: As of `search`.
        on_progress: Called with every round of a trial.

    Returns:
        The content of result.json.

    Raises:
        CacpError: Bad input, before anything is written, or a trial that failed too often.
    """
    settings = (
        config if isinstance(config, AgentTuningConfig) else load_config(AgentTuningConfig, config)
    )
    where = Path(folder) if folder is not None else Path("runs") / settings.name
    open_folder(where, settings, resume=resume)
    if not (where / "result.json").exists():
        agent_tuning.tune_agent(
            settings,
            where,
            address=address,
            on_progress=on_progress or (lambda progress: None),
            say=logger.info,
        )
    write_tuning_report(where)
    return read_json(where / "result.json")


def finetune(
    folder: str | Path,
    *,
    resume: bool = False,
    address: str | None = None,
    config: FinetuneConfig | dict[str, Any] | str | Path | None = None,
    overrides: Sequence[str] = (),
    on_epoch: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Fine-tunes the subnets of a finished search, all rates side by side, or one subnet.

    Args:
        folder: A run directory, or a subnet folder.
        resume: Go on with an interrupted fine-tuning.
        address: Of a Ray cluster.
        config: A configuration, its content, or the path of its YAML file. A `finetune` section in
            it replaces the one that the run was searched with.
        overrides: `key.path=value` on top of both.
        on_epoch: Called with every finished epoch.

    Returns:
        The content of the run's result.json, or of the subnet's metrics.json.

    Raises:
        CacpError: Bad input, or a trial that failed too often.
    """
    where = Path(folder)
    options: dict[str, Any] = {
        "resume": resume,
        "address": address,
        "on_epoch": on_epoch or (lambda progress: None),
    }
    is_subnet = (where / "subnet.json").exists()
    run_dir = where.resolve().parent.parent if is_subnet else where
    own = None if is_subnet and not is_run(run_dir) else read_run_config(run_dir)
    source = config.model_dump(exclude_unset=True) if isinstance(config, FinetuneConfig) else config
    settings = load_config(
        FinetuneConfig,
        {} if source is None else source,
        overrides,
        defaults=None if own is None else own.model_dump(include={"finetune", "model", "data"}),
    )
    if is_subnet:
        return finetune_folder(where, settings, **options)
    assert own is not None
    return finetune_run(own, where, settings, **options)

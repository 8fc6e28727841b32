"""One problem, made once and handed on whole: configuration, network, cuts, budget, images.

`Setup.create` reads and checks all that a search needs before anything is written; `Setup.open`
does so for the run of a folder. `prepare` adds what all candidates share.
"""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cacp_ray.config.run import PruningConfig, RunConfig
from cacp_ray.config.saved import read_run_config
from cacp_ray.data.images import ImageSet
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.evaluation.classification import Classification
from cacp_ray.evaluation.latency_table import LatencyTable, load_table
from cacp_ray.evaluation.measurement import Metric, Scored
from cacp_ray.evaluation.preparation import Prepared, hash_weights, needed_kinds, prepare
from cacp_ray.evaluation.task import OwnTask, measure_first
from cacp_ray.io.environment import give_back_memory
from cacp_ray.io.rates import format_rate
from cacp_ray.io.schema import read_checked
from cacp_ray.pruning.calibration import Calibration, batches_of
from cacp_ray.pruning.cost import Limited, describe_total
from cacp_ray.pruning.criteria import get_criterion
from cacp_ray.pruning.inputs import Inputs
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.statistics import Statistics, collect_statistics
from cacp_ray.pruning.statistics_file import load_statistics, save_statistics, statistics_key
from cacp_ray.rundir.schema import ModelFile
from cacp_ray.searching.budget import Budget, minimum_counts
from cacp_ray.searching.strategies.table import OTHER_ORDERS
from cacp_ray.workflows.network import check_hash, describe_published
from cacp_ray.workflows.problem import Given, find_loss, find_task, read_images, read_own

logger = logging.getLogger(__name__)

STATISTICS_FILE = "statistics.safetensors"
NOTED = ("classes", "task")  # of a task, in model.json


@dataclass(frozen=True)
class Setup:
    """The problem of a run.

    Attributes:
        config: Run configuration.
        model: Base network with its weights, in evaluation mode.
        sha256: Hash of the weights.
        plan: How the network may be cut.
        budget: Budget of the run's cost; every rate of the run is reachable.
        calibration: Training examples, for statistics only.
        task: What scores a network: the built-in task holds the search split.
        inputs: What the network is called with, for one example.
        latency: Latency table of the network's layers; None where the run names none.
        run_dir: Folder of the run; None where there is none.
        saved: Content of its model.json; None before the run has begun.
        shared: What all candidates share; None before `prepare`.
        stored: Ray's references of `task` and `prepared`; empty where Ray does not hold them.
        first: What the whole network is worth by a task of the user's own; None for images.
    """

    config: RunConfig
    model: nn.Module
    sha256: str
    plan: Plan
    budget: Budget
    calibration: Calibration
    task: Classification | OwnTask
    inputs: Inputs
    latency: LatencyTable | None = None
    run_dir: Path | None = None
    saved: dict[str, Any] | None = None
    shared: Prepared | None = None
    stored: Mapping[str, Any] = field(default_factory=dict)
    first: Scored | None = None

    @classmethod
    def create(
        cls, config: RunConfig, run_dir: Path | None = None, given: Given | None = None
    ) -> "Setup":
        """Reads and checks what a search needs; writes nothing.

        Args:
            config: Run configuration.
            run_dir: Folder of the run, begun or not; statistics saved there are used again.
            given: Network and task that were given as objects.

        Raises:
            CacpError: The first thing that does not fit, in one line.
        """
        get_criterion(config.pruning.criterion)
        file = None if run_dir is None else run_dir / "model.json"
        saved = None
        if file is not None and file.exists():
            saved = read_checked(file, ModelFile, ("sha256", "groups", "base", "metric"))
        own = find_task(config, given)
        model, calibration, task, inputs = (
            read_images(config)
            if own is None
            else read_own(config, own, None if given is None else given.model)
        )
        plan = make_plan(model, inputs)
        check_counted(plan, config)
        table = None
        if config.latency_table is not None:
            table = load_table(config.latency_table)
            plan = with_latency(plan, table)
            for difference in table.differences(config.model.name, config.pruning.round_to):
                logger.warning("latency table %s: %s", config.latency_table, difference)
        budget = make_budget(plan, config.cost, config.pruning)
        for rate in config.rates:
            budget.check(rate)
        sha256 = hash_weights(model.state_dict())
        setup = cls(config, model, sha256, plan, budget, calibration, task, inputs, table, run_dir)
        if isinstance(task, OwnTask) and saved is None:
            setup = replace(setup, first=measure_first(task, copy.deepcopy(model)))
        if run_dir is None or saved is None:
            return setup
        _check_base(setup, saved, run_dir)
        return replace(setup, saved=saved)

    @classmethod
    def open(cls, run_dir: Path, given: Given | None = None) -> "Setup":
        """The problem that a run was searched on, prepared with the run's importance orders.

        Raises:
            ArtifactError: The folder holds no run that has begun, or was searched from other
                weights or another latency table than are there now.
        """
        config = read_run_config(run_dir)
        read_checked(run_dir / "model.json", ModelFile, ("groups",))
        return cls.create(config, run_dir, given).prepare()

    @property
    def prepared(self) -> Prepared:
        """What all candidates share; `prepare` comes first."""
        assert self.shared is not None, "prepare() comes first"
        return self.shared

    @property
    def search(self) -> ImageSet:
        """The search split of the built-in task."""
        assert isinstance(self.task, Classification), "a task of the user's own has no images"
        return self.task.split

    @property
    def num_images(self) -> int:
        """Images of a whole measurement; 0 for a task of the user's own."""
        return min(self.config.evaluation.images or len(self.task), len(self.task))

    @property
    def statistics_key(self) -> str:
        """Identity of `find_statistics`: the same key stands for the same statistics."""
        return statistics_key(
            self.sha256, self.plan, self.calibration, seed=self.config.seed, kinds=self._kinds
        )

    def find_statistics(self) -> Statistics:
        """What the criterion and the recovery read of the calibration images.

        Statistics saved with the run are read. Where they are missing, damaged or made from other
        weights, images or settings, they are collected and, once the run has begun, saved.
        """
        run_dir = self.run_dir
        if run_dir is not None:
            saved = load_statistics(run_dir / STATISTICS_FILE, self.statistics_key)
            if saved is not None:
                return saved
        statistics = collect_statistics(
            self.model,
            self.plan,
            batches_of(self.calibration),
            seed=self.config.seed,
            kinds=self._kinds,
            loss=find_loss(self.task, self.config.pruning.criterion, self._kinds),
        )
        if run_dir is not None and (run_dir / "config.yaml").exists():
            self.save_statistics(run_dir, statistics)
        return statistics

    def save_statistics(self, run_dir: Path, statistics: Statistics) -> None:
        """Writes statistics where `find_statistics` looks for them."""
        save_statistics(run_dir / STATISTICS_FILE, statistics, self.statistics_key)

    def prepare(
        self,
        statistics: Statistics | None = None,
        orders: Mapping[str, list[list[int]]] | None = None,
    ) -> "Setup":
        """The same problem with what all candidates share: orders and compensation factors.

        Args:
            statistics: Statistics of `find_statistics`; None collects them.
            orders: Importance orders by criterion, "" for the run's; None takes those of a run
                that has begun, else makes them.
        """
        config = self.config
        if orders is None and self.saved is not None:
            orders = read_orders(self.saved)
        if statistics is None:
            statistics = self.find_statistics()
        give_back_memory()
        by_criterion = {
            name: prepare(
                self.model,
                self.plan,
                self.calibration,
                statistics,
                criterion=name or config.pruning.criterion,
                recovery=config.pruning.recovery,
                seed=config.seed,
                orders=None if orders is None else [np.array(order) for order in orders[name]],
            )
            for name in ("", *OTHER_ORDERS.get(config.strategy, ()))
        }
        return replace(self, shared=replace(by_criterion.pop(""), others=by_criterion))

    def describe(self) -> str:
        """One line: the network, its groups, what is reachable, and the published accuracy."""
        config, budget = self.config, self.budget
        return (
            f"{config.model.name}: {len(self.plan.groups)} channel groups, "
            f"{describe_total(config.cost, budget.total)}, reachable rates "
            f"{budget.smallest / budget.total:.3f}-1, asked (kept): "
            f"{', '.join(map(format_rate, config.rates))}{describe_published(config.model)}"
        )

    def describe_model(self) -> dict[str, Any]:
        """The content of model.json; measures the base network on the search split in float32."""
        scored = self.first or self.task.measure(self.model)
        counts = self.plan.cost_model.num_channels
        return {
            "model": self.config.model.name,
            "weights": self.config.model.weights,
            "sha256": self.sha256,
            "input_shape": list(self.plan.input_shape),
            "metric": vars(self.task.metric),
            **{key: value for key, value in self.task.describe().items() if key in NOTED},
            "groups": [
                {
                    "name": group.name,
                    "members": list(group.members),
                    "num_channels": group.num_channels,
                    "is_residual": group.is_residual,
                    "order": order.tolist(),
                }
                for group, order in zip(self.plan.groups, self.prepared.orders, strict=True)
            ],
            "orders": {
                name: [order.tolist() for order in other.orders]
                for name, other in self.prepared.others.items()
            },
            "base": {
                "model": self.config.model.name,
                "macs": int(self.plan.macs(counts)),
                "params": int(self.plan.params(counts)),
                "cost": self.budget.total,
                "search": scored.describe(),
                "test": None,
                "latency_ms": None,
            },
        }

    @property
    def _kinds(self) -> frozenset[str]:
        return needed_kinds(self.config.pruning.criterion, self.config.pruning.recovery)


def read_orders(saved: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    """Importance orders in the content of model.json, by criterion; the run's own under ""."""
    return {"": [group["order"] for group in saved["groups"]], **(saved.get("orders") or {})}


def with_latency(plan: Plan, table: LatencyTable) -> Plan:
    """The same plan with a cost model that knows the latency of keep counts.

    Raises:
        ConfigError: The table lacks layers of the network.
    """
    latency = table.cost(plan.cost_model)
    return replace(plan, cost_model=replace(plan.cost_model, latency=latency))


def check_counted(plan: Plan, config: RunConfig) -> None:
    """Refuses a budget of MACs for a network with work that nothing counts, or says so.

    Raises:
        ConfigError: Rates would mean other shares than they say.
    """
    names = plan.describe_uncounted()
    if not names or "macs" not in config.cost:
        return
    if config.pruning.uncounted == "refuse":
        raise ConfigError(
            f"no formula counts the work of {names}: rates would keep more than they say; register "
            "one (torch.utils.flop_counter.register_flop_formula), limit another cost, or set "
            "pruning.uncounted=ignore"
        )
    logger.warning("not counted as cost: %s; rates are shares of the rest", names)


def make_budget(plan: Plan, cost: Limited, pruning: PruningConfig) -> Budget:
    """The budget of a cost (`CostModel.kind`); groups that match a keep pattern stay whole."""
    num_channels = plan.cost_model.num_channels
    least = np.maximum(
        minimum_counts(num_channels, pruning.floor, pruning.round_to), plan.least_counts
    )
    prunable = plan.select_groups(pruning.keep)
    return Budget(
        plan.cost_model.kind(cost),
        num_channels,
        np.where(prunable, least, num_channels),
        pruning.round_to,
    )


def describe_accuracy(saved: Mapping[str, Any]) -> str:
    """One line about the base network's measured accuracy, from the content of model.json."""
    metric, scored = Metric(**saved["metric"]), saved["base"]["search"]
    images = f" on the search split ({scored['images']:,} images)" if scored["images"] else ""
    return f"base network: {metric.describe(scored['score'])}{images}"


def _check_base(setup: Setup, saved: Mapping[str, Any], run_dir: Path) -> None:
    """Refuses to go on with other weights, or another latency table, than a run began with."""
    total = setup.budget.total
    cost = saved["base"].get("cost") or total
    if cost != total:
        raise ArtifactError(
            f"{run_dir}: the whole network cost {cost:,} when the search began and costs "
            f"{total:,} now: put the latency table back, or search again in another --run-dir"
        )
    check_hash(setup.sha256, saved, run_dir)
    groups = [(group.name, group.num_channels) for group in setup.plan.groups]
    if groups != [(group["name"], group["num_channels"]) for group in saved["groups"]]:
        raise ArtifactError(
            f"{run_dir / 'model.json'} has other groups than the network has now: go on with the "
            "code that the search began with, or search again in another --run-dir"
        )

"""Subnets cut from larger trained ones: the rungs of a ladder, and rates that nobody searched.

A trained subnet has made up for the channels that it lost. One that is cut from it loses little
more, where one that is cut from the base network loses everything at once. Statistics, importance
order and repair are made anew on the trained network.

Source: training between two cuts is as old as Han et al. (2015). Ours: one pass down the rates of a
search, which have to be trained in any case, with repaired cuts that meet each budget exactly.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import nn

from cacp_ray.errors import ArtifactError
from cacp_ray.evaluation.preparation import hash_weights
from cacp_ray.io.files import read_json, read_tensors, write_json, write_tensors
from cacp_ray.io.rates import format_rate
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.subnet import load_subnet, read_description, save_subnet
from cacp_ray.searching.budget import Budget, Ints, grow
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.winners import build_here, describe_subnet

logger = logging.getLogger(__name__)

EXPERIMENT_FILE = "finetune.json"  # `cacp_ray.tuning.finetune` writes it
COPIED = "copied.json"  # in a rung's folder once the search's folder has what it trained
ROW_KEYS = ("cost_kept", "macs", "params", "keep_counts")  # of result.json; a ladder changes them
# Keys of subnet.json that differ between a search's subnet and one cut from a trained network.
CUT_KEYS = (
    "cost_kept", "macs", "params", "keep_counts", "sequential", "cut_from", "criterion", "groups",
)  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """A trained subnet of a run, from which smaller ones are cut.

    Attributes:
        rate: Share of the base network's cost that it keeps.
        net: The trained network, in evaluation mode.
        keep_counts: (G,) its channels.
        kept: The base network's channel of each of its own, by group.
    """

    rate: float
    net: nn.Module
    keep_counts: Ints
    kept: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Cut:
    """A smaller network, repaired, and the content of its subnet.json."""

    net: nn.Module
    description: dict[str, Any]


def read_rung(folder: Path, model: nn.Module | None = None) -> Rung:
    """The fine-tuned network of a subnet folder.

    Args:
        folder: Subnet folder of a run.
        model: The whole network, where the search was given it as an object.

    Raises:
        ArtifactError: The folder is incomplete, or has not been fine-tuned.
    """
    if not (folder / "finetuned.safetensors").exists():
        raise ArtifactError(
            f"{folder} has no finetuned.safetensors, the trained network to cut smaller ones from: "
            "fine-tune its run first"
        )
    needed = ("rate", "keep_counts", "groups")
    description = read_description(folder, *needed, is_finetuned=True)
    return Rung(
        description["rate"],
        load_subnet(folder, finetuned=True, trust=True, model=model),
        np.array(description["keep_counts"], dtype=np.int64),
        [group["kept"] for group in description["groups"]],
    )


def nest(budget: Budget, keep_counts: ArrayLike, most: Ints, rate: float) -> Ints:
    """(G,) the keep counts nearest to the wanted ones that a larger subnet has.

    Groups that are wider than the larger subnet's are cut to its width. What that frees is spent on
    the others, in proportion to the wanted counts.

    Args:
        budget: Budget of the base network.
        keep_counts: (G,) wanted counts, within the budget.
        most: (G,) counts of the larger subnet, legal ones.
        rate: Share of the base network's cost.
    """
    wanted = np.asarray(keep_counts, dtype=np.int64)
    within = replace(budget, num_channels=most)
    counts = np.minimum(wanted, most)[None]
    return grow(within, counts, wanted[None].astype(np.float64), budget.limit([rate]))[0]


def open_rung(setup: Setup, rung: Rung) -> tuple[Setup, list[int]]:
    """The problem of cutting a trained subnet in place of the base network.

    Returns:
        The problem, and which of the base network's groups its groups are. A group with one channel
        left cannot be cut, and is none of them.

    Raises:
        ArtifactError: The trained subnet has other groups than the base network.
    """
    plan = make_plan(rung.net, setup.inputs)
    places = {group.name: place for place, group in enumerate(setup.plan.groups)}
    present = [places.get(group.name, -1) for group in plan.groups]
    sizes = [group.num_channels for group in plan.groups]
    is_alike = -1 not in present and sizes == rung.keep_counts[present].tolist()
    if not is_alike or (np.delete(rung.keep_counts, present) > 1).any():
        raise ArtifactError(
            f"the trained subnet of rate {format_rate(rung.rate)} has other channel groups than "
            "the whole network, so nothing can be cut from it: set finetune.order=parallel"
        )
    problem = replace(
        setup,
        model=rung.net,
        plan=plan,
        sha256=hash_weights(rung.net.state_dict()),
        run_dir=None,
        saved=None,
        shared=None,
        stored={},
        first=None,
    )
    return problem, present


def open_cuts(setup: Setup, rung: Rung) -> Callable[[float, ArrayLike], Cut]:
    """A function that cuts subnets of smaller rates from a trained one, in this process.

    It takes a rate and wanted keep counts (G,), see `nest`, and returns the network, repaired, with
    its description. Statistics and order are made once.
    """
    problem, present = open_rung(setup, rung)
    problem = problem.prepare()
    orders = [np.array(channels) for channels in rung.kept]
    for place, order in zip(present, problem.prepared.orders, strict=True):
        orders[place] = orders[place][order]
    build, criterion = build_here(problem), setup.config.pruning.criterion

    def cut(rate: float, wanted: ArrayLike) -> Cut:
        counts = nest(setup.budget, wanted, rung.keep_counts, rate)
        (built,) = build([(tuple(counts[present].tolist()), "")])
        facts = {
            "rate": rate,
            "cost_kept": float(setup.budget.cost(counts)) / setup.budget.total,
            "macs": int(setup.plan.macs(counts)),
            "params": int(setup.plan.params(counts)),
            "keep_counts": counts.tolist(),
            "sequential": built.is_sequential,
            "cut_from": {"rate": rung.rate, "sha256": problem.sha256},
        }
        return Cut(built.net, describe_subnet(setup, facts, orders, criterion, built))

    return cut


def cut_one(setup: Setup, rung: Rung, rate: float, wanted: ArrayLike) -> Cut:
    """One cut of `open_cuts`."""
    return open_cuts(setup, rung)(rate, wanted)


def list_experiments(
    setup: Setup | None,
    folders: Mapping[float, Path],
    experiment_dir: Path,
    one_by_one: bool,
    cpus: int,
    model: nn.Module | None = None,
) -> Iterator[tuple[Path, dict[float, Path]]]:
    """The experiments of a fine-tuning in their order; the caller runs each before the next.

    Args:
        setup: The problem of the run, to cut each subnet from the next larger trained one; None
            trains them as the search left them.
        folders: Subnet folders of the search by rate; what a rung trains is copied there.
        experiment_dir: Folder of the fine-tuning's own files.
        one_by_one: Whether each rate is an experiment, the largest first.
        cpus: CPUs of the Ray task that cuts and repairs.
        model: The whole network, where the search was given it as an object.

    Yields:
        Folder of the experiment, and the subnet folders to be trained in it, by rate.

    Raises:
        CacpError: There is nothing to cut from, or a task fails.
    """
    if not one_by_one:
        yield experiment_dir, dict(folders)
        return
    larger: Path | None = None
    for rate in sorted(folders, reverse=True):
        where, searched = experiment_dir / f"rate-{rate:g}", folders[rate]
        if setup is None or larger is None:
            yield where, {rate: searched}
        else:
            start = experiment_dir / "subnets" / searched.name
            if (start / COPIED).exists():  # it may have been trained further there
                yield where, {rate: searched}
            else:
                _begin_rung(setup, rate, searched, read_rung(larger, model), start, cpus)
                yield where, {rate: start}
                end_rung(start, searched)
        larger = searched


def _begin_rung(
    setup: Setup, rate: float, searched: Path, rung: Rung, out: Path, cpus: int
) -> None:
    """Writes the subnet folder that a rung is trained from; one written stays."""
    from cacp_ray.distributed.tasks import run_once

    if (out / "subnet.json").exists():
        return
    wanted = read_description(searched, "keep_counts")["keep_counts"]
    name = f"the cut to rate {format_rate(rate)}"
    cut = run_once(cut_one, setup, rung, rate, wanted, cpus=cpus, name=name)
    save_subnet(out, cut.net, cut.description)
    logger.info(
        "rate %s: cut from the trained %s, %s before training",
        format_rate(rate),
        format_rate(rung.rate),
        setup.task.metric.describe(cut.description["search"]["score"]),
    )


def end_rung(trained: Path, folder: Path) -> None:
    """Copies what was trained into the subnet folder of the search, and which network it is."""
    description = read_description(trained)
    subnet = {key: description[key] for key in CUT_KEYS}
    # The weights last: without the description they would be taken for a damaged file.
    write_json(folder / "metrics.json", read_json(trained / "metrics.json") | {"subnet": subnet})
    write_tensors(folder / "finetuned.safetensors", read_tensors(trained / "finetuned.safetensors"))
    write_json(trained / COPIED, {"to": folder.name})


def note_trained(row: dict[str, Any], run_dir: Path) -> None:
    """Puts what was trained into a rate's row of result.json: another network, after a ladder."""
    trained = read_description(run_dir / row["path"], is_finetuned=True)
    row |= {name: trained[name] for name in ROW_KEYS if name in trained}
    row["cut_from"] = (trained.get("cut_from") or {}).get("rate")


def check_order(experiment_dir: Path, one_by_one: bool) -> None:
    """Refuses to write over what was trained in another order."""
    others = [experiment_dir] if one_by_one else experiment_dir.glob("rate-*")
    if any((folder / EXPERIMENT_FILE).exists() for folder in others):
        raise ArtifactError(
            f"{experiment_dir} was begun with another finetune.teacher or finetune.order: undo the "
            "change, or delete that folder to fine-tune again"
        )

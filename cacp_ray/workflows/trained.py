"""Networks for any rate, cut from the fine-tuned subnets of a run and repaired, without training.

Each is cut from the nearest larger trained subnet (`cacp_ray.workflows.ladder`), with keep counts
between those of the trained rates. Nothing of a policy is needed, so runs of every strategy answer.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cacp_ray.config.saved import check_new, read_run_config
from cacp_ray.errors import ArtifactError
from cacp_ray.pruning.subnet import read_description, save_subnet
from cacp_ray.rundir.directory import read_result
from cacp_ray.rundir.schema import ReportedFile
from cacp_ray.searching.budget import Budget, Ints, scale_to_budget, spend
from cacp_ray.workflows.ladder import Cut, Rung, cut_from, read_rung
from cacp_ray.workflows.problem import Given
from cacp_ray.workflows.setup import Setup

logger = logging.getLogger(__name__)


def trained_folders(run_dir: Path) -> dict[float, Path]:
    """Subnet folders of the fine-tuned rates of a run, by rate; empty before a fine-tuning ends."""
    return {
        row["rate"]: run_dir / row["path"]
        for row in read_result(run_dir, ReportedFile)["rates"]
        if row.get("finetuned_score") is not None
    }


def answer_from_trained(
    run_dir: Path,
    rates: Sequence[float],
    *,
    save: bool,
    out: Path | None = None,
    given: Given | None = None,
) -> list[dict[str, Any]]:
    """Subnets for any rates, each cut from the nearest larger trained one and repaired.

    Above every trained rate, they are cut from the base network.

    Args:
        run_dir: Folder of a run that has been fine-tuned.
        rates: Shares of the cost kept.
        save: Whether to write a subnet folder a rate.
        out: Folder of the subnet of a single rate; by default `subnets/rate-R` in the run.
        given: Network and task of a search that was given them as objects.

    Returns:
        A row a rate, in their order: `rate`, `cost_kept`, `macs`, `params`, `keep_counts`, `score`
        on the search split, `cut_from`, the rate of the larger network, and `path` where saved.

    Raises:
        ArtifactError: The run is not fine-tuned, its networks are missing, or a folder exists.
        InfeasibleRateError: A rate cannot be reached.
    """
    config = read_run_config(run_dir)
    folders = trained_folders(run_dir)
    if not folders:
        raise ArtifactError(
            f"{run_dir} has no trained subnets: run `cacp-ray finetune` on it first"
        )
    places = {rate: out or run_dir / "subnets" / f"rate-{rate:.2f}" for rate in rates}
    for place in places.values() if save else ():
        check_new(place, "load it", "give another folder (--out)")
    setup = Setup.create(config, run_dir, given)
    for rate in rates:
        setup.budget.check(rate)
    known = {
        rate: read_description(folder, "keep_counts", is_finetuned=True)["keep_counts"]
        for rate, folder in folders.items()
    }
    cuts: dict[float, Cut] = {}
    for rung_rate, smaller in _share_out(rates, folders).items():
        rung = _open(setup, folders, rung_rate, given)
        wanted = {rate: widths_between(setup.budget, known, rate) for rate in smaller}
        cuts |= cut_from(setup, rung, wanted)
    names = ("rate", "cost_kept", "macs", "params", "keep_counts")
    answers: list[dict[str, Any]] = []
    for rate in rates:
        description = cuts[rate].description
        answers.append(
            {name: description[name] for name in names}
            | {
                "score": description["search"]["score"],
                "cut_from": description["cut_from"]["rate"],
            }
        )
        if save:
            save_subnet(places[rate], cuts[rate].net, description)
            answers[-1]["path"] = str(out.absolute() if out else places[rate].relative_to(run_dir))
    return answers


def widths_between(budget: Budget, known: Mapping[float, Sequence[int]], rate: float) -> Ints:
    """(G,) keep counts of a rate: between those of known rates, exactly within the budget.

    Each group's count is interpolated along the rate, up to the whole network at rate 1. Below
    the smallest known rate, that one's counts are scaled down.
    """
    rates = [*sorted(known), 1.0]
    rows = np.array([*(known[each] for each in rates[:-1]), budget.num_channels], dtype=np.float64)
    desired = np.array([np.interp(rate, rates, column) for column in rows.T])[None]
    scaled = scale_to_budget(budget, desired / budget.num_channels, [rate])
    return spend(budget, scaled, [rate])[0]


def _share_out(rates: Sequence[float], trained: Iterable[float]) -> dict[float, list[float]]:
    """By trained rate, or 1.0 for the base network, the rates that are cut from it."""
    shared: dict[float, list[float]] = {}
    for rate in rates:
        # The trained rate itself too: its widths, repaired anew, are the network that is there.
        larger = min((each for each in trained if each >= rate), default=1.0)
        shared.setdefault(larger, []).append(rate)
        if larger == 1.0:
            logger.warning(
                "rate %.2f is above every trained rate (largest %.2f): cut from the base network",
                rate,
                max(trained),
            )
    return shared


def _open(setup: Setup, folders: Mapping[float, Path], rate: float, given: Given | None) -> Rung:
    if rate in folders:
        return read_rung(folders[rate], None if given is None else given.model)
    counts = setup.budget.num_channels
    return Rung(1.0, setup.model, counts, [range(count) for count in counts])

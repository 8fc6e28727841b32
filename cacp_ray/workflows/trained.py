"""Networks for any rate, cut from the fine-tuned subnets of a run and repaired, without training.

Each is cut from the nearest larger trained subnet (`cacp_ray.workflows.ladder`), with keep counts
between those of the trained rates. Nothing of a policy is needed, so runs of every strategy answer.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cacp_ray.config.saved import check_new, read_run_config
from cacp_ray.errors import ArtifactError
from cacp_ray.io.rates import format_rate
from cacp_ray.pruning.subnet import read_description, save_subnet
from cacp_ray.rundir.directory import read_result
from cacp_ray.rundir.schema import ReportedFile
from cacp_ray.searching.budget import Budget, Ints, scale_to_budget, spend
from cacp_ray.workflows.ladder import Cut, Rung, open_cuts, read_rung
from cacp_ray.workflows.problem import Given
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.winners import frontier_rates

logger = logging.getLogger(__name__)


def trained_folders(run_dir: Path) -> dict[float, Path]:
    """Subnet folders of the fine-tuned rates of a run, by rate; empty before a fine-tuning ends."""
    return {
        row["rate"]: run_dir / row["path"]
        for row in read_result(run_dir, ReportedFile)["rates"]
        if row.get("finetuned_score") is not None
    }


@dataclass(frozen=True)
class Ladder:
    """The trained subnets of a run, from which others are cut.

    Attributes:
        setup: The problem of the run.
        folders: Subnet folder by trained rate.
        widths: Keep counts by trained rate.
        given: Network and task of a search that was given them as objects.
    """

    setup: Setup
    folders: Mapping[float, Path]
    widths: Mapping[float, Sequence[int]]
    given: Given | None = None

    @classmethod
    def open(cls, run_dir: Path, given: Given | None = None) -> "Ladder":
        """The ladder of a fine-tuned run.

        Raises:
            ArtifactError: The run is not fine-tuned, or its networks are missing.
        """
        config, folders = read_run_config(run_dir), trained_folders(run_dir)
        if not folders:
            raise ArtifactError(
                f"{run_dir} has no trained subnets: run `cacp-ray finetune` on it first"
            )
        widths = {
            rate: read_description(folder, "keep_counts", is_finetuned=True)["keep_counts"]
            for rate, folder in folders.items()
        }
        return cls(Setup.create(config, run_dir, given), folders, widths, given)

    def cut(self, rates: Sequence[float]) -> Iterator[Cut]:
        """Cuts each rate from the nearest larger trained one, in their order, and repairs it.

        Above every trained rate, the base network is cut.
        """
        opened: float | None = None
        cut_rate: Callable[[float], Cut] | None = None
        for rate in rates:
            # The trained rate itself too: its widths, repaired anew, are the network that is there.
            larger = min((each for each in self.folders if each >= rate), default=1.0)
            if larger not in self.folders:
                logger.warning(
                    "rate %s is above every trained rate (largest %s): cut from the base network",
                    format_rate(rate),
                    format_rate(max(self.folders)),
                )
            if cut_rate is None or larger != opened:
                opened, cut_rate = larger, self.open_rung(larger)
            yield cut_rate(rate)

    def open_rung(self, larger: float) -> Callable[[float], Cut]:
        """What cuts smaller rates from one trained rate, or at 1.0 from the base network."""
        if larger in self.folders:
            model = None if self.given is None else self.given.model
            rung = read_rung(self.folders[larger], model)
        else:
            counts = self.setup.budget.num_channels
            rung = Rung(1.0, self.setup.model, counts, [range(count) for count in counts])
        cut = open_cuts(self.setup, rung)
        return lambda rate: cut(rate, widths_between(self.setup.budget, self.widths, rate))


def answer_from_trained(
    run_dir: Path,
    rates: Sequence[float],
    *,
    save: bool,
    out: Path | None = None,
    given: Given | None = None,
) -> list[dict[str, Any]]:
    """Subnets for any rates, each cut from the nearest larger trained one and repaired.

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
    places = {rate: place_of(run_dir, rate, out) for rate in rates}
    for place in places.values() if save else ():
        check_new(place, "load it", "give another folder (--out)")
    ladder = Ladder.open(run_dir, given)
    for rate in rates:
        ladder.setup.budget.check(rate)
    return [
        as_row(cut) | (save_cut(run_dir, cut, places[rate], out) if save else {})
        for rate, cut in zip(rates, ladder.cut(rates), strict=True)
    ]


def trained_frontier(run_dir: Path) -> list[dict[str, Any]]:
    """What networks cut from the trained ones are worth, at tenths below the largest trained rate.

    A cut takes some seconds, so there are fewer than answers of a policy.
    """
    ladder = Ladder.open(run_dir)
    reachable = [
        rate
        for rate in frontier_rates(ladder.setup)
        if rate < max(ladder.folders) and rate not in ladder.folders and round(100 * rate) % 10 == 0
    ]
    names = ("rate", "cost_kept", "macs", "score", "cut_from")
    return [
        {name: row[name] for name in names}
        for row in map(as_row, ladder.cut(sorted(reachable, reverse=True)))
    ][::-1]


def as_row(cut: Cut) -> dict[str, Any]:
    """A row of `answer_from_trained`."""
    names = ("rate", "cost_kept", "macs", "params", "keep_counts")
    return {name: cut.description[name] for name in names} | {
        "score": cut.description["search"]["score"],
        "cut_from": cut.description["cut_from"]["rate"],
    }


def place_of(run_dir: Path, rate: float, out: Path | None) -> Path:
    """Subnet folder of a rate."""
    return out or run_dir / "subnets" / f"rate-{format_rate(rate)}"


def save_cut(run_dir: Path, cut: Cut, place: Path, out: Path | None) -> dict[str, Any]:
    """Writes a cut to its folder; returns its `path`, relative to the run unless `out` is given."""
    save_subnet(place, cut.net, cut.description)
    return {"path": str(place.absolute() if out else place.relative_to(run_dir))}


def widths_between(budget: Budget, known: Mapping[float, Sequence[int]], rate: float) -> Ints:
    """(G,) keep counts of a rate: between those of known rates, exactly within the budget.

    Each group's count is interpolated along the rate, up to the whole network at rate 1. Below
    the smallest known rate, that one's counts are scaled down.
    """
    widths = {1.0: budget.num_channels, **known}
    rates = sorted(widths)
    rows = np.array([widths[each] for each in rates], dtype=np.float64)
    desired = np.array([np.interp(rate, rates, column) for column in rows.T])[None]
    scaled = scale_to_budget(budget, desired / budget.num_channels, [rate])
    return spend(budget, scaled, [rate])[0]

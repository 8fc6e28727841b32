"""The network of a fine-tuned run that fits a wish: a largest loss, or a largest latency."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cacp_ray.config.saved import check_new
from cacp_ray.errors import ConfigError
from cacp_ray.evaluation.latency import use_threads
from cacp_ray.evaluation.latency_table import Settings
from cacp_ray.exporting.timing import make_timer
from cacp_ray.io.rates import format_rate
from cacp_ray.pruning.resizable import build_subnet
from cacp_ray.pruning.surgery import Cutter, all_tensors
from cacp_ray.rundir.directory import read_result
from cacp_ray.rundir.schema import ReportedFile
from cacp_ray.workflows.ladder import Cut
from cacp_ray.workflows.problem import Given
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.trained import Ladder, as_row, place_of, save_cut, widths_between

logger = logging.getLogger(__name__)

KEPT_KEYS = ("rate", "cost_kept", "macs", "params", "keep_counts", "path")


def answer_max_drop(
    run_dir: Path, drop: float, *, out: Path | None = None, given: Given | None = None
) -> dict[str, Any]:
    """The smallest network that loses at most `drop` against the base network.

    Trained subnets are taken as they are. Below the smallest that is good enough, smaller ones are
    cut from it by bisection over the rate, in steps of 0.01, and repaired; without one that is good
    enough, they are cut from the base network. All are judged on the search split, so expect a
    little more to be lost on other data.

    Args:
        run_dir: Folder of a run that has been fine-tuned.
        drop: What may be lost: points of a share such as top-1, else units of the score; 0 or more.
        out: Folder of the subnet; by default `subnets/rate-R` in the run.
        given: Network and task of a search that was given them as objects.

    Returns:
        A row as of `answer_from_trained`, with the `path` of the subnet. A trained subnet that no
        smaller one replaces is not written again.

    Raises:
        ArtifactError: The run is not fine-tuned, its networks are missing, or a folder exists.
        ConfigError: `drop` is negative, or no network is good enough.
    """
    if not (math.isfinite(drop) and drop >= 0):
        raise ConfigError(f"--max-drop {drop:g}: give 0 or more, such as 1.0")
    if out is not None:
        check_new(out, "load it", "give another folder (--out)")
    ladder = Ladder.open(run_dir, given)
    setup, result = ladder.setup, read_result(run_dir, ReportedFile)
    least = result["base"]["search"]["score"] - drop / setup.task.metric.scale
    good = {r["rate"]: r for r in result["rates"] if (r["finetuned_score"] or -math.inf) >= least}
    top = min(good, default=1.0)
    below = [rate for rate in ladder.folders if rate < top]
    floor = max(setup.budget.smallest / setup.budget.total, *below, 0.0)
    steps = [step / 100 for step in range(math.ceil(100 * floor + 1e-9), round(100 * top))]
    cut_rate = ladder.open_rung(top)
    found: Cut | None = None
    low, high = 0, len(steps)  # steps from `high` on are good enough, as far as is known
    while low < high:
        middle = (low + high) // 2
        cut = cut_rate(steps[middle])
        score = cut.description["search"]["score"]
        logger.info("rate %s: %s", format_rate(steps[middle]), setup.task.metric.describe(score))
        if score >= least:
            high, found = middle, cut
        else:
            low = middle + 1
    if found is not None:
        place = place_of(run_dir, steps[high], out)
        check_new(place, "load it", "give another folder (--out)")
        return as_row(found) | save_cut(run_dir, found, place, out)
    if not good:
        raise ConfigError(
            f"{run_dir}: no network is within {drop:g} of the base network on the search split: "
            "raise --max-drop"
        )
    row = good[top]
    known = {name: row[name] for name in KEPT_KEYS}
    return known | {"score": row["finetuned_score"], "cut_from": top}


def answer_latency(
    run_dir: Path,
    most_ms: float,
    settings: Settings,
    *,
    out: Path | None = None,
    given: Given | None = None,
) -> dict[str, Any]:
    """The largest network of at most so many milliseconds, trained or cut from a trained one.

    A run with a latency table is asked for predictions; else networks of the widths are measured
    here. Rates are tried by bisection in steps of 0.01.

    Args:
        run_dir: Folder of a run that has been fine-tuned.
        most_ms: Milliseconds of a pass; above 0.
        settings: How passes are measured where the run has no latency table.
        out: Folder of the subnet; by default `subnets/rate-R` in the run.
        given: Network and task of a search that was given them as objects.

    Returns:
        A row as of `answer_from_trained`, with its `path` and `latency_ms`.

    Raises:
        ArtifactError: The run is not fine-tuned, its networks are missing, or a folder exists.
        ConfigError: `most_ms` is not above 0, or no network is fast enough.
    """
    if not (math.isfinite(most_ms) and most_ms > 0):
        raise ConfigError(f"--latency {most_ms:g}: give milliseconds above 0, such as 1.5")
    if out is not None:
        check_new(out, "load it", "give another folder (--out)")
    ladder = Ladder.open(run_dir, given)
    setup, result = ladder.setup, read_result(run_dir, ReportedFile)
    time_rate = _find_clock(ladder, settings)
    least = math.ceil(100 * setup.budget.smallest / setup.budget.total + 1e-9)
    steps = [step / 100 for step in range(least, round(100 * max(ladder.folders)) + 1)]
    low, high = 0, len(steps)  # steps below `low` are fast enough, as far as is known
    times: dict[float, float] = {}
    while low < high:
        middle = (low + high) // 2
        rate = steps[middle]
        times[rate] = time_rate(rate)
        logger.info("rate %s: %.3g ms", format_rate(rate), times[rate])
        if times[rate] <= most_ms:
            low = middle + 1
        else:
            high = middle
    if low == 0:
        raise ConfigError(
            f"--latency {most_ms:g}: the smallest network takes {times[steps[0]]:.3g} ms"
        )
    rate = steps[low - 1]
    latency = {"latency_ms": times[rate]}
    for row in result["rates"]:
        if math.isclose(row["rate"], rate):
            known = {name: row[name] for name in KEPT_KEYS}
            return known | {"score": row["finetuned_score"], "cut_from": rate} | latency
    place = place_of(run_dir, rate, out)
    check_new(place, "load it", "give another folder (--out)")
    (cut,) = ladder.cut([rate])
    return as_row(cut) | save_cut(run_dir, cut, place, out) | latency


def _find_clock(ladder: Ladder, settings: Settings) -> Callable[[float], float]:
    """Milliseconds of a rate's network: predicted by the run's latency table, or measured here."""
    setup, cost_model = ladder.setup, ladder.setup.plan.cost_model

    def widths(rate: float) -> Any:
        known = ladder.widths.get(rate)
        return widths_between(setup.budget, ladder.widths, rate) if known is None else known

    if cost_model.latency is not None:
        predict = cost_model.latency
        return lambda rate: float(predict(widths(rate))) / 1e6
    timer, tensors, cut = make_timer(settings), all_tensors(setup.model), Cutter(setup.plan)
    x = _example(setup, settings.batch)

    def measure(rate: float) -> float:
        net = build_subnet(setup.model, tensors | cut(tensors, [int(n) for n in widths(rate)]))
        with use_threads(settings.threads):
            return median(timer([(net.eval(), x)], 5, 50, 2.0)[0])

    return measure


def _example(setup: Setup, batch: int) -> torch.Tensor:
    if not isinstance(setup.inputs, torch.Tensor):
        raise ConfigError("--latency: networks with several inputs are not timed here")
    return torch.cat([setup.inputs] * batch)

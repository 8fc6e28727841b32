"""The end of a run: result.json, whatever filled the run directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cacp_ray.io.files import write_json
from cacp_ray.pruning.cost import describe_cost
from cacp_ray.rundir.mirror import RunMirror
from cacp_ray.rundir.records import EpisodeRecord
from cacp_ray.workflows.latencies import add_latencies
from cacp_ray.workflows.setup import Setup


def finish_run(
    setup: Setup,
    run_dir: Path,
    base: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    evaluations: int,
    seconds: Mapping[str, float],
    mirror: RunMirror | None,
    answers: Sequence[EpisodeRecord] = (),
    learning: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes result.json, which marks the end of a run, and copies the run to its storage.

    Args:
        setup: The problem of the run.
        run_dir: Folder of the run.
        base: What model.json says of the base network.
        rows: One a rate, rising.
        evaluations: Distinct candidates that were measured.
        seconds: By phase.
        mirror: The copy of the run on other storage.
        answers: The policy's answers at any rates.
        learning: What the policy would have answered at moments of the search.
    """
    config = setup.config
    result = {
        "name": config.name,
        "strategy": config.strategy,
        "cost": describe_cost(config.cost),
        "metric": vars(setup.task.metric),
        "groups": [
            {
                "name": group.name,
                "num_channels": group.num_channels,
                "is_residual": group.is_residual,
            }
            for group in setup.plan.groups
        ],
        "base": base,
        "rates": rows,
        "frontier": [
            {name: getattr(answer, name) for name in ("rate", "cost_kept", "macs", "score")}
            for answer in answers
        ],
        "learning": learning,
        "evaluations": evaluations,
        "seconds": seconds,
    }
    if config.report.latency:
        add_latencies(result, setup, run_dir)
    write_json(run_dir / "result.json", result)
    if mirror is not None:
        mirror.finish(run_dir)
    return result

"""Latency of a run's networks, side by side, and what its latency table says of them."""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cacp_ray.errors import ConfigError
from cacp_ray.evaluation.classification import Classification
from cacp_ray.evaluation.latency import measure_latency, speedup, use_threads
from cacp_ray.evaluation.latency_table import COMMAND, Settings
from cacp_ray.exporting.timing import make_timer
from cacp_ray.models.factory import GIVEN
from cacp_ray.pruning.subnet import load_subnet
from cacp_ray.workflows.setup import Setup

logger = logging.getLogger(__name__)

LATENCY_BATCH = 64


def add_latencies(result: dict[str, Any], setup: Setup, run_dir: Path) -> None:
    """Measures base and subnets side by side: one image, then a batch; one thread, float32."""
    models = {"base": setup.model}
    is_given = setup.config.model.name.startswith(GIVEN)
    models |= {
        row["path"]: load_subnet(
            run_dir / row["path"],
            finetuned=False,
            trust=True,
            model=setup.model if is_given else None,
        )
        for row in result["rates"]
    }
    logger.info("measuring latency")
    images = example_batch(setup, LATENCY_BATCH)
    if images is None:
        return
    for prefix, x, repeats in (("", images[:1], 100), ("batch_", images, 7)):
        latencies = measure_latency(models, x, threads=1, repeats=repeats, seconds=10.0)
        result["base"][f"{prefix}latency_ms"] = latencies["base"].median_ms
        for row in result["rates"]:
            row[f"{prefix}latency_ms"] = latencies[row["path"]].median_ms
            row[f"{prefix}speedup"] = speedup(latencies["base"], latencies[row["path"]])
    result["latency_batch"] = len(images)
    predict_latencies(result, setup, models)


def example_batch(setup: Setup, size: int) -> Tensor | None:
    """A batch of inputs (N, ...); None where the network takes more than one tensor."""
    if isinstance(setup.task, Classification):
        return setup.search.take(size).tensors()[0]
    inputs = setup.inputs
    return torch.cat([inputs] * size) if isinstance(inputs, Tensor) else None


def predict_latencies(
    result: dict[str, Any], setup: Setup, models: Mapping[str, nn.Module], seconds: float = 10.0
) -> None:
    """Adds what a run's latency table says of each network, and a measurement made as the table.

    Args:
        result: Content of result.json; left alone where the run has no table.
        setup: The problem.
        models: `base`, and each rate's subnet by its path.
        seconds: Time for the measurement, which is left out where the table's device is missing.
    """
    table, cost_model = setup.latency, setup.plan.cost_model
    if table is None or cost_model.latency is None:
        return
    settings = table.settings
    result["latency_table"] = {
        **vars(settings), "processor": table.processor, "error": table.error
    }  # fmt: skip
    rows = {"base": (result["base"], cost_model.num_channels)}
    rows |= {row["path"]: (row, np.array(row["keep_counts"])) for row in result["rates"]}
    medians: dict[str, float] = {}
    if can_time(settings):
        x = torch.zeros(settings.batch, *setup.plan.input_shape, device=settings.device)
        nets = [(copy.deepcopy(model).to(settings.device), x) for model in models.values()]
        with use_threads(settings.threads):
            times = make_timer(settings)(nets, 1, 100, seconds)
        medians = {name: median(passed) for name, passed in zip(models, times, strict=True)}
    for name, (row, counts) in rows.items():
        row["predicted_latency_ms"] = int(cost_model.latency(counts)) / 1e6
        row["measured_latency_ms"] = medians.get(name)


def can_time(settings: Settings) -> bool:
    """Whether the device and the runtime of a latency table are here; a command's may not be."""
    if settings.runtime == COMMAND or (settings.device == "cuda" and not torch.cuda.is_available()):
        return False
    try:
        make_timer(settings)
    except ConfigError:
        return False
    return True

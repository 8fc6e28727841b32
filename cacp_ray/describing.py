"""What a run says of its base network: a line for the user, and the content of model.json."""

from typing import Any

from cacp_ray.config import ModelConfig, RunConfig
from cacp_ray.evaluation.preparation import Prepared
from cacp_ray.loading import Base
from cacp_ray.models.pretrained import describe_weights, is_published
from cacp_ray.pruning.cost import describe_total
from cacp_ray.training.metrics import measure_split


def describe_base(base: Base, config: RunConfig) -> str:
    """One line: the network, its groups, what is reachable, and the published accuracy."""
    budget = base.budget
    return (
        f"{config.model.name}: {len(base.plan.groups)} channel groups, "
        f"{describe_total(config.cost, budget.total)}, reachable rates "
        f"{budget.smallest / budget.total:.3f}-1, asked (kept): "
        f"{', '.join(f'{rate:.2f}' for rate in config.rates)}{describe_published(config.model)}"
    )


def describe_published(model: ModelConfig) -> str:
    """What is published about the accuracy of its weights, to compare the measured one with."""
    if model.weights is None or not is_published(model.name, model.weights):
        return ""
    found = describe_weights(model.name, model.weights)
    if found.top1 is None:
        return ""
    return f"; published top-1 {100 * found.top1:.2f} % on {found.data}"


def describe_accuracy(model: dict[str, Any]) -> str:
    """One line of what the base network was measured to be, from the content of model.json."""
    found = model["base"]["search"]
    return (
        f"base network: {100 * found['top1']:.2f} % top-1 on the search split "
        f"({found['images']:,} images)"
    )


def describe_model(base: Base, prepared: Prepared, config: RunConfig) -> dict[str, Any]:
    """The content of model.json; measures the base network on the search split in float32."""
    accuracy = measure_split(base.model, base.search)
    counts = base.plan.cost_model.num_channels
    return {
        "model": config.model.name,
        "weights": config.model.weights,
        "sha256": base.sha256,
        "input_shape": list(base.plan.input_shape),
        "classes": list(base.search.classes),
        "groups": [
            {
                "name": group.name,
                "members": list(group.members),
                "num_channels": group.num_channels,
                "is_residual": group.is_residual,
                "order": order.tolist(),
            }
            for group, order in zip(base.plan.groups, prepared.orders, strict=True)
        ],
        "orders": {
            name: [order.tolist() for order in other.orders]
            for name, other in prepared.others.items()
        },
        "base": {
            "model": config.model.name,
            "macs": int(base.plan.macs(counts)),
            "params": int(base.plan.params(counts)),
            "cost": base.budget.total,
            "search": dict(vars(accuracy)),
            "test": None,
            "latency_ms": None,
        },
    }

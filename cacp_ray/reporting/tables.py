"""The final tables on the terminal, and as plain text where there is none."""

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cacp_ray.pruning.cost import CostModel
from cacp_ray.reporting.summary import (
    DASH,
    Column,
    Row,
    accuracy_columns,
    frontier_columns,
    size_columns,
    standard_errors,
    summary_rows,
)

PLAIN_WIDTH = 110


def make_console(file: TextIO | None = None) -> Console:
    """A console on `file` (standard output); without a terminal 110 columns and no colour."""
    console = Console(file=file, highlight=False)
    if console.is_terminal:
        return console
    return Console(file=file, highlight=False, width=PLAIN_WIDTH, no_color=True)


def final_table(result: dict[str, Any]) -> RenderableType:
    """Size and accuracy of every rate, one table below the other: each fits 100 columns."""
    parts: list[RenderableType] = [size_table(result), accuracy_table(result)]
    errors = standard_errors(result)
    if errors:
        parts.append(Text(f"Standard error (binomial) on the {', on the '.join(errors)}."))
    return Group(*parts)


def size_table(result: dict[str, Any]) -> Table:
    """What you got: rate, cost, MACs, params, latency, speed-up and where it lies."""
    subnet = Column("subnet", "folder", lambda row: row.get("path") or DASH)
    title = f"What you got: {result['name']}"
    return _table(title, [*size_columns(result), subnet], summary_rows(result))


def accuracy_table(result: dict[str, Any]) -> Table:
    """How good it is: cut, recovered, fine-tuned, test."""
    columns = [size_columns(result)[0], *accuracy_columns(result)]
    return _table(
        "How good it is: top-1 accuracy in %, on the search or test split",
        columns,
        summary_rows(result),
    )


def frontier_table(result: dict[str, Any]) -> Table:
    """What the policy answers without a further search; no rows where it was not asked."""
    title = "The policy's answers, top-1 in %"
    return _table(title, frontier_columns(result), result["frontier"])


def groups_table(
    model: str, cost_model: CostModel, fixed: Mapping[str, str], reachable: tuple[float, float]
) -> RenderableType:
    """What `inspect` prints: groups, what stays whole and why, the reachable rates.

    Args:
        model: Its name.
        cost_model: Groups and cost.
        fixed: Layers whose outputs stay whole, with the reason.
        reachable: Smallest and largest rate (share of MACs kept).
    """
    counts = cost_model.num_channels
    # Row g: the network without any channel of group g; what is missing depends on the group.
    without = np.where(np.eye(len(counts), dtype=bool), 0, counts)
    macs, params = int(cost_model.macs(counts)), int(cost_model.params(counts))
    table = Table(title=f"{model}: {len(counts)} channel groups", box=box.SIMPLE_HEAD)
    for head in ("group (first layer)", "kind"):
        table.add_column(head)
    for head in ("channels", "layers", "% of MACs", "% of params"):
        table.add_column(head, justify="right")
    rows = zip(cost_model.groups, cost_model.macs(without), cost_model.params(without), strict=True)
    for group, macs_left, params_left in rows:
        layers = {member.rpartition(".")[0] for member in group.members}
        table.add_row(
            group.name,
            "residual stream" if group.is_residual else "inner",
            str(group.num_channels),
            str(len(layers)),
            f"{100 * (macs - int(macs_left)) / macs:.1f}",
            f"{100 * (params - int(params_left)) / params:.1f}",
        )
    lines = [f"whole: {name} ({reason})" for name, reason in fixed.items()]
    lines.append(f"{macs:,} MACs (FLOPs = 2 MACs), {params:,} parameters")
    lines.append(f"reachable rates (share of MACs kept): {reachable[0]:.4f} to {reachable[1]:g}")
    return Group(table, Text("\n".join(lines)))


def _table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        is_text = column.head == "subnet"
        table.add_column(
            Text(f"{column.head}\n{column.unit}"),
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(column.text(row)) for column in columns))
    return table

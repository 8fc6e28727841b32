"""Tables for the terminal, and as plain text where there is none."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cacp_ray.evaluation.measurement import Metric, Scored
from cacp_ray.io.rates import format_rate
from cacp_ray.pruning.cost import ChannelGroup, CostModel
from cacp_ray.reporting.benchmark import benchmark_blocks, conclude, describe_benchmark
from cacp_ray.reporting.stacks import Stack
from cacp_ray.reporting.summary import (
    Column,
    Row,
    answer_columns,
    binomial_error,
    format_percent,
    frontier_columns,
    metric_of,
    rate_column,
    result_blocks,
    sentence,
    stage_columns,
    standard_errors,
    summary_rows,
    words,
)

PLAIN_WIDTH = 110
MANY_GROUPS = 24


def make_console(file: TextIO | None = None) -> Console:
    """A console on `file` or standard output; 110 columns without colour if that is no terminal."""
    console = Console(file=file, highlight=False)
    if console.is_terminal:
        return console
    return Console(file=file, highlight=False, width=PLAIN_WIDTH, no_color=True)


def final_table(result: dict[str, Any]) -> RenderableType:
    """What every rate became, and below it what it was worth on the way there."""
    rows = summary_rows(result)
    name, *blocks = result_blocks(result)
    paths = [row["path"] for row in rows if row.get("path")]
    parts: list[RenderableType] = [
        Stack(f"What you got: {result['name']}", name, blocks, rows),
        "",
        *([Text(f"Subnets: {', '.join(paths)}"), ""] if paths else []),
        stages_table(result),
        "",
        Text(" ".join(f"{sentence(word)}: {text}" for word, text in words(result))),
    ]
    if errors := standard_errors(result):
        parts.append(Text(f"Standard error (binomial) on the {', on the '.join(errors)}."))
    return Group(*parts)


def stages_table(result: dict[str, Any]) -> Stack:
    """Score of every subnet on the way: cut, repaired and fine-tuned."""
    metric = metric_of(result)
    where = " on the search split" if metric.is_share else ""
    title = f"How it got there: {metric.heading}{where}"
    return Stack(title, [rate_column()], [stage_columns(result)], summary_rows(result))


def frontier_table(result: dict[str, Any]) -> Stack:
    """The policy's answers without a further search; no rows where it was not asked."""
    title = f"The policy's answers, {metric_of(result).heading}"
    name, *others = frontier_columns(result)
    return Stack(title, [name], [others], result["frontier"])


def answers_table(title: str, result: dict[str, Any], answers: Sequence[Row]) -> Stack:
    """The answers of `cacp-ray subnet`."""
    metric = metric_of(result)
    where = " on the search split" if metric.is_share else ""
    name, *others = answer_columns(result, answers)
    return Stack(f"{title}, {metric.heading}{where}", [name], [others], answers)


def benchmark_table(content: dict[str, Any]) -> RenderableType:
    """Output of `benchmark`: a row a network and format, and the conclusion."""
    names, *blocks = benchmark_blocks(content)
    return Group(
        Stack(f"Where it is deployed: {content['name']}", names, blocks, content["rows"]),
        "",
        Text(describe_benchmark(content)),
        *map(Text, conclude(content)),
    )


def measured_table(split: str, measured: Sequence[tuple[Path, float, Scored, Metric]]) -> Stack:
    """Output of `evaluate`: rate, measurement and folder of every subnet."""
    rows = [
        {"rate": rate, "path": str(folder), "scored": scored}
        for folder, rate, scored, _ in measured
    ]
    _, _, first, metric = measured[0]
    score = Column(
        metric.name, "%" * metric.is_share, lambda row: metric.format(row["scored"].score)
    )
    if metric.is_share:
        others = [
            Column("standard", "error", lambda row: _error(row["scored"])),
            Column("images", "", lambda row: f"{row['scored'].images:,}"),
        ]
    else:
        others = [
            Column(name, "", lambda row, name=name: f"{row['scored'].figures[name]:.5g}")
            for name in first.figures
        ]
    return Stack(
        f"Measured on the {split} split" if metric.is_share else "Measured",
        [rate_column(lambda row: format_rate(row["rate"]))],
        [[score], others, [Column("subnet", "folder", lambda row: row["path"])]],
        rows,
    )


def _error(scored: Scored) -> str:
    return format_percent(binomial_error(scored.score, scored.images))


def groups_table(
    name: str,
    about: str,
    cost_model: CostModel,
    least: NDArray[np.int64],
    fixed: Mapping[str, str],
    *,
    uncounted: str,
    base_channels: Mapping[str, int],
    with_members: bool,
) -> RenderableType:
    """Output of `inspect`: groups, savings of each, layers that stay whole, reachable rates.

    With more than `MANY_GROUPS` groups, those whose names differ only in numbers share a row.

    Args:
        name: Name of the network.
        about: Text on its input and outputs.
        cost_model: Groups and cost.
        least: (G,) smallest counts that a search may choose.
        fixed: Layers whose outputs stay whole, with the reason.
        uncounted: Operations with work that is not counted; empty where there are none.
        base_channels: Channels by group before the cut; empty for a network that was not cut.
        with_members: Whether to list each group with all its layers.
    """
    groups, whole = cost_model.groups, cost_model.num_channels
    macs, params = int(cost_model.macs(whole)), int(cost_model.params(whole))
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, group in enumerate(groups):
        is_alone = with_members or len(groups) <= MANY_GROUPS
        base = base_channels.get(group.name)
        key = (index if is_alone else 0, group.num_channels, base, group.is_residual)
        alike.setdefault(key, []).append(index)
    rows = [
        (short, [members[i] for i in chosen])
        for members in alike.values()
        for short, chosen in shorten_names([groups[i].name for i in members]).items()
    ]
    table = _plain_table("group (first layer)")
    heads = ("n", "channels", "least", "saves %\nof MACs", "\nof params")
    for head in heads[len(rows) == len(groups) :]:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for short, members in sorted(rows, key=lambda row: row[1][0]):
        group, base = groups[members[0]], base_channels.get(groups[members[0]].name)
        counts = whole.copy()
        counts[members] = least[members]
        cells = (
            str(len(members)),
            str(group.num_channels) + (f" of {base}" if base is not None else ""),
            str(least[members[0]]),
            f"{100 * (1 - int(cost_model.macs(counts)) / macs):.1f}",
            f"{100 * (1 - int(cost_model.params(counts)) / params):.1f}",
            "residual" if group.is_residual else "inner",
        )
        table.add_row(Text(short), *cells[len(rows) == len(groups) :])
    reachable = np.ceil(1e4 * int(cost_model.macs(least)) / macs) / 1e4
    unmoved = int(cost_model.macs(np.zeros_like(whole)))
    lines = [
        f"{macs:,} MACs (FLOPs = 2 MACs), {params:,} parameters",
        f"{100 * (1 - unmoved / macs):.1f} % of the MACs depend on a channel that can be cut",
        f"reachable rates (share of MACs kept): {reachable:.4f} to 1",
        *([f"not counted in MACs, for want of a formula: {uncounted}"] if uncounted else []),
        *_whole_lines(fixed, with_members=with_members),
    ]
    parts: list[RenderableType] = [
        Text(name, style="bold"),
        Text(f"{about}, {len(groups)} channel groups"),
        Text("least: the fewest channels that a search keeps, by pruning.floor"),
        Text("saves: what goes when only this row is cut to its least"),
        "",
        table,
    ]
    if with_members:
        parts += ["", _members_table(groups)]
    return Group(*parts, "", Text("\n".join(lines)))


def _members_table(groups: Sequence[ChannelGroup]) -> Table:
    table = _plain_table("group")
    table.add_column("layers whose channels go with it", overflow="fold")
    for group in groups:
        layers = dict.fromkeys(member.rpartition(".")[0] for member in group.members)
        table.add_row(Text(group.name), Text(", ".join(shorten_names(list(layers)))))
    return table


def _plain_table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column(first, overflow="fold")
    return table


def _whole_lines(fixed: Mapping[str, str], *, with_members: bool) -> list[str]:
    """Layers that stay whole, a line for each reason; reasons may differ in layer names."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in fixed.items():
        words = ["..." if "." in word.strip(".,") else word for word in reason.split()]
        by_reason.setdefault(" ".join(words), []).append(name)
    lines = []
    for reason, names in by_reason.items():
        short = list(shorten_names(names))
        shown = short if with_members or len(short) <= 4 else short[:3]
        more = f" and {len(short) - len(shown)} more (--members)" if len(short) > len(shown) else ""
        number = f"{len(names)} layers: " if len(names) > 1 else ""
        lines.append(f"stays whole ({reason}): {number}{', '.join(shown)}{more}")
    return lines


def shorten_names(names: Sequence[str]) -> dict[str, list[int]]:
    """Merges names that differ only in numbers, with a shell's braces; the values are indices.

    `layer1.0.conv1`, `layer1.1.conv1`, `layer1.2.conv1` become `layer1.{0..2}.conv1`. A number that
    ends the last part (`conv1`) says what a layer does, so such names stay apart.
    """
    rows = [(re.split(r"(\d+)", name), [index]) for index, name in enumerate(names)]
    longest = max((len(parts) for parts, _ in rows), default=0)
    for place in range(longest - 2, 0, -2):  # numbers stand at odd places; last ones merge first
        merged: dict[tuple[str, ...], list[tuple[list[str], list[int]]]] = {}
        for parts, indices in rows:
            after = "".join(parts[place + 1 :])
            is_index = "." in after or (place < len(parts) and parts[place - 1].endswith("."))
            key = [*parts[:place], "", *parts[place + 1 :]] if is_index else parts
            merged.setdefault(tuple(key), []).append((parts, indices))
        rows = []
        for key, alike in merged.items():
            parts = list(key)
            if len(alike) > 1:
                parts[place] = _braces([parts[place] for parts, _ in alike])
            else:
                parts = alike[0][0]
            rows.append((parts, [i for _, indices in alike for i in indices]))
    return {"".join(parts): indices for parts, indices in rows}


def _braces(numbers: Sequence[str]) -> str:
    """Numbers in a shell's braces: 0, 1, 2, 5 become `{0..2,5}`."""
    runs: list[list[str]] = []
    for number in sorted(numbers, key=int):
        if runs and int(number) == int(runs[-1][-1]) + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = [f"{run[0]}..{run[-1]}" if len(run) > 1 else run[0] for run in runs]
    return f"{{{','.join(spans)}}}"

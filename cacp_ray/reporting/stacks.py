"""Tables that fit the terminal: columns that have no room move to a further table below.

Nothing is cut or wrapped, unless one column alone is wider than the terminal.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from cacp_ray.reporting.summary import Column, Row

MAX_RUN_NAME = 34  # columns; a longer path is folded
TEXT_HEADS = ("subnet", "run", "rates", "format")


@dataclass(frozen=True)
class Stack:
    """A title above one table, or above as many as the width needs.

    Attributes:
        title: A line above all; may be empty.
        names: Columns that begin every table, such as the rate.
        blocks: Other columns, in order. A block that has no room moves down as a whole; one that is
            too wide by itself is divided.
        rows: Rows of all tables.
    """

    title: str
    names: Sequence[Column]
    blocks: Sequence[Sequence[Column]]
    rows: Sequence[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The tables for the width of the console, with empty lines between them."""
        if self.title:
            yield Text(self.title, style="bold")
        for columns in self._divide(options.max_width):
            yield Text("")
            yield make_table(columns, self.rows)

    def _divide(self, width: int) -> list[list[Column]]:
        """Columns of each table."""
        names = [*self.names]
        whole = [*names, *(column for block in self.blocks for column in block)]
        if self._fits(whole, width):
            return [whole]
        tables = [names]
        for block in self.blocks:
            if self._fits([*tables[-1], *block], width):
                tables[-1] = [*tables[-1], *block]
                continue
            if len(tables[-1]) > len(names):
                tables.append(names)
            for column in block:
                if len(tables[-1]) > len(names) and not self._fits([*tables[-1], column], width):
                    tables.append(names)
                tables[-1] = [*tables[-1], column]
        return tables

    def _fits(self, columns: Sequence[Column], width: int) -> bool:
        table = make_table(columns, self.rows)
        return Console(width=10_000).measure(table).maximum <= width


def make_table(columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """A table of right-aligned numbers; columns of `TEXT_HEADS` are text."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(
            Text(f"{column.head}\n{column.unit}" if column.unit else column.head),
            justify="left" if column.head in TEXT_HEADS else "right",
            max_width=MAX_RUN_NAME if column.head == "run" else None,
            overflow="fold",
            vertical="top",
        )
    for row in rows:
        table.add_row(*(Text(column.text(row)) for column in columns))
    return table

"""The command line. Each command loads, calls the library once, and prints."""

from cacp_ray.cli import data, latency, machines, networks, results, searching, starting, subnets
from cacp_ray.cli.app import app, main

# Commands in the order of use, by panel of `--help`; the modules above have added them.
PANELS = {
    "Begin": ("demo", "init", "schema", "inspect", "train"),
    "Search and train": ("run", "search", "finetune", "report", "compare", "tune-agent"),
    "Use the networks": ("subnet", "evaluate", "benchmark", "export", "push"),
    "Clusters": ("watch-spot",),
}
_order = [name for names in PANELS.values() for name in names]
_panels = {name: panel for panel, names in PANELS.items() for name in names}


def _name(command: object) -> str:
    named = getattr(command, "name", None)
    return named or command.callback.__name__.replace("_", "-")  # type: ignore[attr-defined]


app.registered_commands.sort(key=lambda command: _order.index(_name(command)))
for _command in app.registered_commands:
    _command.rich_help_panel = _panels[_name(_command)]
for _group in app.registered_groups:
    _group.rich_help_panel = "Data and devices"

__all__ = [
    "app", "data", "latency", "machines", "main", "networks", "results", "searching", "starting",
    "subnets",
]  # fmt: skip

"""Selectors of Ray nodes by their labels: `a`, `!a`, `in(a, b)` or `!in(a, b)` for each label.

Source: Ray 2.60's `label_selector`, whose own check and match are private to it. Labels are those
of `ray start --labels`, of Kubernetes pods under KubeRay, and Ray's own, such as
`ray.io/accelerator-type` and `ray.io/market-type`.
"""

import re
from collections.abc import Mapping

NAME = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
KEY = re.compile(rf"([a-zA-Z0-9]([a-zA-Z0-9.-]{{0,251}}[a-zA-Z0-9])?/)?{NAME}")
CONDITION = re.compile(rf"!?({NAME}|in\({NAME}(, ?{NAME})*\))")

Selector = Mapping[str, str]
ANY: Selector = {}  # every node


def check_selector(selector: dict[str, str]) -> dict[str, str]:
    """Returns a selector that Ray would take.

    Raises:
        ValueError: It would refuse it.
    """
    for key, condition in selector.items():
        if not KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no name of a label, such as zone or ray.io/market-type")
        if not CONDITION.fullmatch(condition):
            raise ValueError(f"{key}: {condition!r} is none of a, !a, in(a, b) and !in(a, b)")
    return selector


def matches(selector: Selector, labels: Mapping[str, str]) -> bool:
    """Whether a node with these labels is one of those selected; all conditions must hold."""
    return all(_holds(condition, labels.get(key)) for key, condition in selector.items())


def describe_selector(selector: Selector) -> str:
    """One line for people."""
    return ", ".join(f"{key}={condition}" for key, condition in selector.items())


def _holds(condition: str, label: str | None) -> bool:
    wanted = condition.removeprefix("!")
    if wanted.startswith("in("):
        values = [value.strip() for value in wanted[3:-1].split(",")]
    else:
        values = [wanted]
    return (label in values) != condition.startswith("!")

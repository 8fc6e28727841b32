"""The figures of a finished run as text: one definition for the terminal and for the HTML report.

Takes the content of result.json. A value that was not measured (yet) becomes a dash.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"

ON_SEARCH = (  # accuracies of a rate on the whole search split
    "uniform_top1",
    "policy_top1",
    "policy_recovered_top1",
    "search_recovered_top1",
    "top1",
    "finetuned_top1",
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        head: Name of the figure.
        unit: Below the head, or "".
        text: A row's cell.
    """

    head: str
    unit: str
    text: Callable[[Row], str]


def is_missing(value: float | None) -> bool:
    """Whether a figure is absent or not a number."""
    return value is None or math.isnan(value)


def format_number(value: float | None, digits: int) -> str:
    """Fixed digits; a dash where the value is missing."""
    return DASH if value is None or math.isnan(value) else f"{value:.{digits}f}"


def format_percent(share: float | None, digits: int = 2) -> str:
    """A share in [0, 1] in percent, without the sign."""
    return DASH if share is None else format_number(100 * share, digits)


def format_seconds(seconds: float | None) -> str:
    """A duration to read at a glance: 4.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds is None or math.isnan(seconds):
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_macs(macs: float) -> str:
    """MACs with their unit."""
    unit, scale, digits = _macs_unit(macs)
    return f"{macs / scale:.{digits}f} {unit}"


def summary_rows(result: dict[str, Any]) -> list[Row]:
    """The base network, then each rate as in result.json, smallest first; `label` names the row."""
    base = result["base"]
    whole = {
        "label": "base",
        "cost_kept": 1.0,
        "macs": base["macs"],
        "params": base["params"],
        "top1": _top1(base, "search"),
        "test_top1": _top1(base, "test"),
        "latency_ms": base.get("latency_ms"),
        "speedup": None if is_missing(base.get("latency_ms")) else 1.0,
        "batch_speedup": None if is_missing(base.get("batch_latency_ms")) else 1.0,
        "predicted_latency_ms": base.get("predicted_latency_ms"),
        "measured_latency_ms": base.get("measured_latency_ms"),
    }
    rows = sorted(result["rates"], key=lambda row: row["rate"])
    return [whole, *({"label": f"{row['rate']:.2f}"} | row for row in rows)]


def short_columns(result: dict[str, Any]) -> list[Column]:
    """The result in five columns: on the test split once fine-tuned, on the search split before."""
    split, key = ("test", "test_top1") if _has(result, "test_top1") else ("search", "top1")
    base_top1 = _top1(result["base"], split)
    return [
        Column("rate", "kept", lambda row: row["label"]),
        _count_column("MACs", *_macs_unit(result["base"]["macs"])),
        Column("speed-up", "1 image", lambda row: _format_speedup(row.get("speedup"))),
        Column("top-1", f"%, {split}", lambda row: format_percent(row.get(key))),
        Column("change", "points", lambda row: _format_change(row, key, base_top1)),
    ]


def size_columns(result: dict[str, Any]) -> list[Column]:
    """What you got: how small and how fast. Units fit the base network and hold for all rows."""
    return [
        Column("rate", "kept", lambda row: row["label"]),
        *_cost_columns(result),
        _count_column("params", *_params_unit(result["base"]["params"])),
        Column("latency", "ms, 1 image", lambda row: format_number(row.get("latency_ms"), 2)),
        Column("speed-up", "1 image", lambda row: _format_speedup(row.get("speedup"))),
        Column(
            "speed-up",
            f"{result.get('latency_batch', 'batch')} images",
            lambda row: _format_speedup(row.get("batch_speedup")),
        ),
        *_prediction_columns(result),
    ]


def _prediction_columns(result: dict[str, Any]) -> list[Column]:
    """What the latency table says, and what was measured with the table's settings."""
    if not result.get("latency_table"):
        return []
    return [
        Column("predicted", "ms", lambda row: format_number(row.get("predicted_latency_ms"), 2)),
        Column("measured", "ms", lambda row: format_number(row.get("measured_latency_ms"), 2)),
    ]


def accuracy_columns(result: dict[str, Any]) -> list[Column]:
    """How good it is: top-1 in percent, on the search split but for the last two.

    `words` says what the heads mean. What no rate has, such as a policy, has no column.
    """
    base_top1 = _top1(result["base"], "test")
    measured = [
        ("uniform", "scored", "uniform_top1"),
        ("policy", "scored", "policy_top1"),
        ("search", "scored", "search_top1"),
    ]
    if _has(result, "policy_top1"):  # else the winner is the search's
        measured.append(("policy", "final", "policy_recovered_top1"))
        measured.append(("search", "final", "search_recovered_top1"))
    return [
        *(_accuracy_column(*column) for column in measured if _has(result, column[-1])),
        _accuracy_column("winner", "final", "top1"),
        _accuracy_column("tuned", "on search", "finetuned_top1"),
        _accuracy_column("tuned", "on test", "test_top1"),
        Column("change", "on test", lambda row: _format_change(row, "test_top1", base_top1)),
    ]


def words(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What the heads of `accuracy_columns` mean, as this run has them; a sentence each."""
    has_policy, has_search = _has(result, "policy_top1"), _has(result, "search_top1")
    layers = any(row.get("sequential") for row in result["rates"])
    repaired = "repaired layer by layer where that is better" if layers else "repaired alike"
    images = search_images(result)
    part = f", on {images:,} images" if images else ""
    known = [
        ("uniform", "every group keeps the same share.", _has(result, "uniform_top1")),
        ("policy", "what the trained policy itself answers.", has_policy),
        ("search", f"the best candidate of the search{part}.", has_search),
        ("winner", "the better of the two when repaired, which is saved.", has_policy),
        ("winner", "the network that is saved.", not has_policy),
        (
            "scored",
            "repaired without training, as the search scores candidates.",
            has_policy or has_search,
        ),
        ("final", f"as it is saved, {repaired}, and measured in float32.", True),
        ("tuned", "the winner, fine-tuned.", True),
        ("change", "points against the base network.", True),
    ]
    return [(word, meaning) for word, meaning, is_used in known if is_used]


def frontier_columns(result: dict[str, Any]) -> list[Column]:
    """What the policy answers at rates without a further search."""
    return [
        Column("rate", "kept", lambda row: f"{row['rate']:.2f}"),
        *_cost_columns(result),
        _accuracy_column("policy", "scored", "top1"),
    ]


def answer_columns(result: dict[str, Any], answers: Sequence[Row]) -> list[Column]:
    """What `cacp-ray subnet` found: the policy's own answer, the best around it, what is saved."""
    searched = [_accuracy_column("best", "scored", "scored_top1")]
    saved = [_accuracy_column("saved", "final", "top1")]
    return [
        *frontier_columns(result)[:-1],
        _accuracy_column("policy", "scored", "policy_top1"),
        *(searched if any(row["scored_top1"] != row["policy_top1"] for row in answers) else []),
        *(saved if any("path" in row for row in answers) else []),
    ]


def standard_errors(result: dict[str, Any]) -> list[str]:
    """One sentence a split: the binomial standard errors of its accuracies in the tables."""
    base, rates = result["base"], result["rates"]
    search = [row.get(key) for row in rates for key in ON_SEARCH]
    if not search_images(result):
        search += [row.get("search_top1") for row in rates]
    test = [row.get("test_top1") for row in rates]
    return [
        *_standard_error("search", [_top1(base, "search"), *search], _images(base, "search")),
        *_standard_error("test", [_top1(base, "test"), *test], _images(base, "test")),
    ]


def _standard_error(split: str, shares: Iterable[float | None], images: int | None) -> list[str]:
    known = [share for share in shares if share is not None and not math.isnan(share)]
    if not known or not images:
        return []
    errors = sorted(100 * math.sqrt(share * (1 - share) / images) for share in known)
    low, high = f"{errors[0]:.2f}", f"{errors[-1]:.2f}"
    span = low if low == high else f"{low} to {high}"
    return [f"{split} split: {span} points ({images:,} images)"]


def _cost_columns(result: dict[str, Any]) -> list[Column]:
    cost = "MACs" if result["cost"] == "macs" else result["cost"]
    cost = "limits" if " and " in cost else cost  # of several costs
    return [
        Column("cost kept", f"% of {cost}", lambda row: format_percent(row["cost_kept"])),
        _count_column("MACs", *_macs_unit(result["base"]["macs"])),
    ]


def _count_column(head: str, unit: str, scale: float, digits: int) -> Column:
    return Column(head, unit, lambda row: format_number(row[head.lower()] / scale, digits))


def _accuracy_column(head: str, split: str, key: str) -> Column:
    return Column(head, split, lambda row: format_percent(row.get(key)))


def _macs_unit(macs: float) -> tuple[str, float, int]:
    unit, scale = ("G", 1e9) if macs >= 1e9 else ("M", 1e6)
    return unit, scale, _digits(macs / scale)


def _params_unit(params: float) -> tuple[str, float, int]:
    unit, scale = ("M", 1e6) if params >= 1e7 else ("k", 1e3)
    return unit, scale, _digits(params / scale)


def _digits(largest: float) -> int:
    return 1 if largest >= 100 else 2 if largest >= 10 else 3


def search_images(result: dict[str, Any]) -> int | None:
    """Images that scored the candidates of the search, None where that is the whole split."""
    images = max((row.get("search_images") or 0 for row in result["rates"]), default=0)
    return images if 0 < images < (_images(result["base"], "search") or 0) else None


def _has(result: dict[str, Any], key: str) -> bool:
    """Whether any rate has the figure."""
    return any(not is_missing(row.get(key)) for row in result["rates"])


def _top1(base: dict[str, Any], split: str) -> float | None:
    return (base.get(split) or {}).get("top1")


def _images(base: dict[str, Any], split: str) -> int | None:
    return (base.get(split) or {}).get("images")


def _format_speedup(factor: float | None) -> str:
    text = format_number(factor, 2)
    return text if text == DASH else text + TIMES


def _format_change(row: Row, key: str, base_top1: float | None) -> str:
    top1 = row.get(key)
    if row["label"] == "base" or top1 is None or base_top1 is None:
        return DASH
    return f"{100 * (top1 - base_top1):+.2f}".replace("-", MINUS)

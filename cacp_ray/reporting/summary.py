"""The numbers of a finished run as text, for the terminal and the HTML report alike.

The input is the content of result.json. A value that was not measured (yet) becomes a dash.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cacp_ray.evaluation.measurement import DASH, TOP1, Metric
from cacp_ray.io.rates import format_rate

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"

# Keys of accuracies on the whole search split.
ON_SEARCH = (
    "uniform_score",
    "policy_score",
    "policy_recovered_score",
    "search_recovered_score",
    "score",
    "finetuned_score",
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    head: str
    unit: str  # stands below the head; may be empty
    text: Callable[[Row], str]  # makes the cell of a row


def format_number(value: float | None, digits: int) -> str:
    """A number with fixed digits; a dash where the value is missing."""
    return DASH if value is None or math.isnan(value) else f"{value:.{digits}f}"


def format_percent(share: float | None, digits: int = 2) -> str:
    """A share in [0, 1] as percent, without the percent sign."""
    return DASH if share is None else format_number(100 * share, digits)


def cost_name(cost: str) -> str:
    """What a rate limits, as tables and figures write it."""
    return "MACs" if cost == "macs" else cost


def format_seconds(seconds: float | None) -> str:
    """A duration such as 4.2 s, 3 min 20 s, 2 h 05 min."""
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


def sentence(text: str) -> str:
    """The text as the beginning of a sentence; names such as `PSNR (dB)` keep their letters."""
    return text[:1].upper() + text[1:]


def count_examples(metric: Metric, count: object) -> str:
    """A number of images, or of a task's examples, such as `1 image` or `64 examples`."""
    return f"{count} {metric.example}{'' if count == 1 else 's'}"


def format_setting(value: Any) -> str:
    """A float with three digits, any other value as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def format_macs(macs: float) -> str:
    """MACs with their unit."""
    unit, scale, digits = _macs_unit(macs)
    return f"{macs / scale:.{digits}f} {unit}"


def summary_rows(result: dict[str, Any]) -> list[Row]:
    """Rows of the base network and of each rate, smallest first; `label` names a row."""
    base = result["base"]
    whole = base | {
        "label": "base",
        "cost_kept": 1.0,
        "score": base_score(result, "search"),
        "test_score": base_score(result, "test"),
        "speedup": None if base.get("latency_ms") is None else 1.0,
        "batch_speedup": None if base.get("batch_latency_ms") is None else 1.0,
    }
    rows = sorted(result["rates"], key=lambda row: row["rate"])
    return [whole, *({"label": format_rate(row["rate"])} | row for row in rows)]


def rate_column(text: Callable[[Row], str] = lambda row: row["label"]) -> Column:
    """The column that names a row of `summary_rows`."""
    return Column("rate", "kept", text)


def short_columns(result: dict[str, Any]) -> list[Column]:
    """The result in five columns; accuracy is on the test split once fine-tuned, else on search."""
    return [
        rate_column(),
        _count_column("MACs", *_macs_unit(result["base"]["macs"])),
        *_speed_columns(result)[1:2],
        *_score_columns(result),
    ]


def result_blocks(result: dict[str, Any]) -> list[list[Column]]:
    """The result in all columns: name; score and MACs; other sizes; speed; predicted latency."""
    cost, macs = _cost_columns(result)
    params = _count_column("params", *_params_unit(result["base"]["params"]))
    blocks = [[*_score_columns(result), macs], [cost, params], _speed_columns(result)]
    return [[rate_column()], *blocks, _predicted_columns(result)]


def size_columns(result: dict[str, Any]) -> list[Column]:
    """Columns of size and speed; the base network sets the units of all rows."""
    return [
        rate_column(),
        *_cost_columns(result),
        _count_column("params", *_params_unit(result["base"]["params"])),
        *_speed_columns(result),
        *_predicted_columns(result),
    ]


def _predicted_columns(result: dict[str, Any]) -> list[Column]:
    """Latency from the latency table, if any, and as measured with the table's settings."""
    if not result.get("latency_table"):
        return []
    return [
        Column("predicted", "ms", lambda row: format_number(row.get("predicted_latency_ms"), 2)),
        Column("measured", "ms", lambda row: format_number(row.get("measured_latency_ms"), 2)),
    ]


def _score_columns(result: dict[str, Any]) -> list[Column]:
    """The last score that was measured, and its distance from the base network's."""
    metric = metric_of(result)
    split, key = ("test", "test_score") if _has(result, "test_score") else ("search", "score")
    unit = f"%, {split}" if metric.is_share else "fine-tuned"
    if not metric.is_share:
        key = "finetuned_score" if _has(result, "finetuned_score") else "score"
        unit = unit if key == "finetuned_score" else ""
    return [
        Column(metric.name, unit, lambda row: metric.format(row.get(key))),
        _change_column(result, "points" if metric.is_share else "", split, key),
    ]


def has_latency(result: dict[str, Any]) -> bool:
    """Whether the latency of the run's networks was measured; `report.latency` says so."""
    return result["base"].get("latency_ms") is not None


def _speed_columns(result: dict[str, Any]) -> list[Column]:
    """Latency of one image, speed-up for one image and for a batch; none where not measured."""
    if not has_latency(result):
        return []
    metric = metric_of(result)
    one, batch = (
        count_examples(metric, count) for count in (1, result.get("latency_batch", "batch"))
    )
    return [
        Column("ms for", one, lambda row: format_number(row.get("latency_ms"), 2)),
        Column("speed-up", one, lambda row: _format_speedup(row.get("speedup"))),
        Column("speed-up", batch, lambda row: _format_speedup(row.get("batch_speedup"))),
    ]


def accuracy_columns(result: dict[str, Any]) -> list[Column]:
    """Columns of scores: of the built-in task on the search split except for the last two.

    `words` explains the heads. A number that no rate has, such as a policy's, gets no column.
    """
    metric = metric_of(result)
    if not metric.is_share:  # a task of the user's own has one way of scoring
        key = "finetuned_score" if _has(result, "finetuned_score") else "score"
        return [*stage_columns(result), _change_column(result, "", "search", key)]
    return [
        *stage_columns(result),
        _score_column(metric, "tuned", "on test", "test_score"),
        _change_column(result, "on test", "test", "test_score"),
    ]


def stage_columns(result: dict[str, Any]) -> list[Column]:
    """Columns of scores on the way: scored by the search, repaired, fine-tuned."""
    metric = metric_of(result)
    measured = [
        ("uniform", "scored", "uniform_score"),
        ("policy", "scored", "policy_score"),
        ("search", "scored", "search_score"),
    ]
    if _has(result, "policy_score"):  # without a policy, the winner comes from the search
        measured.append(("policy", "final", "policy_recovered_score"))
        measured.append(("search", "final", "search_recovered_score"))
    if is_learned(result):  # the winner itself
        measured.pop()
    return [
        *(_score_column(metric, *column) for column in measured if _has(result, column[-1])),
        _score_column(metric, "winner", "final", "score"),
        _score_column(metric, "tuned", "on search" * metric.is_share, "finetuned_score"),
    ]


def is_learned(result: dict[str, Any]) -> bool:
    """Whether widths and weights come from a training, which scored no candidates."""
    return any(row.get("learned") for row in result["rates"])


def words(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The heads of `accuracy_columns` in this run, each with its meaning."""
    has_policy, has_search = _has(result, "policy_score"), _has(result, "search_score")
    is_share = metric_of(result).is_share
    layers = any(row.get("sequential") for row in result["rates"])
    repaired = "repaired layer by layer where that is better" if layers else "repaired alike"
    images = search_images(result)
    part = f", on {images:,} images" if images else ""
    as_scored = "as the search scores candidates"
    if is_learned(result):
        repaired, has_search = "BN statistics estimated anew", False
    is_ladder = any(row.get("cut_from") for row in result["rates"])
    known = [
        ("uniform", "every group keeps the same share.", _has(result, "uniform_score")),
        ("policy", "what the trained policy itself answers.", has_policy),
        ("search", f"the best candidate of the search{part}.", has_search),
        ("winner", "the better of the two when repaired, which is saved.", has_policy),
        ("winner", "the network with the widths that were learned.", is_learned(result)),
        ("winner", "the network that is saved.", not has_policy and not is_learned(result)),
        ("scored", f"repaired without training, {as_scored}.", has_policy or has_search),
        ("final", f"as it is saved, {repaired}, and measured in float32.", is_share),
        ("final", f"as it is saved, {repaired}.", not is_share),
        ("tuned", "the winner, fine-tuned.", not is_ladder),
        ("tuned", "cut from the next larger tuned network, and fine-tuned.", is_ladder),
        ("change", f"{'points against' if is_share else 'minus'} the base network.", True),
    ]
    return [(word, meaning) for word, meaning, is_used in known if is_used]


def frontier_columns(result: dict[str, Any]) -> list[Column]:
    """Columns of the policy's answers at rates without a further search."""
    return [
        rate_column(lambda row: format_rate(row["rate"])),
        *_cost_columns(result),
        _score_column(metric_of(result), "policy", "scored", "score"),
    ]


def answer_columns(result: dict[str, Any], answers: Sequence[Row]) -> list[Column]:
    """Columns of `cacp-ray subnet`.

    The policy's answer, the best around it and the saved network, or what was cut from which
    trained subnet.
    """
    columns, metric = frontier_columns(result)[:-1], metric_of(result)
    if any("cut_from" in row for row in answers):
        columns.append(Column("cut", "from", lambda row: f"{row['cut_from']:.2f}"))
        return [*columns, _score_column(metric, "score", "", "score")]
    columns.append(_score_column(metric, "policy", "scored", "policy_score"))
    if any(row["scored_score"] != row["policy_score"] for row in answers):
        columns.append(_score_column(metric, "best", "scored", "scored_score"))
    if any("path" in row for row in answers):
        columns.append(_score_column(metric, "saved", "final", "score"))
    return columns


def standard_errors(result: dict[str, Any]) -> list[str]:
    """Binomial standard errors of the accuracies in the tables, one text for each split.

    There are none for a score that is no share of images.
    """
    if not metric_of(result).is_share:
        return []
    on_search = ON_SEARCH if search_images(result) else (*ON_SEARCH, "search_score")
    texts: list[str] = []
    for split, keys in (("search", on_search), ("test", ("test_score",))):
        shares = [base_score(result, split)]
        shares += [row.get(key) for row in result["rates"] for key in keys]
        known = [share for share in shares if share is not None]
        images = _images(result, split)
        if known and images:
            errors = sorted(100 * binomial_error(share, images) for share in known)
            low, high = f"{errors[0]:.2f}", f"{errors[-1]:.2f}"
            span = low if low == high else f"{low} to {high}"
            texts.append(f"{split} split: {span} points ({images:,} images)")
    return texts


def binomial_error(share: float, images: int) -> float:
    """Standard error of a share of images."""
    return math.sqrt(share * (1 - share) / images)


def _cost_columns(result: dict[str, Any]) -> list[Column]:
    cost = "limits" if " and " in result["cost"] else cost_name(result["cost"])
    return [
        Column("cost kept", f"% of {cost}", lambda row: format_percent(row["cost_kept"])),
        _count_column("MACs", *_macs_unit(result["base"]["macs"])),
    ]


def _count_column(head: str, unit: str, scale: float, digits: int) -> Column:
    return Column(head, unit, lambda row: format_number(row[head.lower()] / scale, digits))


def _score_column(metric: Metric, head: str, split: str, key: str) -> Column:
    return Column(head, split, lambda row: metric.format(row.get(key)))


def _macs_unit(macs: float) -> tuple[str, float, int]:
    return ("G", 1e9, _digits(macs / 1e9)) if macs >= 1e9 else ("M", 1e6, _digits(macs / 1e6))


def _params_unit(params: float) -> tuple[str, float, int]:
    return ("M", 1e6, _digits(params / 1e6)) if params >= 1e7 else ("k", 1e3, _digits(params / 1e3))


def _digits(largest: float) -> int:
    return 1 if largest >= 100 else 2 if largest >= 10 else 3


def search_images(result: dict[str, Any]) -> int | None:
    """Number of images that scored candidates; None where that is the whole search split."""
    images = max((row.get("search_images") or 0 for row in result["rates"]), default=0)
    return images if 0 < images < (_images(result, "search") or 0) else None


def metric_of(result: dict[str, Any]) -> Metric:
    """What the scores of a run or a tuning measure; earlier tunings had images of classes alone."""
    return Metric(**result["metric"]) if result.get("metric") else TOP1


def base_score(result: dict[str, Any], split: str) -> float | None:
    """Score of the base network on a split; None where it was not measured."""
    return (result["base"].get(split) or {}).get("score")


def _has(result: dict[str, Any], key: str) -> bool:
    """Whether any rate has a value for the key."""
    return any(row.get(key) is not None for row in result["rates"])


def _images(result: dict[str, Any], split: str) -> int | None:
    return (result["base"].get(split) or {}).get("images")


def _format_speedup(factor: float | None) -> str:
    text = format_number(factor, 2)
    return text if text == DASH else text + TIMES


def _change_column(result: dict[str, Any], unit: str, split: str, key: str) -> Column:
    base, metric = base_score(result, split), metric_of(result)

    def change(row: Row) -> str:
        if row["label"] == "base" or row.get(key) is None or base is None:
            return DASH
        return metric.difference(row[key], base).replace("-", MINUS)

    return Column("change", unit, change)

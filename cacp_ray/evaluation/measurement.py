"""What travels between the search and the evaluators: a few hundred bytes each way."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Status = Literal["ok", "failed", "stopped"]
SubnetKey = tuple[tuple[int, ...], str]  # keep counts and criterion: what tells candidates apart


@dataclass(frozen=True)
class Candidate:
    """Keep counts to score.

    Attributes:
        rate: Compression rate whose budget it meets, in (0, 1]; 1 for a probe of a strategy.
        keep_counts: Channels kept, one entry a group.
        criterion: Its importance order says which channels are kept; empty for the run's.
        index: Unique in a run, in the order asked; the search loop numbers what strategies propose.
        images: Length of the search-split prefix to score; None for the whole split.
        opponent: Hits of the network to beat (`cacp_ray.evaluation.racing`); empty where the
            candidate is scored to the end.
    """

    rate: float
    keep_counts: tuple[int, ...]
    criterion: str = ""
    index: int = -1
    images: int | None = None
    opponent: str = ""

    @property
    def key(self) -> SubnetKey:
        """What tells candidates apart."""
        return self.keep_counts, self.criterion


DASH = "\N{EN DASH}"  # for a value that was not measured


@dataclass(frozen=True)
class Metric:
    """What a score measures, for tables and figures.

    Attributes:
        name: Its name, such as `top-1` or `PSNR (dB)`.
        is_share: Whether it is a share in [0, 1], shown in per cent.
    """

    name: str
    is_share: bool = False

    @property
    def scale(self) -> float:
        """What a value is multiplied by before it is shown."""
        return 100.0 if self.is_share else 1.0

    @property
    def example(self) -> str:
        """What one thing that a network is scored on is called."""
        return "image" if self.is_share else "example"

    @property
    def heading(self) -> str:
        """The name with its unit, over numbers that stand for themselves."""
        return f"{self.name} in %" if self.is_share else self.name

    @property
    def axis(self) -> str:
        """Label of an axis."""
        return f"{self.name}, search split (%)" if self.is_share else self.name

    def format(self, value: float | None) -> str:
        """The value alone: per cent with two decimals, or five digits; a dash for None."""
        if value is None or math.isnan(value):
            return DASH
        return f"{100 * value:.2f}" if self.is_share else f"{value:.5g}"

    def describe(self, value: float | None) -> str:
        """The value with its unit or name."""
        shown = self.format(value)
        return f"{shown} % {self.name}" if self.is_share else f"{self.name} {shown}"

    def difference(self, value: float, other: float) -> str:
        """`value` minus `other` with its sign, in points of per cent for a share."""
        change = self.scale * (value - other)
        return f"{change:+.2f}" if self.is_share else f"{change:+.4g}"


TOP1 = Metric("top-1", is_share=True)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a network is worth by its task.

    Attributes:
        score: What networks are judged by: higher is better, on any scale. Top-1 as a share of the
            images for the built-in task.
        figures: The task's other figures by name. The built-in task has `top1` and `top5` as shares
            of the images, and `loss`, the mean cross-entropy in nats.
        images: Images scored; 0 where the task does not count them.
    """

    score: float
    figures: Mapping[str, float] = field(default_factory=dict[str, float], hash=False)
    images: int = 0

    @property
    def loss(self) -> float:
        """The task's `loss`, lower is better and finer than many scores; else minus the score."""
        loss = self.figures.get("loss", -self.score)
        return math.inf if math.isnan(loss) else loss

    @property
    def rank(self) -> tuple[float, float]:
        """Orders networks: by score, then by the lower loss."""
        return self.score, -self.loss

    def describe(self) -> dict[str, Any]:
        """All figures side by side, for a file."""
        return {**self.figures, "score": self.score, "images": self.images}


FAILED = -1e30  # score of a network that could not be measured; finite, as JSON has no infinity


@dataclass(frozen=True, kw_only=True)
class Measurement(Scored):
    """What scoring a candidate returned.

    Its score is FAILED where scoring failed, and an estimate where it was stopped.

    Attributes:
        index: Index of the candidate.
        seconds: Spent scoring, on the evaluator.
        status: `ok`, `failed`, or `stopped` because it fell behind (`cacp_ray.evaluation.racing`).
        error: Reason of a failure, one line; or a remark about an unusual success.
        evaluator: Name of the actor.
        node: Address of its machine.
        attempt: 1 for the first try.
        finished_at: Unix time.
        hits: Encoded set of the images that were right; empty where not all images were scored.
        cached: Whether it was answered from memory or from a cache instead of scored.
    """

    index: int
    seconds: float
    status: Status = "ok"
    error: str = ""
    evaluator: str = "local"
    node: str = "local"
    attempt: int = 1
    finished_at: float = 0.0
    hits: str = ""
    cached: bool = False


class Evaluator(Protocol):
    """The one port of the search loop. Implementations: LocalEvaluator, RayEvaluatorPool."""

    @property
    def capacity(self) -> int:
        """Candidates that keep every evaluator busy now (those in flight included)."""
        ...

    @property
    def num_alive(self) -> int:
        """Evaluators ready to score."""
        ...

    def submit(self, candidate: Candidate) -> None:
        """Queues a candidate; never blocks."""
        ...

    def results(self, timeout: float) -> list[Measurement]:
        """Measurements as they come: at least one, or none after `timeout` seconds."""
        ...

    def close(self) -> None:
        """Frees the evaluators."""
        ...


ScoreFunction = Callable[[Candidate], Measurement]


class LocalEvaluator:
    """Scores in this process, in the order submitted."""

    capacity = 1
    num_alive = 1

    def __init__(self, score: ScoreFunction) -> None:
        self._score = score
        self._queue: list[Candidate] = []

    def submit(self, candidate: Candidate) -> None:
        """Queues a candidate."""
        self._queue.append(candidate)

    def results(self, timeout: float) -> list[Measurement]:
        """Scores the oldest queued candidate."""
        return [self._score(self._queue.pop(0))] if self._queue else []

    def close(self) -> None:
        """Nothing to free."""

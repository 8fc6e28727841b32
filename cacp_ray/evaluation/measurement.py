"""What travels between the search and the evaluators: a few hundred bytes each way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

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


@dataclass(frozen=True)
class Measurement:
    """What scoring a candidate returned.

    Attributes:
        index: Index of the candidate.
        top1: Share of images in [0, 1]; 0 where scoring failed, an estimate where it was stopped.
        top5: Share of images in [0, 1].
        loss: Mean cross-entropy in nats.
        images: Images scored.
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
    top1: float
    top5: float
    loss: float
    images: int
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

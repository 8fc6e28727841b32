"""A task of somebody's own: what makes a search one of their problem, with their score.

The built-in task is `cacp_ray.evaluation.classification`.
"""

# pyright: basic
# Basic: tasks, loaders and scores are the user's own.

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from cacp_ray.errors import ConfigError, EvaluationError, users_code
from cacp_ray.evaluation.measurement import Metric, Scored
from cacp_ray.io.numbers import as_number
from cacp_ray.models.factory import import_function
from cacp_ray.pruning.calibration import Loss

SCORE = "score"
PLAIN = Metric(SCORE)


class Task(Protocol):
    """What a user writes.

    Attributes:
        example_inputs: What the network is called with: a tensor, a tuple, or a dictionary of them.

    A task may also have `loss(net, batch)`, a mean over the batch, for criteria that read
    gradients; `train(net, context)`, for fine-tuning; and `metric`, the name of its score in
    tables, such as `PSNR (dB)`.
    """

    example_inputs: Any

    def calibration(self) -> Iterable[Any]:
        """Batches of training data: tensors, tuples with the inputs first, or dictionaries."""
        ...

    def score(self, net: nn.Module) -> float | Mapping[str, float]:
        """What a network is worth: higher is better, on any scale.

        A mapping has it under `score`; its other numbers are recorded and reported, and `loss`,
        lower is better, helps to tell networks of the same score apart. The network is in
        evaluation mode, and no gradients are taken.
        """
        ...


@dataclass(frozen=True)
class FunctionTask:
    """A task made of functions; each is a callable, or `package.module:function`.

    Attributes:
        example_inputs: What the network is called with.
        make_loader: Gives batches of training data.
        score_network: See `Task.score`.
        loss_of: See `Task`; None where no criterion reads gradients.
        metric: Name of the score.
    """

    example_inputs: Any
    make_loader: Callable[[], Iterable[Any]] | str
    score_network: Callable[[nn.Module], Any] | str
    loss_of: Loss | str | None = None
    metric: str = SCORE

    def calibration(self) -> Iterable[Any]:
        """Batches of training data."""
        return _resolve("calibration", self.make_loader)()

    def score(self, net: nn.Module) -> Any:
        """What a network is worth."""
        return _resolve("score", self.score_network, "net")(net)

    @property
    def loss(self) -> Loss | None:
        """The loss."""
        return None if self.loss_of is None else _resolve("loss", self.loss_of, "net", "batch")


def _resolve(kind: str, given: Any, *arguments: str) -> Any:
    return import_function(kind, given, *arguments) if isinstance(given, str) else given


_made: dict[str, Any] = {}  # tasks by name, made once in a process


@dataclass(frozen=True)
class OwnTask:
    """A user's task as evaluators get it.

    Attributes:
        name: `package.module:Class`; for an object, what it is called in messages.
        given: The object; None makes it from its name, once in every process.
        metric: What the score measures.
    """

    name: str
    given: Any = field(default=None, repr=False)
    metric: Metric = PLAIN

    @classmethod
    def make(cls, name: str, given: Any = None) -> "OwnTask":
        """Makes the task and looks at what it has.

        Raises:
            ConfigError: It cannot be made, or lacks what a search needs.
        """
        task = cls(name, given)
        content = task.content
        for member in ("calibration", "score"):
            if not callable(getattr(content, member, None)):
                raise ConfigError(f"task {name} has no method {member}: see docs/tasks.md")
        if not hasattr(content, "example_inputs"):
            raise ConfigError(f"task {name} has no example_inputs: see docs/tasks.md")
        metric = getattr(content, "metric", SCORE)
        if not isinstance(metric, str) or not metric:
            raise ConfigError(f"task {name}: metric is {metric!r}: give the name of the score")
        return cls(name, given, Metric(metric))

    def __len__(self) -> int:
        return 0  # a task does not say how many examples it scores

    @property
    def content(self) -> Any:
        """The user's task itself."""
        if self.given is not None:
            return self.given
        if self.name not in _made:
            make = import_function("task", self.name)  # without arguments
            with users_code(f"task {self.name} cannot be made"):
                _made[self.name] = make()
        return _made[self.name]

    def measure(self, net: nn.Module) -> Scored:
        """What a network is worth; it is in evaluation mode before and afterwards.

        Raises:
            EvaluationError: The score is not finite.
            ConfigError: It is not a number.
        """
        net.eval()
        try:
            with torch.no_grad():
                value = self.content.score(net)
        except SystemExit as error:  # it would end an evaluator, or the command, without a word
            raise EvaluationError(f"the task's score exits ({error}): return a number") from error
        net.eval()
        return read_score(value)

    def describe(self) -> dict[str, Any]:
        """What subnet.json says of the task."""
        return {"task": self.name}

    def without_data(self) -> "OwnTask":
        """The same task, which brings its data itself."""
        return self


def read_score(value: Any) -> Scored:
    """What a user's score returned.

    Raises:
        EvaluationError: The score or a figure is not finite.
        ConfigError: It is no number, and no mapping of numbers with `score`.
    """
    figures = dict(value) if isinstance(value, Mapping) else {SCORE: value}
    if SCORE not in figures:
        names = ", ".join(map(str, figures)) or "nothing"
        raise ConfigError(
            f"the task's score returned a mapping with {names}: one entry must be `score`"
        )
    numbers = {str(n): as_number(f"the task's {n}", number) for n, number in figures.items()}
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise EvaluationError(f"the task's {name} is not finite ({number})")
    return Scored(score=numbers.pop(SCORE), figures=numbers)


def measure_first(task: OwnTask, net: nn.Module) -> Scored:
    """The score of the whole network, before a search begins.

    Raises:
        ConfigError: The task's score fails, or is no finite number.
    """
    with users_code(f"task {task.name}: its score fails on the whole network"):
        try:
            return task.measure(net)
        except EvaluationError as error:
            raise ConfigError(f"task {task.name}: the whole network: {error}") from error

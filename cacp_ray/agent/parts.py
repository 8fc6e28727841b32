"""Parts that both agents are built from: memory, layers, samples around a policy."""

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from cacp_ray.errors import ArtifactError
from cacp_ray.io.files import read_tensors
from cacp_ray.searching.strategy import Counts

POLICY_FILE = "policy.safetensors"  # an agent's networks, for readers that open no pickle
SAMPLE_NOISE = 0.05
SAMPLE_NOISE_GROWTH = 1.4  # factor after a round that finds too few
MAX_SAMPLE_ROUNDS = 20
# Noise, number and beam -> candidates near the beam, or without one near the policy.
Near = Callable[[float, int, Sequence[Counts]], list[Counts]]


class EpisodeArrays:
    """Arrays with one row an episode, the attributes of a subclass; above `capacity` old rows go.

    Attributes:
        capacity: Episodes that are kept.
        num_added: Episodes added so far, dropped ones included.
    """

    capacity = sys.maxsize

    def __init__(self) -> None:
        self.num_added = 0

    def __len__(self) -> int:
        return min(self.num_added, self.capacity)

    def add(self, **rows: ArrayLike) -> None:
        """Adds N episodes: rows (N, ...) for every array, by its name."""
        for name, new in rows.items():
            old = getattr(self, name)
            joined = np.concatenate([old, np.asarray(new, old.dtype)])
            setattr(self, name, joined[-self.capacity :])
        self.num_added += np.shape(next(iter(rows.values())))[0]

    def get_state(self) -> dict[str, Any]:
        """All arrays, and the count."""
        return dict(vars(self))

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes what `get_state` gave."""
        vars(self).update(state)


def draw_rows(
    columns: Mapping[str, NDArray[Any]], count: int, rng: np.random.Generator
) -> dict[str, NDArray[np.float32]]:
    """`count` rows of columns of equal length, drawn with replacement, every one as likely."""
    rows = rng.integers(len(next(iter(columns.values()))), size=count)
    return {name: column[rows].astype(np.float32) for name, column in columns.items()}


def make_layers(
    widths: Sequence[int], activation: type[nn.Module], *, is_last_zero: bool = False
) -> list[nn.Module]:
    """Linear layers with an activation in between; with a zero last layer the output is zero."""
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(widths):
        layers += [nn.Linear(num_in, num_out), activation()]
    if is_last_zero:
        for parameter in layers[-2].parameters():
            nn.init.zeros_(parameter)
    return layers[:-1]


@contextlib.contextmanager
def frozen(networks: nn.Module) -> Iterator[None]:
    """Gradients pass through the networks but reach none of their weights."""
    networks.requires_grad_(False)
    try:
        yield
    finally:
        networks.requires_grad_(True)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Small matrices are fastest on one thread, and the other cores belong to the evaluators."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def sample_around(
    greedy: Counts, count: int, near: Near, beam: Sequence[Counts], known: Collection[Counts]
) -> list[Counts]:
    """Distinct candidates, at most `count`: the greedy one first, then others around it.

    After the paper's inference: small noise on the policy at any reachable rate, and a `beam` of
    the best measured so far, from which half of the candidates start. None is in `known`.
    """
    samples = {counts: None for counts in [greedy] if counts not in known}  # an ordered set
    noise = SAMPLE_NOISE
    for _ in range(MAX_SAMPLE_ROUNDS):
        missing = count - len(samples)
        if missing <= 0:
            break
        drawn = near(noise, (missing + 1) // 2, beam) if beam else []
        if missing > len(drawn):
            drawn += near(noise, missing - len(drawn), ())
        samples |= {counts: None for counts in drawn if counts not in known}
        noise *= SAMPLE_NOISE_GROWTH
    return list(samples)[:count]


def load_networks(networks: nn.Module, file: Path) -> None:
    """Puts the tensors of a `POLICY_FILE` into an agent's networks.

    Raises:
        ArtifactError: The file cannot be read, or its networks have other sizes.
    """
    tensors = read_tensors(file)
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ArtifactError(f"{file}: holds values that are not finite; restore it from a copy")
    try:
        networks.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(
            f"{file}: not the networks of this agent: config.yaml has changed, or an earlier "
            "cacp_ray wrote it; search again in another folder"
        ) from error

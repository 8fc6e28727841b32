"""The conditional agent: one memory and a few critics lead the search at every rate.

Candidates are drafts around good allocations of this and other rates, screened by the critics
(behaviour.py), which learn from all measurements on one scale for all rates (replay.py,
critics.py). Offsets from a prior make the first candidates sound and carry over between rates
(searching/allocation.py).

Source: the task, one search and one policy for every rate, is that of CACP (Liu et al., 2021),
whose agent is `cacp-paper`. Ours: allocations of all groups at once, critics of whole allocations,
and no actor: one that followed the critics' gradient found nothing more (docs/agent.md).
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

from cacp_ray.agent.cacp.behaviour import Behaviour
from cacp_ray.agent.cacp.critics import NUM_CRITICS, Critics
from cacp_ray.agent.cacp.replay import Replay
from cacp_ray.agent.parts import POLICY_FILE, draw_rows, load_networks, one_thread, sample_around
from cacp_ray.errors import ArtifactError
from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.io.files import read_json, read_tensors, write_json, write_tensors
from cacp_ray.searching.allocation import AllocationSpace, Float32s
from cacp_ray.searching.budget import Floats, Ints
from cacp_ray.searching.settings import AgentSettings
from cacp_ray.searching.strategy import Counts

LEARNED_FROM = 10  # episodes a rate before the first gradient step
MAX_UPDATES_A_STEP = 256  # under a second; the evaluators work on their second candidates
STATE_FILE = "state.json"
LEARNER_FILE = "learner.safetensors"  # the optimizer and the replay


class CACP:
    """The agent: it asks, is told, and learns."""

    name = "cacp"

    def __init__(
        self, settings: AgentSettings, space: AllocationSpace, rates: Sequence[float], seed: int
    ) -> None:
        """Takes the offsets of a problem, and the rates that it proposes for."""
        self.space = space
        self.num_updates = 0
        self.pending_updates = 0
        self._settings = settings
        self._critics = Critics(space.num_offsets, settings.hidden, settings.lr, seed)
        self._replay = Replay(space.num_offsets)
        self._behaviour = Behaviour(settings, space, rates, self._value, seed)
        self._rng = np.random.default_rng([seed, 2])
        self._told: set[tuple[float, Counts]] = set()

    @property
    def num_episodes(self) -> int:
        """Episodes remembered."""
        return len(self._replay)

    @one_thread()
    def ask(self, count: int) -> list[Candidate]:
        """Candidates that the critics chose among drafts."""
        return self._behaviour.propose(count)

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Stores episodes, this agent's or others'; `learn` uses them."""
        fresh: list[tuple[Candidate, Measurement]] = []
        for candidate, measurement in results:
            key = (candidate.rate, candidate.keep_counts)
            if key not in self._told:
                self._told.add(key)
                fresh.append((candidate, measurement))
        if not fresh:
            return
        counts = np.array([candidate.keep_counts for candidate, _ in fresh])
        offsets = self.space.encode([candidate.rate for candidate, _ in fresh], counts)
        measurements = [measurement for _, measurement in fresh]
        status = np.array([measurement.status for measurement in measurements])
        self._replay.add(
            log_ratios=self.space.log_ratios(counts),
            score=[measurement.score for measurement in measurements],
            # A stopped candidate's loss would say more about its images than about the network.
            loss=np.where(status == "ok", [m.loss for m in measurements], np.nan),
            images=np.where(status != "failed", [m.images for m in measurements], 0),
        )
        self.pending_updates += self._settings.updates_per_episode * len(fresh)
        for row, (candidate, measurement) in zip(offsets, fresh, strict=True):
            if measurement.status == "ok" and candidate.images is None:
                self._behaviour.adopt(candidate, measurement.score, row)

    def learn(self, most: int = MAX_UPDATES_A_STEP) -> dict[str, float]:
        """Takes the gradient steps that new episodes have earned; those above `most` are dropped.

        Where many episodes come at once, learning thins out, so that no evaluator waits for it. The
        result has `updates`, the gradient steps so far, and `critic_loss`, the squared error of
        the last step of this call.
        """
        steps = min(self.pending_updates, most)
        self.pending_updates = steps
        if self._is_early or not steps:
            return {"updates": float(self.num_updates)}
        error = self.update(steps)
        return {"updates": float(self.num_updates), "critic_loss": error}

    @one_thread()
    def update(self, steps: int) -> float:
        """Takes gradient steps; returns the squared error of the last."""
        error, columns = 0.0, self._replay.columns()
        for _ in range(steps):
            rows = draw_rows(columns, NUM_CRITICS * self._settings.batch_size, self._rng)
            error = self._critics.step(rows)
        self.pending_updates -= steps
        self.num_updates += steps
        return error

    @property
    def _is_early(self) -> bool:
        """Whether the first few episodes would teach the critics nothing sound."""
        return self.num_episodes < LEARNED_FROM * len(self._behaviour.num_asked)

    def noise(self, rate: float) -> float:
        """Present standard deviation of the noise of drafts at a rate."""
        return self._behaviour.noise(rate)

    @one_thread()
    def policy(self, rates: ArrayLike) -> Ints:
        """(B, G) the mean of the drafts around good allocations that the critics favour.

        While the critics have not learned, these are means of good allocations, interpolated
        between rates; before any was measured, the prior.
        """
        rates = np.asarray(rates, dtype=np.float64)
        if self._is_early or self._settings.updates_per_episode == 0:
            offsets = self._behaviour.between(rates)
        else:
            offsets = np.stack([self._behaviour.favoured(rate) for rate in rates.tolist()])
        return self.space.decode(rates, offsets)

    @one_thread()
    def policy_samples(
        self,
        rate: float,
        count: int,
        rng: np.random.Generator,
        *,
        beam: Sequence[Counts] = (),
        known: Collection[Counts] = (),
    ) -> list[Counts]:
        """Distinct candidates, at most `count`, around the policy and a beam: `sample_around`."""
        (greedy,) = map(tuple, self.policy([rate]).tolist())

        def near(noise: float, number: int, beam: Sequence[Counts]) -> list[Counts]:
            num_drafts = self._behaviour.num_drafts * number
            if beam:
                offsets = self.space.encode(np.full(len(beam), rate), beam)
                drafts = np.resize(offsets, (num_drafts, offsets.shape[1]))
                drafts += noise * rng.standard_normal(drafts.shape).astype(np.float32)
            else:
                drafts = self._behaviour.draft(rate, noise, num_drafts, rng)
            return self._behaviour.screen(rate, drafts, number)

        return sample_around(greedy, count, near, beam, known)

    def stop(self) -> None:
        """Holds nothing."""

    def save(self, folder: Path) -> None:
        """Writes the critics, their optimizer, the memory and the random states; no pickle."""
        write_tensors(folder / POLICY_FILE, self._critics.state_dict())
        moments = {
            f"optimizer.{key}": value for key, value in self._critics.get_optimizer().items()
        }
        arrays = {f"replay.{key}": value for key, value in self._replay.get_tensors().items()}
        write_tensors(folder / LEARNER_FILE, moments | arrays)
        state = {
            "behaviour": self._behaviour.get_state(),
            "told": [[rate, counts] for rate, counts in sorted(self._told)],
            "random": self._rng.bit_generator.state,
            "pending_updates": self.pending_updates,
            "num_updates": self.num_updates,
        }
        write_json(folder / STATE_FILE, state)

    def restore(self, folder: Path) -> None:
        """Restores what `save` wrote; the same calls then give the same answers.

        Raises:
            ArtifactError: The files cannot be read, or an earlier version wrote them.
        """
        if not (folder / STATE_FILE).exists():
            raise ArtifactError(
                f"{folder} has no {STATE_FILE}, as an earlier cacp_ray wrote it: go on with that "
                "version, or search again in another folder"
            )
        state = read_json(folder / STATE_FILE)
        self.load_policy(folder / POLICY_FILE)
        tensors = read_tensors(folder / LEARNER_FILE)
        self._critics.set_optimizer(_part(tensors, "optimizer."))
        self._replay.set_tensors(_part(tensors, "replay."))
        self._behaviour.set_state(state["behaviour"])
        self._told = {(rate, tuple(counts)) for rate, counts in state["told"]}
        self._rng.bit_generator.state = state["random"]
        self.pending_updates = state["pending_updates"]
        self.num_updates = state["num_updates"]

    def load_policy(self, file: Path) -> None:
        """Takes the critics of a `POLICY_FILE`; told what was measured, it then answers any rate.

        Raises:
            ArtifactError: The file cannot be read, or its networks have other sizes.
        """
        load_networks(self._critics, file)

    def _value(self, counts: Ints | Floats) -> Float32s:
        """(N,) mean of the critics at keep counts (N, G)."""
        log_ratios = torch.from_numpy(self.space.log_ratios(counts))
        with torch.inference_mode():
            return self._critics.values(log_ratios).mean(dim=0).numpy()


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }

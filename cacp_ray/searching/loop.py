"""The one loop of every search: asks, submits, collects, records, checkpoints, tells, lets learn.

In rounds, a strategy is asked for a batch, waits for all of it and is told in the order asked: the
run repeats bit for bit, whatever order results come in and wherever it is killed and resumed. In
async mode the evaluators never wait: freed places are filled before the strategy is told, and it
learns while they work.

Candidates are told apart by their keep counts and criterion. One that was asked before is answered
from memory, recorded as cached, and does not count as an evaluation. One that the evaluator
answers from a cache of other runs is recorded as cached too, and counts.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.measurement import Candidate, Evaluator, SubnetKey
from cacp_ray.io.files import read_json, write_json
from cacp_ray.pruning.cost import CostModel, Limited
from cacp_ray.reporting.progress import SearchProgress
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.rundir.records import EpisodeRecord
from cacp_ray.searching.episodes import Episodes
from cacp_ray.searching.in_flight import InFlight
from cacp_ray.searching.settings import Mode
from cacp_ray.searching.stopwatch import Stopwatch
from cacp_ray.searching.strategy import Strategy, learn

logger = logging.getLogger(__name__)

WAIT_SECONDS = 2.0
MAX_REPEATS = 200
MOST_FAILURES = 8  # candidates without any that succeeds; one allocation may fail for its own sake

Result = tuple[Candidate, EpisodeRecord]


class SearchLoop:
    """Drives one strategy over one run directory, and continues what the directory holds.

    Attributes:
        archive: The best of every rate.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        cost_model: CostModel,
        run: RunDirectory,
        *,
        rates: Sequence[float],
        evaluations: int,
        reserved: int = 0,
        cost: Limited = "macs",
        mode: Mode = "rounds",
        round_size: int = 6,
        checkpoint_seconds: float = 30.0,
        checkpoint_ticks: int | None = None,
        races: bool = False,
        on_progress: Callable[[SearchProgress], object] | None = None,
        on_checkpoint: Callable[[], object] | None = None,
    ) -> None:
        """Reads nothing yet: `restore` does.

        Args:
            evaluator: Scores candidates, all on the same images.
            cost_model: Cost model of the whole network.
            run: Where measurements and checkpoints are kept.
            rates: The rates that are searched.
            evaluations: Distinct candidates to measure, over all rates.
            reserved: How many of these the search leaves to `measure_last`.
            cost: What a rate limits, as `CostModel.kind` takes it.
            mode: `rounds` or `async`.
            round_size: Candidates asked together in a round.
            checkpoint_seconds: Time between checkpoints.
            checkpoint_ticks: Calls of `tick` between checkpoints; None leaves it to the time.
            races: Candidates race against the best told so far of their rate.
            on_progress: Called after every tick, and while a round is waited for.
            on_checkpoint: Called after each checkpoint; the journal is empty then.
        """
        self._evaluator = evaluator
        self._episodes = Episodes(run, cost_model, cost)
        self.archive = self._episodes.archive
        self._run = run
        self._rates = tuple(rates)
        self._evaluations = evaluations
        self._reserved = reserved
        self._mode = mode
        self._round_size = round_size
        self._checkpoint_seconds = checkpoint_seconds
        self._checkpoint_ticks = math.inf if checkpoint_ticks is None else checkpoint_ticks
        self._races = races
        self._on_progress = on_progress
        self._on_checkpoint = on_checkpoint

        # By rate: score, the negative index that decides ties, and the hits.
        self._best: dict[float, tuple[float, int, str]] = {}
        self._is_restored = False
        self._next_index = 0
        self._num_told = 0
        self._asked: set[SubnetKey] = set()
        self._repeats = 0  # consecutive proposals that brought nothing new
        self._is_exhausted = False
        self._in_flight = InFlight()
        # Rounds: recorded but not told yet; replayed when the strategy asks for them again.
        self._ahead: dict[int, EpisodeRecord] = {}
        # Told without being asked in this session; asking for one is no sign of a stuck strategy.
        self._adopted: set[SubnetKey] = set()

        self._stopwatch = Stopwatch()
        self._last_checkpoint = time.monotonic()
        self._ticks = 0
        self._num_failed = 0  # measured since this process began
        self._has_measured = False

    @property
    def records(self) -> Sequence[EpisodeRecord]:
        """Every measurement of the run, in the order recorded."""
        return self._episodes.rows

    @property
    def done(self) -> bool:
        """Whether the search has ended: nothing is left but what is reserved for the end."""
        return self._is_restored and self._room == 0 and not self._in_flight

    @property
    def progress(self) -> SearchProgress:
        """Where the search stands."""
        per_second = self._stopwatch.per_second
        left = max(0, self._evaluations - len(self._episodes))
        return SearchProgress(
            evaluations=len(self._episodes),
            total=self._evaluations,
            best={rate: self.archive.best(rate) for rate in self._rates},
            evaluations_per_second=per_second,
            num_alive=self._evaluator.num_alive,
            seconds_left=left / per_second if per_second > 0 else None,
        )

    @property
    def seconds(self) -> float:
        """Wall time of the search, earlier sessions included up to their last checkpoints."""
        return self._stopwatch.seconds

    def run(self, strategy: Strategy) -> None:
        """Searches to the end, from where the directory stands."""
        self.restore(strategy)
        while not self.done:
            self.tick(strategy)
        self.checkpoint(strategy)

    def restore(self, strategy: Strategy) -> None:
        """Continues the last checkpoint and the measurements after it; only once, before ticks.

        In rounds these measurements answer the strategy when it asks for them again; in async
        mode it is told at once, and candidates that were in flight are submitted again.
        """
        if self._is_restored:
            return
        self._is_restored = True
        self._episodes.strategy = strategy.name
        rows = self._episodes.read()
        seconds = 0.0
        in_flight: list[Candidate] = []  # at the checkpoint
        checkpoint = self._run.find_checkpoint()
        if checkpoint is not None:
            folder, num_told = checkpoint
            strategy.restore(folder / "strategy")
            state = read_json(folder / "loop.json")
            self._next_index = state["next_index"]
            self._repeats = state["repeats"]
            seconds = state["seconds"]
            self._num_told = min(num_told, len(rows))
            in_flight = [
                Candidate(rate, tuple(keep_counts), criterion, index)
                for index, rate, keep_counts, criterion in state["in_flight"]
            ]
        told = rows[: self._num_told]
        ahead = [row for row in rows[self._num_told :] if not row.is_answer]
        # A policy answers after the search alone, which had then ended.
        self._is_exhausted = any(row.is_answer for row in rows) and not ahead
        self._asked.update(row.key for row in told)
        self._note_best([(row.candidate, row) for row in told])
        if self._mode == "rounds":
            self._ahead = {row.index: row for row in ahead}
        else:
            self._adopt(strategy, ahead)
        indices = {row.index for row in rows}
        lost = [candidate for candidate in in_flight if candidate.index not in indices]
        self._asked.update(candidate.key for candidate in lost)
        self._tell(strategy, [result for candidate in lost for result in self._place(candidate)])
        self._stopwatch = Stopwatch(seconds)

    def tick(self, strategy: Strategy) -> Mapping[str, float]:
        """One round, or in async mode one wait of at most a few seconds; then the strategy learns.

        A checkpoint is made at the start, so that it holds what the last tick has taught. The
        result is that of `Learner.learn`.
        """
        self.restore(strategy)
        if self.done:
            return {}
        age = time.monotonic() - self._last_checkpoint
        if age >= self._checkpoint_seconds or self._ticks >= self._checkpoint_ticks:
            self.checkpoint(strategy)
        self._ticks += 1
        if self._mode == "rounds":
            self._tick_round(strategy)
        else:
            self._tick_async(strategy)
        self._report()
        return learn(strategy)

    def measure_last(self, candidates: Sequence[Candidate]) -> list[EpisodeRecord]:
        """Measures what a policy answers after the search, as the reserved evaluations.

        The strategy is not told and the archive does not take them: they say what the policy is
        worth. After a kill the same call answers from the records that are there.

        Args:
            candidates: At most as many as were reserved.

        Returns:
            Their records, in order; of a failed one, its failure.
        """
        first = self._next_index
        rows = {row.index: row for row in self._episodes.rows if row.index >= first}
        keys = {row.index: row.key for row in rows.values()}
        if any(keys.get(first + i, c.key) != c.key for i, c in enumerate(candidates)):
            first, rows = max(keys) + 1, {}  # other hardware or versions: it answers otherwise
        numbered = [dataclasses.replace(c, index=first + i) for i, c in enumerate(candidates)]
        self._next_index = first + len(numbered)
        for candidate in numbered:
            if candidate.index not in rows and self._episodes.knows(candidate, whole=True):
                rows[candidate.index] = self._episodes.repeat(candidate, is_answer=True)
            elif candidate.index not in rows and self._in_flight.add(candidate):
                self._evaluator.submit(candidate)
        while self._in_flight:
            rows |= {c.index: row for c, row in self._collect(WAIT_SECONDS, is_answer=True)}
            self._report()
        self._run.compact()
        return [rows[candidate.index] for candidate in numbered]

    def checkpoint(self, strategy: Strategy) -> None:
        """Saves the strategy and the loop. Call it between ticks, and after the last one."""
        waiting = self._in_flight.candidates
        state = {
            "next_index": self._next_index,
            "repeats": self._repeats,
            "seconds": self.seconds,
            "in_flight": [(c.index, c.rate, c.keep_counts, c.criterion) for c in waiting],
        }

        def write(folder: Path) -> None:
            (folder / "strategy").mkdir()
            strategy.save(folder / "strategy")
            write_json(folder / "loop.json", state)

        self._run.compact()
        self._run.save_checkpoint(self._num_told, write)
        if self._on_checkpoint is not None:
            self._on_checkpoint()
        self._last_checkpoint = time.monotonic()
        self._ticks = 0

    @property
    def _room(self) -> int:
        """Distinct candidates that may still be asked."""
        if self._is_exhausted or self._repeats >= MAX_REPEATS:
            return 0
        return max(0, self._evaluations - self._reserved - len(self._asked))

    def _tick_round(self, strategy: Strategy) -> None:
        results = self._ask(strategy, min(self._round_size, self._room))
        self._is_exhausted |= not results and not self._in_flight
        while self._in_flight:
            results += self._collect(WAIT_SECONDS)
            if self._in_flight:
                self._report()
        self._tell(strategy, sorted(results, key=lambda result: result[0].index))

    def _tick_async(self, strategy: Strategy) -> None:
        can_ask = self._num_free() > 0
        results = self._fill(strategy)
        self._is_exhausted |= can_ask and not results and not self._in_flight
        if not self.done:
            results += self._collect(0.0 if results else WAIT_SECONDS)
        # Before telling: the evaluators work while the strategy learns.
        results += self._fill(strategy)
        self._tell(strategy, results)

    def _fill(self, strategy: Strategy) -> list[Result]:
        """Asks until every evaluator is busy or an ask brings nothing new."""
        results: list[Result] = []
        num_before = -1
        while len(self._in_flight) > num_before and (free := self._num_free()):
            num_before = len(self._in_flight)
            results += self._ask(strategy, free)
        return results

    def _num_free(self) -> int:
        return max(0, min(self._evaluator.capacity - len(self._in_flight), self._room))

    def _ask(self, strategy: Strategy, count: int) -> list[Result]:
        """Asks and submits; returns what could be answered at once."""
        results: list[Result] = []
        for proposal in strategy.ask(count):
            self._episodes.check_budget(proposal)
            row = self._ahead.get(self._next_index)
            if row is not None and (row.rate, row.key) != (proposal.rate, proposal.key):
                logger.warning(
                    "%s: the strategy does not repeat its earlier proposals (other hardware or "
                    "versions?); their measurements are kept, the search goes on differently",
                    self._run.path,
                )
                self._adopt(strategy, list(self._ahead.values()))
            if proposal.key not in self._asked and self._room == 0:
                break
            is_new = proposal.key not in self._asked or proposal.key in self._adopted
            self._adopted.discard(proposal.key)
            self._asked.add(proposal.key)
            self._repeats = 0 if is_new else self._repeats + 1
            results += self._place(self._number(proposal))
        if self._repeats >= MAX_REPEATS:
            logger.warning("the last %d proposals were known: the search ends", self._repeats)
        return results

    def _number(self, proposal: Candidate) -> Candidate:
        """The candidate under the next index, with its opponent where candidates race."""
        opponent = self._best[proposal.rate][2] if proposal.rate in self._best else ""
        index, self._next_index = self._next_index, self._next_index + 1
        return dataclasses.replace(proposal, index=index, opponent=opponent)

    def _place(self, candidate: Candidate) -> list[Result]:
        """Answers a candidate from what is known, or has it measured."""
        row = self._ahead.pop(candidate.index, None)
        if row is not None:
            return [(row.candidate, row)]
        if self._episodes.knows(candidate):
            return [(candidate, self._episodes.repeat(candidate))]
        if self._in_flight.add(candidate):
            self._evaluator.submit(candidate)
        return []

    def _collect(self, timeout: float, *, is_answer: bool = False) -> list[Result]:
        """Records what the evaluators have finished."""
        results: list[Result] = []
        for measurement in self._evaluator.results(timeout):
            candidates = self._in_flight.finish(measurement.index)
            if not candidates:
                continue
            first, *repeats = candidates
            results.append((first, self._episodes.record(first, measurement, is_answer=is_answer)))
            results += [(c, self._episodes.repeat(c, is_answer=is_answer)) for c in repeats]
            self._num_failed += measurement.status != "ok"
            if not measurement.cached:
                self._stopwatch.note_finish()
        return results

    def _adopt(self, strategy: Strategy, rows: Sequence[EpisodeRecord]) -> None:
        """Tells recorded measurements that the strategy will not ask for under their index."""
        self._ahead = {}
        keys = {row.key for row in rows}
        self._adopted |= keys - self._asked
        self._asked |= keys
        self._next_index = max([self._next_index, *(row.index + 1 for row in rows)])
        self._tell(strategy, [(row.candidate, row) for row in rows])

    def _tell(self, strategy: Strategy, results: Sequence[Result]) -> None:
        if results:
            strategy.tell(results)
            self._num_told += len(results)
            self._note_best(results)
            self._check_failures([row for _, row in results])

    def _check_failures(self, rows: Sequence[EpisodeRecord]) -> None:
        """Ends a search whose first candidates all fail: the others would fail alike.

        Raises:
            EvaluationError: MOST_FAILURES failed since this process began, and none succeeded.
        """
        self._has_measured |= any(row.status == "ok" for row in rows)
        if self._num_failed >= MOST_FAILURES and not self._has_measured:
            raise EvaluationError(
                f"the first {self._num_failed} candidates all failed, the last with: "
                f"{rows[-1].error}; mend that, and go on with --resume (in Python: resume=True)"
            )

    def _note_best(self, results: Sequence[Result]) -> None:
        """Keeps what candidates race against; probes at other rates than the run's never do."""
        for candidate, measurement in results if self._races else ():
            rank = measurement.score, -candidate.index, measurement.hits
            if measurement.hits and candidate.rate in self._rates:
                self._best[candidate.rate] = max(rank, self._best.get(candidate.rate, rank))

    def _report(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self.progress)

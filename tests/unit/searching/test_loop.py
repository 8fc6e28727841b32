"""The loop: equal rows in whatever order results arrive, and wherever the run is killed."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cacp_ray.errors import ArtifactError, EvaluationError
from cacp_ray.evaluation.cache import CachedEvaluator, MeasurementCache
from cacp_ray.evaluation.measurement import Candidate, LocalEvaluator
from cacp_ray.io import files
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.searching.allocation import uniform_prior
from cacp_ray.searching.budget import Budget, minimum_counts, spend
from cacp_ray.searching.loop import MAX_REPEATS, SearchLoop
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.procedure import Procedure
from cacp_ray.searching.strategies.table import make_strategy
from tests.small import measurement_of
from tests.toy import toy_cost_model, toy_score

RATES = (0.4, 0.6)
COST_MODEL = toy_cost_model(num_groups=4)
BUDGET = Budget(
    COST_MODEL.macs, COST_MODEL.num_channels, minimum_counts(COST_MODEL.num_channels, 0.1, 1)
)
SCORE = toy_score(COST_MODEL)
PROBLEM = Problem(COST_MODEL, BUDGET, RATES, 0, 30, uniform_prior(4))
LAWFUL = "index strategy rate keep_counts macs params cost_kept score images reward cached"

# These tests write many files; a slow disk is no failure.
FILES = settings(
    deadline=None,
    max_examples=8,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Killed(BaseException):
    """Stands for the end of the process."""


def measure(candidate):
    """A formula; every seventh of the possible keep counts fails."""
    is_ok = sum(candidate.keep_counts) % 7 > 0
    score = SCORE(candidate.keep_counts) if is_ok else 0.0
    status = "ok" if is_ok else "failed"
    return measurement_of(candidate.index, score, score, 1 - score, 100, 0.1, status)


class ShuffledEvaluator:
    """Returns some of the submitted candidates, in random order, now and then none."""

    num_alive = 3

    def __init__(self, seed=0, capacity=3, kill_at=None):
        self.capacity = capacity
        self.submitted = []
        self._rng = np.random.default_rng(seed)
        self._queue = []
        self._countdown = kill_at

    def _maybe_kill(self):
        if self._countdown is not None:
            self._countdown -= 1
            if self._countdown < 0:
                raise Killed

    def submit(self, candidate):
        self._maybe_kill()
        self.submitted.append(candidate)
        self._queue.append(candidate)

    def results(self, timeout):
        self._maybe_kill()
        count = self._rng.integers(0, len(self._queue) + 1)
        taken = [self._queue.pop(self._rng.integers(len(self._queue))) for _ in range(count)]
        return [measure(candidate) for candidate in taken]

    def close(self):
        pass


class ClimbingStrategy:
    """Mutates the best so far; its proposals depend on all results and the order of telling."""

    name = "climbing"

    def __init__(self, seed=0):
        self._rng = np.random.default_rng(seed)
        self._best = {rate: (-1.0, BUDGET.num_channels.tolist()) for rate in RATES}
        self._digest = 0
        self._asked = 0
        self.told = []

    def ask(self, count):
        proposals = []
        for _ in range(count):
            rate = RATES[self._asked % len(RATES)]
            self._asked += 1
            shift = self._digest % 3 / 10
            factor = np.exp(self._rng.normal(shift, 0.15, len(BUDGET.num_channels)))
            counts = spend(BUDGET, np.array([self._best[rate][1]]) * factor, [rate])
            proposals.append(Candidate(rate, tuple(counts[0].tolist())))
        return proposals

    def tell(self, results):
        for candidate, measurement in results:
            self.told.append(candidate.index)
            self._digest = (self._digest * 31 + candidate.index) % 1_000_003
            if measurement.score > self._best[candidate.rate][0]:
                self._best[candidate.rate] = (measurement.score, list(candidate.keep_counts))

    def save(self, folder):
        best = list(self._best.items())
        state = [self._rng.bit_generator.state, best, self._digest, self._asked]
        (folder / "state.json").write_text(json.dumps(state))

    def restore(self, folder):
        state, best, self._digest, self._asked = json.loads((folder / "state.json").read_text())
        self._rng.bit_generator.state = state
        self._best = {rate: tuple(pair) for rate, pair in best}


class ScriptedStrategy:
    """Proposes given keep counts, then nothing; saves no state."""

    name = "scripted"

    def __init__(self, script):
        self._script = iter(script)
        self.told = []

    def ask(self, count):
        return [Candidate(1.0, tuple(counts)) for counts in itertools.islice(self._script, count)]

    def tell(self, results):
        self.told += [candidate.index for candidate, _ in results]

    def save(self, folder):
        pass

    def restore(self, folder):
        pass


def iter_once(proposals):
    yield proposals


def make_loop(folder, evaluator=None, **changes):
    arguments = {
        "rates": RATES,
        "evaluations": 30,
        "round_size": 5,
        "checkpoint_ticks": 2,
        "checkpoint_seconds": 1e9,
    }
    return SearchLoop(
        evaluator or ShuffledEvaluator(),
        COST_MODEL,
        RunDirectory(folder),
        **(arguments | changes),
    )


def rows(folder):
    """The columns that must be equal, by index."""
    records = sorted(RunDirectory(folder).read_records(), key=lambda record: record.index)
    assert len({record.index for record in records}) == len(records)
    return [tuple(getattr(record, name) for name in LAWFUL.split()) for record in records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    make_loop(folder).run(ClimbingStrategy())
    return rows(folder)


def distinct(folder):
    return {record.keep_counts for record in RunDirectory(folder).read_records()}


# --- counting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rounds", "async"])
@pytest.mark.parametrize("name", ["random", "uniform", "climbing"])
def test_no_more_distinct_candidates_than_asked_and_all_within_budget(tmp_path, mode, name):
    strategy = ClimbingStrategy() if name == "climbing" else make_strategy(name, PROBLEM)
    evaluator = ShuffledEvaluator()
    loop = make_loop(tmp_path, evaluator, mode=mode)
    loop.run(strategy)
    assert loop.done
    assert len(distinct(tmp_path)) == (4 if name == "uniform" else 30)
    submitted = [candidate.keep_counts for candidate in evaluator.submitted]
    assert len(set(submitted)) == len(submitted) == len(distinct(tmp_path))
    for record in RunDirectory(tmp_path).read_records():
        assert record.macs <= BUDGET.limit(record.rate)
        assert record.cost_kept == record.macs / BUDGET.total
        assert record.reward == record.score


@pytest.mark.parametrize("mode", ["rounds", "async"])
def test_what_another_run_has_measured_counts_but_is_not_measured_again(tmp_path, mode):
    script = [(1, 1, 1, 1), (2, 2, 2, 1), (3, 3, 3, 1), (5, 5, 5, 1), (6, 6, 6, 1)]
    cache, evaluator = MeasurementCache(tmp_path / "cache", "key"), ShuffledEvaluator()
    for known in (Candidate(0.6, (2, 2, 2, 1)), Candidate(0.6, (3, 3, 3, 1), "l1")):
        cache.add(known, measurement_of(99, 0.25, 0.5, 1.5, 100, 3.0))
    cached = CachedEvaluator(evaluator, cache, images=100)
    loop = make_loop(tmp_path, cached, mode=mode, evaluations=4)
    loop.run(ScriptedStrategy(script))
    assert [c.keep_counts for c in evaluator.submitted] == [script[i] for i in (0, 2, 3)]
    (record,) = [r for r in RunDirectory(tmp_path).read_records() if r.cached]
    assert (record.index, record.keep_counts, record.score) == (1, (2, 2, 2, 1), 0.25)
    assert loop.progress.evaluations == 4


ANSWERS = [Candidate(0.4, (1, 2, 1, 2)), Candidate(0.6, (2, 1, 2, 1)), Candidate(0.6, (1, 2, 1, 2))]


@pytest.mark.parametrize("mode", ["rounds", "async"])
@pytest.mark.parametrize("kill_at", [None, 0, 1, 2, 3])
def test_reserved_evaluations_are_measured_last_wherever_that_is_killed(tmp_path, mode, kill_at):
    loop = make_loop(tmp_path, mode=mode, reserved=2)
    strategy = ClimbingStrategy()
    loop.run(strategy)
    assert loop.done
    searched = distinct(tmp_path)
    assert len(searched) == 28
    assert not searched & {answer.keep_counts for answer in ANSWERS}
    best = [loop.archive.best(rate) for rate in RATES]
    told = list(strategy.told)
    if kill_at is not None:
        loop._evaluator = ShuffledEvaluator(seed=2, kill_at=kill_at)
        with contextlib.suppress(Killed):
            loop.measure_last(ANSWERS)
        strategy, evaluator = ClimbingStrategy(), ShuffledEvaluator()
        loop = make_loop(tmp_path, evaluator, mode=mode, reserved=2)
        loop.run(strategy)
        assert evaluator.submitted == strategy.told == []
    records = loop.measure_last(ANSWERS)
    assert [record.keep_counts for record in records] == [answer.keep_counts for answer in ANSWERS]
    assert len(distinct(tmp_path)) == loop.progress.evaluations == 30
    recorded = RunDirectory(tmp_path).read_records()
    assert sum(row.is_answer for row in recorded) == len(ANSWERS)
    assert len(recorded) == loop._next_index  # no kill adds a row
    assert [loop.archive.best(rate) for rate in RATES] == best
    if kill_at is None:
        assert strategy.told == told


def test_an_answer_that_a_race_had_stopped_is_measured_to_the_end(tmp_path):
    class Stopping(ShuffledEvaluator):
        def results(self, timeout):
            status = "ok" if self.submitted[-1].index > 0 else "stopped"
            return [dataclasses.replace(each, status=status) for each in super().results(timeout)]

    (answer,) = proposals = [Candidate(0.6, (2, 1, 2, 1))]
    loop = make_loop(tmp_path, Stopping(), evaluations=2, reserved=1)
    loop.run(Procedure("one", lambda: iter_once(proposals)))
    (record,) = loop.measure_last([answer])
    assert (record.status, record.is_answer, record.cached) == ("ok", True, False)
    assert loop.archive.best(0.6) is None


@pytest.mark.parametrize("mode", ["rounds", "async"])
def test_the_same_keep_counts_in_another_order_are_another_candidate(tmp_path, mode):
    proposals = [Candidate(0.6, (1, 1, 1, 1), order) for order in ("", "l1", "", "l1")]
    evaluator = ShuffledEvaluator()
    make_loop(tmp_path, evaluator, mode=mode).run(Procedure("orders", lambda: iter_once(proposals)))
    assert sorted(c.criterion for c in evaluator.submitted) == ["", "l1"]
    assert {r.key for r in RunDirectory(tmp_path).read_records()} == {
        ((1, 1, 1, 1), ""),
        ((1, 1, 1, 1), "l1"),
    }


@pytest.mark.parametrize("mode", ["rounds", "async"])
def test_a_search_ends_whose_first_candidates_all_fail_and_goes_on_when_that_is_mended(
    tmp_path, mode
):
    def fail(candidate):
        return measurement_of(candidate.index, 0.0, status="failed", error="no such layer")

    def search(score):
        loop = make_loop(tmp_path, LocalEvaluator(score), mode=mode)
        loop.run(ClimbingStrategy())
        return loop

    with pytest.raises(EvaluationError, match=r"candidates all failed, .*no such layer; mend"):
        search(fail)
    assert search(measure).done


def test_it_works_with_the_local_evaluator(tmp_path, uninterrupted):
    make_loop(tmp_path, LocalEvaluator(measure)).run(ClimbingStrategy())
    assert rows(tmp_path) == uninterrupted


def test_repeats_are_answered_from_memory_and_do_not_count(tmp_path):
    script = [(1, 1, 1, 1), (2, 2, 2, 1), (1, 1, 1, 1), (3, 3, 3, 1), (2, 2, 2, 1), (5, 5, 5, 1)]
    for mode in ("rounds", "async"):
        strategy, evaluator = ScriptedStrategy(script), ShuffledEvaluator()
        make_loop(tmp_path / mode, evaluator, mode=mode, evaluations=4).run(strategy)
        assert [c.keep_counts for c in evaluator.submitted] == [script[i] for i in (0, 1, 3, 5)]
        records = RunDirectory(tmp_path / mode).read_records()
        assert sorted((r.index, r.cached) for r in records) == list(
            enumerate([False, False, True, False, True, False])
        )
        assert sorted(strategy.told) == [0, 1, 2, 3, 4, 5]
        assert all(r.seconds == (0.0 if r.cached else 0.1) for r in records)
        assert len({(r.keep_counts, r.score) for r in records}) == 4


@pytest.mark.parametrize("mode", ["rounds", "async"])
def test_a_strategy_that_proposes_too_many_is_cut_short(tmp_path, mode):
    strategy = ScriptedStrategy(itertools.product((1, 2, 3), repeat=4))
    ask = strategy.ask
    strategy.ask = lambda count: ask(7)
    make_loop(tmp_path, mode=mode).run(strategy)
    assert len(distinct(tmp_path)) == 30


@pytest.mark.parametrize("mode", ["rounds", "async"])
def test_a_strategy_that_only_repeats_ends_the_search(tmp_path, mode):
    strategy = ScriptedStrategy(itertools.repeat((1, 1, 1, 1)))
    make_loop(tmp_path, mode=mode).run(strategy)
    assert MAX_REPEATS < len(strategy.told) <= MAX_REPEATS + 6


@pytest.mark.parametrize("mode", ["rounds", "async"])
def test_a_strategy_that_has_nothing_left_ends_the_search(tmp_path, mode):
    strategy = ScriptedStrategy([(1, 1, 1, 1), (2, 2, 2, 2)])
    loop = make_loop(tmp_path, mode=mode)
    loop.run(strategy)
    assert sorted(strategy.told) == [0, 1]
    assert loop.progress.evaluations == 2


def test_failures_are_recorded_and_told_and_count_but_never_win(tmp_path):
    strategy = ScriptedStrategy([(7, 7, 7, 7), (1, 1, 1, 1), (2, 2, 2, 2)])
    loop = make_loop(tmp_path, evaluations=2)
    loop.run(strategy)
    assert {r.index: r.status for r in RunDirectory(tmp_path).read_records()} == {
        0: "failed",
        1: "ok",
    }
    assert strategy.told == [0, 1]
    assert loop.archive.best(1.0).index == 1


def test_keep_counts_above_the_budget_are_refused(tmp_path):
    strategy = ScriptedStrategy([COST_MODEL.num_channels.tolist()])
    strategy.ask = lambda count: [Candidate(0.5, tuple(COST_MODEL.num_channels.tolist()))]
    with pytest.raises(EvaluationError, match="above the budget"):
        make_loop(tmp_path).run(strategy)


# --- order --------------------------------------------------------------------------------------


@FILES
@given(seed=st.integers(0, 1000), capacity=st.integers(1, 8))
def test_rounds_give_the_same_rows_however_results_arrive(
    tmp_path_factory, uninterrupted, seed, capacity
):
    folder = tmp_path_factory.mktemp("shuffled")
    strategy = ClimbingStrategy()
    make_loop(folder, ShuffledEvaluator(seed, capacity)).run(strategy)
    assert rows(folder) == uninterrupted
    assert strategy.told == sorted(strategy.told)


def test_async_submits_before_it_tells(tmp_path):
    evaluator = ShuffledEvaluator(capacity=4)
    strategy = ScriptedStrategy(itertools.product((1, 2, 3), repeat=4))
    waiting = []
    tell = strategy.tell

    def tell_and_look(results):
        if len(evaluator.submitted) < 30:
            waiting.append(len(evaluator._queue))
        tell(results)

    strategy.tell = tell_and_look
    make_loop(tmp_path, evaluator, mode="async").run(strategy)
    assert set(waiting) == {4}


def test_async_never_submits_above_capacity(tmp_path):
    evaluator = ShuffledEvaluator(capacity=2)
    loop = make_loop(
        tmp_path,
        evaluator,
        mode="async",
        on_progress=lambda _: sizes.append(len(evaluator._queue)),
    )
    sizes = []
    loop.run(ClimbingStrategy())
    assert max(sizes) == 2


def test_an_answer_that_comes_twice_counts_once(tmp_path, uninterrupted):
    class Doubling(ShuffledEvaluator):
        def results(self, timeout):
            return [m for m in super().results(timeout) for _ in range(2)]

    make_loop(tmp_path, Doubling()).run(ClimbingStrategy())
    assert rows(tmp_path) == uninterrupted


# --- kill and resume ----------------------------------------------------------------------------


def run_with_kills(folder, kills, **changes):
    """Runs, dies after each of `kills` submissions and waits, resumes; never loses a row."""
    seen = set()
    for number, kill_at in enumerate([*kills, None]):
        evaluator = ShuffledEvaluator(seed=number, kill_at=kill_at)
        try:
            make_loop(folder, evaluator, **changes).run(ClimbingStrategy())
        except Killed:
            if number % 2:
                with (folder / "journal.jsonl").open("a") as journal:
                    journal.write('{"index": 99, "rate": 0.')
        now = set(RunDirectory(folder).read_records())
        assert seen <= now
        seen = now


KILLS = st.lists(st.integers(0, 40), max_size=3)


@FILES
@given(kills=KILLS, checkpoint_ticks=st.sampled_from([1, 2, 1000]))
def test_a_killed_and_resumed_run_in_rounds_equals_an_uninterrupted_one(
    tmp_path_factory, uninterrupted, kills, checkpoint_ticks
):
    folder = tmp_path_factory.mktemp("killed")
    run_with_kills(folder, kills, checkpoint_ticks=checkpoint_ticks)
    assert rows(folder) == uninterrupted


@FILES
@given(kills=KILLS, checkpoint_ticks=st.sampled_from([1, 2, 1000]))
def test_a_killed_and_resumed_async_run_measures_as_many_and_loses_none(
    tmp_path_factory, kills, checkpoint_ticks
):
    folder = tmp_path_factory.mktemp("killed")
    run_with_kills(folder, kills, mode="async", checkpoint_ticks=checkpoint_ticks)
    rows(folder)
    assert len(distinct(folder)) == 30


@FILES
@given(kills=st.lists(st.integers(0, 25), max_size=3))
def test_a_kill_in_the_progress_callback_is_survived(tmp_path_factory, uninterrupted, kills):
    folder = tmp_path_factory.mktemp("killed")
    for kill_at in kills:
        calls = itertools.count()

        def kill(_, calls=calls, kill_at=kill_at):
            if next(calls) >= kill_at:
                raise Killed

        with contextlib.suppress(Killed):
            make_loop(folder, on_progress=kill).run(ClimbingStrategy())
    make_loop(folder).run(ClimbingStrategy())
    assert rows(folder) == uninterrupted


@FILES
@given(
    mode=st.sampled_from(["rounds", "async"]),
    kill_at=st.integers(0, 60),
    is_done_first=st.booleans(),
)
def test_a_kill_in_any_file_operation_is_survived(
    tmp_path_factory, uninterrupted, mode, kill_at, is_done_first
):
    folder = tmp_path_factory.mktemp("killed")
    calls = itertools.count()

    def dying(operation):
        def run(*arguments, **options):
            is_dead = next(calls) >= kill_at
            if is_done_first or not is_dead:
                operation(*arguments, **options)
            if is_dead:
                raise Killed

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(os, "truncate", dying(os.truncate))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        patch.setattr(pathlib.Path, "rename", dying(pathlib.Path.rename))
        with contextlib.suppress(Killed):
            make_loop(folder, mode=mode, checkpoint_ticks=1).run(ClimbingStrategy())
    before = set(RunDirectory(folder).read_records())
    make_loop(folder, mode=mode).run(ClimbingStrategy())
    assert before <= set(RunDirectory(folder).read_records())
    assert len(distinct(folder)) == 30
    if mode == "rounds":
        assert rows(folder) == uninterrupted


@pytest.mark.parametrize("operation", ["open", "replace", "rename", "mkdir"])
def test_storage_that_fails_for_a_while_loses_nothing(
    tmp_path, uninterrupted, monkeypatch, caplog, operation
):
    holder = os if operation == "replace" else pathlib.Path
    real, calls = getattr(holder, operation), itertools.count()

    def failing(*arguments, **options):
        if 6 <= next(calls) < 30 and (operation != "open" or "ab+" in arguments):
            raise OSError(5, "Input/output error")
        return real(*arguments, **options)

    monkeypatch.setattr(files, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(holder, operation, failing)
    make_loop(tmp_path, checkpoint_ticks=1).run(ClimbingStrategy())
    assert "Input/output error" in caplog.text
    assert rows(tmp_path) == uninterrupted


def test_storage_that_fails_for_good_ends_the_search_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(files, "RETRY_SECONDS", 0.001)
    (tmp_path / "journal.jsonl").mkdir()
    with pytest.raises(ArtifactError, match=r"(?s)journal.jsonl cannot be written .* --resume"):
        make_loop(tmp_path).run(ClimbingStrategy())


def test_a_damaged_checkpoint_falls_back_and_still_equals(tmp_path, uninterrupted):
    run_with_kills(tmp_path, [25], checkpoint_ticks=1)
    newest, _ = RunDirectory(tmp_path).find_checkpoint()
    (newest / "strategy" / "state.json").write_text("{}")
    make_loop(tmp_path).run(ClimbingStrategy())
    assert rows(tmp_path) == uninterrupted


def test_a_finished_run_has_nothing_left_to_do(tmp_path, uninterrupted):
    for mode in ("rounds", "async"):
        folder = tmp_path / mode
        make_loop(folder, mode=mode).run(ClimbingStrategy())
        before = rows(folder)
        evaluator = ShuffledEvaluator()
        loop = make_loop(folder, evaluator, mode=mode)
        loop.run(ClimbingStrategy())
        assert evaluator.submitted == []
        assert rows(folder) == before
        assert loop.progress.evaluations == 30


def test_more_evaluations_continue_a_finished_run(tmp_path):
    make_loop(tmp_path, evaluations=10).run(ClimbingStrategy())
    before = rows(tmp_path)
    make_loop(tmp_path, evaluations=30).run(ClimbingStrategy())
    assert len(distinct(tmp_path)) == 30
    assert rows(tmp_path)[: len(before)] == before


def test_async_asks_again_for_what_was_in_flight_at_the_checkpoint(tmp_path):
    script = [(1, 1, 1, 1), (2, 2, 2, 1), (3, 3, 3, 1)]
    silent = ShuffledEvaluator()
    silent.results = lambda timeout: []
    loop = make_loop(tmp_path, silent, mode="async")
    strategy = ScriptedStrategy(script)
    loop.tick(strategy)
    loop.checkpoint(strategy)
    again = ScriptedStrategy([])
    evaluator = ShuffledEvaluator()
    make_loop(tmp_path, evaluator, mode="async").run(again)
    assert [c.keep_counts for c in evaluator.submitted] == script
    assert sorted(again.told) == [0, 1, 2]


def test_a_strategy_that_proposes_something_else_after_resume_keeps_what_was_measured(tmp_path):
    for kill_at in (17, 23, 29):
        folder = tmp_path / str(kill_at)
        loop = make_loop(folder, ShuffledEvaluator(kill_at=kill_at), checkpoint_ticks=1000)
        with pytest.raises(Killed):
            loop.run(ClimbingStrategy())
        before = set(RunDirectory(folder).read_records())
        other = ClimbingStrategy(seed=1)
        make_loop(folder, evaluations=20, round_size=8).run(other)
        assert before <= set(RunDirectory(folder).read_records())
        assert {record.index for record in before} <= set(other.told)
        assert len(distinct(folder)) == 20
        rows(folder)


# --- progress -----------------------------------------------------------------------------------


def test_progress_counts_all_sessions_but_measures_the_speed_of_this_one(tmp_path):
    seen = []
    with pytest.raises(Killed):
        make_loop(tmp_path, ShuffledEvaluator(kill_at=40)).run(ClimbingStrategy())
    done = len(distinct(tmp_path))
    loop = make_loop(tmp_path, on_progress=seen.append)
    loop.restore(ClimbingStrategy())
    assert loop.progress.evaluations == done > 0
    assert loop.progress.evaluations_per_second == 0
    assert loop.progress.seconds_left is None
    loop.run(ClimbingStrategy())
    last = seen[-1]
    assert (last.evaluations, last.total, last.num_alive) == (30, 30, 3)
    assert last.evaluations_per_second > 0
    assert last.seconds_left == 0
    for rate in RATES:
        best = last.best[rate]
        records = RunDirectory(tmp_path).read_records()
        fitting = [r.score for r in records if r.macs <= BUDGET.limit(rate)]
        assert best.score == max(fitting)
    assert [f.name for f in dataclasses.fields(last)][:2] == ["evaluations", "total"]


def test_overhead_of_an_evaluation_is_small(tmp_path):
    strategy = make_strategy("random", PROBLEM)
    loop = make_loop(
        tmp_path, LocalEvaluator(measure), evaluations=300, round_size=20, checkpoint_ticks=None
    )
    started = time.perf_counter()
    loop.run(strategy)
    assert (time.perf_counter() - started) / 300 < 0.02

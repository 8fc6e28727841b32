"""Searches that share evaluators take turns, and nothing is scored twice."""

import time

import pytest
import ray

from cacp_ray.distributed.broker import BrokeredEvaluator, start_broker
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.measurement import Candidate
from tests.small import measurement_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SECONDS = 0.1


def make_slow():
    def score(candidate):
        time.sleep(SECONDS)
        return measurement_of(candidate.index, candidate.keep_counts[0] / 1000, 1, 0.5, 10, SECONDS)

    return score


def make_impossible():
    raise FileNotFoundError("no such file on this node")


def begin(folder, make_score=make_slow):
    return start_broker(
        make_score,
        {},
        num_evaluators=1,
        cpus_per_evaluator=0.5,
        cache_folder=folder,
        cache_key="key",
        images=10,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the measurements are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def broker(ray_cluster, folder):
    """One for all tests: each asks for widths of its own, and counts from where it begins."""
    handle = begin(folder)
    yield handle
    ray.kill(handle)


def candidates(*widths, first=0):
    return [Candidate(0.5, (width,), index=first + i) for i, width in enumerate(widths)]


def submit(evaluator, asked):
    for candidate in asked:
        evaluator.submit(candidate)


def collect(evaluator, count, seconds=60.0):
    """Collects `count` measurements, or more."""
    results, deadline = [], time.monotonic() + seconds
    while len(results) < count:
        assert time.monotonic() < deadline
        results += evaluator.results(1.0)
    return results


def counts(broker):
    return ray.get(broker.status.remote())


@pytest.fixture
def before(broker):
    """What the broker has counted, once nothing of other tests is being scored any more."""
    while True:
        status = counts(broker)
        time.sleep(3 * SECONDS)
        if counts(broker) == status:
            return status


def test_searches_take_turns(broker):
    greedy, modest = (BrokeredEvaluator(broker, name) for name in ("greedy", "modest"))
    submit(greedy, candidates(*range(1, 31)))
    collect(greedy, 1)
    submit(modest, candidates(51, 52, 53))
    collect(modest, 3)
    # Alone in the queue, the three would come after all thirty.
    assert len(greedy.results(0.0)) + 1 <= 12
    assert (greedy.num_alive, greedy.capacity) == (1, 2)
    greedy.close()


def test_what_two_want_is_scored_once_and_both_get_it_under_their_own_index(broker, folder, before):
    one, other = (BrokeredEvaluator(broker, name) for name in ("one", "other"))
    submit(one, candidates(101, 102, 103))
    submit(other, candidates(103, 102, 101, first=70))
    accuracies = {m.index: m.score for m in collect(one, 3)}
    assert accuracies == {0: 0.101, 1: 0.102, 2: 0.103}
    assert {m.index: m.score for m in collect(other, 3)} == {70: 0.103, 71: 0.102, 72: 0.101}
    after = counts(broker)
    assert after.scored - before.scored == 3
    assert after.joined + after.cached - before.joined - before.cached == 3
    by_search = ray.get(broker.counts.remote())
    (asked, known), (asked_too, known_too) = by_search["one"], by_search["other"]
    assert (asked + asked_too, known + known_too) == (6, 3)
    again = begin(folder)
    third = BrokeredEvaluator(again, "third")
    submit(third, candidates(102))
    assert [m.score for m in collect(third, 1)] == [0.102]
    assert (counts(again).scored, counts(again).cached) == (0, 1)
    ray.kill(again)


def test_a_search_that_ends_or_begins_anew_leaves_nothing_in_the_queue(broker, before):
    stopped = BrokeredEvaluator(broker, "stopped")
    submit(stopped, candidates(*range(201, 231)))
    collect(stopped, 1)
    stopped.close()
    restarted = BrokeredEvaluator(broker, "restarted")
    submit(restarted, candidates(*range(231, 261)))
    restarted = BrokeredEvaluator(broker, "restarted")
    submit(restarted, candidates(261))
    assert [m.score for m in collect(restarted, 1)] == [0.261]
    time.sleep(4 * SECONDS)
    assert counts(broker).scored - before.scored <= 12
    assert stopped.results(0.0) == []


@pytest.mark.slow
def test_a_scorer_that_cannot_be_built_ends_every_search(tmp_path):
    broker = begin(tmp_path, make_impossible)
    evaluator = BrokeredEvaluator(broker, "search")
    submit(evaluator, candidates(1))
    with pytest.raises(EvaluationError, match="no such file on this node"):
        collect(evaluator, 1)
    ray.kill(broker)
    reason, deadline = "", time.monotonic() + 30
    while "has died" not in reason and time.monotonic() < deadline:
        with pytest.raises(EvaluationError) as caught:
            collect(evaluator, 1)
        reason = str(caught.value)
    assert "has died" in reason

"""What a pool does about losses, errors, hangs and nodes that come and go, on a made-up cluster."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ray.util import metrics

from cacp_ray.distributed import fleet, pool
from cacp_ray.distributed.nodes import Kind
from cacp_ray.distributed.pool import RayEvaluatorPool
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.measurement import FAILED, Candidate, Measurement
from tests.clusters import CRASH, HANG, Actor, Answer, FakeCluster, measure
from tests.small import measurement_of

SECONDS = 36_000.0  # of the made-up clock: whatever ends, ends before


def open_pool(cluster: FakeCluster, number: int = 2, **options: Any) -> RayEvaluatorPool:
    return RayEvaluatorPool(cluster, num_evaluators=number, **{"cpus_per_evaluator": 1.0} | options)


def submit(evaluator: RayEvaluatorPool, number: int, first: int = 0) -> None:
    for index in range(first, first + number):
        evaluator.submit(Candidate(0.5, (1,), index=index))


def collect(cluster: FakeCluster, evaluator: RayEvaluatorPool, number: int) -> list[Measurement]:
    """Every candidate must come back exactly once, and nothing else."""
    measured: list[Measurement] = []
    while len(measured) < number:
        assert cluster.clock < SECONDS, f"{len(measured)} of {number} came back"
        before = cluster.clock
        new = evaluator.results(10.0)
        assert new or cluster.clock > before, "nothing is in flight any more"
        measured += new
    assert evaluator.results(10.0) == []
    assert sorted(m.index for m in measured) == sorted({m.index for m in measured})
    return measured


def score(cluster: FakeCluster, evaluator: RayEvaluatorPool, number: int) -> list[Measurement]:
    submit(evaluator, number)
    return collect(cluster, evaluator, number)


def wait(cluster: FakeCluster, evaluator: RayEvaluatorPool, is_so: Callable[[], bool]) -> float:
    """Lets time pass until something is so; returns the seconds."""
    started = cluster.clock
    while not is_so():
        assert cluster.clock < SECONDS
        evaluator.results(0.0)
        cluster.sleep(0.1)
    return cluster.clock - started


def by_index(
    answers: dict[int, Answer], times: int | None = None
) -> Callable[[Candidate, Actor], Answer]:
    """A score function that does as told for some candidates, the first `times` times."""
    seen: Counter[int] = Counter()

    def score(candidate: Candidate, actor: Actor) -> Answer:
        seen[candidate.index] += 1
        if candidate.index in answers and (times is None or seen[candidate.index] <= times):
            return answers[candidate.index]
        return measure(candidate, actor)

    return score


def test_candidates_come_back_once_and_not_in_their_order() -> None:
    cluster = FakeCluster(2, seconds=lambda candidate: 9.0 if candidate.index == 0 else 1.0)
    evaluator = open_pool(cluster)
    assert (evaluator.capacity, evaluator.num_alive) == (2, 0)  # nobody is ready yet
    measured = score(cluster, evaluator, 20)
    order = [m.index for m in measured]
    assert order != sorted(order)
    assert all((m.status, m.attempt, m.score) == ("ok", 1, m.index) for m in measured)
    assert (evaluator.capacity, evaluator.num_alive) == (4, 2)


def test_both_evaluators_work_all_the_time() -> None:
    cluster = FakeCluster(2)
    evaluator = open_pool(cluster)
    wait(cluster, evaluator, lambda: evaluator.num_alive == 2)
    started = cluster.clock
    score(cluster, evaluator, 40)
    assert cluster.clock - started == pytest.approx(20.0)


def test_submitting_does_not_wait_and_an_idle_pool_answers_at_once() -> None:
    cluster = FakeCluster(2)
    evaluator = open_pool(cluster)
    wait(cluster, evaluator, lambda: evaluator.num_alive == 2)
    started = cluster.clock
    assert evaluator.results(10.0) == []
    submit(evaluator, 5)
    assert cluster.clock == started
    assert evaluator.results(0.5) == []
    assert cluster.clock == started + 0.5
    assert len(evaluator.results(10.0)) == 1
    assert cluster.clock == started + 1.0


def test_a_lost_evaluator_loses_nothing_and_comes_back() -> None:
    cluster = FakeCluster(2)
    evaluator = open_pool(cluster)
    cluster.at(5.2, lambda: cluster.lose_process(cluster.actors[0]))
    measured = score(cluster, evaluator, 40)
    assert {m.status for m in measured} == {"ok"}
    # The one that was scored and the one that waited behind it.
    assert sorted(m.attempt for m in measured) == 38 * [1] + 2 * [2]
    assert evaluator.num_alive == 2


def test_losing_every_evaluator_unnoticed_is_survived() -> None:
    cluster = FakeCluster(2)
    evaluator = open_pool(cluster)
    wait(cluster, evaluator, lambda: evaluator.num_alive == 2)
    for actor in cluster.actors:
        cluster.lose_process(actor)
    measured = score(cluster, evaluator, 10)
    # They had not been prepared again: that is no failure of a candidate.
    assert {(m.status, m.attempt) for m in measured} == {("ok", 1)}


def test_a_candidate_that_crashes_its_process_fails_after_three_attempts_and_alone() -> None:
    cluster = FakeCluster(2, score=by_index({2: CRASH}))
    evaluator = open_pool(cluster)
    measured = {m.index: m for m in score(cluster, evaluator, 12)}
    bad = measured.pop(2)
    assert (bad.status, bad.attempt, bad.score) == ("failed", 3, FAILED)
    assert "lost with evaluator-" in bad.error
    # The candidate on the same actor is lost once, never again.
    assert all((m.status, m.attempt <= 2) == ("ok", True) for m in measured.values())


@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_candidate_is_tried_as_often_as_told(most: int) -> None:
    cluster = FakeCluster(2, score=by_index({0: ValueError("no")}))
    evaluator = open_pool(cluster, max_attempts=most)
    (bad,) = score(cluster, evaluator, 1)
    assert (bad.status, bad.attempt) == ("failed", most)


def test_a_candidate_that_raises_is_tried_elsewhere_then_failed() -> None:
    places: list[str] = []

    def raising(candidate: Candidate, actor: Actor) -> Answer:
        if candidate.index != 1:
            return measure(candidate, actor)
        places.append(actor.name)
        return ValueError("group 2\nkeeps nothing")

    cluster = FakeCluster(3, score=raising)
    evaluator = open_pool(cluster, 3)
    measured = {m.index: m for m in score(cluster, evaluator, 9)}
    bad = measured.pop(1)
    assert (bad.status, bad.attempt) == ("failed", 3)
    assert bad.error == "scoring raised ValueError: group 2"
    assert len(set(places)) == len(places) == 3
    assert all((m.status, m.attempt) == ("ok", 1) for m in measured.values())
    assert not cluster.killed
    assert all(actor.num_lives == 1 for actor in cluster.actors)


def test_a_candidate_that_raised_once_is_measured_by_another() -> None:
    cluster = FakeCluster(2, score=by_index({1: ValueError("once")}, times=1))
    measured = {m.index: m for m in score(cluster, open_pool(cluster), 8)}
    assert (measured[1].status, measured[1].attempt) == ("ok", 2)


@pytest.mark.parametrize("is_first", [False, True])
def test_an_evaluator_that_hangs_is_replaced(
    is_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    bad = 0 if is_first else 3
    cluster = FakeCluster(2, score=by_index({bad: HANG}, times=1))
    evaluator = open_pool(cluster)
    measured = {m.index: m for m in score(cluster, evaluator, 1 if is_first else 12)}
    assert {m.status for m in measured.values()} == {"ok"}
    assert measured[bad].attempt == 2
    patience = pool.FIRST_HANG_S if is_first else pool.HANG_S
    assert caplog.text.count(f"has not answered for {patience:.0f} s: it is replaced") == 1
    assert len(cluster.killed) == 1


def test_an_evaluator_that_was_replaced_is_not_lost_again_with_its_old_candidates() -> None:
    """The calls of the old process fail a second later, when the new one is ready."""
    built: list[Actor] = []
    cluster = FakeCluster(1, score=by_index({0: HANG}, times=1), build=built.append)
    measured = score(cluster, open_pool(cluster, 1), 2)
    assert [m.status for m in measured] == ["ok", "ok"]
    assert len(cluster.killed) == 1
    assert built == [*cluster.killed, *cluster.actors]


@pytest.mark.parametrize(("images", "is_replaced"), [(None, True), (100, True), (50_000, False)])
def test_a_longer_measurement_is_no_hang(images: int | None, is_replaced: bool) -> None:
    def slow(candidate: Candidate, actor: Actor) -> Answer:
        return measurement_of(candidate.index, 0.5, 0.5, 1.0, 100, 2.0)  # 0.02 s an image

    late = pool.HANG_S + 100.0
    cluster = FakeCluster(1, score=slow, seconds=lambda c: late if c.index == 9 else 2.0)
    evaluator = open_pool(cluster, 1)
    score(cluster, evaluator, 1)
    evaluator.submit(Candidate(0.5, (1,), index=9, images=images))
    while not cluster.killed and not evaluator.results(1.0):
        assert cluster.clock < SECONDS
    assert bool(cluster.killed) is is_replaced


def test_a_score_that_counts_no_images_tells_what_a_hang_is() -> None:
    def uncounted(candidate: Candidate, actor: Actor) -> Answer:
        return Measurement(index=candidate.index, score=0.5, seconds=2.0)

    late = pool.HANG_S + 100.0
    cluster = FakeCluster(1, score=uncounted, seconds=lambda c: late if c.index == 9 else 2.0)
    evaluator = open_pool(cluster, 1)
    score(cluster, evaluator, 1)
    submit(evaluator, 1, first=9)
    while not cluster.killed and not evaluator.results(1.0):
        assert cluster.clock < SECONDS
    assert cluster.killed


def test_patience_doubles_while_no_measurement_is_known() -> None:
    times: list[float] = []
    cluster = FakeCluster(2, seconds=lambda candidate: 3.5 * pool.FIRST_HANG_S)
    evaluator = open_pool(cluster, 1)
    submit(evaluator, 1)
    while cluster.clock < 12 * pool.FIRST_HANG_S and not evaluator.results(60.0):
        if len(cluster.killed) > len(times):
            times.append(cluster.clock)
    first, second = times
    assert first == pytest.approx(pool.FIRST_HANG_S, abs=120)
    assert second - first == pytest.approx(2 * pool.FIRST_HANG_S, abs=120)


def test_what_a_gpu_takes_says_nothing_of_cpus() -> None:
    cluster = FakeCluster(seconds=lambda candidate: 1.0)
    cluster.add_node(1, gpus=1)
    evaluator = open_pool(cluster, 0, num_gpu_evaluators=1, gpus_per_evaluator=1.0)
    score(cluster, evaluator, 3)
    assert evaluator._slowest.keys() == {Kind(1.0, 1.0)}


def test_shares_of_gpus_are_placed_and_plain_actors_follow_nodes_without_a_gpu() -> None:
    cluster = FakeCluster()
    cluster.add_node(2, gpus=1)
    cluster.add_node(1)
    evaluator = open_pool(cluster, 1, num_gpu_evaluators=2, gpus_per_evaluator=0.5, most=100)
    wait(cluster, evaluator, lambda: evaluator.num_alive == 3)
    assert sorted(actor.kind.gpus for actor in cluster.actors) == [0.0, 0.5, 0.5]
    cluster.add_node(2, gpus=1)
    wait(cluster, evaluator, lambda: evaluator.num_alive == 5)
    assert sorted(actor.kind.gpus for actor in cluster.actors) == [0.0, 0.5, 0.5, 0.5, 0.5]
    cluster.add_node(3)
    wait(cluster, evaluator, lambda: evaluator.num_alive == 8)
    assert sum(actor.kind.gpus == 0 for actor in cluster.actors) == 4


def test_only_failures_on_nodes_that_are_still_there_are_a_candidate_s_fault() -> None:
    """A node is lost with the candidate eight times: three failures of its own are too many."""
    cluster = FakeCluster(1, seconds=lambda candidate: 5.0)
    evaluator = open_pool(cluster, 1)
    submit(evaluator, 1)
    for _ in range(pool.LOSSES_AN_ATTEMPT * 3 - 1):
        wait(cluster, evaluator, lambda: bool(evaluator._flights))
        cluster.remove_node(next(iter(cluster.nodes().cpus)))
        wait(cluster, evaluator, lambda: not evaluator._flights)
        cluster.add_node(1)
    (measured,) = collect(cluster, evaluator, 1)
    assert (measured.status, measured.attempt) == ("ok", 9)


def test_a_candidate_that_ends_every_node_it_touches_is_given_up() -> None:
    def deadly(candidate: Candidate, actor: Actor) -> Answer:
        node = actor.node
        cluster.at(cluster.clock, lambda: cluster.remove_node(node))
        cluster.at(cluster.clock + 1, lambda: cluster.add_node(1))
        return HANG

    cluster = FakeCluster(1, score=deadly)
    (bad,) = score(cluster, open_pool(cluster, 1), 1)
    assert (bad.status, bad.attempt) == ("failed", pool.LOSSES_AN_ATTEMPT * 3)


def test_an_announced_loss_is_no_attempt() -> None:
    cluster = FakeCluster(1, 1, seconds=lambda candidate: 30.0)
    evaluator = open_pool(cluster)
    cluster.at(10.0, lambda: cluster.remove_node("n0", announced=True))
    measured = score(cluster, evaluator, 2)
    assert [(m.status, m.attempt) for m in measured] == 2 * [("ok", 1)]


def test_a_draining_node_is_left_once_its_candidates_are_measured() -> None:
    cluster = FakeCluster(1, 1, seconds=lambda candidate: 10.0)
    evaluator = open_pool(cluster)
    cluster.at(5.0, lambda: cluster.drain("n0"))
    cluster.at(60.0, lambda: cluster.remove_node("n0"))
    measured = score(cluster, evaluator, 16)
    assert all((m.status, m.attempt) == ("ok", 1) for m in measured)
    assert sum(m.node == "n0" for m in measured) == 2  # those that it held


def test_a_pool_left_alone_asks_for_little_and_is_there_when_a_node_joins() -> None:
    cluster = FakeCluster(2)
    evaluator = open_pool(cluster, 2, most=3)
    wait(cluster, evaluator, lambda: evaluator.num_alive == 2)
    cluster.remove_node("n0")
    withdrawn = wait(cluster, evaluator, lambda: len(cluster.actors) == 1)
    assert fleet.WITHDRAW_S < withdrawn < fleet.WITHDRAW_S + 10
    cluster.at(cluster.clock + 300, lambda: None)
    cluster.sleep(300)
    evaluator.results(0.0)
    assert len(cluster.actors) == 1
    cluster.add_node(1)
    assert wait(cluster, evaluator, lambda: evaluator.num_alive == 1) < 5
    cluster.add_node(8)
    wait(cluster, evaluator, lambda: evaluator.num_alive == 3)
    cluster.sleep(10)
    evaluator.results(0.0)
    assert len(cluster.actors) == 3


def test_a_pool_of_a_fixed_size_does_not_follow_the_cluster() -> None:
    cluster = FakeCluster(1)
    evaluator = open_pool(cluster, 1)
    wait(cluster, evaluator, lambda: evaluator.num_alive == 1)
    cluster.add_node(8)
    cluster.sleep(10)
    evaluator.results(0.0)
    assert len(cluster.actors) == 1


def test_that_nobody_is_ready_is_told_once_and_from_when_one_waits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster = FakeCluster(2)
    evaluator = open_pool(cluster, 1, cpus_per_evaluator=64)
    cluster.sleep(fleet.PATIENCE_S + 1)  # the driver measures the base network, say
    evaluator.results(0.0)
    assert not caplog.text
    for _ in range(3):
        cluster.sleep(fleet.PATIENCE_S + 1)
        evaluator.results(0.0)
    evaluator.close()
    told = "no evaluator is ready after 21 s: they ask for 1 x 64 CPU, the cluster has 2 CPU"
    assert caplog.text.count("no evaluator is ready") == 1
    assert told in caplog.text


@pytest.mark.parametrize(
    ("outcome", "reason", "seconds"),
    [
        (ValueError("x.npy is not on this node\nreally"), "ValueError: x.npy is not on", 5),
        (CRASH, "process died", 30),
    ],
)
def test_a_scorer_that_cannot_be_built_ends_the_search(
    outcome: Exception | str, reason: str, seconds: float
) -> None:
    cluster = FakeCluster(2, build=lambda actor: outcome)
    evaluator = open_pool(cluster)
    submit(evaluator, 1)
    with pytest.raises(EvaluationError, match=reason):
        evaluator.results(SECONDS)
    assert cluster.clock < seconds
    evaluator.close()
    evaluator.close()
    assert (evaluator.capacity, evaluator.num_alive) == (0, 0)
    assert cluster.is_closed
    assert not cluster.actors


def test_one_node_that_cannot_build_is_told_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster = FakeCluster(
        1, 1, build=lambda actor: ValueError("no torch") if actor.node == "n1" else None
    )
    evaluator = open_pool(cluster)
    wait(cluster, evaluator, lambda: evaluator.num_alive == 1)
    cluster.sleep(100)
    measured = score(cluster, evaluator, 6)
    assert {m.node for m in measured} == {"n0"}
    assert caplog.text.count("cannot be prepared") == 1


def test_the_pool_tells_ray_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: Counter[str] = Counter()
    shown: dict[str, list[float]] = {}
    monkeypatch.setattr(metrics.Counter, "inc", lambda self: counted.update([self.info["name"]]))
    monkeypatch.setattr(
        metrics.Gauge,
        "set",
        lambda self, value: shown.setdefault(self.info["name"], []).append(value),
    )
    cluster = FakeCluster(2, score=by_index({3: ValueError("no")}))
    evaluator = open_pool(cluster)
    score(cluster, evaluator, 21)
    assert counted == {"cacp_measurements": 20, "cacp_failed_measurements": 1}
    stopped = measurement_of(0, 0.1, 0.1, 1.0, 5, 1.0, status="stopped")
    evaluator._metrics.count([stopped])
    assert counted["cacp_measurements"] == 21
    assert shown["cacp_evaluators_alive"][-1] == 2
    assert max(shown["cacp_candidates_waiting"]) > 0
    assert max(shown["cacp_candidates_scoring"]) > 0


Loss = tuple[float, str, int]


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(
        st.tuples(
            st.floats(0.0, 40.0),
            st.sampled_from(["process", "node", "announced", "drain", "join"]),
            st.integers(0, 5),
        ),
        max_size=12,
    ),
    bad=st.dictionaries(st.integers(0, 29), st.sampled_from([CRASH, HANG, ValueError("no")])),
    number=st.integers(1, 4),
    follows=st.booleans(),
)
@example(losses=[], bad={0: HANG, 1: HANG}, number=1, follows=False)
@example(losses=[], bad=dict.fromkeys(range(30), HANG), number=1, follows=False)
def test_whatever_is_lost_and_whenever_every_candidate_comes_back_once(
    losses: list[Loss], bad: dict[int, Answer], number: int, follows: bool
) -> None:
    """Nodes and processes go, come and drain, candidates crash, hang and raise, in any order."""
    cluster = FakeCluster(2, 2, score=by_index(bad, times=2))

    def do(what: str, which: int) -> None:
        nodes, actors = sorted(cluster.nodes().cpus), cluster.actors
        if what == "join":
            cluster.add_node(1)
        elif what == "process" and actors:
            cluster.lose_process(actors[which % len(actors)])
        elif what == "drain" and nodes:
            cluster.drain(nodes[which % len(nodes)])
        elif nodes:
            cluster.remove_node(nodes[which % len(nodes)], announced=what == "announced")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "FIRST_HANG_S", 60.0)  # all hang twice before any answers, at worst
        evaluator = open_pool(cluster, number, most=6 if follows else None)
        check_whatever_is_lost(cluster, evaluator, losses, do)


def check_whatever_is_lost(
    cluster: FakeCluster, evaluator: RayEvaluatorPool, losses: list[Loss], do: Callable[..., object]
) -> None:
    wait(cluster, evaluator, lambda: evaluator.num_alive > 0)  # else the scorer may be to blame
    for moment, what, which in losses:
        cluster.at(cluster.clock + moment, lambda what=what, which=which: do(what, which))
    cluster.at(cluster.clock + 50.0, lambda: cluster.add_node(4))  # a place is left in the end
    measured = score(cluster, evaluator, 30)
    assert sorted(m.index for m in measured) == list(range(30))
    for m in measured:
        # A loss with a node counts a third.
        assert m.status == "ok" or 3 <= m.attempt <= 3 * pool.LOSSES_AN_ATTEMPT
        assert m.status == "failed" or m.score == m.index
    evaluator.close()
    assert not cluster.actors

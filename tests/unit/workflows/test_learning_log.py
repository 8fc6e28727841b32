"""The log of an agent's learning: when it is written, what survives, which rates it asks for."""

import struct
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto import event_pb2

from cacp_ray.io.jsonl import read_journal
from cacp_ray.reporting.scalars import ScalarLog
from cacp_ray.rundir.records import EpisodeRecord
from cacp_ray.rundir.schema import LEARNING_FILE
from cacp_ray.searching.budget import Budget
from cacp_ray.workflows.learning_log import (
    NUM_LINES,
    LearningLog,
    choose_moments,
    measure_answers,
    recent_reward,
    unseen_rates,
)
from tests.small import measurement_of

RATES = (0.3, 0.5, 0.7)
UNSEEN = (0.4, 0.6)
rates_of_a_run = st.lists(
    st.integers(1, 100).map(lambda percent: percent / 100), min_size=1, max_size=8, unique=True
)


def budget(smallest: float) -> Budget:
    """One group of a thousand channels that cost one each."""
    return Budget(
        cost=lambda counts: np.asarray(counts).sum(axis=-1),
        num_channels=np.array([1000]),
        min_counts=np.array([round(1000 * smallest)]),
    )


@given(rates_of_a_run, st.floats(0.001, 1))
def test_unseen_rates_are_new_reachable_and_at_most_three(rates, smallest):
    limits = budget(smallest)
    found = unseen_rates(rates, limits)
    assert len(found) <= 3
    assert found == sorted(set(found) - set(rates))
    for rate in found:
        assert 0 < rate < 1
        assert rate == round(rate, 2)
        assert limits.limit(rate) >= limits.smallest
    outside = [rate for rate in found if not min(rates) < rate < max(rates)]
    assert len(outside) <= 1


@given(rates_of_a_run)
def test_every_gap_that_holds_a_rate_is_asked_for_up_to_three(rates):
    known = sorted(rates)
    inside = [rate for rate in unseen_rates(rates, budget(0.001)) if known[0] < rate < known[-1]]
    gaps = sum(round(high - low, 2) >= 0.02 for low, high in pairwise(known))
    assert len(inside) == min(3, gaps)


@pytest.mark.parametrize(
    ("rates", "smallest", "expected"),
    [
        ((0.3, 0.5, 0.7), 0.1, [0.2, 0.4, 0.6]),
        ((0.3, 0.5, 0.7), 0.25, [0.4, 0.6, 0.8]),  # 0.2 is out of reach
        ((0.5,), 0.1, [0.4]),
        ((0.5,), 0.45, [0.6]),
        ((0.1, 0.2, 0.5, 0.8, 1.0), 0.01, [0.35, 0.65, 0.9]),
        ((1.0,), 0.95, []),
    ],
)
def test_unseen_rates_are_midpoints_then_one_further_out(rates, smallest, expected):
    assert unseen_rates(rates, budget(smallest)) == expected


class FakeAgent:
    def policy_samples(self, rate, count, rng, *, beam=(), known=()):
        raise AssertionError("a log asks for the greedy answer alone")

    def stop(self):
        pass

    def noise(self, rate):
        return 0.5 * rate

    def policy(self, rates):
        return np.array([[round(100 * rate), 7] for rate in rates])


def record(index, rate=0.3, score=0.5, *, cached=False, status="ok"):
    return EpisodeRecord(
        index=index, strategy="cacp", rate=rate, keep_counts=(index,), macs=1, params=1,
        cost_kept=rate, score=score, figures={"loss": 1.0}, images=9, reward=score, seconds=0.0,
        cached=cached, status=status, evaluator="", node="", attempt=1, finished_at=0.0, error="",
    )  # fmt: skip


def learned(loss=1.0, updates=16):
    return {"critic_loss": loss, "policy_value": 2 * loss, "updates": float(updates)}


def open_log(folder, evaluations, agent=None, loggers=()) -> LearningLog:
    scalars = ScalarLog(loggers, folder, "project", {})
    return LearningLog(folder, agent or FakeAgent(), RATES, UNSEEN, evaluations, scalars)


def numbers(folder):
    return [line["evaluations"] for line in read_journal(folder / LEARNING_FILE)]


@given(st.integers(1, 300), st.lists(st.integers(0, 9), max_size=60), st.integers(0, 300))
def test_lines_rise_and_survive_a_resume_without_duplicates(
    tmp_path_factory, evaluations, steps, killed_at
):
    folder = tmp_path_factory.mktemp("run")
    ends = [min(evaluations, int(n)) for n in np.cumsum(steps)]
    log = open_log(folder, evaluations)
    for i, n in enumerate(ends):
        if i == killed_at % (len(ends) + 1):
            before = numbers(folder)
            log = open_log(folder, evaluations)  # in rounds it goes over old ground again
            for again in ends[max(0, i - 3) : i]:
                log.watch(again, [], {})
            assert numbers(folder) == before
        log.watch(n, [], learned(), is_last=i == len(ends) - 1)
    found = numbers(folder)
    assert found == sorted(set(found))
    assert len(found) <= NUM_LINES + 1
    if ends and ends[-1]:
        assert found[-1] == ends[-1]
    if ends and max(np.diff([0, *ends])) <= evaluations / NUM_LINES:
        assert len(found) >= ends[-1] * NUM_LINES // evaluations


def test_a_line_that_a_kill_cut_short_is_dropped_and_written_again(tmp_path):
    log = open_log(tmp_path, 40)
    for n in range(1, 6):
        log.watch(n, [], learned())
    path = tmp_path / LEARNING_FILE
    path.write_bytes(path.read_bytes()[:-30])
    log = open_log(tmp_path, 40)
    log.watch(5, [], learned())
    log.watch(6, [], learned())
    assert numbers(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_line_holds_what_the_agent_and_the_measurements_say(tmp_path):
    records = [record(i, score=i / 100, cached=i % 4 == 0) for i in range(16)]
    log = open_log(tmp_path, 40)
    for loss in (1.0, float("nan"), 3.0):
        log.watch(0, records, learned(loss))
    log.watch(4, records, learned(5.0, updates=64))
    (line,) = read_journal(tmp_path / LEARNING_FILE)
    assert line == {
        "evaluations": 4,
        "critic_loss": 3.0,  # mean of the turns that learned
        "policy_value": 6.0,
        "updates": 64,
        "noise": {"0.30": 0.15, "0.50": 0.25, "0.70": 0.35},
        "cached_share": 0.25,
        "reward": {"0.30": pytest.approx(0.105), "0.50": None, "0.70": None},
        "policy": {key: [round(100 * float(key)), 7] for key in line["policy"]},
    }
    assert sorted(line["policy"]) == ["0.30", "0.40", "0.50", "0.60", "0.70"]


def test_what_a_strategy_without_a_policy_lacks_is_null(tmp_path):
    open_log(tmp_path, 40, object()).watch(4, [], {})
    (line,) = read_journal(tmp_path / LEARNING_FILE)
    assert set(line["noise"].values()) == set(line["policy"].values()) == {None}
    assert line["critic_loss"] is line["policy_value"] is line["updates"] is None
    assert choose_moments([line]) == []


def test_the_reward_forgets_failures_other_rates_and_old_candidates():
    rows = [record(i, score=0.9) for i in range(3)] + [record(i, score=0.5) for i in range(10)]
    rows += [record(20, rate=0.5, score=0.1), record(21, score=0.0, status="failed")]
    assert recent_reward(rows, 0.3) == 0.5
    assert recent_reward(rows, 0.7) is None


def events(folder):
    """(tag, step, value) of the scalars in all event files."""
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                yield value.tag, event.step, value.simple_value


def test_tensorboard_has_the_numbers_of_the_lines(tmp_path):
    log = open_log(tmp_path, 40, loggers=("tensorboard",))
    for n in (1, 2):
        log.watch(n, [record(0)], learned(n))
    point = {"evaluations": 2, "rate": 0.4, "seen": False, "score": 0.75, "images": 9}
    log.close([point])
    found = {(tag, step): value for tag, step, value in events(tmp_path / "tensorboard")}
    names = {"critic_loss", "policy_value", "cached_share", "reward/0.30"}
    names |= {f"noise/{rate:.2f}" for rate in RATES}
    assert set(found) == {(name, n) for name in names for n in (1, 2)} | {("policy_score/0.40", 2)}
    assert found["critic_loss", 2] == 2.0
    assert found["reward/0.30", 1] == 0.5
    assert found["policy_score/0.40", 2] == 0.75


def make_line(evaluations, counts=(1, 2)):
    return {"evaluations": evaluations, "policy": {"0.30": list(counts), "0.40": [evaluations]}}


@given(st.integers(1, 60))
def test_moments_are_spread_from_the_first_to_the_last(count):
    chosen = [line["evaluations"] for line in choose_moments([make_line(n) for n in range(count)])]
    assert len(chosen) == min(8, count)
    assert (chosen[0], chosen[-1]) == (0, count - 1)
    gaps = np.diff(chosen)
    assert count == 1 or gaps.max() - gaps.min() <= 1


def test_equal_answers_are_measured_once_on_the_images_asked_for():
    asked = []

    def measure(candidates):
        asked.extend(candidates)
        return [
            measurement_of(i, 0.1 * len(c.keep_counts), 0.0, 0.0, c.images, 0.0)
            for i, c in enumerate(candidates)
        ]

    points = measure_answers([make_line(5), make_line(9)], (0.3,), 77, measure)
    assert [c.keep_counts for c in asked] == [(1, 2), (5,), (9,)]
    assert {c.images for c in asked} == {77}
    assert [(p["evaluations"], p["rate"], p["seen"], p["score"], p["images"]) for p in points] == [
        (5, 0.3, True, 0.2, 77),
        (5, 0.4, False, 0.1, 77),
        (9, 0.3, True, 0.2, 77),
        (9, 0.4, False, 0.1, 77),
    ]

"""The best measurement of every rate."""

import math

from hypothesis import given
from hypothesis import strategies as st

from cacp_ray.rundir.records import EpisodeRecord
from cacp_ray.searching.archive import Archive

TOTAL = 20


def record(index, cost, score, loss=1.0, status="ok"):
    return EpisodeRecord(
        index=index,
        strategy="test",
        rate=1.0,
        keep_counts=(cost,),
        macs=cost,
        params=cost,
        cost_kept=cost / TOTAL,
        score=score,
        figures={"loss": loss},
        images=100,
        reward=score,
        seconds=0.0,
        cached=False,
        status=status,
        evaluator="local",
        node="local",
        attempt=1,
        finished_at=0.0,
        error="",
    )


RECORDS = st.lists(
    st.tuples(
        st.integers(1, TOTAL),
        st.sampled_from([0.1, 0.5, 0.9]),
        st.sampled_from([0.5, 1.0, math.nan]),
        st.sampled_from(["ok", "ok", "failed"]),
    )
).map(lambda rows: [record(index, *row) for index, row in enumerate(rows)])


@given(RECORDS, st.floats(0.01, 1), st.randoms())
def test_best_is_the_maximum_over_all_that_fit_in_whatever_order_they_come(records, rate, random):
    fitting = [r for r in records if r.status == "ok" and r.macs <= math.floor(rate * TOTAL)]
    expected = max(
        fitting,
        key=lambda r: (r.score, -math.inf if math.isnan(r.loss) else -r.loss, -r.macs, -r.index),
        default=None,
    )
    random.shuffle(records)
    archive = Archive(TOTAL)
    for measured in records:
        archive.add(measured)
    assert archive.best(rate) is expected


def test_a_failed_measurement_never_wins():
    archive = Archive(TOTAL)
    archive.add(record(0, 10, 0.9, status="failed"))
    assert archive.best(1.0) is None


def test_a_cheap_measurement_also_serves_a_larger_rate():
    archive = Archive(TOTAL)
    archive.add(record(0, 6, 0.8))
    archive.add(record(1, 14, 0.7))
    assert archive.best(0.7) is archive.best(0.3)
    assert archive.best(0.29) is None


def test_a_cost_equal_to_the_budget_fits():
    archive = Archive(TOTAL)
    archive.add(record(0, 6, 0.8))
    assert archive.best(0.3) is not None

"""Final subnets: what is stored is what was measured."""

import dataclasses

import numpy as np
import pytest

from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.evaluation.classification import Classification
from cacp_ray.evaluation.measurement import Candidate
from cacp_ray.evaluation.scorer import Scorer
from cacp_ray.pruning.subnet import load_subnet, read_description
from cacp_ray.rundir.records import EpisodeRecord
from cacp_ray.searching.budget import uniform
from cacp_ray.training.metrics import measure
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.winners import (
    build_here,
    build_winners,
    frontier_rates,
    measure_outside,
    measure_uniform,
)
from tests.small import measurement_of

RATE = 0.3


def record(base, counts):
    return EpisodeRecord(
        index=0, strategy="uniform", rate=RATE, keep_counts=tuple(counts),
        macs=int(base.plan.macs(counts)), params=int(base.plan.params(counts)), cost_kept=RATE,
        score=0.0, figures={"loss": 9.0}, images=1, reward=0.0, seconds=0.0, cached=False,
        status="ok", evaluator="", node="", attempt=1, finished_at=0.0, error="",
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Base; folder and row of the subnet, one-shot and sequential; accuracy of another answer."""
    base = Setup.create(load_config(RunConfig, {}, ["pruning.calibration_images=128"])).prepare()
    base = dataclasses.replace(base, task=Classification(base.search.take(200)))
    counts = uniform(base.budget, [RATE], np.ones(len(base.plan.groups)))[0].tolist()
    winners = {RATE: record(base, counts)}
    # The policy answers with the winner's own counts, or with others.
    answers = {False: record(base, counts), True: record(base, [count - 1 for count in counts])}
    found = {}
    for sequential in (False, True):
        config = load_config(RunConfig, {}, [f"pruning.sequential={sequential}"])
        folder = tmp_path_factory.mktemp("run")
        setup = dataclasses.replace(base, config=config)
        build = build_here(setup)
        (row,) = build_winners(setup, winners, folder, build, [answers[sequential]])
        found[sequential] = folder / row["path"], row
    (again,) = build([answers[True].key])
    return base, found, again.scored


@pytest.mark.parametrize("sequential", [False, True])
def test_the_stored_accuracy_is_that_of_the_saved_subnet(built, sequential):
    base, found, _ = built
    folder, row = found[sequential]
    accuracy = measure(load_subnet(folder), *base.search.tensors())
    description = read_description(folder)
    assert description["search"]["score"] == description["search"]["top1"] == row["score"]
    assert row["score"] == pytest.approx(accuracy.top1, abs=0.004)
    assert description["search"]["loss"] == pytest.approx(accuracy.loss, rel=1e-3)


def test_sequential_recovery_is_kept_where_it_is_better(built):
    _, found, _ = built
    assert not read_description(found[False][0])["sequential"]
    is_better = found[True][1]["score"] > found[False][1]["score"]
    assert is_better  # at this rate, on this network: by several points
    assert read_description(found[True][0])["sequential"]


def test_the_policys_answer_is_repaired_and_measured_as_the_winner_is(built):
    _, found, again = built
    assert found[False][1]["policy_recovered_score"] == found[False][1]["score"]  # it is the winner
    row = found[True][1]
    assert row["policy_recovered_score"] == pytest.approx(again.score, abs=0.004)
    assert row["policy_recovered_score"] != row["score"]
    assert row["search_recovered_score"] == row["score"]  # it is the winner here


def test_a_winner_in_another_order_is_built_in_it(tmp_path):
    config = load_config(RunConfig, {}, ["strategy=adapruner", "pruning.sequential=false"])
    base = Setup.create(load_config(RunConfig, {}, ["pruning.calibration_images=128"]))
    base = dataclasses.replace(
        base, config=config, task=Classification(base.search.take(200))
    ).prepare()
    prepared = base.prepared
    assert set(prepared.others) == {"l1", "l2", "fpgm", "bn_scale"}
    score = Scorer(prepared, base.search, recovery="compensate", batch_size=100, dtype="float32")
    counts = uniform(base.budget, [0.5], np.ones(len(base.plan.groups)))[0].tolist()
    build = build_here(base)
    scores = {}
    for order in ("", "l1", "bn_scale"):
        winner = dataclasses.replace(record(base, counts), criterion=order)
        folder = tmp_path / f"run{order}"
        (row,) = build_winners(base, {0.5: winner}, folder, build)
        description = read_description(folder / row["path"])
        assert description["criterion"] == (order or "cap")
        kept = [group["kept"] for group in description["groups"]]
        orders = prepared.with_order(order).orders
        assert kept == [o[:k].tolist() for o, k in zip(orders, counts, strict=True)]
        measured = score(Candidate(0.5, tuple(counts), criterion=order, index=0))
        assert row["score"] == pytest.approx(measured.score, abs=0.004)
        scores[order] = row["score"]
    assert len(set(scores.values())) == 3


def test_orders_of_a_run_are_repeated_from_its_description():
    config = load_config(RunConfig, {}, ["strategy=cpmc", "pruning.calibration_images=16"])
    setup = Setup.create(config).prepare()
    prepared = setup.prepared
    again = dataclasses.replace(setup, saved=setup.describe_model(), shared=None).prepare().prepared
    for order in ("", "cpmc"):
        for one, other in zip(
            prepared.with_order(order).orders, again.with_order(order).orders, strict=True
        ):
            assert (one == other).all()


class HalfFailing:
    """An evaluator that cannot score every second candidate."""

    def __init__(self):
        self._queue = []

    def submit(self, candidate):
        self._queue.append(candidate)

    def results(self, _):
        found = [
            measurement_of(
                each.index, 0.5, 0.5, 1.0, 10, 0.0, status="failed", error="out of memory"
            )
            if each.index % 2
            else measurement_of(each.index, 0.25, 0.5, 1.0, 10, 0.0)
            for each in self._queue
        ]
        self._queue = []
        return found


def test_a_final_measurement_that_fails_is_left_out_with_a_warning(built, caplog):
    base, _, _ = built
    assert base.config.rates == (0.3, 0.5, 0.7)
    assert measure_uniform(base, HalfFailing()) == {0.3: 0.25, 0.7: 0.25}
    assert "a final measurement at rate 0.50 failed: out of memory" in caplog.text

    rates = frontier_rates(base)
    counts = uniform(base.budget, rates, np.ones(len(base.plan.groups)))
    answers = measure_outside(base, rates, counts, HalfFailing())
    assert [answer.rate for answer in answers] == rates[::2]
    assert {answer.score for answer in answers} == {0.25}

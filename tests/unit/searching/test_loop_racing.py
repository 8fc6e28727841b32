"""Racing in the loop: the opponents, and the same rows wherever the run is killed."""

import contextlib
import shutil
import zlib

import numpy as np
import pytest

from cacp_ray.evaluation.cache import CachedEvaluator, MeasurementCache
from cacp_ray.evaluation.racing import (
    decode_hits,
    encode_hits,
    estimate,
    has_fallen_behind,
    prefixes,
)
from cacp_ray.rundir.directory import RunDirectory
from tests.small import measurement_of
from tests.unit.searching.test_loop import (
    RATES,
    SCORE,
    ClimbingStrategy,
    Killed,
    ShuffledEvaluator,
    make_loop,
    rows,
)

IMAGES = 400
HARDNESS = np.random.default_rng(0).permutation(IMAGES) / IMAGES


def measure(candidate):
    """Gets an image right where its noisy hardness is below the formula's accuracy."""
    rng = np.random.default_rng(zlib.crc32(repr(candidate.keep_counts).encode()))
    hits = HARDNESS + rng.normal(0, 0.03, IMAGES) < SCORE(candidate.keep_counts)
    score = float(hits.mean())
    whole = measurement_of(candidate.index, score, score, 0.5, IMAGES, 0.1, hits=encode_hits(hits))
    if candidate.opponent:
        best = decode_hits(candidate.opponent)
        for stop in prefixes(IMAGES):
            if has_fallen_behind(hits[:stop], best[:stop]):
                score = estimate(hits[:stop], best)
                return measurement_of(candidate.index, score, score, 0.5, stop, 0.1, "stopped")
    return whole


class RacingEvaluator(ShuffledEvaluator):
    def results(self, timeout):
        self._maybe_kill()
        count = self._rng.integers(0, len(self._queue) + 1)
        taken = [self._queue.pop(self._rng.integers(len(self._queue))) for _ in range(count)]
        return [measure(candidate) for candidate in taken]


def all_rows(folder):
    records = sorted(RunDirectory(folder).read_records(), key=lambda record: record.index)
    return rows(folder), [(record.images, record.status, record.hits) for record in records]


def search(folder, **options):
    make_loop(folder, RacingEvaluator(**options), races=True).run(ClimbingStrategy())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("racing")
    search(folder)
    return all_rows(folder)


def test_candidates_race_against_the_best_told_of_their_rate(tmp_path):
    evaluator = RacingEvaluator()
    make_loop(tmp_path, evaluator, races=True).run(ClimbingStrategy())
    records = {record.index: record for record in RunDirectory(tmp_path).read_records()}
    assert not any(candidate.opponent for candidate in evaluator.submitted[:5])
    raced = 0
    for candidate in evaluator.submitted:
        round_start = candidate.index // 5 * 5
        told = [
            record
            for record in records.values()
            if record.index < round_start and record.rate == candidate.rate and record.hits
        ]
        best = max(told, key=lambda record: (record.score, -record.index), default=None)
        assert candidate.opponent == (best.hits if best else "")
        raced += records[candidate.index].status == "stopped"
    assert raced > 5
    for rate in RATES:
        kept = [r for r in records.values() if r.status == "ok" and r.cost_kept <= rate]
        loop = make_loop(tmp_path, races=True)
        loop.restore(ClimbingStrategy())
        assert loop.archive.best(rate).score == max(record.score for record in kept)


def test_without_racing_nobody_has_an_opponent(tmp_path):
    evaluator = RacingEvaluator()
    make_loop(tmp_path, evaluator).run(ClimbingStrategy())
    assert not any(candidate.opponent for candidate in evaluator.submitted)


@pytest.mark.parametrize("kill_at", [3, 11, 24, 37, 50])
def test_a_killed_race_goes_on_as_if_it_had_not_been(tmp_path, uninterrupted, kill_at):
    with contextlib.suppress(Killed):
        search(tmp_path / "run", seed=kill_at, kill_at=kill_at)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")  # like a restart on another machine
    search(tmp_path / "copy", seed=kill_at + 1)
    assert all_rows(tmp_path / "copy") == uninterrupted


def test_a_repeated_race_on_a_warm_cache_measures_nothing(tmp_path):
    """The cache also knows candidates that the same opponents stopped."""

    def repeat(name):
        evaluator = RacingEvaluator()
        cached = CachedEvaluator(evaluator, MeasurementCache(tmp_path / "cache", "key"), IMAGES)
        make_loop(tmp_path / name, cached, races=True).run(ClimbingStrategy())
        return evaluator.submitted

    assert repeat("first")
    assert repeat("second") == []
    (first, raced), (second, repeated) = (all_rows(tmp_path / name) for name in ("first", "second"))
    assert [row[:-1] for row in first] == [row[:-1] for row in second]
    assert all(is_cached for *_, is_cached in second)
    assert raced == repeated
    assert any(status == "stopped" for _, status, _ in repeated)

"""Candidates with the same content key are scored once, in any run."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.evaluation.cache import (
    CachedEvaluator,
    MeasurementCache,
    check_folder,
    key_of_own_scores,
    key_of_scores,
)
from cacp_ray.evaluation.measurement import Candidate, LocalEvaluator
from cacp_ray.evaluation.task import OwnTask, _made
from tests.small import measurement_of
from tests.unit.evaluation.test_fusion import Plain, make_prepared, randomize

KEY = "a" * 64
SOURCE = """
class First:
    example_inputs = ()
    def calibration(self):
        return []
    def score(self, net):
        return {score}

class Second(First):
    pass
"""


def measure(candidate):
    status = "failed" if candidate.keep_counts == (0,) else "ok"
    images = candidate.images or 100
    score = sum(candidate.keep_counts) / 10
    if candidate.opponent:
        status, images = "stopped", images // 2
    return measurement_of(candidate.index, score, 1.0, 0.3, images, 0.5, status=status)


@pytest.fixture
def scored():
    return []


@pytest.fixture
def build(tmp_path, scored):
    def score(candidate):
        scored.append(candidate)
        return measure(candidate)

    def make(key=KEY):
        return CachedEvaluator(LocalEvaluator(score), MeasurementCache(tmp_path, key), 100)

    return make


def ask(evaluator, *candidates):
    for candidate in candidates:
        evaluator.submit(candidate)
    measurements = []
    while len(measurements) < len(candidates):
        measurements += evaluator.results(1.0)
    return {measurement.index: measurement for measurement in measurements}


def as_cached(measurement, index, finished_at):
    changes = {"cached": True, "seconds": 0.0, "finished_at": finished_at}
    return dataclasses.replace(measurement, index=index, **changes)


def test_a_second_run_scores_nothing(build, scored):
    candidates = [Candidate(0.5, (i, 1), criterion="l1" if i else "", index=i) for i in range(3)]
    first = ask(build(), *candidates)
    assert len(scored) == 3
    again = [dataclasses.replace(old, index=old.index + 10, rate=0.3) for old in candidates]
    second = ask(build(), *again)
    assert len(scored) == 3
    for index, known in second.items():
        assert known == as_cached(first[index - 10], index, known.finished_at)
        assert known.finished_at > 0


@pytest.mark.parametrize(
    "other",
    [{"keep_counts": (2, 1)}, {"criterion": "l1"}, {"images": 50}],
)
def test_another_candidate_is_scored(build, scored, other):
    candidate = Candidate(0.5, (1, 1), index=0)
    ask(build(), candidate)
    ask(build(), dataclasses.replace(candidate, **other))
    assert len(scored) == 2


def test_one_that_was_stopped_is_known_against_the_same_opponent_alone(build, scored):
    racing = Candidate(0.5, (1, 1), index=0, opponent="hits")
    (first,) = ask(build(), racing).values()
    assert (first.status, first.images) == ("stopped", 50)
    (again,) = ask(build(), dataclasses.replace(racing, index=7)).values()
    assert again == as_cached(first, 7, again.finished_at)
    assert len(scored) == 1
    assert build()._cache.get(dataclasses.replace(racing, opponent=""), 50) is None
    ask(build(), dataclasses.replace(racing, opponent="other"))
    ask(build(), dataclasses.replace(racing, opponent=""))
    assert len(scored) == 3
    ask(build(), dataclasses.replace(racing, opponent="third"))  # it has been measured to the end
    assert len(scored) == 3


def test_the_whole_split_is_the_same_however_it_is_said(build, scored):
    ask(build(), Candidate(0.5, (1, 1), index=0))
    ask(build(), Candidate(0.5, (1, 1), index=0, images=100))
    assert len(scored) == 1


def test_other_content_and_failures_are_scored(build, scored):
    ask(build(), Candidate(0.5, (1, 1), index=0), Candidate(0.5, (0,), index=1))
    ask(build("b" * 64), Candidate(0.5, (1, 1), index=0))
    ask(build(), Candidate(0.5, (0,), index=1))
    assert len(scored) == 4


def test_a_line_that_a_kill_cut_short_is_left_out(build, scored, tmp_path, caplog):
    ask(build(), Candidate(0.5, (1, 1), index=0), Candidate(0.5, (2, 1), index=1))
    file = tmp_path / f"{KEY}.jsonl"
    file.write_text(file.read_text()[:-20])
    assert len(MeasurementCache(tmp_path, KEY)) == 1
    assert "damaged" in caplog.text
    ask(build(), Candidate(0.5, (2, 1), index=1))
    assert len(MeasurementCache(tmp_path, KEY)) == 2


def test_lines_that_are_no_measurements_are_left_out(build, scored, tmp_path):
    ask(build(), Candidate(0.5, (1, 1), index=0))
    file = tmp_path / f"{KEY}.jsonl"
    row = json.loads(file.read_text())
    broken = [{key: row[key] for key in row if key != "keep_counts"}]
    broken += [row | changes for changes in (
        {"keep_counts": [[1, 2], [3]]}, {"criterion": ["l1"]}, {"criterion": 3}, {"against": "x"},
    )]  # fmt: skip
    for changes in (
        {"images": [1]}, {"images": -1}, {"score": "0.9"}, {"score": float("nan")}, {"figures": 1},
        {"figures": {"loss": float("inf")}}, {"status": "failed"}, {"unknown": 1},
    ):  # fmt: skip
        broken.append(row | {"measurement": row["measurement"] | changes})
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in broken)
    file.write_bytes(b"\xff\xfe\n[1]\n\n" + lines + file.read_bytes())
    assert len(MeasurementCache(tmp_path, KEY)) == 1
    ask(build(), Candidate(0.5, (1, 1), index=0))
    assert len(scored) == 1


def test_a_folder_in_the_place_of_the_file_is_one_line(tmp_path):
    (tmp_path / f"{KEY}.jsonl").mkdir()
    with pytest.raises(ArtifactError, match="directory; move it away"):
        MeasurementCache(tmp_path, KEY)


def test_a_folder_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="file: File exists; name a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(ArtifactError, match="name a folder"):
        check_folder(tmp_path / "file" / "inside")
    check_folder(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()


def test_the_key_is_of_all_that_a_score_depends_on():
    prepared, split = make_prepared(randomize(Plain(torch.nn.ReLU())))

    def key(prepared=prepared, split=split, recovery="none", dtype=torch.float32):
        return key_of_scores(prepared, split, recovery=recovery, dtype=str(dtype))

    name = "conv1.weight"
    weights = {**prepared.tensors, name: prepared.tensors[name] + 1}
    changed = [
        key(),
        key(dataclasses.replace(prepared, tensors=weights)),
        key(dataclasses.replace(prepared, others={"l2": prepared})),
        key(split=split.take(10)),
        key(split=dataclasses.replace(split, mean=(0.5, 0.5, 0.5))),
        key(split=dataclasses.replace(split, labels=np.roll(split.labels, 1))),
        key(recovery="bn"),
        key(dtype=torch.bfloat16),
    ]
    assert len(set(changed)) == len(changed)
    assert key() == changed[0]


def test_the_key_of_a_task_is_of_its_code_too(tmp_path, monkeypatch):
    prepared, split = make_prepared(randomize(Plain(torch.nn.ReLU())))
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "task_of_a_key.py"

    def key(score="0.0", name="First", prepared=prepared, **changes):
        file.write_text(SOURCE.format(score=score))
        sys.modules.pop("task_of_a_key", None)
        _made.clear()
        task = OwnTask.make(f"task_of_a_key:{name}")
        given = {"recovery": "none", "device": "cpu"} | changes
        return key_of_own_scores(prepared, task, split.take(1).tensors()[0], **given)

    weights = {**prepared.tensors, "conv1.weight": prepared.tensors["conv1.weight"] + 1}
    changed = [
        key(),
        key(score="1.0 "),
        key(name="Second"),
        key(prepared=dataclasses.replace(prepared, tensors=weights)),
        key(recovery="bn"),
        key(device="cuda"),
    ]
    assert len(set(changed)) == len(changed)
    assert key() == changed[0]
    sys.modules["task_of_a_key"].__file__ = None  # such as code that was typed in
    file.unlink()
    task, inputs = OwnTask("task_of_a_key:First"), split.take(1).tensors()[0]
    with pytest.raises(ConfigError, match=r"source of module task_of_a_key cannot be read"):
        key_of_own_scores(prepared, task, inputs, recovery="none", device="cpu")


def test_the_key_is_of_what_the_network_computes(monkeypatch):
    """Networks of the same modules and weights, with other code between them."""

    class Net(Plain):
        def __init__(self, between):
            super().__init__(torch.nn.Identity())
            self.between = between

        def forward(self, x):
            return self.between(super().forward(x))

    def key(between):
        torch.manual_seed(0)
        prepared, split = make_prepared(randomize(Net(between)))
        return key_of_scores(prepared, split, recovery="none", dtype="torch.float32")

    def add(value):
        constant = torch.full((5,), value)
        return lambda x: x + constant

    keys = [
        key(between)
        for between in (
            torch.relu, torch.tanh, lambda x: x * 2.0, lambda x: x * 3.0, add(1.0), add(2.0),
        )
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key(torch.relu) == keys[0]
    assert key(add(2.0)) == keys[-1]
    versions = {"cacp-ray": "9", "torch": "9"}
    monkeypatch.setattr("cacp_ray.evaluation.cache.installed_versions", lambda: versions)
    assert key(torch.relu) != keys[0]

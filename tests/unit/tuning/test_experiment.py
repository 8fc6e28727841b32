"""What is said of trials that failed, and of a storage that fails under Ray Tune."""

from types import SimpleNamespace

import pyarrow as pa
import pytest
from ray.exceptions import RayTaskError
from ray.tune import TuneError

from cacp_ray.errors import ArtifactError, EvaluationError
from cacp_ray.tuning.experiment import (
    ReportCallback,
    TrialFiles,
    check_trials,
    restore,
    running_tune,
)

TEXT = """Failure # 1 (occurred at 2026-01-01_00-00-00)
Traceback (most recent call last):
  File "own.py", line 3, in train
    raise ValueError("two")
ValueError: two
lines
"""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RayTaskError("train", TEXT, ValueError("two\nlines")), "ValueError: two"),
        (RayTaskError("train", TEXT, ValueError()), "ValueError"),
        (RuntimeError(TEXT), "ValueError: two"),  # as Tune keeps what cannot be pickled
        (RuntimeError("alone"), "alone"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_failed_trial_is_told_by_its_error_and_the_first_line(error, reason):
    trial = SimpleNamespace(error=error, path="tune/rate-0.3")
    with pytest.raises(EvaluationError) as caught:
        check_trials([SimpleNamespace(error=None, path=""), trial], "fine-tuning of")
    assert str(caught.value) == (
        f"fine-tuning of rate-0.3 failed 3 times ({reason}); see tune/rate-0.3, then continue with "
        "--resume, in Python resume=True"
    )


FRAMES = """Traceback (most recent call last):
  File "controller.py", line 3, in step
    raise it
    ^^^^^^^^
"""


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            OSError(28, "No space left"),
            ArtifactError,
            r"storage: b/t cannot .*No space left\): make",
        ),
        (pa.ArrowInvalid("no such bucket"), ArtifactError, "storage: b/t cannot .*no such bucket"),
        (TuneError(FRAMES + "PermissionError: denied"), ArtifactError, "b/t cannot .*denied"),
        (
            TuneError(FRAMES + "KeyError: 'x'"),
            EvaluationError,
            "b/t: Ray Tune has stopped .*KeyErr",
        ),
    ],
    ids=["disk", "store", "as a text", "another"],
)
def test_errors_of_tune_reach_the_user_in_one_line(error, kind, message):
    with pytest.raises(kind, match=message) as caught, TrialFiles("b/t").reached():
        raise error
    assert "\n" not in str(caught.value)
    assert "--resume" in str(caught.value)


def test_an_error_of_the_listener_reaches_the_caller_as_it_was():
    """Tune makes a text of what a callback raises."""

    def listen(trial, metrics):
        raise ArtifactError("another driver")

    def tune_as_ray_does():
        try:
            ReportCallback().on_trial_result(0, [], None, {})
        except ArtifactError:
            raise TuneError(FRAMES + "ArtifactError: another driver") from None

    with (
        pytest.raises(ArtifactError, match=r"^another driver$"),
        running_tune(listen, TrialFiles("b/t")),
    ):
        tune_as_ray_does()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(5, "timeout"), OSError, "timeout"),
        (FileNotFoundError(2, "gone"), ArtifactError, "is damaged"),
        (EOFError(), ArtifactError, "is damaged"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_a_storage_that_cannot_be_read_is_not_called_damaged(error, kind, message, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("ray.tune.Tuner.restore", fail)
    with pytest.raises(kind, match=message):
        restore(TrialFiles("b/t"), None, {})

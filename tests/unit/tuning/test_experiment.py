"""What is said of trials that failed."""

from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError

from cacp_ray.errors import EvaluationError
from cacp_ray.tuning.experiment import check_trials

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

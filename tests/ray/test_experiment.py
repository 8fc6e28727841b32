"""Errors while Ray Tune runs reach the caller as they are, and a failing storage in one line."""

import pytest
from ray import tune

from cacp_ray.errors import ArtifactError
from cacp_ray.tuning.experiment import ReportCallback, TrialFiles, make_run_config, running_tune

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def report_once(config):
    tune.report({"x": 1})


def fit(files, listen):
    with running_tune(listen, files):
        trainable = tune.with_resources(report_once, {"cpu": 0.1})
        config = make_run_config(files, [ReportCallback()], 1)
        tune.Tuner(trainable, run_config=config).fit()


def test_what_a_listener_raises_ends_the_experiment_as_it_is(tmp_path):
    def listen(trial, metrics):
        raise ArtifactError(f"another driver, {metrics['x']}")

    with pytest.raises(ArtifactError, match=r"^another driver, 1$"):
        fit(TrialFiles(str(tmp_path / "tune")), listen)


def test_a_storage_that_takes_no_files_is_told_in_one_line():
    with pytest.raises(ArtifactError, match=r"^storage: /proc/no/tune cannot be .*: make room"):
        fit(TrialFiles("/proc/no/tune"), lambda *_: None)

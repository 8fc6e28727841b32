import sys
from types import SimpleNamespace

import pytest

from cacp_ray.errors import ConfigError
from cacp_ray.reporting.scalars import ScalarLog, check_loggers


class FakeWandb:
    """The part of wandb that a search needs: one run, which can be resumed."""

    def __init__(self):
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options["project"], options["id"], options["config"]))
        return SimpleNamespace(
            id=options["id"] or "w1",
            log=lambda scalars: self.calls.append(("log", scalars)),
            finish=lambda: self.calls.append(("finish",)),
        )


class FakeMlflow:
    """The part of mlflow that a search needs."""

    def __init__(self):
        self.calls = []

    def set_experiment(self, name):
        self.calls.append(("experiment", name))

    def start_run(self, run_id, run_name):
        self.calls.append(("start", run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "m1"))

    def log_dict(self, values, name):
        self.calls.append(("dict", values, name))

    def log_metrics(self, scalars, step):
        self.calls.append(("log", scalars, step))

    def end_run(self):
        self.calls.append(("finish",))


def test_a_resumed_search_goes_on_with_its_run_at_weights_and_biases(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (3, 5):
        log = ScalarLog(("wandb",), tmp_path, "mine", {"seed": 1})
        log.write({"best_score/0.50": 0.5, "unknown": None}, step)
        log.close()
    assert fake.calls == [
        ("init", "mine", None, {"seed": 1}),
        ("log", {"best_score/0.50": 0.5, "evaluations": 3}),
        ("finish",),
        ("init", "mine", "w1", {"seed": 1}),
        ("log", {"best_score/0.50": 0.5, "evaluations": 5}),
        ("finish",),
    ]


def test_a_resumed_search_goes_on_with_its_run_at_mlflow(tmp_path, monkeypatch):
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    for step in (3, 5):
        log = ScalarLog(("mlflow",), tmp_path, "mine", {"seed": 1})
        log.write({"best_score/0.50": 0.5}, step)
        log.close()
    assert fake.calls == [
        ("experiment", "mine"),
        ("start", None, "search"),
        ("dict", {"seed": 1}, "config.yaml"),
        ("log", {"best_score/0.50": 0.5}, 3),
        ("finish",),
        ("experiment", "mine"),
        ("start", "m1", None),
        ("log", {"best_score/0.50": 0.5}, 5),
        ("finish",),
    ]


def test_nothing_is_opened_before_there_is_something_to_write(tmp_path):
    ScalarLog(("tensorboard",), tmp_path, "mine", {}).close()
    assert list(tmp_path.iterdir()) == []


def test_a_logger_that_is_not_installed_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else name)
    check_loggers(("tensorboard", "mlflow"))
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_loggers(("tensorboard", "wandb"))

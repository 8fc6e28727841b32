"""The copy of a run that a fine-tuning reads and writes: what it is opened for, and refused."""

import shutil
from pathlib import Path

import pytest

from cacp_ray.config.agent_tuning import AgentTuningConfig
from cacp_ray.config.reading import load_config, resolved
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.io.files import write_json, write_yaml
from cacp_ray.rundir.mirror import RunMirror, _copy_order
from cacp_ray.workflows.finetune import finetune
from cacp_ray.workflows.storage import (
    check_trials_place,
    note_trials_place,
    open_for_training,
    open_for_tuning,
)
from cacp_ray.workflows.tune_agent import tune_agent


def make_run(folder: Path, **settings) -> Path:
    config = RunConfig(name="far", **settings).model_dump(mode="json")
    write_yaml(folder / "config.yaml", config)
    write_json(folder / "result.json", {})
    return folder


def test_a_run_is_fetched_without_the_trials_that_wrote_beside_it(tmp_path):
    run, storage = make_run(tmp_path / "run"), tmp_path / "storage"
    RunMirror(str(storage)).finish(run)
    write_json(storage / "trials/finetune/tuner.json", {})
    mirror = open_for_training(str(storage), tmp_path / "elsewhere")
    assert sorted(path.name for path in (tmp_path / "elsewhere").rglob("*.*")) == [
        "config.yaml",
        "result.json",
    ]
    assert mirror.trials("finetune")[0] == str(storage / "trials/finetune")


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda run, storage: shutil.rmtree(run), "is no run, and storage .* holds none"),
        (lambda run, storage: make_run(storage, seed=7), "storage .*seed"),
    ],
    ids=["nothing anywhere", "another run"],
)
def test_what_is_not_this_run_is_refused_in_one_line(arrange, message, tmp_path):
    run, storage = make_run(tmp_path / "run"), tmp_path / "storage"
    arrange(run, storage)
    with pytest.raises(ConfigError, match=message) as caught:
        open_for_training(str(storage), run)
    assert "\n" not in str(caught.value)


def test_a_storage_within_the_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="lie in each other"):
        open_for_training(str(tmp_path / "run/copy"), make_run(tmp_path / "run"))


def test_one_subnet_has_no_storage(tmp_path):
    write_json(tmp_path / "subnet.json", {})
    with pytest.raises(ConfigError, match="with --storage, give its run"):
        finetune(tmp_path, storage=str(tmp_path / "storage"))


def test_files_that_say_that_weights_are_complete_are_copied_after_them():
    names = [
        "result.json", "finetune/chosen.json", "finetune/subnets/rate-0.30/copied.json",
        "subnets/rate-0.30/metrics.json", "subnets/rate-0.30/finetuned.safetensors", "config.yaml",
    ]  # fmt: skip
    assert sorted(names, key=_copy_order) == [
        "subnets/rate-0.30/finetuned.safetensors",
        "subnets/rate-0.30/metrics.json",
        "finetune/subnets/rate-0.30/copied.json",
        "finetune/chosen.json",
        "result.json",
        "config.yaml",
    ]


TUNING = load_config(
    AgentTuningConfig, {"search": {}, "space": {"agent.lr": {"log_uniform": [1e-4, 1e-2]}}}
)


def make_tuning(folder: Path) -> Path:
    write_yaml(folder / "config.yaml", resolved(TUNING))
    write_json(folder / "result.json", {})
    return folder


def test_a_tuning_is_fetched_where_the_folder_does_not_hold_it(tmp_path):
    storage = tmp_path / "storage"
    RunMirror(str(storage)).finish(make_tuning(tmp_path / "tuning"))
    write_json(storage / "trials/tune/tuner.json", {})
    open_for_tuning(str(storage), tmp_path / "elsewhere", TUNING, resume=True)
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == [
        "config.yaml",
        "result.json",
    ]


@pytest.mark.parametrize(
    ("change", "resume", "message"),
    [
        ({"seed": 1}, True, "storage .* was started with another configuration; changed: seed;"),
        ({}, False, "storage .* holds a run: pass --resume"),
    ],
    ids=["other settings", "no --resume"],
)
def test_the_tuning_of_a_storage_goes_on_as_it_began_or_not_at_all(
    change, resume, message, tmp_path
):
    storage = tmp_path / "storage"
    RunMirror(str(storage)).finish(make_tuning(tmp_path / "tuning"))
    asked = TUNING.model_copy(update=change)
    with pytest.raises((ArtifactError, ConfigError), match=message):
        tune_agent(asked, tmp_path / "elsewhere", resume=resume, storage=storage)
    assert not (tmp_path / "elsewhere").exists()


def test_a_tuning_that_ended_elsewhere_is_not_run_again_in_the_first_folder(tmp_path):
    storage, folder = tmp_path / "storage", make_tuning(tmp_path / "tuning")
    RunMirror(str(storage)).finish(folder)
    (folder / "result.json").unlink()
    with pytest.raises(ArtifactError, match="holds the result of a tuning"):
        tune_agent(TUNING, folder, resume=True, storage=storage)


@pytest.mark.parametrize(
    ("before", "now", "step"),
    [
        (None, "bucket/a/trials/tune", "leave out --storage"),
        ("bucket/a/trials/tune", None, "give the --storage that it began with"),
        ("bucket/a/trials/tune", "bucket/b/trials/tune", "give the --storage that it began with"),
    ],
)
def test_trials_of_a_tuning_never_begin_anew_elsewhere(before, now, step, tmp_path):
    check_trials_place(tmp_path, now)  # nothing was begun
    note_trials_place(tmp_path, before)
    if before is None:
        (tmp_path / "tune").mkdir()
    check_trials_place(tmp_path, before)
    with pytest.raises(ConfigError, match=f"would begin anew: {step}"):
        check_trials_place(tmp_path, now)

"""Bad input ends in one line on standard error, exit code 2, and nothing is written."""

import json
import logging
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file

from cacp_ray.config.run import RunConfig
from cacp_ray.config.saved import open_folder
from cacp_ray.errors import ConfigError, EvaluationError
from cacp_ray.models.factory import build_model
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.workflows import answers
from cacp_ray.workflows.benchmark import check_formats, find_subnets
from tests.unit.exporting.folders import make_folder
from tests.unit.reporting.synthetic import make_own_result, make_result, make_run

FEW = {"search": {"path": "embedded:search", "rows": [0, 100]}}
MODEL = {"name": "resnet20", "weights": "embedded:resnet20_cifar10"}


@pytest.fixture
def config(tmp_path):
    def write(**values):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"name": "x", "model": MODEL, "data": FEW, **values}))
        return path

    return write


def truncated(tmp_path):
    path = tmp_path / "cut.parquet"
    path.write_bytes(Path("cacp_ray/data/cifar10_sample/test.parquet").read_bytes()[:5000])
    return str(path)


def foreign_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(build_model("resnet32", 10).state_dict(), path)
    return str(path)


CASES = {
    "unknown model": (lambda t: ["model.name=resnet21"], "did you mean .*resnet20"),
    "unknown criterion": (lambda t: ["pruning.criterion=l3"], "did you mean .*l1"),
    "rate above one": (lambda t: ["rates=[1.5]"], r"rates\.0.*got 1\.5"),
    "rate of zero": (lambda t: ["rates=[0]"], r"rates\.0.*greater than 0"),
    "rate not reachable": (
        lambda t: ["rates=[0.01]"],
        r"rate 0\.0100 is below the reachable 0\.0\d+",
    ),
    "data missing": (lambda t: ["data.search.path=none.parquet"], "none.parquet: no such file"),
    "data cut short": (
        lambda t: [f"data.search.path={truncated(t)}"],
        "cut.parquet: not a readable Parquet file",
    ),
    "weights missing": (lambda t: ["model.weights=none.safetensors"], "no such file"),
    "no weights": (lambda t: ["model.weights=null"], "starts from a trained network"),
    "weights of another network": (
        lambda t: [f"model.weights={foreign_weights(t)}"],
        r"unexpected layer1\.3\.bn1\.bias",
    ),
    "test data missing": (lambda t: ["data.test.path=none.parquet"], "none.parquet: no such file"),
    "splits that share rows": (
        lambda t: ["data.search.path=embedded:train"],
        "data.search and data.train share rows",
    ),
    "unknown key": (lambda t: ["evalutions=5"], "did you mean evaluations"),
    "keep pattern without a match": (lambda t: ["pruning.keep=[stem.*]"], "matches no layer"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_search_is_refused_in_one_line(case, run, config, tmp_path):
    overrides, message = CASES[case]
    folder = tmp_path / "run"
    sets = [part for value in overrides(tmp_path) for part in ("--set", value)]
    code, out, err = run("search", config(), "--run-dir", folder, *sets)
    assert code == 2
    assert re.search(message, err)
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert not folder.exists()


def test_dry_run_checks_and_writes_nothing(run, config, tmp_path):
    folder = tmp_path / "run"
    code, out, _ = run("search", config(), "--run-dir", folder, "--dry-run", "--price", "0.05")
    assert code == 0
    assert "12 channel groups" in out
    assert "at 0.05 a core-hour" in out
    assert "240 evaluations" in out
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "cluster.cpus_per_evaluator=4096"], "4096 CPUs at once are asked for"),
        (["--set", "finetune.padding=40"], "finetune.padding: 40 pixels, but images have 32"),
        (["--address", "127.0.0.1:1"], "127.0.0.1:1"),
        (["--price", "-1"], "'--price': Input should be greater"),
    ],
)
def test_a_dry_run_ends_where_the_search_would(run, config, tmp_path, options, message):
    folder = tmp_path / "run"
    code, out, err = run("search", config(), "--run-dir", folder, "--dry-run", *options)
    assert code == 2
    assert message in err
    assert "Traceback" not in out + err
    assert not folder.exists()


def test_existing_folder_is_left_alone(run, config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    code, _, err = run("search", config(), "--run-dir", folder)
    assert code == 2
    assert "pass --resume" in err
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_what_a_kill_left_of_the_first_file_is_no_run(tmp_path):
    (tmp_path / ".config.yaml.17.tmp").touch()
    open_folder(tmp_path, RunConfig(), resume=False)


def test_a_run_that_another_process_searches_is_refused_at_once(run, config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(config().read_text())
    with RunDirectory(folder).locked():
        code, out, err = run("search", config(), "--run-dir", folder, "--resume")
    assert code == 2
    assert "another process is searching there" in err
    assert "channel groups" not in out + err


def test_resume_with_a_changed_configuration_names_the_keys(run, config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "x", "evaluations": 30}))
    code, _, err = run("search", config(), "--run-dir", folder, "--resume", "--set", "seed=5")
    assert code == 2
    assert "evaluations" in err
    assert "seed" in err
    # How many evaluators there may be changes no measurement.
    (folder / "config.yaml").write_text(config().read_text())
    options = ["--resume", "--dry-run", "--set", "cluster.max_evaluators=5"]
    code, out, _ = run("search", config(), "--run-dir", folder, *options)
    assert code == 0
    assert "240 evaluations" in out
    code, _, err = run("search", config(), "--run-dir", tmp_path / "none", "--resume")
    assert code == 2
    assert "holds no run" in err


@pytest.mark.slow  # in this process: tests/ray/test_cluster.py
def test_unreachable_address_is_refused_within_half_a_minute(config, tmp_path):
    # In a process of its own: one that is connected to Ray already would stay so.
    command = [sys.executable, "-m", "cacp_ray.cli", "search", config(), "--address", "127.0.0.1:9"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, "--run-dir", tmp_path / "r"], capture_output=True, text=True, check=False
    )
    assert time.monotonic() - started < 30
    assert done.returncode == 2
    assert "127.0.0.1:9" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("command", ["report", "evaluate", "finetune"])
def test_a_folder_without_a_run_is_named(command, run, tmp_path):
    code, _, err = run(command, tmp_path / "nothing")
    assert code == 2
    assert "nothing holds no run" in err


def test_a_subnet_outside_its_run_is_not_evaluated(run, tmp_path):
    folder = make_folder(tmp_path / "subnets" / "rate-0.50", "tests.unit.pruning.networks:Plain", 8)
    code, _, err = run("evaluate", folder)
    assert (code, err.count("\n")) == (2, 1)
    assert "stands outside its run" in err


def test_inspect_prints_groups_reasons_and_reachable_rates(run):
    code, out, _ = run("inspect", "resnet20")
    assert code == 0
    assert "layer3.0.downsample.0" in out
    assert "stays whole (output of the network): fc" in out
    assert "40,813,184 MACs" in out
    assert re.search(r"reachable rates .*: 0\.0157 to 1", out)
    assert "layers whose channels go with it" not in out
    _, out, _ = run("inspect", "resnet20", "--members", "--side", 64, "--num-classes", 3)
    assert "input 3x64x64, 3 classes" in out
    assert re.search(r"^layer3\.1\.conv1 +layer3\.1\.conv1, .*bn1, .*conv2 *$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "about"),
    [
        ("torchvision:resnet18", "input 3x224x224, 1000 classes"),
        ("timm:test_byobnet", "input 3x160x160, 1000 classes"),  # its own input_size
        ("tests.unit.pruning.networks:Plain", "input 3x224x224, 10 classes"),
    ],
)
def test_inspect_takes_the_input_that_a_network_is_made_for(run, name, about):
    code, out, _ = run("inspect", name)
    assert code == 0
    assert f"{name}\n{about}, " in out


def test_inspect_takes_an_input_of_any_shape(run, tmp_path):
    code, out, _ = run("inspect", "resnet20", "--input-shape", "3,48,64")
    assert code == 0
    assert "input 3x48x64, 10 classes" in out
    assert f"{3 * (40_813_184 - 640) + 640:,} MACs" in out  # three times the positions, one fc
    code, out, _ = run("inspect", "resnet20", "--input-shape", "3,48,64", "--json")
    assert json.loads(out)["input_shape"] == [3, 48, 64]
    folder = make_folder(tmp_path / "rate-0.50", "resnet20", 32, num_classes=7)
    code, out, _ = run("inspect", folder, "--input-shape", "3,16,40")
    assert code == 0
    assert "input 3x16x40, 7 classes" in out
    description = json.loads((folder / "subnet.json").read_text())
    one = {"name": None, "shape": [3, 32, 32], "dtype": "float32", "is_batch": True}
    (folder / "subnet.json").write_text(json.dumps(description | {"inputs": [one, one]}))
    code, _, err = run("inspect", folder, "--input-shape", "3,16,40")
    assert (code, err.count("\n")) == (2, 1)
    assert "takes 2 inputs: leave the size of one out" in err


def test_inspect_shows_a_subnet_at_its_own_widths(run, tmp_path):
    folder = make_folder(tmp_path / "rate-0.50", "resnet20", 32, num_classes=7)
    description = json.loads((folder / "subnet.json").read_text())
    code, out, _ = run("inspect", folder)
    assert code == 0
    assert "(resnet20 at rate 0.50)\ninput 3x32x32, 7 classes, " in out
    assert f"{description['macs']:,} MACs" in out
    assert f"{description['params']:,} parameters" in out
    for group in description["groups"]:
        if len(group["kept"]) > 1:  # a single channel is no group
            assert f" {len(group['kept'])} of {group['num_channels']} " in out
    code, _, err = run("inspect", folder, "--num-classes", 10)
    assert (code, err.count("\n")) == (2, 1)
    assert "its own number of classes" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet21"], "did you mean .*resnet20"),
        (["runs/none/subnets/rate-0.50"], r"subnet\.json: No such file"),
        (["tests"], r"subnet\.json: No such file"),
        (["timm:resnet5o"], "timm has no model"),
        (["torchvision:"], "write torchvision:NAME"),
        (["no_such_package:net"], "cannot be imported"),
        ([":net"], "cannot be imported"),
        (["math:pi"], "is a float, not a function"),
        (["tests.unit.pruning.networks:make"], r"cannot be called.*missing a required argument"),
        (["torchvision:vgg11", "--side", "8"], "does not run on an input.*check the inputs"),
        (["resnet20", "--side", "0"], "--side"),
        (["resnet20", "--input-shape", "3x32x32"], r"--input-shape 3x32x32: .* such as 3,480,640"),
        (["resnet20", "--input-shape", "3,0,32"], "--input-shape 3,0,32: write whole numbers"),
        (["resnet20", "--input-shape", "3"], "give channels and one to three sizes"),
        (["resnet20", "--input-shape", "3,9,9,9,9"], "give channels and one to three sizes"),
        (["resnet20", "--input-shape", "3,99999,99999"], "29,999,400,003 values; give at most"),
        (["resnet20", "--input-shape", "1,32,32"], "does not run on an input.*check the inputs"),
        (["resnet20", "--input-shape", "3,32,32", "--side", "32"], "--side and --input-shape"),
    ],
)
def test_bad_input_of_inspect_is_refused_in_one_line(run, arguments, message):
    code, out, err = run("inspect", *arguments)
    assert code == 2
    assert re.search(message, err)
    assert err.count("\n") == 1
    assert not out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "--format", "onnx"], r"none/subnet\.json: No such file"),
        (["SUBNET", "--format", "onxx"], "unknown export format 'onxx': did you mean onnx"),
        (["SUBNET", "--format", "state-dict", "--weights", "best"], "--weights best: choose"),
        (["SUBNET", "--format", "state-dict", "--weights", "finetuned"], "finetuned.safetensors"),
        (["SUBNET", "--format", "onnx", "--out", "SUBNET"], "exists: delete it"),
        (["SUBNET"], "--format"),
        (["SUBNET", "--format", "onnx", "--int8"], "lies in no run"),
        (["SUBNET", "--format", "onnx-int8"], "lies in no run"),
        (["SUBNET", "--format", "state-dict", "--int8"], "--int8 is for --format onnx"),
        (["SUBNET", "--format", "onnx", "--int8", "--max-drop", "nan"], "--max-drop nan: give 0"),
        (["SUBNET", "--format", "openvino", "--out", "a.onnx"], r"--out a\.onnx: .*\.xml"),
    ],
)
def test_bad_input_of_export_is_refused_in_one_line(run, tmp_path, arguments, message):
    folder = make_folder(tmp_path / "subnet", "tests.unit.pruning.networks:Plain", 8)
    before = sorted(folder.iterdir())
    code, out, err = run("export", *[str(folder) if a == "SUBNET" else a for a in arguments])
    assert code == 2
    assert re.search(message, err)
    assert err.count("\n") == 1
    assert not out
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none"),
        (["SUBNET"], "lies in no run"),
        (["SUBNET", "--format", "onxx"], "unknown format 'onxx': did you mean onnx"),
        (["SUBNET", "--format", ""], "unknown format ''"),
        (["SUBNET", "--out", "."], "--out . is a folder"),
        (["SUBNET", "--batch", "0"], "--batch 0: write whole numbers"),
        (["SUBNET", "--batch", "1,x"], "--batch 1,x: write whole numbers"),
        (["SUBNET", "--threads", "0"], "--threads"),
    ],
)
def test_bad_input_of_benchmark_is_refused_in_one_line(run, tmp_path, arguments, message):
    folder = make_folder(tmp_path / "subnet", "tests.unit.pruning.networks:Plain", 8)
    code, out, err = run("benchmark", *[str(folder) if a == "SUBNET" else a for a in arguments])
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not out


def test_a_format_without_its_package_is_left_out_unless_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(
        "cacp_ray.exporting.formats.importlib.util.find_spec", lambda name: name != "nncf" or None
    )
    assert check_formats(None) == ["torch", "onnx", "onnx-int8", "openvino"]
    with pytest.raises(ConfigError, match=r"openvino-int8 needs nncf: .*cacp-ray\[openvino\]"):
        check_formats(["torch", "openvino-int8"])


def test_subnets_of_several_runs_are_not_compared(tmp_path):
    places = [make_run(tmp_path / name, make_result()) for name in ("a", "b")]
    with pytest.raises(ConfigError, match="a benchmark is of one run"):
        find_subnets(places)


def test_ctrl_c_says_how_to_go_on(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cacp_ray.cli.results.print_report", interrupted)
    code, _, err = run("report", "anything")
    assert code == 130
    assert err == "cacp-ray: interrupted\n"
    monkeypatch.setattr("cacp_ray.workflows.answers.read_run_config", interrupted)
    _, _, err = run("evaluate", "anything", "--split", "search")
    assert err == "cacp-ray: interrupted\n"
    monkeypatch.setattr("cacp_ray.cli.searching._search", interrupted)
    _, _, err = run("search", "tune_configs/quickstart.yaml", "--run-dir", "nowhere")
    assert err == "cacp-ray: interrupted; go on with --resume\n"


def test_bad_input_is_the_last_word(run, monkeypatch, caplog):
    """Messages at exit, such as the place of Ray's log, are for runs that went further."""

    def refused(*_, **__):
        raise ConfigError("no GPU here")

    def failed(*_, **__):
        raise EvaluationError("an evaluator died")

    for raised, said in ((refused, []), (failed, ["Ray's own messages: logs"])):
        monkeypatch.setattr("cacp_ray.cli.searching._search", raised)
        run("search", "tune_configs/quickstart.yaml", "--run-dir", "nowhere")
        logging.getLogger("cacp_ray.distributed.cluster").info("Ray's own messages: logs")
        assert caplog.messages == said


def test_wrong_usage_is_one_line(run):
    code, _, err = run("demo", "--no-such-option")
    assert code == 2
    assert err.count("\n") == 1
    assert "--no-such-option" in err


def test_a_broken_saved_configuration_is_bad_input(run, config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("a: [")
    code, _, err = run("search", config(), "--run-dir", tmp_path / "run", "--resume")
    assert code == 2
    assert "not valid YAML" in err


def test_help_and_import_stay_light():
    heavy = {"ray", "torch", "torchvision"}
    for modules, absent in (("cli", heavy | {"numpy"}), ("config.run", heavy)):
        light = f"import sys, cacp_ray.{modules}; assert not {absent} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", light], check=True)


def test_an_unexpected_failure_is_one_line_and_code_1(run, tmp_path, monkeypatch):
    def fail(run_dir):
        raise KeyError("rates")

    monkeypatch.setattr("cacp_ray.config.saved.read_run_config", fail)
    code, _, err = run("report", tmp_path)
    assert code == 1
    assert err.count("\n") == 1
    assert "KeyError" in err


@pytest.mark.parametrize("task", [None, "mine:Task"])
def test_only_a_subnet_of_images_is_sent_to_the_fine_tuning(run, tmp_path, monkeypatch, task):
    result = make_own_result(is_finetuned=False) if task else make_result(is_finetuned=False)
    folder = make_run(tmp_path / "run", result)
    values = {"name": "x", "model": MODEL, "data": FEW, "task": task}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    answer = result["rates"][0] | {"scored_score": 0.5, "policy_score": 0.5}
    monkeypatch.setattr(answers, "answer_rates", lambda *_, **options: [answer])
    code, out, _ = run("subnet", folder, "--rate", "0.42")
    assert code == 0
    assert f"saved: {folder}" in out
    assert ("train it on: cacp-ray finetune" in out) == (task is None)

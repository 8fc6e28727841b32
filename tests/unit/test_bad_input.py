"""Wrong input of every kind: exit code 2, one line that says where, nothing written or changed;
and files from elsewhere never run code."""

import ast
import atexit
import functools
import io
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from cacp_ray.config.reading import load_config, resolved
from cacp_ray.config.run import RunConfig
from cacp_ray.models.factory import build_model
from cacp_ray.models.pretrained import resolve_weights
from tests.unit.exporting.folders import make_folder

SAMPLE = Path("cacp_ray/data/cifar10_sample/test.parquet")
CONFIG = """
name: x
model: {name: resnet20, weights: embedded:resnet20_cifar10}
data: {search: {path: embedded:search}}
"""
OTHER = CONFIG.replace("name: x", "name: y")
WEIGHTS = resolve_weights("embedded:resnet20_cifar10")


def search(*overrides):
    """A search of the defaults but for some values."""

    def arguments(folder):
        (folder / "config.yaml").write_text(CONFIG)
        sets = [part for value in overrides for part in ("--set", value)]
        return ["search", folder / "config.yaml", "--run-dir", folder / "run", *sets]

    return arguments


def search_with(make, key):
    """A search whose `key` names a file that `make` writes."""

    def arguments(folder):
        scale = ("data.mean=[0.5, 0.5, 0.5]", "data.std=[0.2, 0.2, 0.2]")
        return search(f"{key}={make(folder)}", *scale)(folder)

    return arguments


def config_file(content):
    def arguments(folder):
        (folder / "config.yaml").write_bytes(content)
        return ["search", folder / "config.yaml", "--run-dir", folder / "run"]

    return arguments


def weights(change):
    def make(folder):
        tensors = load_file(WEIGHTS)
        change(tensors)
        save_file(tensors, folder / "w.safetensors")
        return folder / "w.safetensors"

    return make


def set_nan(tensors):
    tensors["fc.weight"][0, 0] = torch.nan


def cut_weights(folder):
    (folder / "w.safetensors").write_bytes(WEIGHTS.read_bytes()[:9000])
    return folder / "w.safetensors"


def pickled_weights(folder):
    torch.save(build_model("resnet20", 10), folder / "w.pt")
    return folder / "w.pt"


def table(change):
    def make(folder):
        pq.write_table(change(pq.read_table(SAMPLE)), folder / "d.parquet")
        return folder / "d.parquet"

    return make


def replace(name, values):
    def change(data):
        return data.set_column(data.schema.names.index(name), name, values(data))

    return change


def labels(function):
    return replace("label", lambda data: pa.array(function(data["label"].to_pylist())))


def broken_image(data):
    images = data["img"].to_pylist()
    images[7] = {**images[7], "bytes": b"no image"}
    return pa.array(images, type=data["img"].type)


ROW = {
    **{"rate": 0.5, "cost_kept": 0.5, "macs": 20_000_000, "params": 100_000},
    **{"keep_counts": [8, 8], "path": "subnets/rate-0.50"},
}


METRIC = {"metric": {"name": "top-1", "is_share": True}}
BASE = {"search": {"score": 0.9, "images": 9}}
GROUPS = [{"name": name, "num_channels": 16, "is_residual": False} for name in "ab"]
RESULT = json.dumps(
    {
        **{"name": "x", "strategy": "cacp", "cost": "macs", "evaluations": 9, "rates": [ROW]},
        **{"base": {"model": "resnet20", "macs": 40_000_000, "params": 200_000}, "groups": GROUPS},
        **{"frontier": [], "seconds": {"search": 1.0}, **METRIC},
    }
)


def enormous_image(data):
    images = data["img"].to_pylist()
    file = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(file, "PNG")
    images[7] = {**images[7], "bytes": file.getvalue()}
    return pa.array(images, type=data["img"].type)


def enormous_label(data):
    labels = pa.array([2**64 - 1, *data["label"].to_pylist()[1:]], pa.uint64())
    return data.set_column(data.schema.names.index("label"), "label", labels)


def named(text):
    return lambda data: data.replace_schema_metadata({"class_names": text})


def run_folder(folder, **files):
    """A run that was begun; `files` replaces some of its files."""
    path = folder / "run"
    config = resolved(load_config(RunConfig, {"name": "x"}))
    content = {
        "config.yaml": yaml.safe_dump(config),
        "model.json": json.dumps({"sha256": "0" * 64, "groups": [], "base": BASE, **METRIC}),
        "result.json": RESULT,
        "environment.json": "{}",
        **{name.replace("__", "/"): text for name, text in files.items()},
    }
    for name, text in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def on_run(command, *arguments, **files):
    return lambda folder: [command, run_folder(folder, **files), *arguments]


def resume(**files):
    def arguments(folder):
        path = run_folder(folder, **files)
        (path / "result.json").unlink()
        return [*search()(folder), "--resume"]

    return arguments


def newer(version):
    return json.dumps({"schema_version": version, "checkpoints": []})


@functools.cache
def whole_subnet():
    """A subnet folder, made once for all cases that spoil a copy."""
    folder = Path(tempfile.mkdtemp()) / "subnet"
    atexit.register(shutil.rmtree, folder.parent)
    return make_folder(folder, "resnet20", 32, num_classes=10)


def subnet(change):
    """Evaluates a subnet folder that `change` has spoiled."""

    def arguments(folder):
        run = run_folder(folder)
        path = run / "subnets" / "rate-0.50"
        shutil.copytree(whole_subnet(), path)
        change(path)
        return ["export", path, "--format", "state-dict", "--out", folder / "out.safetensors"]

    return arguments


def describe_otherwise(**values):
    def change(path):
        file = path / "subnet.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def cut(name):
    def change(path):
        (path / name).write_bytes((path / name).read_bytes()[:200])

    return change


def of_another_base(path):
    save_file(build_model("resnet20", 10).state_dict(), path / "model.safetensors")


def occupied(folder):
    (folder / "cache").write_text("mine")
    return [*search()(folder), "--cache", folder / "cache"]


def storage(uri):
    return lambda folder: [*search()(folder), "--storage", uri.format(folder=folder)]


def taken_storage(folder, content=OTHER):
    (folder / "copy").mkdir()
    (folder / "copy" / "config.yaml").write_text(content)
    return [*search()(folder), "--storage", folder / "copy"]


def with_text(key, text):
    """Replaces a value of subnet.json by JSON text that Python might not write."""

    def change(path):
        file = path / "subnet.json"
        marked = json.dumps(json.loads(file.read_text()) | {key: "HERE"})
        file.write_text(marked.replace('"HERE"', text))

    return change


LATE = {  # its best epoch comes after its last
    **{"epochs": 1, "best_epoch": 3, "history": [{"search_score": 0.5}]},
    **{"search_score_before": 0.4, "seconds": 1.0},
}
GROUP = {**GROUPS[0], "num_channels": 2, "members": ["a.weight:0"], "order": [1, 0]}


def reported(key, text):
    marked = json.dumps(json.loads(RESULT) | {key: "HERE"}).replace('"HERE"', text)
    return on_run("report", **{"result.json": marked})


def learning(*rates):
    """Lines of an agent's learning, each of its rates."""
    values = [dict.fromkeys(names, 0.5) for names in rates]
    rest = {"evaluations": 5, "critic_loss": None, "cached_share": 0.0, "policy": {}}
    return "".join(json.dumps(rest | {"reward": v, "noise": v}) + "\n" for v in values)


def later(key, text):
    described = {"schema_version": 1, "model": "resnet20", "num_classes": 10, "rate": 0.41}
    described |= {"cost_kept": 0.41, "macs": 1, key: "HERE"}
    return json.dumps(described).replace('"HERE"', text)


def saved_base(key, text):
    base = {"search": {"score": 0.9, "images": 100}}
    saved = {"sha256": "0" * 64, "groups": [GROUP], "base": base, **METRIC, key: "HERE"}
    return resume(**{"model.json": json.dumps(saved).replace('"HERE"', text)})


CASES = {
    # Configuration
    "not YAML": (config_file(b"a: ["), "not valid YAML"),
    "not text": (config_file(b"\xff\xfe\x00"), "not valid YAML"),
    "a list": (config_file(b"- 1\n"), "expected `key: value`"),
    "python in YAML": (config_file(b"name: !!python/object/apply:os.getcwd []"), "not valid YAML"),
    "a key of another version": (search("cluster.evaluators=3"), "did you mean max_evaluators"),
    "a section of another version": (search("surgery.kind=1"), "unknown key surgery"),
    "no value": (search("seed"), "write key.path=value"),
    "text for a number": (search("seed=many"), "seed: .*got 'many'"),
    "too few evaluations": (search("evaluations=3"), "too few for 3 rates"),
    "too few evaluations of a strategy": (
        search("strategy=global", "evaluations=17"),
        "raise evaluations to 18",
    ),
    "the same rate twice": (search("rates=[0.5,0.5]"), "must differ"),
    "equal rates": (search("rates=[0.3333333,0.33333331]"), "within six decimals"),
    "no evaluators": (search("cluster.max_evaluators=0"), "max_evaluators: .*got 0"),
    "unknown strategy": (search("strategy=cacpp"), "did you mean"),
    "unknown model": (search("model.name=resnet19"), "did you mean"),
    "a model that is not installed": (search("model.name=nothing.at:all"), "cannot be imported"),
    "data without mean and std": (
        search(f"data.test.path={SAMPLE}"),
        "data.mean and std not given: set data.mean and data.std as in the training",
    ),
    "a model that is no network": (
        search("model.name=os:getcwd"),
        "returned str: the factory must",
    ),
    "arguments that a model does not take": (
        search("model={name: 'tests.unit.pruning.networks:Plain', weights: x, kwargs: {depth: 3}}"),
        r"cannot be called .*depth",
    ),
    "a strategy that takes no problem": (search("strategy=os:getcwd"), r"must take \(problem\)"),
    "a criterion that takes no network": (
        search("pruning.criterion=os:getcwd"),
        r"must take \(plan, tensors, statistics, seed\)",
    ),
    "a criterion that is no function": (search("pruning.criterion=os:sep"), "is a str, not a func"),
    "YAML nested deeply": (config_file(b"a: " + b"[" * 10_000), "not valid YAML"),
    "YAML with a number of 5,000 digits": (config_file(b"seed: " + b"1" * 5_000), "not valid YAML"),
    "a value nested deeply": (search("rates=" + "[" * 10_000), "the value is not valid YAML"),
    "an agent of enormous networks": (
        search("agent.hidden=[1000000000,1000000000]"),
        r"agent\.hidden\.0: .*4096",
    ),
    "an agent of enormous batches": (
        search("paper.batch_size=1000000000000"),
        r"paper\.batch_size: .*65536",
    ),
    # Data
    "no file": (search("data.search.path=none.parquet"), "no such file"),
    "a folder": (search("data.search.path=tests"), "neither Parquet files nor folders of images"),
    "not Parquet": (search("data.search.path=README.md"), "not a readable Parquet"),
    "unknown embedded split": (search("data.search.path=embedded:sarch"), "did you mean search"),
    "rows outside": (search("data.search.rows=[0,9000]"), "outside its 1500 rows"),
    "shared rows": (search("data.test.path=embedded:train"), "share rows"),
    "labels out of range": (
        search_with(table(labels(lambda y: [99, *y[1:]])), "data.search.path"),
        "row 0: label 99 is outside the 10 classes",
    ),
    "negative labels": (
        search_with(table(labels(lambda y: [-1, *y[1:]])), "data.search.path"),
        "row 0: label -1 is outside",
    ),
    "missing labels": (
        search_with(table(labels(lambda y: [None, *y[1:]])), "data.search.path"),
        "row 0: no label",
    ),
    "labels that are text": (
        search_with(table(labels(lambda y: [str(each) for each in y])), "data.search.path"),
        "they must be integers",
    ),
    "labels that are numbers to predict": (
        search_with(table(labels(lambda y: [each / 10 for each in y])), "data.search.path"),
        r"column label are double; they must be integers, .*task of your own \(docs/tasks.md\)",
    ),
    "several labels for an image": (
        search_with(table(labels(lambda y: [[each, 0] for each in y])), "data.search.path"),
        r"column label are list<.*>; they must be integers, .*task of your own \(docs/tasks.md\)",
    ),
    "several label columns": (
        search_with(
            table(
                lambda data: data.append_column("sex", data["label"]).rename_columns(
                    {"label": "age"}
                )
            ),
            "data.search.path",
        ),
        r"none of the columns label.* task of your own \(docs/tasks.md\)",
    ),
    "no label column": (
        search_with(table(lambda data: data.drop_columns(["label"])), "data.search.path"),
        "none of the columns label",
    ),
    "no image column": (
        search_with(table(lambda data: data.drop_columns(["img"])), "data.search.path"),
        "none of the columns i",
    ),
    "a broken image": (
        search_with(table(replace("img", broken_image)), "data.search.path"),
        "row 7: cannot decode the image",
    ),
    "an enormous image": (
        search_with(table(replace("img", enormous_image)), "data.search.path"),
        r"row 7: cannot decode the image \(13,000 x 13,000 pixels, more than data.max_pixels",
    ),
    "labels beyond 64 bits": (
        search_with(table(enormous_label), "data.search.path"),
        r"a label is larger than 2\^63",
    ),
    "class names nested deeply": (
        search_with(table(named("[" * 10_000 + "]" * 10_000)), "data.search.path"),
        "class_names cannot be read .nested too deeply.",
    ),
    "class names that are numbers": (
        search_with(table(named("[1, 2]")), "data.search.path"),
        "class_names cannot be read .no list of names.",
    ),
    "enormous crops": (search("data.crop=1000000000"), "data.crop: .*8192"),
    # Weights
    "weights cut short": (search_with(cut_weights, "model.weights"), "not a readable safetensors"),
    "weights that are a pickle": (
        search_with(pickled_weights, "model.weights"),
        "not a readable state dict",
    ),
    "weights with NaN": (
        search_with(weights(set_nan), "model.weights"),
        "fc.weight holds NaN or infinity",
    ),
    "a tensor too few": (
        search_with(weights(lambda tensors: tensors.pop("fc.bias")), "model.weights"),
        "missing fc.bias",
    ),
    "a tensor of another shape": (
        search_with(
            weights(lambda tensors: tensors.update({"fc.bias": torch.zeros(9)})), "model.weights"
        ),
        r"fc.bias has shape \(9,\), the model \(10,\)",
    ),
    "unknown embedded weights": (search("model.weights=embedded:resnet21"), "no embedded weights"),
    # Run directories
    "a run of another configuration": (
        lambda folder: [*resume()(folder), "--set", "seed=5"],
        "changed: .*seed",
    ),
    "a run of other weights": (
        resume(),
        "searched from other weights",
    ),
    "a damaged model.json": (
        resume(**{"model.json": "{"}),
        r"model\.json: not valid JSON",
    ),
    "a model.json of something else": (
        resume(**{"model.json": '{"sha256": "0"}'}),
        r"model\.json: no base, groups, metric in it",
    ),
    "a model.json that is a list": (resume(**{"model.json": "[]"}), r"model\.json: no JSON object"),
    "a run at a dangling link": (
        lambda folder: ((folder / "run").symlink_to("/nowhere/at/all"), search()(folder))[1],
        "cannot be written .File exists.: choose another --run-dir",
    ),
    "a run where nothing can be": (
        lambda folder: [*search()(folder)[:-1], "/proc/run"],
        "cannot be written .No such file or directory.: choose another --run-dir",
    ),
    "a run with a long name": (
        lambda folder: [*search()(folder)[:-1], folder / ("n" * 300)],
        "cannot be written .File name too long.",
    ),
    "a run with a NUL in its name": (
        lambda folder: [*search()(folder)[:-1], f"{folder}/a\0b"],
        "embedded null byte",
    ),
    "a run with half a character in its name": (
        lambda folder: [*search()(folder)[:-1], f"{folder}/a\ud800"],
        "surrogates not allowed",
    ),
    "nothing to resume": (lambda folder: [*search()(folder), "--resume"], "holds no run"),
    "a file where the run should be": (
        lambda folder: ((folder / "run").write_text("x"), search()(folder))[1],
        "exists: pass --resume",
    ),
    "a damaged line in the journal": (
        on_run("evaluate", "--index", "1", **{"journal.jsonl": "{}\n{}\n"}),
        "line 1 is not a measurement",
    ),
    "episodes cut short": (
        on_run("evaluate", "--index", "1", **{"episodes__part-00000.parquet": "PAR1"}),
        "not a readable Parquet file",
    ),
    "a candidate that is not there": (on_run("evaluate", "--index", "1"), "no candidate 1"),
    "a checkpoint of a newer version": (
        on_run("subnet", "--rate", "0.4", **{"checkpoints__LATEST.json": newer(3)}),
        "schema version 3, this cacp_ray reads 2",
    ),
    "a run without a policy": (on_run("subnet", "--rate", "0.4"), "no trained policy yet"),
    "a strategy without a policy": (
        on_run("subnet", "--rate", "0.4", **{"config.yaml": "strategy: random\n"}),
        "searched by random, which has no policy for every rate",
    ),
    "a fine-tuning on other images": (
        on_run("finetune", "--set", "data.stream=true"),
        "was searched with another `model` or `data`",
    ),
    "a damaged result": (on_run("report", **{"result.json": "{"}), "not valid JSON"),
    "a result of something else": (
        on_run("report", **{"result.json": "{}"}),
        r"result\.json: no base, .*rates, seconds.* in it; restore it",
    ),
    "an empty configuration in a run": (
        on_run("evaluate", "--index", "1", **{"config.yaml": ""}),
        "no candidate 1",
    ),
    "a rate above one": (on_run("subnet", "--rate", "1.4"), r"in \(0, 1\]"),
    "endless rates": (on_run("subnet", "--rate", "0.2:inf:0.1"), "write one rate"),
    "one folder for many": (
        on_run("subnet", "--rate", "0.2:0.9:0.1", "--out", "there"),
        "give one rate",
    ),
    "rates backwards": (on_run("subnet", "--rate", "0.9:0.2:0.1"), "smaller rate first"),
    # Subnets
    "a subnet of a newer version": (subnet(describe_otherwise(schema_version=9)), "version 9"),
    "a subnet of another base network": (subnet(of_another_base), "a file of another subnet"),
    "a subnet of an unknown network": (subnet(describe_otherwise(model="resnet21")), "unknown"),
    "a description that lacks something": (
        subnet(lambda path: (path / "subnet.json").write_text('{"schema_version": 1}')),
        r"subnet\.json: no input_shape, model, num_classes in it",
    ),
    "a description cut short": (subnet(cut("subnet.json")), "not valid JSON"),
    "small weights cut short": (subnet(cut("model.safetensors")), "not a readable safetensors"),
    **{
        f"a subnet whose {key} is {text}": (subnet(with_text(key, text)), rf"subnet\.json: {key}")
        for key, text in (
            *(("model", text) for text in ("5", "[5]", "{}", '""', f'"{"x" * 301}"')),
            *(("num_classes", text) for text in ('"10"', "-1", "true", "1.5", "1e12", "1e30")),
            ("num_classes", "1000000000000"),
            *(("input_shape", text) for text in ('"3"', "[3, -1, 8]", "[3, 0.5, 8]", "[]", "{}")),
            ("rate", '"a half"'),
            ("groups", "[5]"),
            ("classes", '{"0": "cat"}'),
            ("params", "NaN"),
        )
    },
    "a subnet without an input": (
        subnet(with_text("input_shape", "null")),
        r"subnet\.json: no input_shape in it",
    ),
    "a subnet of enormous images": (
        subnet(with_text("input_shape", "[3, 100000, 100000]")),
        "30,000,000,000 values; at most",
    ),
    "a subnet nested deeply": (
        subnet(with_text("groups", "[" * 10_000 + "]" * 10_000)),
        r"subnet\.json: not valid JSON \(nested too deeply\)",
    ),
    "a subnet with a number of 5,000 digits": (
        subnet(with_text("num_classes", "1" * 5_000)),
        r"subnet\.json: not valid JSON",
    ),
    "a subnet that is not text": (
        subnet(lambda path: (path / "subnet.json").write_bytes(b"\xff\xfe{")),
        "not text in UTF-8",
    ),
    # Results
    **{
        f"a result whose {key} is {text}": (reported(key, text), rf"result\.json: {where or key}")
        for key, text, where in (
            ("rates", '"0.5"', ""),
            ("rates", "[]", ""),
            ("rates", '[{"rate": "0.5"}]', "rates.0.rate"),
            ("rates", json.dumps([ROW | {"path": "../../elsewhere"}]), "rates.0.path"),
            ("rates", json.dumps([ROW | {"path": "/tmp"}]), "rates.0.path"),
            ("rates", json.dumps([ROW | {"keep_counts": [1]}]), "rate 0.5: keep_counts do not"),
            ("rates", json.dumps([ROW | {"keep_counts": [1, 99]}]), "rate 0.5: keep_counts do not"),
            ("rates", json.dumps([ROW | {"score": "all"}]), "rates.0.score"),
            ("seconds", '{"search": "long"}', "seconds.search"),
            ("seconds", "5", ""),
            ("frontier", '["0.5"]', "frontier.0"),
            ("base", "[1]", ""),
            ("base", '{"macs": 1e30, "params": 1}', "base.macs"),
            ("groups", '[{"name": "conv1"}]', "groups.0.num_channels"),
            ("learning", '{"policy_score": [1]}', "learning.policy_score.0"),
        )
    },
    "learning at other rates in its last line": (
        on_run("report", **{"learning.jsonl": learning(["0.30", "0.50"], ["0.30"])}),
        r"learning\.jsonl: reward is of different rates",
    ),
    **{
        f"a later subnet whose {key} is {text}": (
            on_run("report", **{"subnets__rate-0.41__subnet.json": later(key, text)}),
            rf"subnet\.json: {key}",
        )
        for key, text in (("search", '"good"'), ("candidates", "[1]"), ("search", '{"score": "x"}'))
    },
    "a metrics.json of one number": (
        on_run("report", **{"subnets__rate-0.50__metrics.json": '{"epochs": 1}'}),
        r"metrics\.json: no best_epoch, history, search_score_before, seconds in it",
    ),
    "a best epoch after the last": (
        on_run("report", **{"subnets__rate-0.50__metrics.json": json.dumps(LATE)}),
        r"metrics\.json: best_epoch 3 of 1 in its history",
    ),
    "class names that are one text": (
        search_with(table(named('"abc"')), "data.search.path"),
        "class_names cannot be read .no list of names.",
    ),
    "learning of something else": (
        on_run("report", **{"learning.jsonl": "[1]\n[2]\n"}),
        r"learning\.jsonl: line 1 is not about the agent's learning",
    ),
    "a fine-tuning of something else": (
        on_run(
            "report",
            **{"subnets__rate-0.50__metrics.json": '{"epochs": "many"}'},
        ),
        r"metrics\.json: epochs: ",
    ),
    **{
        f"a base network whose {key} is {text}": (saved_base(key, text), rf"model\.json: {where}")
        for key, text, where in (
            ("base", '"resnet20"', "base"),
            ("groups", '"none"', "groups"),
            ("groups", json.dumps([GROUP | {"order": "upwards"}]), "groups.0.order"),
            ("groups", json.dumps([GROUP | {"order": [0, 7]}]), "groups.0.order: no order"),
            ("groups", json.dumps([GROUP | {"num_channels": 3}]), "groups.0: .* orders 2 of 3"),
            ("orders", '{"l1": [[1]]}', "orders.l1.0: no order of channels"),
            ("orders", '{"l1": [[0]]}', "orders of l1 do not fit the groups"),
            ("base", '{"macs": 1}', "base.search: Field required"),
        )
    },
    # Options
    "a file where the cache should be": (occupied, "name a folder"),
    "unknown storage": (storage("ftp://host/x"), "write s3://BUCKET/FOLDER"),
    "storage that cannot be written": (storage("{folder}/config.yaml/x"), "cannot be written to"),
    "storage of another run": (taken_storage, "holds a run: pass --resume"),
    "storage of a run of another configuration": (
        lambda folder: [*taken_storage(folder), "--resume"],
        "copy was started with another configuration; changed: name; .* another --storage",
    ),
    "storage of a damaged run": (
        lambda folder: [*taken_storage(folder, "- 1"), "--resume"],
        r"config\.yaml cannot be read \(damaged\)",
    ),
    "storage in the run directory": (storage("{folder}/run/copy"), "lie in each other"),
    "storage around the run directory": (storage("{folder}"), "lie in each other"),
    "an unknown option": (lambda folder: ["search", "--adress", "auto"], "--adress"),
}


def snapshot(folder):
    def content(path):
        return os.readlink(path) if path.is_symlink() else path.is_dir() or path.read_bytes()

    return {path: content(path) for path in sorted(folder.rglob("*"))}


def test_the_table_is_long():
    assert len(CASES) >= 130


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_changes_nothing(case, run, tmp_path):
    make, message = CASES[case]
    arguments = make(tmp_path)
    before = snapshot(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2, err
    assert re.search(message, err), err
    assert err.count("\n") == 1
    assert len(err) > 30
    assert "Traceback" not in out + err
    assert snapshot(tmp_path) == before


# Calls that may run code of the file they read; each is allowed only in the safe form.
def find_unsafe(source):
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            found += [f"imports {name}" for name in names if name in UNSAFE_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
            found.append("np.load with pickles")
        if name in UNSAFE_CALLS:
            found.append(name)
    return found


UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "shelve", "joblib", "marshal"}
UNSAFE_CALLS = {
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
    *("eval", "exec", "torch.jit.load", "pd.read_pickle"),
}


@pytest.mark.parametrize("path", sorted(Path("cacp_ray").rglob("*.py")), ids=str)
def test_no_file_from_elsewhere_can_run_code(path):
    assert find_unsafe(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f, Loader=yaml.Loader)",
        "eval(text)",
    ],
)
def test_the_audit_finds_what_it_looks_for(source):
    assert len(find_unsafe(source)) == 1

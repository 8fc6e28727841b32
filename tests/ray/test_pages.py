"""Commands and code of the pages, run as they stand but with less to search and to train.

docs/tour.md is in test_tour.py; the pages on clusters need clusters.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file

from cacp_ray.data.images import read_parquet
from cacp_ray.models.factory import build_model
from tests.ray.test_tour import SMALL

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

ROOT = Path(__file__).parents[2]
MINE = {
    "name": "mine",
    "model": {"name": "resnet20", "weights": "embedded:resnet20_cifar10"},
    "rates": [0.3, 0.5, 0.7],
} | SMALL
AGENT = {"trials": 2, "evaluations": 24, "seeds": [0]}


def read(page):
    return (ROOT / page).read_text()


def commands(page):
    return re.findall(r"^ *(cacp-ray .+)$", read(page), re.MULTILINE)


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", read(page), re.DOTALL)


def run_all(run, lines):
    printed = {}
    for line in lines:
        code, out, err = run(*shlex.split(line, comments=True)[1:])
        assert code == 0, f"{line}: {err}"
        printed[line] = out
    return printed


def copy_config(name, changes):
    """A file of tune_configs in this folder, smaller."""
    values = yaml.safe_load((ROOT / "tune_configs" / name).read_text())
    file = Path("tune_configs") / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(values | changes))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A folder with runs/mine in it."""
    from cacp_ray import search
    from cacp_ray.config.reading import load_config
    from cacp_ray.config.run import RunConfig

    root = tmp_path_factory.mktemp("pages")
    search(load_config(RunConfig, MINE), root / "runs" / "mine")
    return root


def make_net(num_classes=10):
    return build_model("resnet20", num_classes)


def test_your_own_network_as_in_the_readme(folder, run):
    (text,) = [text for text in blocks("README.md", "yaml") if "my_package" in text]
    config = yaml.safe_load(text)
    # A package that Ray's processes, which run already, can import.
    mine = f"{__name__}:{config['model']['name'].partition(':')[2]}"
    config["model"]["name"] = mine
    weights = folder / config["model"]["weights"]
    weights.parent.mkdir()
    save_file(build_model("resnet20", 10).state_dict(), weights)
    for name, split in config["data"].items():
        split["path"] = f"embedded:{name}"
    data = config["data"] | SMALL["data"]
    (folder / "mine.yaml").write_text(yaml.safe_dump(config | SMALL | {"data": data}))
    lines = [line for line in commands("README.md") if "cluster" not in line]
    run_all(run, [re.sub(r"my_package\.\S+", mine, line) for line in lines])
    assert (folder / "runs/mine/subnets/rate-0.42/subnet.json").exists()
    assert (folder / "runs/mine/subnets/rate-0.30/finetuned.safetensors").exists()


def test_the_analysis_of_the_readme(capsys):
    for text in blocks("README.md", "python"):
        if "analyze" in text:
            exec(compile(text, "README.md", "exec"), {})
    assert "channel groups" in capsys.readouterr().out


def test_export(folder, run, searched):
    shutil.copytree(searched / "runs", folder / "runs")
    run_all(run, commands("docs/export.md"))
    assert (folder / "exports" / "cut.safetensors").exists()
    names = {}
    for text in blocks("docs/export.md", "python")[:-1]:  # the last needs a detector
        exec(compile(text, "export.md", "exec"), names)


def test_finetuning(folder, run, searched):
    copy_config("finetune_variants.yaml", {"finetune": {"epochs": 3}})
    for line in commands("docs/finetuning.md"):  # each is another way for the same run
        shutil.rmtree(folder / "runs", ignore_errors=True)
        shutil.copytree(searched / "runs", folder / "runs")
        run_all(run, [line.replace("NAME", "mine")])
    assert (folder / "runs/mine/subnets/rate-0.50/finetune").exists()


def test_compare(folder, run, capsys):
    (folder / "mine.yaml").write_text(yaml.safe_dump(MINE))
    run_all(run, commands("docs/compare.md"))
    names = {path.name for path in (folder / "runs/mine").iterdir()}
    assert names == {"cacp", "hill_climb", "random", "uniform", "comparison", "cache"}
    for text in blocks("docs/compare.md", "python"):
        exec(compile(text, "compare.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_latency(folder, run):
    copy_config("search_latency_resnet20.yaml", SMALL)
    printed = run_all(run, commands("docs/latency.md"))
    assert (folder / "resnet20-latency.parquet").exists()
    assert "predicted" in list(printed.values())[-1]


def test_data(folder, run):
    (convert, *_) = lines = commands("docs/data.md")
    assert "data/imagenet/train" in convert
    split = read_parquet("embedded:search", (0, 300))
    for number, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
        place = folder / "data/imagenet/train" / split.classes[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png")
    shutil.copytree(folder / "data/imagenet/train", folder / "data/imagenet/val")
    printed = run_all(run, lines)
    assert "300 images in 256 shards" in printed[convert]


def test_tuning(folder, run):
    small = {
        name: value for name, value in SMALL.items() if name not in ("evaluations", "finetune")
    }
    search = {"name": "tuned", "evaluations": 40} | small
    copy_config("agent_asha.yaml", AGENT | {"search": search})
    (printed,) = run_all(run, commands("docs/tuning.md")).values()
    assert "best settings: cacp-ray search" in printed

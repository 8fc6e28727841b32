"""docs/transfer.md from its first line to a subnet: DANN, pseudo labels, mixed splits, pcp."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.data.images import ImageSet, read_parquet
from cacp_ray.data.mixing import write_parquet
from cacp_ray.evaluation.measurement import LocalEvaluator
from cacp_ray.evaluation.scorer import Scorer
from cacp_ray.models.factory import build_model
from cacp_ray.models.pretrained import load_weights
from cacp_ray.pruning.subnet import load_subnet
from cacp_ray.pruning.verify import count_macs
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.training.metrics import measure
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.strategy import make_run_strategy
from cacp_ray.workflows.winners import build_here, build_winners

PAGE = Path("docs/transfer.md").read_text()
SIZES = {"train": 128, "search": 64, "test": 96}
SIDE = 8  # pixels


def make_domain(part, *, is_target):
    """Red tells the class in both domains; the target is greener."""
    count = SIZES[part]
    rng = np.random.default_rng(list(SIZES).index(part) + 10 * is_target)
    labels = np.arange(count) % 2
    images = rng.normal(128, 30, (count, SIDE, SIDE, 3)) + rng.normal(0, 8, (count, 1, 1, 3))
    side = (2.0 * labels - 1)[:, None, None]
    images[..., 0] += 50 * side
    images[..., 1] += 20 * is_target
    return ImageSet(images.clip(0, 255).astype(np.uint8), labels, ("no", "yes"))


def search(config, folder):
    """The subnet of the first rate, as a run saves it, and how many candidates were measured."""
    setup = Setup.create(config).prepare()
    score = Scorer(setup.prepared, setup.search, recovery="compensate", dtype="float32", threads=1)
    strategy = make_run_strategy(setup)
    loop = SearchLoop(
        LocalEvaluator(score),
        setup.plan.cost_model,
        RunDirectory(folder),
        rates=config.rates,
        evaluations=config.evaluations,
    )
    loop.run(strategy)
    best = {rate: loop.archive.best(rate) for rate in config.rates}
    (row,) = build_winners(setup, best, folder, build_here(setup))
    return load_subnet(folder / row["path"]), loop.progress.evaluations


@pytest.mark.slow
def test_the_page_leads_from_two_domains_to_a_subnet_for_the_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in SIZES:
        write_parquet(Path(f"source-{part}.parquet"), make_domain(part, is_target=False))
        np.save(f"target-{part}.npy", make_domain(part, is_target=True).images)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block, "transfer.md", "exec"), {})

    # Half of each domain, and the target's labels are what the network takes its images for.
    model = build_model("resnet20", 2)
    load_weights(model, "base.safetensors")
    source, target = (make_domain("search", is_target=t) for t in (False, True))
    mixed = read_parquet("mixed-search.parquet")
    assert len(mixed) == len(source) + len(target)
    known = {
        image.tobytes(): label for image, label in zip(source.images, source.labels, strict=True)
    }
    of_target = ~np.isin([image.tobytes() for image in mixed.images], list(known))
    with torch.inference_mode():
        guesses = model.eval()(mixed.tensors()[0]).argmax(1).numpy()
    assert of_target.sum() == len(target)
    assert (mixed.labels[of_target] == guesses[of_target]).all()
    assert all(
        known[image.tobytes()] == label
        for image, label in zip(mixed.images[~of_target], mixed.labels[~of_target], strict=True)
    )

    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    changes = ["evaluations=32", "pruning.calibration_images=64", "pruning.sequential=false"]
    config = load_config(RunConfig, yaml.safe_load(text), changes)
    subnet, evaluations = search(config, tmp_path / "run")
    assert 16 < evaluations <= 32
    example = torch.zeros(1, 3, SIDE, SIDE)
    assert count_macs(subnet, example) <= 0.5 * count_macs(model, example)
    test = make_domain("test", is_target=True).tensors()
    assert measure(model, *test).top1 > 0.8
    assert measure(subnet, *test).top1 > 0.8

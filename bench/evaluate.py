"""Candidates a second, against the usual loops: python bench/evaluate.py --candidates 20.

The same random candidates (rates 0.3 to 0.7) go through all ways in turn, in one process on one
core. The table shows medians of each way's time over ours.

- usual loop: copy the network, prune the copy with Torch-Pruning, float32, NCHW, a DataLoader;
- masking: the whole network with zeros for cut channels, as AMC and CACP score, float32;
- masking + least squares: masking, and scikit-learn's regression of every layer on its kept inputs,
  on sampled points of the calibration images, as in their recovery;
- floor: only the forward pass of the small network, already built and fused, with images ready, at
  the batch size of several that is fastest for the whole network.

Ours scores the whole search split from its stored uint8 images, without recovery and with it.
"""

import argparse
import copy
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from compensation import make_noise
from cutting import prune_a_copy
from numpy.typing import NDArray
from report import parse_rows, positive, print_environment, print_table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from cacp_ray.config.run import PruningConfig
from cacp_ray.data.images import ImageSet, read_parquet
from cacp_ray.evaluation.fusion import fuse
from cacp_ray.evaluation.measurement import Candidate
from cacp_ray.evaluation.preparation import CutNetwork, Prepared, prepare
from cacp_ray.evaluation.scorer import Scorer
from cacp_ray.models.factory import build_model
from cacp_ray.models.pretrained import load_weights
from cacp_ray.pruning.calibration import batches_of
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.statistics import collect_statistics
from cacp_ray.searching.budget import spend
from cacp_ray.searching.strategies.random import scale_to_budget
from cacp_ray.training.metrics import fast_dtype
from cacp_ray.workflows.setup import make_budget

POINTS = 10  # places that the least squares read in each map, as in AMC's code
RATES = (0.3, 0.7)
FLOOR_BATCHES = (4, 10, 32, 64, 128, 250, 512, 1000)


class MaskedNetwork:
    """The papers' way: cut channels are zeros of the whole network; layers may be refitted."""

    def __init__(self, prepared: Prepared, seed: int) -> None:
        self.model = copy.deepcopy(prepared.model).eval().requires_grad_(False)
        self._plan = prepared.plan
        self._weights = {
            name: torch.from_numpy(np.array(value)) for name, value in prepared.tensors.items()
        }
        self.model.load_state_dict(self._weights, strict=False)
        self._rng = np.random.default_rng(seed)
        self._points: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        handles = [
            self.model.get_submodule(consumer.module).register_forward_hook(
                partial(self._sample, consumer.weight)
            )
            for consumer in self._plan.consumers
        ]
        with torch.inference_mode():
            self.model(prepared.calibration.tensors()[0].contiguous())
        for handle in handles:
            handle.remove()

    def _sample(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        x = inputs[0]
        if not isinstance(module, nn.Conv2d):
            self._points[name] = x.flatten(1).numpy(), y.flatten(1).numpy()
            return
        size, stride, padding = module.kernel_size, module.stride, module.padding
        rows, columns = [], []
        for image, out in zip(x.split(1), y.split(1), strict=True):
            unfolded = functional.unfold(image, size, padding=padding, stride=stride)[0]  # (D, L)
            places = self._rng.integers(unfolded.shape[1], size=POINTS)
            rows.append(unfolded[:, places].T.numpy())
            columns.append(out.flatten(2)[0][:, places].T.numpy())
        self._points[name] = np.concatenate(rows), np.concatenate(columns)

    def load(self, counts: Sequence[int], *, fit: bool) -> nn.Module:
        """Puts zeros for the cut channels, and the old or refitted weights for the kept ones."""
        from sklearn.linear_model import LinearRegression

        parameters = dict(self.model.named_parameters())
        for consumer in self._plan.consumers:
            whole = self._weights[consumer.weight]
            kept = self._plan.axes[consumer.weight, 1].positions(counts)
            masked = torch.zeros_like(whole)
            if fit:
                x, y = self._points[consumer.weight]
                size = whole[0, 0].numel()
                inputs = (kept[:, None] * size + np.arange(size)).ravel()
                weights = LinearRegression().fit(x[:, inputs], y).coef_  # (N, kept inputs)
                masked[:, kept] = torch.from_numpy(
                    weights.reshape(len(whole), len(kept), *whole.shape[2:])
                ).float()
            else:
                masked[:, kept] = whole[:, kept]
            parameters[consumer.weight].copy_(masked)
        return self.model


def score_plainly(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> float:
    """The usual evaluation loop."""
    right = total = 0
    with torch.no_grad():
        for x, y in loader:
            right += int((model(x).argmax(1) == y).sum())
            total += len(y)
    return right / total


def bench(
    name: str,
    model: nn.Module,
    calibration: ImageSet,
    search: ImageSet,
    options: argparse.Namespace,
) -> list[str]:
    """One row of the table."""
    x, y = search.tensors()
    plan = make_plan(model, x[:1])
    moments = collect_statistics(
        model, plan, batches_of(calibration), seed=options.seed, kinds={"inputs"}
    )
    prepared = {
        recovery: prepare(
            model, plan, calibration, moments, criterion="l1", recovery=recovery, seed=options.seed
        )
        for recovery in ("none", "compensate")
    }
    ours = {
        recovery: Scorer(shared, search, recovery=recovery, dtype="auto")
        for recovery, shared in prepared.items()
    }
    loader = DataLoader(TensorDataset(x.contiguous(), y), batch_size=options.batch)
    masked = MaskedNetwork(prepared["none"], options.seed)
    cut_network = CutNetwork(prepared["none"], "none")
    fused = fuse(cut_network.resizable.model)
    assert fused is not None
    fused.dtype = fast_dtype()
    images = x.to(fast_dtype())

    def run_floor(small: nn.Module, size: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            for batch in images.split(size):
                small(batch)
        return time.perf_counter() - started

    whole = fused.load(cut_network.tensors)
    seconds = {
        size: min(run_floor(whole, size) for _ in range(2))
        for size in FLOOR_BATCHES
        if size <= len(x)
    }
    size = min(seconds, key=seconds.__getitem__)
    logging.info("%s: floor with batches of %d", name, size)

    def prune_and_score(counts: list[int]) -> None:
        score_plainly(prune_a_copy(model, plan, prepared["none"].orders, counts, x[:1]), loader)

    rows = []
    for index, counts in enumerate(draw(plan, options)):
        candidate = Candidate(0.5, tuple(counts), index=index)
        small = fused.load({**cut_network.tensors, **cut_network.cut(counts)})
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda c=candidate: ours["none"](c),
            "ours+": lambda c=candidate: ours["compensate"](c),
            "floor": lambda s=small: run_floor(s, size),
            "usual": lambda c=counts: prune_and_score(c),
            "masking": lambda c=counts: score_plainly(masked.load(c, fit=False), loader),
            "masking+": lambda c=counts: score_plainly(masked.load(c, fit=True), loader),
        }
        row = {}
        for way, run in ways.items():
            started = time.perf_counter()
            run()
            row[way] = time.perf_counter() - started
        rows.append(row)
        logging.info("%s %d %s", name, index, {k: round(v, 2) for k, v in row.items()})
    rows = rows[1:]  # the first one warms up

    def ratio(way: str, to: str) -> str:
        return f"{statistics.median(row[way] / row[to] for row in rows):.2f}x"

    return [
        f"{name}, {len(search):,} images",
        f"{statistics.median(row['ours'] for row in rows):.2f} s",
        f"{statistics.median(row['ours+'] for row in rows):.2f} s",
        ratio("usual", "ours"),
        ratio("masking", "ours"),
        ratio("masking+", "ours+"),
        ratio("ours", "floor"),
        ratio("ours+", "floor"),
    ]


def draw(plan: Plan, options: argparse.Namespace) -> list[list[int]]:
    """Keep counts of random candidates at random rates, each spending its budget."""
    budget = make_budget(plan, "macs", PruningConfig())
    rng = np.random.default_rng(options.seed)
    number = options.candidates + 1
    rates = rng.uniform(*RATES, size=number)
    least = budget.min_counts / budget.num_channels
    ratios = rng.uniform(least, 1, (number, len(least)))
    return spend(budget, scale_to_budget(budget, ratios, rates), rates).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    networks = ["resnet20", "resnet56", "resnet50"]
    parser.add_argument("--networks", nargs="+", choices=networks, default=networks)
    parser.add_argument("--weights56", default="tests/golden/resnet56_cifar10.safetensors")
    parser.add_argument("--train", default="embedded:train", help="Parquet of calibration images")
    parser.add_argument("--search", default="embedded:search", help="Parquet of scored images")
    parser.add_argument("--search-rows", type=parse_rows, help="START:STOP, by default all")
    parser.add_argument("--calibration", type=int, default=1000, help="images")
    parser.add_argument("--candidates", type=positive, default=20)
    parser.add_argument("--batch", type=positive, default=250, help="usual loop and masking")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    rows = []
    for name in options.networks:
        if name == "resnet50":  # random weights, because only time is measured
            model = build_model("torchvision:resnet50", 1000).eval()
            calibration = search = make_noise(64, 224, options.seed)
        else:
            model = build_model(name, 10).eval()
            load_weights(
                model, "embedded:resnet20_cifar10" if name == "resnet20" else options.weights56
            )
            calibration = read_parquet(options.train, count=options.calibration)
            search = read_parquet(options.search, options.search_rows)
        rows.append(bench(name, model, calibration, search, options))
    header = [
        "network", "ours", "with recovery", "usual loop", "masking", "masking + least squares",
        "ours over floor", "with recovery over floor",
    ]  # fmt: skip
    title = f"time of a candidate, and of the other ways over ours, {options.candidates} candidates"
    print_table(title, header, rows)
    print_environment(options.seed)


if __name__ == "__main__":
    main()

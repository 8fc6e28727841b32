"""Cold compensation of a candidate against its forward pass: python bench/compensation.py.

Each draw takes random keep counts and an empty cache, solves every layer and runs the small
network, in float32 and in the fast dtype of this CPU, all on one thread. ResNet-56 has trained
weights and real images. ResNet-50 has random weights and noise for images, which makes no
difference to the solver; its forward pass is timed on a few images and scaled up.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from report import print_environment, print_table
from torch import nn

from cacp_ray.data.images import ImageSet, read_parquet
from cacp_ray.evaluation.preparation import CutNetwork, prepare
from cacp_ray.models.factory import build_model
from cacp_ray.models.pretrained import load_weights
from cacp_ray.pruning.calibration import image_batches
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.statistics import collect_statistics
from cacp_ray.training.metrics import fast_dtype, predict

SMALLEST = 0.1  # least share of a group's channels that is kept


def make_noise(count: int, side: int, seed: int) -> ImageSet:
    """Images of smooth noise: neighbouring pixels are alike, as in photographs."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, size=(count, side // 8, side // 8, 3), dtype=np.uint8)
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)
    return ImageSet(images, np.zeros(count, dtype=np.int64), ("noise",))


def bench(
    name: str, model: nn.Module, calibration: ImageSet, timed: ImageSet, options: argparse.Namespace
) -> list[str]:
    """One row of the table: `timed` images stand for `options.images`."""
    x = timed.tensors()[0]
    plan = make_plan(model, x[:1])
    images, _ = calibration.tensors()
    moments = collect_statistics(model, plan, image_batches(images), seed=options.seed)
    prepared = prepare(
        model, plan, calibration, moments, criterion="l1", recovery="compensate", seed=options.seed
    )
    rng = np.random.default_rng(options.seed)
    whole = plan.cost_model.num_channels
    dtypes = dict.fromkeys((torch.float32, fast_dtype()))
    rows = []
    for _ in range(options.draws + 1):
        counts = [int(rng.integers(np.ceil(SMALLEST * n), n + 1)) for n in whole]
        cut_network = CutNetwork(prepared, "compensate")  # with an empty cache
        started = time.process_time()
        small = cut_network.load(counts)
        row = {"compensation": time.process_time() - started}
        for dtype in dtypes:
            started = time.process_time()
            predict(small, x, options.batch, dtype)
            seconds = time.process_time() - started
            row[str(dtype)] = seconds * options.images / len(x)
        rows.append(row)
    rows = rows[1:]  # the first one warms up

    def median(key: str) -> float:
        return statistics.median(row[key] for row in rows)

    cells = [name, f"{1e3 * median('compensation'):.0f}"]
    for dtype in (torch.float32, fast_dtype()):
        share = statistics.median(row["compensation"] / row[str(dtype)] for row in rows)
        cells += [f"{median(str(dtype)):.2f}", f"{100 * share:.1f} %"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="tests/golden/resnet56_cifar10.safetensors")
    parser.add_argument("--train", default="embedded:train", help="Parquet of calibration images")
    parser.add_argument("--search", default="embedded:search", help="Parquet of scored images")
    parser.add_argument("--images", type=int, default=1000, help="images a candidate is scored on")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--draws", type=int, default=9, help="random keep counts a network")
    parser.add_argument("--large", action="store_true", help="also torchvision's ResNet-50, 224 px")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = build_model("resnet56", 10).eval()
    load_weights(model, options.weights)
    calibration = read_parquet(options.train, count=1000)
    timed = read_parquet(options.search, count=options.images)
    rows = [bench("ResNet-56, 32 px", model, calibration, timed, options)]
    if options.large:
        model = build_model("torchvision:resnet50", 1000).eval()
        calibration, timed = make_noise(64, 224, options.seed), make_noise(16, 224, options.seed)
        rows.append(bench("ResNet-50, 224 px", model, calibration, timed, options))
    fast = str(fast_dtype()).removeprefix("torch.")
    header = ["network", "compensation, ms"]
    for dtype in ("float32", fast):
        header += [f"{options.images} images in {dtype}, s", f"share of {dtype}"]
    print_table("Cold compensation of one candidate", header, rows)
    print_environment(options.seed)


if __name__ == "__main__":
    main()

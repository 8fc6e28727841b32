"""Accuracy before any fine-tuning, of compensation at once and layer by layer.

python bench/sequential.py --model resnet20 --weights embedded:resnet20_cifar10 \
    --train TRAIN.parquet --train-rows 0:45000 --search TRAIN.parquet --search-rows 45000:50000

Widths are uniform, the order is that of `cap`, and the networks compute in float32. Times are
processor seconds of this process: for one compensated candidate with a cold cache, and for the
layer-by-layer repair.
"""

import time

from experiment import GROUP_SETS, RATES, load, make_parser, widths
from report import print_environment, print_table

from cacp_ray.data.images import read_parquet
from cacp_ray.evaluation.preparation import CutNetwork, prepare
from cacp_ray.pruning.calibration import image_batches
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.sequential import recover_sequentially
from cacp_ray.pruning.statistics import collect_statistics
from cacp_ray.training.metrics import measure


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--calibration", type=int, default=1000, help="training images")
    options = parser.parse_args()
    model, search = load(options)
    train = read_parquet(options.train, options.train_rows, options.calibration)
    images, _ = train.tensors()
    plan = make_plan(model, images[:1])
    statistics = collect_statistics(model, plan, image_batches(images), seed=options.seed)
    prepared = prepare(
        model, plan, train, statistics, criterion="cap", recovery="compensate", seed=options.seed
    )
    split = search.tensors()
    table = []
    for groups in GROUP_SETS:
        for rate, counts in zip(RATES, widths(plan, groups).tolist(), strict=True):
            cut_network = CutNetwork(prepared, "compensate")
            started = time.process_time()
            tensors = cut_network.cut(counts)
            middle = time.process_time()
            repaired = recover_sequentially(
                model, plan, tensors, prepared.orders, counts, images, seed=options.seed
            )
            ended = time.process_time()
            once = measure(cut_network.resizable.load(tensors), *split).top1
            stepwise = measure(cut_network.resizable.load(repaired), *split).top1
            table.append(
                [
                    groups, f"{rate}", f"{100 * once:.1f}", f"{100 * stepwise:.1f}",
                    f"{100 * (stepwise - once):+.1f}", f"{middle - started:.3f}",
                    f"{ended - middle:.1f}",
                ]
            )  # fmt: skip
    base = 100 * measure(model, *split).top1
    print_table(
        f"{options.model}: top-1 % on {len(search)} search images without fine-tuning (base "
        f"{base:.1f} %, {len(train)} calibration images)",
        ["groups", "rate", "at once", "layer by layer", "gain", "s at once", "s layer by layer"],
        table,
    )
    print_environment(options.seed)


if __name__ == "__main__":
    main()

"""Evaluators that share a GPU: python bench/gpu.py --network resnet50 --images 1000.

For each number of evaluators, that many processes, each with its share of the GPU's memory, score
random candidates (rates 0.3 to 0.7, without recovery) for a few rounds. The floor is one process
that only runs forward passes of small networks built beforehand. The first line tells how many
evaluators `cluster.gpus_per_evaluator: auto` would start. Without a GPU everything runs on CPUs:
that tries the command out and measures nothing.
"""

import argparse
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from report import positive, print_environment, print_table
from threads import IMAGENET, draw, prepare_network, work


def ask_need(pipe: Connection, network: str, images: int, seed: int) -> None:
    """Sends the GB that an evaluator takes, the GB of the GPU, and how many evaluators it holds."""
    from cacp_ray.evaluation.scorer import measure_need

    need = measure_need(*prepare_network(network, images, seed), recovery="none", dtype="auto")
    pipe.send((need.evaluator / 2**30, need.gpu / 2**30, need.num_evaluators))


def run_floor(pipe: Connection, network: str, images: int, count: int, seed: int) -> None:
    """Sends the seconds of `count` forward passes over all images."""
    from cacp_ray.evaluation.gpu import gpu_batch_size
    from cacp_ray.evaluation.network import FastNetwork, default_batch_size, put_pixels
    from cacp_ray.evaluation.preparation import CutNetwork
    from cacp_ray.evaluation.scorer import read_dtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    prepared, split = prepare_network(network, images, seed)
    fast = FastNetwork(CutNetwork(prepared, "none", device), read_dtype("auto", device))
    pixels = put_pixels(split, device)
    side = split.images.shape[1]
    batch = gpu_batch_size(side**2, len(split)) if device == "cuda" else default_batch_size(split)
    seconds = []
    for candidate in draw(prepared.plan, count, np.random.default_rng(seed)):
        predict = fast.load(candidate.keep_counts, batch)
        predict(pixels, 0, len(split))  # warms up
        started = time.perf_counter()
        predict(pixels, 0, len(split))
        seconds.append(time.perf_counter() - started)
    pipe.send(seconds)


def time_evaluators(number: int, share: float, options: argparse.Namespace) -> float:
    """Candidates a second of `number` evaluators together: median of the rounds."""
    pipes = [
        start(work, options.network, 1, options.seed + index, options.images, share)
        for index in range(number)
    ]
    for pipe in pipes:
        pipe.recv()
    quota = -(-options.candidates // number)
    rates = []
    for _ in range(options.rounds + 1):
        started = time.monotonic()
        for pipe in pipes:
            pipe.send(quota)
        for pipe in pipes:
            pipe.recv()
        rates.append(quota * number / (time.monotonic() - started))
    for pipe in pipes:
        pipe.send(None)
    return statistics.median(rates[1:])  # the first warms up


def start(run: Any, *arguments: Any) -> Connection:
    """Starts a process, whose GPU memory is free again when it ends."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    spawn.Process(target=run, args=(theirs, *arguments), daemon=True).start()
    theirs.close()
    return ours


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=("resnet20", *IMAGENET), default="resnet50")
    parser.add_argument(
        "--images", type=positive, default=1000, help="of 224 pixels, for resnet50 and mobilenet_v2"
    )
    parser.add_argument("--evaluators", type=positive, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--candidates", type=positive, default=32, help="a round, of all together")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        pipe = start(ask_need, options.network, options.images, options.seed)
        taken, memory, number = pipe.recv()
        print(f"An evaluator takes {taken:.1f} of {memory:.0f} GB: auto would start {number}.")
    few = max(4, options.candidates // 4)
    arguments = (options.network, options.images, few, options.seed)
    floor = 1 / statistics.mean(start(run_floor, *arguments).recv())
    rates = [
        time_evaluators(number, 1 / number if has_gpu else 0.0, options)
        for number in options.evaluators
    ]
    rows = [["floor", f"{floor:.2f}", "", "1.00x"]]
    rows += [
        [f"{number:,}", f"{rate:.2f}", f"{rate / rates[0]:.2f}x", f"{rate / floor:.2f}x"]
        for number, rate in zip(options.evaluators, rates, strict=True)
    ]
    header = ["evaluators", "candidates a second", "over the first number", "over the floor"]
    device = torch.cuda.get_device_name(0) if has_gpu else "CPUs, as no GPU is here"
    images = (
        f"{options.images:,} images of 224 pixels" if options.network in IMAGENET else "CIFAR-10"
    )
    print_table(f"{options.network}, {images}, on {device}", header, rows)
    print_environment(options.seed)


if __name__ == "__main__":
    main()

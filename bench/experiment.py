"""Shared parts of the accuracy benchmarks: options, network and images, uniform widths."""

import argparse
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from report import parse_rows
from torch import nn

from cacp_ray.config.run import PruningConfig
from cacp_ray.data import cifar10
from cacp_ray.data.images import ImageSet, read_parquet
from cacp_ray.models.factory import build_model
from cacp_ray.models.pretrained import load_weights
from cacp_ray.pruning.plan import Plan
from cacp_ray.searching.budget import uniform
from cacp_ray.workflows.setup import make_budget

RATES = (0.3, 0.5, 0.7)
GROUP_SETS = ("all", "inner")


def make_data_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the options of network and images."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights", default="embedded:resnet20_cifar10")
    parser.add_argument("--train", default="embedded:train", help="Parquet of training images")
    parser.add_argument("--train-rows", type=parse_rows, help="START:STOP, by default all")
    parser.add_argument("--search", default="embedded:search", help="Parquet of scored images")
    parser.add_argument("--search-rows", type=parse_rows, help="START:STOP, by default all")
    parser.add_argument("--test-rows", type=parse_rows, help="START:STOP, by default all")
    parser.add_argument("--mean", nargs=3, type=float, default=cifar10.MEAN)
    parser.add_argument("--std", nargs=3, type=float, default=cifar10.STD)
    return parser


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks that score in this process."""
    parser = make_data_parser(doc)
    parser.add_argument("--images", type=int, help="score on so many of them, evenly spaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def run_values(options: argparse.Namespace) -> dict[str, Any]:
    """Network and splits of a run's configuration, from these options and --test."""
    return {
        "model": {"name": options.model, "weights": options.weights},
        "data": {
            "train": {"path": options.train, "rows": options.train_rows},
            "search": {"path": options.search, "rows": options.search_rows},
            "test": {"path": options.test, "rows": options.test_rows},
            "mean": tuple(options.mean),
            "std": tuple(options.std),
        },
    }


def load(options: argparse.Namespace) -> tuple[nn.Module, ImageSet]:
    """Sets the threads; returns the network and the images that score it."""
    torch.set_num_threads(options.threads)
    search = read_parquet(options.search, options.search_rows, options.images)
    model = build_model(options.model, len(search.classes)).eval()
    load_weights(model, options.weights)
    return model, search


def widths(plan: Plan, groups: str) -> NDArray[np.int64]:
    """(rates, G) keep counts, uniform over `all` or `inner` groups."""
    is_cut = np.array([groups == "all" or not group.is_residual for group in plan.groups])
    return uniform(make_budget(plan, "macs", PruningConfig()), RATES, is_cut)

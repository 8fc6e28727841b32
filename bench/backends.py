"""Other scoring backends, their compilation counted: OMP_NUM_THREADS=1 python bench/backends.py.

Random candidates (rates 0.3 to 0.7), cut and repaired, go through our scorer, ONNX Runtime
(float32) and, where it is installed, OpenVINO (bfloat16 where the CPU has it), on one core. The
times of the others do not include cutting. `compile` is the time to convert one cut network and
load it; `run` is the time of the forward passes over the search split, at the fastest of several
batch sizes.
"""

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from evaluate import draw
from report import parse_rows, positive, print_environment, print_table
from torch import Tensor, nn

from cacp_ray.data.images import ImageSet, read_parquet
from cacp_ray.evaluation.measurement import Candidate
from cacp_ray.evaluation.preparation import CutNetwork, prepare
from cacp_ray.evaluation.scorer import Scorer
from cacp_ray.exporting.onnx_files import read_onnx, write_onnx
from cacp_ray.exporting.source import Source
from cacp_ray.models.factory import build_model
from cacp_ray.models.pretrained import load_weights
from cacp_ray.pruning.arguments import Argument
from cacp_ray.pruning.calibration import image_batches
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.statistics import collect_statistics
from cacp_ray.training.metrics import fast_dtype

BATCHES = (10, 64, 250, 1000)
WEIGHTS56 = "tests/golden/resnet56_cifar10.safetensors"

Network = Callable[[Tensor], object]


def compile_onnx(model: nn.Module, example: Tensor) -> Network:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.onnx"
        write_onnx(Source(model, (Argument(None, tuple(example.shape[1:])),), ""), path)
        return read_onnx(path, model)


def compile_openvino(model: nn.Module, example: Tensor) -> Network:
    import openvino as ov  # type: ignore[import-not-found]

    precision = "bf16" if fast_dtype() == torch.bfloat16 else "f32"
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
    compiled = ov.compile_model(ov.convert_model(model, example_input=example), "CPU", settings)
    return lambda images: compiled(images.numpy())


def run(network: Network, images: Tensor, size: int) -> float:
    """Seconds for all images."""
    started = time.perf_counter()
    for batch in images.split(size):
        network(batch)
    return time.perf_counter() - started


def bench(
    name: str, model: nn.Module, search: ImageSet, options: argparse.Namespace
) -> list[list[str]]:
    """Rows of the table: ours, then the others."""
    images = search.tensors()[0].contiguous()
    plan = make_plan(model, images[:1])
    calibration = search.take(options.calibration)
    x, y = calibration.tensors()
    moments = collect_statistics(model, plan, image_batches(x, y), seed=0, kinds={"inputs"})
    prepared = prepare(
        model, plan, calibration, moments, criterion="l1", recovery="compensate", seed=0
    )
    score = Scorer(prepared, search, recovery="compensate", dtype="auto")
    cut_network = CutNetwork(prepared, "compensate")
    backends = {"ONNX Runtime": compile_onnx}
    if find_spec("openvino"):
        backends["OpenVINO"] = compile_openvino
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ("ours", *backends)}
    for index, counts in enumerate(draw(plan, options)):
        started = time.perf_counter()
        score(Candidate(0.5, tuple(counts), index=index))
        seconds["ours"].append((0.0, time.perf_counter() - started))
        small = copy.deepcopy(cut_network.load(counts)).eval()
        for way, build in backends.items():
            started = time.perf_counter()
            network = build(small, images[:2])
            built = time.perf_counter() - started
            sizes = [size for size in BATCHES if size <= len(images)]
            seconds[way].append((built, min(run(network, images, size) for size in sizes)))
    rows = []
    ours = [ran for _, ran in seconds["ours"][1:]]  # the first one warms up
    for way, pairs in seconds.items():
        built, ran = zip(*pairs[1:], strict=True)
        whole = [b + r for b, r in pairs[1:]]
        ratio = statistics.median(own / other for own, other in zip(ours, whole, strict=True))
        bare = statistics.median(own / other for own, other in zip(ours, ran, strict=True))
        rows.append(
            [
                f"{name}, {len(search):,} images", way, f"{statistics.median(built):.2f} s",
                f"{statistics.median(ran):.2f} s", f"{ratio:.2f}x", f"{bare:.2f}x",
            ]
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    networks = ["resnet20", "resnet56"]
    parser.add_argument("--networks", nargs="+", choices=networks, default=networks)
    parser.add_argument("--search", default="embedded:search", help="Parquet of scored images")
    parser.add_argument("--search-rows", type=parse_rows, help="START:STOP, by default all")
    parser.add_argument("--calibration", type=positive, default=1000, help="images")
    parser.add_argument("--candidates", type=positive, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in options.networks:
        model = build_model(name, 10).eval()
        load_weights(model, "embedded:resnet20_cifar10" if name == "resnet20" else WEIGHTS56)
        search = read_parquet(options.search, options.search_rows)
        rows += bench(name, model, search, options)
    header = ["network", "backend", "compile", "run", "speed, ours is 1", "without compiling"]
    print_table(f"A candidate by backend, medians of {options.candidates}", header, rows)
    print_environment(options.seed)


if __name__ == "__main__":
    main()

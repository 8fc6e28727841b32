"""Memory of the driver of a whole search of ResNet-50: python bench/driver_memory.py.

The search uses the default strategy with one evaluator, random weights, and images of 224 pixels
(the embedded sample, enlarged, as JPEG in shards). Few images are scored a candidate, because the
driver holds the whole split anyway. The table gives the largest private memory (RssAnon) and shared
memory (RssShmem: the part of Ray's store that this process has touched) before each message of the
search, and until a few candidates are measured, where the search is stopped.
"""

import argparse
import io
import json
import logging
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from report import positive, print_environment, print_table
from safetensors.torch import save_file

import cacp_ray
from cacp_ray.data.images import read_parquet
from cacp_ray.models.factory import build_model
from cacp_ray.reporting.progress import SearchProgress

SHARDS, SIDE = 20, 224


class Enough(Exception):
    """Ends the search: enough was measured."""


class Watch(logging.Handler):
    """Notes the peak memory between two messages."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.rows: list[list[str]] = []
        self._most = {"RssAnon": 0, "RssShmem": 0}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self._ended.wait(0.05):
            status = dict(
                line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
            )
            with self._lock:
                for name in self._most:
                    self._most[name] = max(self._most[name], int(status[name].split()[0]))

    def emit(self, record: logging.LogRecord) -> None:
        """Ends a stretch with a message."""
        self.note(record.getMessage())

    def note(self, what: str) -> None:
        """Ends a stretch and names it."""
        with self._lock:
            print(what, flush=True)
            self.rows.append(
                [
                    what.replace(tempfile.gettempdir(), "")[:60],
                    *(f"{most / 2**20:.2f}" for most in self._most.values()),
                ]
            )
            self._most = dict.fromkeys(self._most, 0)

    def end(self) -> None:
        """Stops sampling."""
        self._ended.set()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=positive, default=2000, help="images of the search split")
    parser.add_argument("--calibration", type=positive, default=512)
    parser.add_argument("--evaluations", type=positive, default=12, help="until the search stops")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_shards(root, options.images + options.calibration)
        model = build_model("torchvision:resnet50", 10)
        save_file(model.state_dict(), root / "w.safetensors")
        del model
        data = str(root / "*.parquet")
        config = {
            "name": "driver",
            "seed": options.seed,
            "model": {"name": "torchvision:resnet50", "weights": str(root / "w.safetensors")},
            "data": {
                "train": {"path": data, "rows": [0, options.calibration]},
                "search": {
                    "path": data,
                    "rows": [options.calibration, options.images + options.calibration],
                },
                "test": {"path": "embedded:test"},
                "resize": SIDE,
                "crop": SIDE,
                "mean": [0.485, 0.456, 0.406],
                "std": [0.229, 0.224, 0.225],
            },
            "rates": [0.5],
            "evaluations": 800,
            "evaluation": {"images": 16},
            "cluster": {"max_evaluators": 1},
            "pruning": {
                "calibration_images": options.calibration,
                "round_to": 8,
                "sequential": False,
            },
        }
        watch = Watch()
        logger = logging.getLogger("cacp_ray")
        logger.setLevel(logging.INFO)
        logger.addHandler(watch)
        watch.note("data written, libraries loaded")

        def stop(progress: SearchProgress) -> None:
            if progress.evaluations >= options.evaluations:
                raise Enough

        with suppress(Enough):
            cacp_ray.search(config, root / "run", address="local", on_progress=stop)
        watch.note(f"{options.evaluations} evaluations")
        watch.end()
    title = f"Driver of ResNet-50, {options.images:,} images, {options.calibration} for calibration"
    print_table(title, ["until", "private GB", "shared GB"], watch.rows)
    print_environment(options.seed)


def write_shards(root: Path, images: int) -> None:
    """Writes shards with enough rows for both splits."""
    split = read_parquet("embedded:train")
    rows = []
    for number in range(images):
        row = number % len(split)
        buffer = io.BytesIO()
        Image.fromarray(split.images[row]).resize((SIDE, SIDE)).save(buffer, "JPEG")
        rows.append({"image": buffer.getvalue(), "label": int(split.labels[row])})
    for number in range(SHARDS):
        table = pa.Table.from_pylist(rows[number::SHARDS])
        table = table.replace_schema_metadata({"class_names": json.dumps(split.classes)})
        pq.write_table(table, root / f"{number:03d}.parquet", row_group_size=64)


if __name__ == "__main__":
    main()

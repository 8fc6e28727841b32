"""From the command to the first measurement on the disk: python bench/start.py --times 3."""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import positive, print_environment, print_table

CONFIG = "tune_configs/quickstart.yaml"


def start(folder: Path) -> float:
    """Seconds until a search has recorded a measurement, which ends it."""
    command = [sys.executable, "-m", "cacp_ray.cli", "--quiet", "search", CONFIG]
    journal = folder / "journal.jsonl"
    started = time.monotonic()
    search = subprocess.Popen([*command, "--run-dir", str(folder)], start_new_session=True)
    try:
        while not (journal.exists() and journal.stat().st_size):
            if search.poll() is not None:
                sys.exit("the search has ended before its first measurement")
            time.sleep(0.01)
        return time.monotonic() - started
    finally:
        os.killpg(search.pid, signal.SIGKILL)
        search.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=positive, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = [start(Path(folder) / f"{number}") for number in range(options.times)]
    cells = [f"{value:.1f} s" for value in (statistics.median(seconds), min(seconds), max(seconds))]
    header = ["config", "median", "least", "most"]
    print_table("From `cacp-ray search` to the first measurement", header, [[CONFIG, *cells]])
    print_environment(0)


if __name__ == "__main__":
    main()

"""Breaks ten laws on purpose, one after another, and shows that `make test` would fail for each.

Each fault is put into a copy of the working tree, where the tests run that shall notice it; they
are part of `make test`.

    python bench/mutations.py [NAME ...]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fault:
    """One line of the package, changed."""

    law: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = {
    "budget": Fault(
        "a budget is never exceeded, not by one MAC",
        "searching/budget.py",
        "return np.floor(np.asarray(rates, dtype=np.float64) * self.total).astype(np.int64)",
        "return np.floor(np.asarray(rates, dtype=np.float64) * self.total).astype(np.int64) + 1",
        "unit/searching/test_budget.py",
    ),
    "lost": Fault(
        "every candidate comes back",
        "distributed/pool.py",
        "        self._queue.appendleft(work)\n        return []",
        "        return []",
        "unit/distributed/test_pool.py",
    ),
    "doubled": Fault(
        "after a kill, no candidate has two rows",
        "rundir/directory.py",
        "new = [dataclasses.asdict(row) for row in rows if row.index not in known]",
        "new = [dataclasses.asdict(row) for row in rows]",
        "unit/rundir/test_directory.py",
    ),
    "mask": Fault(
        "the best channels stay",
        "pruning/surgery.py",
        "index = torch.as_tensor(axis.reordered(orders))",
        "index = torch.as_tensor(axis.reordered([order[::-1].copy() for order in orders]))",
        "unit/pruning/test_surgery.py",
    ),
    "test split": Fault(
        "the test split chooses nothing",
        "tuning/finetune.py",
        "splits = [ray.put(train_split), ray.put(search_split)]",
        "splits = [ray.put(train_split), ray.put(test_split)]",
        "ray/test_finetune.py",
    ),
    "swallowed": Fault(
        "what fails ends with an exit code",
        "cli/app.py",
        "typer.echo(text, err=True)\n        sys.exit(code)",
        "typer.echo(text, err=True)\n        sys.exit(0)",
        "unit/test_bad_input.py",
    ),
    "journal": Fault(
        "what was measured before a kill is not measured again",
        "searching/loop.py",
        "ahead = [row for row in rows[self._num_told :] if not row.is_answer]",
        "ahead: list[EpisodeRecord] = []",
        "unit/searching/test_loop.py",
    ),
    "retries": Fault(
        "a candidate is tried as often as told",
        "distributed/pool.py",
        "if len(work.failed_on) < self._max_attempts:",
        "if len(work.failed_on) <= self._max_attempts:",
        "unit/distributed/test_pool.py",
    ),
    "shards": Fault(
        "shards are read in the order of their names",
        "data/sources.py",
        "fnmatch.fnmatch(posixpath.basename(n), pattern)))",
        "fnmatch.fnmatch(posixpath.basename(n), pattern))[::-1])",
        "unit/data/test_sources.py",
    ),
    "pickle": Fault(
        "a file of weights runs no code",
        "models/pretrained.py",
        "weights_only=True",
        "weights_only=False",
        "unit/models/test_checkpoints.py",
    ),
}


def main() -> None:
    """Prints a line for each fault; exit code 1 if one goes unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *FAULTS], help="default: all")
    names = parser.parse_args().names or list(FAULTS)
    unnoticed = [name for name in names if not notice(name, FAULTS[name])]
    sys.exit(f"unnoticed: {', '.join(unnoticed)}" if unnoticed else 0)


def notice(name: str, fault: Fault) -> bool:
    """Whether the tests fail in a copy of the tree that has the fault."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        skip = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "results", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=skip)
        file = copy / "cacp_ray" / fault.file
        text = file.read_text()
        if text.count(fault.old) != 1:
            sys.exit(f"{name}: {fault.file} no longer has its line: {fault.old}")
        file.write_text(text.replace(fault.old, fault.new))
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-m", "not slow and not gpu", "-p",
             "no:cacheprovider", f"tests/{fault.tests}"],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    seconds = time.monotonic() - started
    first = failed[0].split(" - ")[0].removeprefix("FAILED ") if failed else "NOTHING FAILED"
    print(f"{name:11} {fault.law:55} {seconds:5.0f} s  {first}", flush=True)
    return done.returncode == 1 and bool(failed)


if __name__ == "__main__":
    main()

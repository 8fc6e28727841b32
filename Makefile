# make demo and make test need only Python >= 3.11, git, make and a C compiler.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SIDE_BY_SIDE := --numprocesses 3 --no-loadscope-reorder

# With it, every process would compile torch and Ray anew, in 10 s each time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-lowest test-ray-next check docs bench upgrade

demo: $(READY)
	$(BIN)/cacp-ray demo

# Tests that need a Ray share one process; the others fill the cores while it waits.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" $(SIDE_BY_SIDE)

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" $(SIDE_BY_SIDE) tests/unit
	$(BIN)/python -m pytest -m "not gpu" tests/ray

# The lowest versions that pyproject.toml allows, in an environment of their own.
test-lowest: $(READY)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .lowest
	$(BIN)/uv pip install --quiet --python .lowest/bin/python --resolution lowest-direct --editable ".[dev]"
	OMP_NUM_THREADS=1 .lowest/bin/python -m pytest -m "not slow and not gpu" --numprocesses 2 tests/unit

# The newest Ray on the registry, also before its release, in an environment of its own.
test-ray-next: $(READY)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .ray-next
	$(BIN)/uv pip install --quiet --python .ray-next/bin/python --editable ".[dev]"
	$(BIN)/uv pip install --quiet --python .ray-next/bin/python --upgrade-package ray "ray[rllib,tune]>=2.60.0rc0"
	.ray-next/bin/python -c 'import ray; print("Ray", ray.__version__)'
	OMP_NUM_THREADS=1 .ray-next/bin/python -m pytest -m "not gpu" tests/unit/distributed tests/unit/tuning \
		tests/unit/config/test_agent_tuning.py tests/unit/test_clusters.py \
		tests/ray/test_cluster.py tests/ray/test_tokens.py tests/ray/test_pool.py tests/ray/test_experiment.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# A site in site/; every warning is an error.
docs: $(READY)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint .venv/locked.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(READY)
	$(BIN)/python bench/pool_overhead.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/cutting.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/compensation.py

# New versions for everybody: commit uv.lock after `make test`.
upgrade: $(READY)
	$(BIN)/uv lock --quiet --upgrade --default-index https://pypi.org/simple

# Versions are those of uv.lock; files come from the index that the machine has, such as one of CPU
# builds of torch. `uv sync --frozen --extra dev` installs the files of uv.lock and checks their hashes.
$(READY): pyproject.toml uv.lock
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv export --quiet --frozen --python $(BIN)/python --all-extras --no-emit-project --no-hashes --output-file .venv/locked.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint .venv/locked.txt --editable ".[dev]"
	touch $(READY)

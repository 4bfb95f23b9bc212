# The environment is .venv; everything else needs only make and Python 3.11 or newer.
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$python && break; done)
BIN := .venv/bin
STAMP := .venv/.setup-done
# Two workers with one thread each: a tiny model gains nothing from more threads (tests/conftest.py).
PYTEST_FLAGS ?= -n 2 --dist worksteal

.PHONY: setup demo test lint bench case-study
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (make setup PYTHON=...)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/flexllm demo

test: setup
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The promise, measured in under 40 minutes: the grid (VLLM_PYTHON, see benchmarks/README.md, adds the contestants that need vLLM), what it rests
# on, and a page about all results there are. Each step says how long it took. Training and serving speed and memory have benchmarks of
# their own (finetune.py, serve.py, memory.py).
bench: setup
	$(BIN)/python benchmarks/coserve.py $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON))
	$(BIN)/python benchmarks/schedule.py
	$(BIN)/python benchmarks/latency.py --quick
	$(BIN)/python benchmarks/simulate.py
	$(BIN)/python benchmarks/paper.py --quick --processes 2
	$(BIN)/python benchmarks/report.py

case-study: setup
	$(BIN)/python benchmarks/burst.py
	$(BIN)/python benchmarks/report.py

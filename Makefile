# Every target makes the virtual environment it needs: .venv, from the versions in constraints.txt.
#
#   PYTHON=python3.12            another interpreter (3.11 or newer)
#   JOBS=4                       test processes, one thread each
#   TORCH_INDEX=URL              package index to take torch from (see .ci/install-torch)
#   TESTS=tests/kernels          what `make test` runs
#   DEMO=/somewhere              where `make demo` writes
#   FUZZ_SECONDS=3600            how long `make fuzz` runs

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
JOBS ?= 2
TESTS ?= tests
DEMO ?= demo
FUZZ_SECONDS ?= 600

BIN = $(VENV)/bin
READY = $(VENV)/.ready
# Test processes share the cores, so each gets one thread; no test needs the Hub.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

# The oldest versions that pyproject.toml allows, in an environment of their own.
OLDEST = .venv-oldest
OLDEST_TESTS = tests/patch tests/methods tests/training tests/evaluation/test_generation.py
# Where the files of transformers' own tests go.
HF = build/hf
# A checkout's `tests` folder of the pinned version; the source distribution lacks the generation tests.
HF_TESTS ?=
SUITE = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=$(HF) $(BIN)/python -m pytest -q \
	-o addopts=--import-mode=importlib -p tests.hf.checks --disable-warnings tests/hf/suite.py

.PHONY: help venv test test-all test-oldest test-hf test-gpu lint fuzz pages demo bench bench-gpu release clean

help:
	@echo "make test      the tests that need no GPU and no network (8 to 16 minutes on 2 cores)"
	@echo "make test-all  the slow ones too"
	@echo "make test-oldest  patch, method, cache, training and generation tests at the oldest allowed versions (6 minutes)"
	@echo "make test-hf   transformers' own model tests on converted models, held against stock Llama (half an hour of one core)"
	@echo "make lint      ruff, its formatter, mypy, and pip-audit where it can run"
	@echo "make fuzz      damaged checkpoints and recipes, for FUZZ_SECONDS"
	@echo "make pages     write the pages of docs/reference that follow from the code"
	@echo "make demo      SmolLM2-135M to NSA and SSA: convert, verify, evaluate, generate"
	@echo "make bench     sparse against dense attention on this machine"
	@echo "make bench-gpu the kernels on a GPU: right, how fast, how near to its limits (under 8 minutes)"
	@echo "make test-gpu  the tests that need a GPU"
	@echo "make release   sdist and wheel in dist/, built and checked; nothing is uploaded"
	@echo "make clean     remove .venv and what the targets wrote"

venv: $(READY)

$(READY): pyproject.toml constraints.txt .ci/install-torch
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	TORCH_INDEX="$(TORCH_INDEX)" .ci/install-torch $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

test: $(READY)
	$(PYTEST) $(TESTS)

test-all: $(READY)
	$(PYTEST) -m "not gpu" $(TESTS)

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt .ci/install-torch
	$(PYTHON) -m venv $(OLDEST)
	CONSTRAINTS=constraints-oldest.txt TORCH_INDEX="$(TORCH_INDEX)" .ci/install-torch $(OLDEST)/bin/python
	$(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt -e '.[dev]'
	touch $@

test-oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -q -n $(JOBS) --dist worksteal $(OLDEST_TESTS)

$(HF)/.ready: $(READY) tests/hf/fetch.py
	$(BIN)/python -m tests.hf.fetch $(HF) $(HF_TESTS)
	touch $@

test-hf: $(HF)/.ready
	$(SUITE) --record $(HF)/stock.json
	$(SUITE) --against $(HF)/stock.json -n $(JOBS) --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/audit $(VENV)/audit

fuzz: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.faults.fuzz --seconds $(FUZZ_SECONDS)

pages: $(READY)
	$(BIN)/python -m tests.guards.reference

demo: $(READY)
	BIN=$(CURDIR)/$(BIN) .ci/demo $(DEMO)

bench: $(READY)
	$(BIN)/nsa-convert bench --device cpu

bench-gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu

test-gpu: $(READY)
	OMP_NUM_THREADS=4 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m gpu $(TESTS)

release: $(READY)
	$(BIN)/python .ci/release dist

clean:
	rm -rf $(VENV) $(OLDEST) demo build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

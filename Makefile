# Every target sets up what it needs: Python 3.11 and git are enough to start from.
PYTHON ?= python3.11
VENV ?= .venv
# Test processes side by side; a test file stays in one of them.
TEST_PROCESSES ?= 2
# The demo is sized for a CPU; `make demo JAX_PLATFORMS=cuda` runs it elsewhere.
JAX_PLATFORMS ?= cpu
BIN = $(VENV)/bin
PINS = $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
READY = $(VENV)/.ready-$(PINS)
READY_TO_TEST = $(VENV)/.ready-to-test-$(PINS)
JOBSET_CRD ?= build/jobset_crd.yaml
JOBSET_CRD_URL = https://raw.githubusercontent.com/kubernetes-sigs/jobset/v0.10.1/charts/jobset/crds/jobset.x-k8s.io_jobsets.yaml
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help setup setup-test demo test test-slow test-faults test-launch bench lint clean

help:
	@echo "make demo       build the embedded data, train two VAEs and a video DiT, resume, sample, export, report (CPU, minutes)"
	@echo "make test       the whole test suite, except what is marked slow"
	@echo "make test-slow  the checks that take longer (pod-sized compilations, long resume runs)"
	@echo "make test-faults  kill, stop and damage tiny real runs; prints a table of what came of it"
	@echo "make test-launch  launch files, also under a real Slurm in a container of its own (root) and with several processes"
	@echo "make bench      timings against PyTorch"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(READY): $(BIN)/python
	$(INSTALL) -e .
	@touch $@

# torch, diffusers and transformers are what tests compare with; libtpu is XLA's compiler for TPUs.
$(READY_TO_TEST): $(READY)
	$(INSTALL) -e ".[test,torch,tpu]"
	@touch $@

setup: $(READY)

setup-test: $(READY_TO_TEST)

demo: setup
	JAX_PLATFORMS=$(JAX_PLATFORMS) $(BIN)/jvgen demo --workdir runs/demo

test: setup-test
	$(BIN)/python -m pytest -m "not slow" -n $(TEST_PROCESSES) --dist loadfile --durations=15

# With LLVM's optimizations, as users compile; `make test` leaves them out (tests/conftest.py).
test-slow: setup-test
	XLA_FLAGS=--xla_force_host_platform_device_count=8 $(BIN)/python -m pytest -m slow --durations=15

test-faults: setup-test
	$(BIN)/python -m tests.faults --workdir build/faults --out build/faults.md

# Without the definition of JobSet (824 kB) the tests that need it skip.
test-launch: setup-test
	@mkdir -p build
	@[ -f $(JOBSET_CRD) ] || curl --silent --fail --location --output $(JOBSET_CRD) $(JOBSET_CRD_URL) || true
	JVGEN_JOBSET_CRD=$(JOBSET_CRD) $(BIN)/python -m pytest tests/launch --durations=5 -rs

bench: setup-test
	$(BIN)/python -m tests.benchmarks

lint: setup-test
	$(BIN)/ruff check jvgen tests configs
	$(BIN)/ruff format --check jvgen tests configs

clean:
	rm -rf $(VENV) build dist *.egg-info

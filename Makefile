# Every target sets up what it needs: Python 3.11 or newer and git are enough to start from. Which Python it takes, and how to
# choose another: .ci/find_python, `make test PYTHON=python3.13`. docs/versions.md has what was tested.
ifneq ($(filter-out help clean,$(or $(MAKECMDGOALS),help)),)
FOUND := $(shell .ci/find_python $(or $(PYTHON),$(if $(filter test-latest,$(MAKECMDGOALS)),--latest)))
ifeq ($(FOUND),)
$(error no Python to set up with)
endif
VERSION := $(word 1,$(FOUND))
override PYTHON := $(word 2,$(FOUND))
endif
# JAX releases after 0.10.2 need Python 3.12, so there are two sets of versions, and a virtual environment for each minor version.
MINOR := $(subst $() ,.,$(wordlist 1,2,$(subst ., ,$(VERSION))))
CONSTRAINTS := $(if $(filter 3.11,$(MINOR)),constraints.txt,constraints-latest.txt)
VENV ?= $(if $(filter 3.11,$(MINOR)),.venv,.venv-$(MINOR))
$(if $(VERSION),$(info jvgen: Python $(VERSION) ($(PYTHON)), $(CONSTRAINTS), $(VENV)))
# Test processes side by side; a test file stays in one of them.
TEST_PROCESSES ?= 2
# The demo is sized for a CPU; `make demo JAX_PLATFORMS=cuda` runs it elsewhere.
JAX_PLATFORMS ?= cpu
BIN = $(VENV)/bin
PINS = $(shell cat pyproject.toml $(CONSTRAINTS) | cksum | cut -d' ' -f1)
READY = $(VENV)/.ready-$(PINS)
READY_TO_TEST = $(VENV)/.ready-to-test-$(PINS)
READY_FOR_WORLD = $(VENV)/.ready-for-world-$(PINS)
READY_FOR_CONTROL = $(VENV)/.ready-for-control-$(PINS)
READY_FOR_DOCS = $(VENV)/.ready-for-docs-$(PINS)
JOBSET_CRD ?= build/jobset_crd.yaml
JOBSET_CRD_URL = https://raw.githubusercontent.com/kubernetes-sigs/jobset/v0.10.1/charts/jobset/crds/jobset.x-k8s.io_jobsets.yaml
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c $(CONSTRAINTS)
# Python compiles what is imported, once and not at every start; pip would compile all, for a minute or more.
unexport PYTHONDONTWRITEBYTECODE

# Of the newest versions, what is fast and touches them most: kernels, mesh, checkpoints, data, saved runs with their steps, weights.
LATEST_TESTS = $(addprefix tests/,unit/test_attention.py unit/test_epipolar_attention.py unit/test_mesh.py \
	unit/test_rules.py unit/test_checkpoint.py unit/test_loader.py unit/test_interop.py \
	sharded/test_transformer.py processes/test_processes.py resume/test_saved_runs.py)

.PHONY: help setup setup-test demo demo-world demo-views test test-latest test-slow test-faults test-control test-launch bench aot docs lint clean

help:
	@echo "make demo       build the embedded data, train two VAEs and a video DiT, resume, sample, export, report (CPU, minutes)"
	@echo "make demo-world a world model: trained, played, planned in, report (CPU, minutes)"
	@echo "make demo-views two cameras on one generated scene: trained, sampled, measured, report (CPU, minutes)"
	@echo "make test       the whole test suite, except what is marked slow"
	@echo "make test-latest  a fast part of it on Python 3.12 or newer, with the newest JAX (constraints-latest.txt)"
	@echo "make test-slow  the checks that take longer (pod-sized compilations, long resume runs)"
	@echo "make test-faults  kill, stop and damage tiny real runs; prints a table of what came of it"
	@echo "make test-control  Meta-World and Stable-Baselines3, which it installs"
	@echo "make test-launch  launch files, also under a real Slurm in a container of its own (root) and with several processes"
	@echo "make bench      timings against PyTorch"
	@echo "make docs       the documentation as a site, in build/site/html"
	@echo "make aot        compile every config for pods on its slices (hours), and write docs/pods.md"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(READY): $(BIN)/python
	$(INSTALL) -e .
	@touch $@

# torch, diffusers and transformers are what tests compare with; libtpu is XLA's compiler for TPUs.
$(READY_TO_TEST): $(BIN)/python
	$(INSTALL) -e ".[test,torch,tpu]"
	@touch $(READY) $@

# gymnasium, whose environments are planned in.
$(READY_FOR_WORLD): $(READY)
	$(INSTALL) -e ".[control]"
	@touch $@

# Meta-World, and a policy library that steps a world model as it would any environment.
$(READY_FOR_CONTROL): $(READY_TO_TEST)
	$(INSTALL) -e ".[test,torch,metaworld]" stable-baselines3==2.9.2
	@touch $@

$(READY_FOR_DOCS): $(READY)
	$(INSTALL) -e ".[docs]"
	@touch $@

setup: $(READY)

setup-test: $(READY_TO_TEST)

demo: setup
	JAX_PLATFORMS=$(JAX_PLATFORMS) $(BIN)/jvgen demo --workdir runs/demo

demo-world: $(READY_FOR_WORLD)
	JAX_PLATFORMS=$(JAX_PLATFORMS) $(BIN)/jvgen demo world --workdir runs/demo_world

demo-views: setup
	JAX_PLATFORMS=$(JAX_PLATFORMS) $(BIN)/jvgen demo views --workdir runs/demo_views

test: setup-test
	$(BIN)/python -m pytest -m "not slow" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations=15

test-latest: setup-test
	$(BIN)/python -m pytest $(LATEST_TESTS) -m "not slow" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations=15

# With LLVM's optimizations, as users compile; `make test` leaves them out (tests/conftest.py).
test-slow: setup-test
	XLA_FLAGS=--xla_force_host_platform_device_count=8 $(BIN)/python -m pytest -m slow --durations=15

test-faults: setup-test
	$(BIN)/python -m tests.faults --workdir build/faults --out build/faults.md

# Without OpenGL the tests with pictures skip; Debian's libosmesa6 is enough.
test-control: $(READY_FOR_CONTROL)
	MUJOCO_GL=$${MUJOCO_GL:-osmesa} $(BIN)/python -m pytest tests/unit/test_metaworld.py tests/unit/test_world_model.py \
		tests/unit/test_scene_environment.py -m "not slow" --durations=5 -rs

# Without the definition of JobSet (824 kB) the tests that need it skip.
test-launch: setup-test
	@mkdir -p build
	@[ -f $(JOBSET_CRD) ] || curl --silent --fail --location --output $(JOBSET_CRD) $(JOBSET_CRD_URL) || true
	JVGEN_JOBSET_CRD=$(JOBSET_CRD) $(BIN)/python -m pytest tests/launch --durations=5 -rs

bench: setup-test
	$(BIN)/python -m tests.benchmarks

# `make aot AOT="--only repvideo --again"`: some of them, also what the table has.
aot: setup-test
	$(BIN)/python -m tests.pods $(AOT)

# Offline, with warnings as errors; `make docs DOCS=--external` also lists links to other sites that do not answer.
docs: $(READY_FOR_DOCS)
	$(BIN)/python -m docs.site --out build/site $(DOCS)

lint: setup-test
	$(BIN)/ruff check jvgen tests configs docs
	$(BIN)/ruff format --check jvgen tests configs docs

clean:
	rm -rf .venv .venv-3.* build dist *.egg-info

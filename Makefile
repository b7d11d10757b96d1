# `make run` and `make test` set up everything they need below this directory: Python packages in .venv from the lock files in
# deploy/ (versions and hashes; no index or download address), and npm packages in tests/sdk/node_modules.
#
# A stamp in .venv says what is installed, so that a second run starts at once. Its name holds this directory's path: a virtual
# environment can't be moved, and a moved clone makes its own anew.
#
# The lock files keep extras (coverage[toml]): older pips take a package's extra for a requirement of its own, and look for the
# newest release of it, which no lock names.

PYTHON ?= python3
# One more than CI has cores, for tests wait for timeouts and servers.
WORKERS ?= 3
SBOM := dist/passkey-broker.cdx.json

HERE := $(shell pwd | cksum | cut -d ' ' -f 1)
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --no-input --quiet
RUNTIME := .venv/.runtime-$(HERE)
TEST := .venv/.test-$(HERE)
# Tests that judge a promise about real time are marked `alone` and run when the others are done, without coverage, which makes
# brokers slower by half. The files of the others begin in the order of tests/conftest.py. pytest's status 5 is: none chosen.
TOGETHER = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not alone'
ALONE = $(BIN)/python -m pytest -n 2 --dist loadgroup -m alone
COMPILE := pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --no-config \
	--no-emit-index-url --no-emit-find-links --no-strip-extras --quiet $(UPGRADE)

# Run a command, and say what it does and how many seconds it took.
STEP = step() { printf '  %s… ' "$$1" >&2; shift; began=$$(date +%s); "$$@" || { status=$$?; echo >&2; exit $$status; }; \
	echo "$$(( $$(date +%s) - began )) s" >&2; }; step

# Install a lock file. uv takes seconds where pip takes a minute. It doesn't read pip's configuration, so it gets the index of it; pip
# installs where uv fails.
INSTALL = install() { { $(PIP) install --require-hashes -r deploy/uv.lock && \
	UV_DEFAULT_INDEX=$${PIP_INDEX_URL:-$$($(PIP) config get global.index-url)} \
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r "$$1"; } 2>/dev/null || \
	$(PIP) install --require-hashes -r "$$1"; }

# Tests start many Pythons, each of which would compile its modules.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run test check bench bench-peers bench-scale chaos chaos-long chaos-mutants lock audit sbom clean parts

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

run: $(RUNTIME) ## set up and start the broker with its stores and the demo; PORT=8080 HOST=localhost ARGS=--no-open
	@exec $(BIN)/broker dev $(ARGS)

test: $(TEST) parts ## run every test; ARGS='-k name' to choose
	@together=0; $(TOGETHER) $(ARGS) || together=$$?; [ $$together -le 1 ] || [ $$together -eq 5 ] || exit $$together; \
	alone=0; $(ALONE) $(ARGS) || alone=$$?; \
	[ $$together$$alone != 55 ] && case $$together$$alone in *[!05]*) false;; esac

check: $(TEST) parts ## what CI runs: format, lint, types, tests, coverage
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(TOGETHER) --cov --cov-report=term --cov-fail-under=95
	$(ALONE)

bench: $(TEST) ## measure what a login costs; ARGS='--json run.json', or --against PATH, --endurance
	@$(BIN)/python -m tests.bench $(ARGS)

bench-peers: $(TEST) ## the same, with a Node server beside it
	@$(BIN)/python -m tests.bench --peers $(ARGS)

bench-scale: $(TEST) ## a login beside 5 million passkeys against one beside 10 thousand: 20 GB of disk, half an hour
	@$(BIN)/python -m tests.bench --scale $(ARGS)

chaos: $(TEST) parts ## faults of every store and of brokers under load, judged by their history: 2 minutes, part of check
	@$(ALONE) tests/chaos $(ARGS)

chaos-long: $(TEST) parts ## faults in mixed order; SEED=, SECONDS=600, STORES=sentinel or cluster
	@$(BIN)/python -m tests.chaos long --seconds $(or $(SECONDS),600) --stores $(or $(STORES),sentinel) $(if $(SEED),--seed $(SEED))

chaos-mutants: $(TEST) parts ## remove each safeguard from a copy of the tree: each run must break a promise
	@$(BIN)/python -m tests.chaos mutants $(ARGS)

parts: $(TEST)
	@$(BIN)/python -m compileall -q broker tests
	@$(BIN)/python tests/support/parts.py

lock: .venv/.python-$(HERE) ## write the lock files anew from pyproject.toml; UPGRADE=--upgrade for newer versions
	@set -eu; tools=$$(mktemp -d); trap 'rm -rf "$$tools"' EXIT; \
	$(BIN)/python -m venv "$$tools"; \
	"$$tools/bin/pip" --disable-pip-version-check --no-input --quiet install --require-hashes -r deploy/uv.lock; \
	"$$tools/bin/uv" $(COMPILE) --extra dev --group build --output-file deploy/requirements.lock; \
	"$$tools/bin/uv" $(COMPILE) --constraint deploy/requirements.lock --output-file deploy/image.lock; \
	"$$tools/bin/uv" $(COMPILE) --extra dev --extra otel --group test --constraint deploy/requirements.lock --output-file deploy/test.lock; \
	"$$tools/bin/uv" $(COMPILE) --extra otel --constraint deploy/test.lock --output-file deploy/image-otel.lock; \
	"$$tools/bin/uv" $(subst pyproject.toml,,$(COMPILE)) --group build --constraint deploy/requirements.lock --output-file deploy/build.lock; \
	"$$tools/bin/uv" $(subst pyproject.toml,,$(COMPILE)) --group node --output-file deploy/node.lock; \
	"$$tools/bin/uv" $(subst pyproject.toml,,$(COMPILE)) --group audit --output-file deploy/audit.lock; \
	"$$tools/bin/uv" $(subst pyproject.toml,,$(COMPILE)) --group uv --output-file deploy/uv.lock; \
	if grep -n -i -E '://|^-' deploy/*.lock; then echo "A lock file holds an address." >&2; exit 1; fi

audit: .venv/.python-$(HERE) ## ask PyPI for known vulnerabilities of what an image and broker dev install
	@set -eu; tools=$$(mktemp -d); trap 'rm -rf "$$tools"' EXIT; \
	$(BIN)/python -m venv "$$tools"; \
	"$$tools/bin/pip" --disable-pip-version-check --no-input --quiet install --require-hashes -r deploy/audit.lock; \
	failed=0; for lock in image-otel requirements; do \
		"$$tools/bin/pip-audit" --strict --progress-spinner off --disable-pip --require-hashes --requirement deploy/$$lock.lock || failed=1; \
	done; exit $$failed

sbom: $(TEST) ## write dist/passkey-broker.cdx.json: the packages of an image with their hashes, as CycloneDX; SBOM=path EXTRAS=otel
	@mkdir -p $(dir $(SBOM))
	@$(BIN)/python -W ignore -m cyclonedx_py requirements --pyproject pyproject.toml --output-reproducible \
		--output-file $(SBOM) deploy/image$(addprefix -,$(EXTRAS)).lock

clean: ## remove what make installed and what tools cached; .broker/ with its passkeys stays
	rm -rf .venv .chaos tests/sdk/node_modules tests/bench/peer/node_modules dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.*
	find broker tests -name __pycache__ -prune -exec rm -rf {} +

.venv/.python-$(HERE):
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no $(PYTHON); install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1); Python 3.11 or newer is needed: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) can't make virtual environments; install the package python3-venv (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@echo "Setting up .venv; this takes a minute, once." >&2
	@$(STEP) "Making the environment" "$(PYTHON)" -m venv --clear .venv
	@touch $@

$(RUNTIME): .venv/.python-$(HERE) deploy/uv.lock deploy/requirements.lock pyproject.toml
	@$(INSTALL); $(STEP) "Installing packages" install deploy/requirements.lock
	@$(STEP) "Installing the broker" $(PIP) install --no-deps --no-build-isolation --editable .
	@$(STEP) "Compiling" $(BIN)/python -m compileall -q broker
	@touch $@

$(TEST): $(RUNTIME) deploy/test.lock
	@$(INSTALL); $(STEP) "Installing packages for tests" install deploy/test.lock
	@touch $@

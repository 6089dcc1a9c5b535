# make run     install what the server needs and start it, with a store under ./data
# make test    all tests but the soaks         make quick   those a developer runs all the time
# make check   style, types, arrows, settings  make bench   measure      make soak   the long tests
# make lock    pin the requirements anew       make clean   remove all that make made, but no data
#
# Needs python3 >= 3.11 and nothing else; PYTHON=... names another one. All is installed
# into .venv, from the locked requirements with their hashes; stamps there make a second
# run immediate. Options of pytest: make test TESTS="tests/cas -k heal"; JOBS=1 runs one
# test after the other.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --require-virtualenv
PACKAGES := cas gateway replicator workflows bench
TESTS ?= tests
# Tests wait for disks and servers more than they compute. Those of a file stay together,
# since they share a server.
JOBS ?= 4
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help run test quick soak check bench format lock clean system

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

run: $(VENV)/run.stamp
	$(BIN)/blobcask serve --config config.ini

test: $(VENV)/test.stamp system
	$(PYTEST) $(TESTS)

quick: $(VENV)/test.stamp
	$(PYTEST) -q -m "not soak and not slow" $(TESTS)

soak: $(VENV)/test.stamp system
	$(BIN)/python -m pytest -m soak --timeout=0 $(TESTS)

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q tests/test_settings.py

bench: $(VENV)/test.stamp system
	$(BIN)/blobcask bench
	$(BIN)/python -m pytest -q --benchmark-enable --benchmark-only --timeout=0 tests/bench

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# --- the environment

# A half-made environment has no stamp, and is made anew.
$(VENV)/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "blobcask needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	        apt-get update -qq </dev/null; \
	        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv </dev/null; \
	    else echo "Python's venv is missing; on Debian: sudo apt-get install python3-venv" >&2; exit 1; fi
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# The project itself is installed in place (changes are seen at once), without isolation:
# what builds it is in the locked list, so nothing is fetched unhashed.
$(VENV)/run.stamp: $(VENV)/made.stamp requirements/run.txt pyproject.toml
	$(PIP) install -q --require-hashes -r requirements/run.txt
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp requirements/test.txt
	$(PIP) install -q --require-hashes -r requirements/test.txt
	@touch $@

$(VENV)/dev.stamp: $(VENV)/test.stamp requirements/dev.txt
	$(PIP) install -q --require-hashes -r requirements/dev.txt
	@touch $@

system:
	@requirements/system.sh

# --- the locked requirements: each list holds the one before it, at the same versions

# UPGRADE=--upgrade takes the newest versions; without it only what must change does.
# Settings of pip and uv on this machine are set aside: the lists must be good anywhere.
COMPILE = env -u PIP_FIND_LINKS -u UV_FIND_LINKS -u UV_INDEX -u UV_INDEX_URL -u UV_EXTRA_INDEX_URL \
    -u UV_DEFAULT_INDEX $(BIN)/uv --no-config pip compile -q --universal --python-version 3.11 \
    --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' \
    --group pyproject.toml:build $(UPGRADE) pyproject.toml

lock: $(VENV)/made.stamp
	$(PIP) install -q 'uv>=0.9'
	$(COMPILE) --extra workflows --extra test --extra dev -o requirements/dev.txt
	$(COMPILE) --extra workflows --extra test -c requirements/dev.txt -o requirements/test.txt
	$(COMPILE) --extra workflows -c requirements/dev.txt -o requirements/run.txt

clean:
	rm -rf $(VENV) .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .roots dist
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +

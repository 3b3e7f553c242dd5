# Everything a newcomer types. Each target ends by itself, but `up`, which stays until Ctrl-C.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SRC := raft shardctrler shardkv client tests bench
PROTOS := $(wildcard proto/*/*.proto)

SEEDS ?= 200
CHAOS_SECONDS ?= 60

.PHONY: up venv test lint unit proto proto-check sim-soak chaos acceptance bench clean

up: venv
	$(BIN)/shardkv up

venv: $(VENV)/.done

$(VENV)/.done: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "shardkv needs Python 3.11 or later"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

test: lint proto-check unit

lint: venv
	$(BIN)/ruff check $(SRC)
	$(BIN)/ruff format --check $(SRC)
	$(BIN)/mypy

unit: venv
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Generated code is committed, so that installing needs no compiler.
proto: venv
	$(BIN)/python proto/generate.py .

proto-check: venv
	$(BIN)/python proto/generate.py --check .

# The whole cluster in virtual time, SEEDS times, with every fault; stops at the first failure.
sim-soak: venv
	$(BIN)/python -m tests.sim.soak --seeds $(SEEDS)

# Real processes for CHAOS_SECONDS: killed, stopped, cut off and rearranged under load; then judged.
chaos: venv
	$(BIN)/python -m tests.chaos.run --seconds $(CHAOS_SECONDS)

# Real processes, real input: load, kill and gap; about two minutes.
acceptance: venv
	$(BIN)/python -m bench.acceptance

bench: venv
	$(BIN)/python -m bench.quick

clean:
	rm -rf $(VENV) build *.egg-info data

# Everything a newcomer types. Each target ends by itself, but `up`, which stays until Ctrl-C.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SRC := wire raft shardctrler shardkv client tests bench
PROTOS := $(wildcard proto/*/*.proto)

SEEDS ?= 200
CHAOS_SECONDS ?= 60

.PHONY: up run venv test lint unit proto proto-check sim-soak mutants chaos acceptance docs bench bench-vs-etcd bench-scale clean

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

up: run
	$(BIN)/shardkv up

# What a cluster needs, and no test tools: a newcomer's first minute.
run: $(VENV)/.run
# Everything.
venv: $(VENV)/.done

$(VENV)/.run: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "shardkv needs Python 3.11 or later"'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[server,web,backup,certs]'
	touch $@

$(VENV)/.done: $(VENV)/.run
	$(PIP) -e '.[dev]'
	touch $@

test: lint proto-check unit

lint: venv
	$(BIN)/ruff check $(SRC)
	$(BIN)/ruff format --check $(SRC)
	$(BIN)/mypy

unit: venv
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The documents and the API reference as a site: open build/site/index.html.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs/site . build/site
	@echo "open build/site/index.html"

$(VENV)/.docs: $(VENV)/.run
	$(PIP) -e '.[docs]'
	touch $@

# Generated code is committed, so that installing needs no compiler.
proto: venv
	$(BIN)/python proto/generate.py .

proto-check: venv
	$(BIN)/python proto/generate.py --check .

# The whole cluster in virtual time, SEEDS times, with every fault; stops at the first failure.
sim-soak: venv
	$(BIN)/python -m tests.sim.soak --seeds $(SEEDS)

# The mutants that whole simulated clusters have to find, each within its bound of seeds; an hour or so.
mutants: venv
	$(BIN)/python -m pytest -n 2 --dist worksteal -m soak tests/test_mutants.py

# Real processes for CHAOS_SECONDS: killed, stopped, cut off and rearranged under load; then judged.
chaos: venv
	$(BIN)/python -m tests.chaos.run --seconds $(CHAOS_SECONDS)

# Real processes, real input: load, kill and gap; about two minutes.
acceptance: venv
	$(BIN)/python -m bench.acceptance

bench: venv
	$(BIN)/python -m bench.quick

# etcd and us in turn, with etcd's own Go client. Installs etcd and Go where it may; else says what is missing.
ROUNDS ?= 3
bench-vs-etcd: venv
	@command -v etcd >/dev/null && command -v go >/dev/null && test -d /usr/share/gocode/src/go.etcd.io/etcd/clientv3 || \
	{ command -v apt-get >/dev/null && test "$$(id -u)" = 0 && apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends etcd-server golang-go golang-etcd-server-dev; } || true
	$(BIN)/python -m bench.vs_etcd --rounds $(ROUNDS)

# Millions of keys, restarts, YCSB, a large map, an idle cluster; about a quarter of an hour.
bench-scale: venv
	$(BIN)/python -m bench.scale

clean:
	rm -rf $(VENV) build *.egg-info data

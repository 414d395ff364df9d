# Every target sets up what it needs and leaves alone what is up to date. `make help` lists them.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup shards demo train test test-slow lint types layers bench-peers clean

PYTHON   ?= python3
VENV     ?= .venv
PY       := $(VENV)/bin/python
RECIPE   ?= configs/recipe.yaml
SESSIONS ?= data/sessions
OUT      ?= shards/default
CONFIG   ?= configs/training_config.yaml

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check \
		--editable '.[preprocess,train,dev]'
	touch $@

setup: $(VENV)/.installed  ## make the virtual environment and install everything into it

shards: setup  ## build SESSIONS into shards by RECIPE (only what changed); VERIFY=1 mends, COMPACT=1 re-packs
	$(PY) -m preprocess shards --recipe $(RECIPE) --sessions $(SESSIONS) --out $(OUT) \
		$(if $(VERIFY),--verify) $(if $(COMPACT),--compact)

demo: setup  ## make the demo sessions and their shard set
	$(PY) -m preprocess demo-sessions data/demo
	$(PY) -m preprocess shards --recipe configs/demo_recipe.yaml --sessions data/demo --out shards/demo

train: setup $(if $(filter demo.yaml,$(notdir $(CONFIG))),demo)  ## train as CONFIG says, or go on where it stopped
	$(PY) -m train run --config $(CONFIG) --resume auto

test: setup lint types layers  ## lint, types, layers and the fast tests
	$(PY) -m pytest

test-slow: setup  ## the slow tests
	$(PY) -m pytest -m slow

lint: setup  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup  ## mypy, strict
	$(PY) -m mypy

layers: setup  ## who may import whom
	$(VENV)/bin/lint-imports

bench-peers: setup  ## our loader beside other projects': a venv of their own, 20 minutes; into data/bench
	$(PY) tests/benchmarks/peers/run.py

clean:  ## remove the demo's sessions, shards, checkpoints and logs; keeps yours and the environment
	rm -rf data/demo shards/demo checkpoints/demo runs/demo

# Every target sets up what it needs and skips what is up to date. `make help` lists the targets.
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
# Processes of `make test`: two more than cores, because many tests wait for other processes.
WORKERS  ?= $(shell expr $$(nproc 2>/dev/null || echo 2) + 2)

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check \
		--editable '.[preprocess,train,dev]'
	touch $@

setup: $(VENV)/.installed  ## create the virtual environment and install everything

shards: setup  ## build shards in OUT from SESSIONS with RECIPE (only what changed); VERIFY=1 rebuilds damaged columns, COMPACT=1 repacks, ONLY=passed or ONLY=warnings uses validated sessions
	$(PY) -m preprocess shards --recipe $(RECIPE) --sessions $(SESSIONS) --out $(OUT) \
		$(if $(VERIFY),--verify) $(if $(COMPACT),--compact) $(if $(ONLY),--only $(ONLY))

demo: setup  ## generate the demo sessions and build their shards
	$(PY) -m preprocess demo-sessions data/demo
	$(PY) -m preprocess shards --recipe configs/demo_recipe.yaml --sessions data/demo --out shards/demo

train: setup $(if $(filter demo.yaml,$(notdir $(CONFIG))),demo)  ## train with CONFIG; resume if a checkpoint exists
	$(PY) -m train run --config $(CONFIG) --resume auto

test: setup lint types layers  ## lint, types, layers and the fast tests, WORKERS at once
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses $(WORKERS) --dist loadgroup

test-slow: setup  ## run the slow tests
	$(PY) -m pytest -m slow

lint: setup  ## check rules and format with ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup  ## check types with mypy (strict)
	$(PY) -m mypy

layers: setup  ## check which package may import which
	$(VENV)/bin/lint-imports

bench-peers: setup  ## compare the loader with those of other projects (20 minutes; creates data/bench)
	$(PY) tests/benchmarks/peers/run.py

clean:  ## remove the demo's sessions, shards, checkpoints and logs
	rm -rf data/demo shards/demo checkpoints/demo runs/demo

# Every target sets up what it needs and leaves alone what is up to date. `make help` lists them.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup shards demo train test test-slow lint types layers bench clean

PYTHON   ?= python3
VENV     ?= .venv
PY       := $(VENV)/bin/python
RECIPE   ?= configs/recipe.yaml
SESSIONS ?= data/sessions
OUT      ?= shards/default
CONFIG   ?= configs/training_config.yaml

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[preprocess,train,dev]'
	touch $@

setup: $(VENV)/.installed  ## make the virtual environment and install everything into it

shards: setup  ## build SESSIONS into shards by RECIPE (only what changed)
	$(PY) -m preprocess shards --recipe $(RECIPE) --sessions $(SESSIONS) --out $(OUT)

# make help lists the targets.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CORES ?= $(shell nproc 2>/dev/null || echo 2)
SECONDS_A_NOTEBOOK ?= 300
ARGS ?=

# .venv, or a folder of its own for another Python: make test PYTHON=python3.12 leaves a .venv of 3.11 as it is
VERSION_OF = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifneq ($(filter command environment,$(firstword $(origin PYTHON))),)
  WANTED := $(call VERSION_OF,$(PYTHON))
  $(if $(WANTED),,$(error $(PYTHON) cannot be run. Name a Python of this machine: make test PYTHON=/path/to/python3.12))
  VENV := .venv$(if $(wildcard .venv/bin/python),$(if $(filter $(WANTED),$(call VERSION_OF,.venv/bin/python)),,-$(WANTED)))
endif
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: bench help setup lab reproduce test test-kill test-fuzz test-slurm check lessons pytest export readme docs clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.stamp ## .venv with the pinned versions; does nothing when it is up to date; of another Python: PYTHON=python3.12

$(VENV)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=/path/to/python3.11")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

lab: setup ## open JupyterLab at the front door; from afar: make lab ARGS="--no-browser --port 8888"
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/start/01_front_door.ipynb $(ARGS)

reproduce: setup ## every table and figure of the paper, on the embedded benchmark: make reproduce ARGS="--preset smoke"
	$(BIN)/lts reproduce $(ARGS)

test: setup ## all tests: what is generated, the notebooks, pytest
	@$(MAKE) -k --no-print-directory check lessons pytest

test-kill: setup ## kill `lts reproduce` at 30 random moments, fill its disk, start it twice: half an hour
	$(BIN)/pytest tests/kill.py

test-fuzz: setup ## damaged and hostile files, ten times as many as in make test
	FUZZ=10 $(BIN)/pytest tests/test_fuzz.py

test-slurm: setup ## a suite on a SLURM that is started for it (apt-get install slurm-wlm munge; pip install -e '.[cluster]'): ten minutes
	$(BIN)/pytest tests/slurm.py

check: setup ## does what is generated (lts_nb/, README.md) agree with the notebooks, and are they clean?
	$(BIN)/pytest tests/test_clean.py

bench: setup ## measure start, data, training step and scoring on this machine: make bench ARGS="--name my-machine"
	$(BIN)/python tools/bench.py $(ARGS)

lessons: setup ## run every notebook's cells, one thread each, with a time limit; one alone: make lessons ARGS=nbs/data/01_refer.ipynb
	$(BIN)/python tools/lessons.py --cores $(CORES) --seconds $(SECONDS_A_NOTEBOOK) $(ARGS)

# a file's tests stay together: they share what its fixtures have made
pytest: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(CORES) --dist loadfile --ignore tests/test_clean.py

export: setup ## lts_nb/ and README.md from the notebooks, and clean them
	$(BIN)/python tools/strip.py
	$(BIN)/nbdev_export
	$(MAKE) --no-print-directory readme
	$(BIN)/nbdev_clean --fname nbs

readme: setup ## README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py
	$(BIN)/nbdev_clean --fname nbs/index.ipynb

docs: setup ## the reading site, in site/; with its search: .venv/bin/python -m http.server -d site
	$(BIN)/mkdocs build --strict

clean: ## remove what can be made again, except .venv*, data/ and out/
	rm -rf build dist site _proc _docs .cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +

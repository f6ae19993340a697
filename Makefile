# All targets install what they need in the virtual environment $(VENV).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Many of the pinned versions do not support Python 3.10.
CONSTRAINTS ?= $(if $(findstring 3.10.,$(shell $(PYTHON) --version)),constraints-3.10.txt,constraints.txt)

# Idle OpenMP threads sleep. By default they spin, and slow down the tests that run in parallel.
export OMP_WAIT_POLICY := PASSIVE

# The photographs of `make demo-photos`: a dataset of examples/train.py and its directory.
PHOTOS ?= cars196
DATA ?= $(PML_EXTRAS_DATA)

.PHONY: demo demo-photos test test-long docs facts notebooks trunks packages lint format clean

demo: $(VENV)/.installed-examples
	$(BIN)/python examples/train.py --loss contextual --dataset digits --out runs/demo --overwrite

demo-photos: $(VENV)/.installed
	$(BIN)/python examples/train.py --trunk efficientnet_lite0 --image-size 160 --cache blocks.14 \
		--freeze-norm --embedding-size 128 --epochs 8 --schedule cosine --warmup 1 \
		--loss multi_similarity --miner multi_similarity --distill snapshot --rerank \
		--dataset $(PHOTOS) $(if $(DATA),--data-root "$(DATA)") --out runs/demo-photos --overwrite

test: lint
	$(BIN)/python -m pytest -n auto --cov

test-long: lint
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -n auto -m "long or not long"

docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html

# Update what the README and the docs state about the components, from tests/conformance.
facts: $(VENV)/.installed
	PYTHONPATH=tests $(BIN)/python -m conformance.facts

# Run the notebooks at their full size and save their outputs.
notebooks: $(VENV)/.installed
	cd examples/recipes && OMP_NUM_THREADS=1 $(abspath $(BIN))/jupyter execute --inplace *.ipynb

# Train with networks of timm, torchvision and transformers in a new environment. Downloads gigabytes.
trunks:
	$(PYTHON) scripts/check_trunks.py

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

# The demo needs few packages. The others take another minute to install.
$(VENV)/.installed-examples: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CONSTRAINTS) $(BIN)/pip install --quiet --editable '.[examples]'
	touch $@

$(VENV)/.installed: $(VENV)/.installed-examples
	PIP_CONSTRAINT=$(CONSTRAINTS) $(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

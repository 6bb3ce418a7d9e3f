# Two commands matter: `make train` and `make test`. Each makes its own environment first and is safe to run again.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
EVOMESH := $(VENV)/bin/evomesh
DEMO ?= demo_data
export DEMO_DATA := $(DEMO)
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= true

.PHONY: help env train test test-fast lint bench clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(VENV)/.core ## the environment for training only

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(PY) pyproject.toml constraints.txt
	$(PY) -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: $(VENV)/.core ## real text -> tokenizer -> dataset -> trained model -> validation -> sample
	$(PY) tools/demo_data.py $(DEMO)
	$(EVOMESH) train configs/demo.py
	$(PY) tools/demo_report.py $(DEMO)

lint: $(VENV)/.dev ## style, types, import layers
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

test: $(VENV)/.dev ## all tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup

test-fast: $(VENV)/.dev ## unit and architecture tests that start no process or server, for the inner loop
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup -m "not slow" tests/unit tests/arch

bench: $(VENV)/.dev ## measure here, and write docs/benchmarks.md
	$(PY) benchmarks/report.py

clean: ## everything the two commands made, but for the environment
	rm -rf $(DEMO) RUN llm_ckpts

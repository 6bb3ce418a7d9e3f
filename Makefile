# Two commands matter: `make train` and `make test`. Each makes its own environment first and is safe to run again.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
EVOMESH := $(VENV)/bin/evomesh
CONSTRAINTS ?= constraints.txt
# The oldest that pyproject.toml allows and the newest that PyPI serves; constraints.txt has the one between.
TORCH_VERSIONS ?= 2.11.0 2.15.0
TESTS ?= tests/unit tests/arch tests/contract tests/dist
DEMO ?= demo_data
export DEMO_DATA := $(DEMO)
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= true

.PHONY: help env train test test-fast test-versions lint docs bench gpu wheels clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(VENV)/.core ## the environment for training only

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(PY) pyproject.toml $(CONSTRAINTS)
	$(PY) -m pip install --quiet --constraint $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PY) -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

train: $(VENV)/.core ## real text -> tokenizer -> dataset -> trained model -> validation -> chat model -> answers
	$(EVOMESH) demo .

lint: $(VENV)/.dev ## style, types, import layers
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(MAKE) docs

docs: $(VENV)/.dev ## the documentation site, in English and Chinese -> site/index.html
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

# The tests start hundreds of interpreters: without byte code on disk each would compile the package again.
test test-fast: export PYTHONDONTWRITEBYTECODE :=

test: $(VENV)/.dev ## all tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup

test-fast: $(VENV)/.dev ## unit and architecture tests that start no process or server, for the inner loop
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup -m "not slow" tests/unit tests/arch

# Another version of torch than the pinned one brings several GB of CUDA libraries, so this is never part of `make test`.
test-versions: ## unit, architecture, contract and distributed tests on other versions of torch (TORCH_VERSIONS="2.11.0 2.15.0")
	TESTS="$(TESTS)" tools/test_versions.sh $(TORCH_VERSIONS)

bench: $(VENV)/.dev ## measure here, and write docs/benchmarks.md
	$(PY) benchmarks/report.py

# A machine with a GPU often has its own torch, which must stay: the environment is made only where there is none.
gpu: ## the first hour on a GPU: tests, layouts, speed, profile, generation, serving -> gpu.md
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then $(PYTHON) benchmarks/gpu.py $(PARTS); \
	else $(MAKE) $(VENV)/.dev && $(PY) benchmarks/gpu.py $(PARTS); fi

wheels: $(VENV)/.dev ## what `make gpu` needs, all but torch, for a machine without a package index (FOR=3.12: its Python)
	$(PY) tools/wheels.py wheels --python $(or $(FOR),3.12) --for-gpu --without $(WITHOUT)

clean: ## everything the two commands made, but for the environment
	rm -rf $(DEMO) RUN llm_ckpts

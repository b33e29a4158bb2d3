PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo recipe test test-fast test-processors test-slurm test-llama-cpp check clean

# A real pretrained model learns Chinese on this machine's processor, in minutes; no account, PyPI only.
demo: $(INSTALLED)
	$(BIN)/python scripts/demo.py

# Pretraining, then tuning on top of it, each evaluated: the README's table and a merged model with its card.
recipe: $(INSTALLED)
	$(BIN)/python scripts/recipe.py

# A process for each core.
PARALLEL := --numprocesses=auto --dist=worksteal

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL)

# Nothing that trains or starts programs: under two minutes on two cores.
test-fast: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

# The rooms that choose by the processor, as on one without AVX512 and as on one that multiplies bfloat16 (emulated
# where it does not): what `make test` runs with what is there.
test-processors: $(INSTALLED)
	CQLORA_CPU_FEATURES=plain ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 \
		$(BIN)/python -m pytest $(PARALLEL) -m processor
	CQLORA_CPU_FEATURES=bfloat16 $(BIN)/python -m pytest $(PARALLEL) -m processor

# Needs root, and Debian's slurm-wlm and munge: starts a Slurm of one node on loopback.
test-slurm: $(INSTALLED)
	CQLORA_TEST_SLURM=1 $(BIN)/python -m pytest tests/slurm

# Needs a C++ compiler: llama.cpp is compiled, which takes minutes.
test-llama-cpp: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,llama-cpp]'
	$(BIN)/python -m pytest tests/weights/test_llama_cpp.py

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info

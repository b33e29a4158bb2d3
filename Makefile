PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slurm test-llama-cpp check clean

# A real pretrained model learns Chinese on this machine's processor, in minutes; no account, PyPI only.
demo: $(INSTALLED)
	$(BIN)/python scripts/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest

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

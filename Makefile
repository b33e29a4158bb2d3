PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo recipe coverage test test-fast test-processors test-gpu test-slurm test-llama-cpp test-tracking check site site-en site-zh clean

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

# What the tests that neither train nor start programs reach. Not part of CI: tracing doubles what the suite takes.
coverage: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" --cov=cqlora --cov-report=term:skip-covered

# Nothing that trains or starts programs: under two minutes on two cores.
test-fast: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

# What chooses by the processor, as on one without AVX512 or one that multiplies bfloat16 (emulated where it does not),
# whichever this one is not.
test-processors: $(INSTALLED)
	$(BIN)/python -m tests.processors $(PARALLEL)

# Needs one NVIDIA GPU or more, which all other targets hide from the tests, and ends in a block of text to paste into an
# issue. Without one it says what it skips.
test-gpu: $(INSTALLED)
	CQLORA_GPU_TESTS=$${CQLORA_GPU_TESTS:-real} $(BIN)/python -m pytest -m gpu tests/gpu tests/model -rs

# Needs root, and Debian's slurm-wlm and munge: starts a Slurm of one node on loopback.
test-slurm: $(INSTALLED)
	CQLORA_TEST_SLURM=1 $(BIN)/python -m pytest tests/slurm

# Installs trackio and MLflow into an environment of its own: trackio would put another event loop under what serve is
# tested with, an older pillow, and both together two dozen packages for two tests.
test-tracking: $(INSTALLED)
	$(PYTHON) -m venv $(VENV)/tracking
	$(VENV)/tracking/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/tracking/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,trackio,mlflow]'
	$(VENV)/tracking/bin/python -m pytest tests/train/test_tracking.py

# Needs a C++ compiler: llama.cpp is compiled, which takes minutes.
test-llama-cpp: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,llama-cpp]'
	$(BIN)/python -m pytest tests/weights/test_llama_cpp.py

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages and the Python reference in both languages, in site/; a warning is an error, and every link is followed.
site: $(INSTALLED)
	$(MAKE) --jobs=2 site-en site-zh
	$(BIN)/python docs/check_links.py site

site-en:
	$(BIN)/python -m sphinx -E -W --keep-going -q docs site

site-zh:
	$(BIN)/python -m sphinx -E -W --keep-going -q -t chinese docs site/zh-CN

# Of what is installed a third is ever imported, and is compiled then.
INSTALL := -m pip install --quiet --no-compile --constraint constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python $(INSTALL) torch
	$(BIN)/python $(INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info

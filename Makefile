# Set-up and the two main commands. A stamp file remembers what is installed, so a second run installs nothing.

# The first of these that runs and is Python 3.11 to 3.13.
PYTHONS := python3.11 python3.12 python3.13 python3
IS_SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in $(PYTHONS); do $$python -c '$(IS_SUPPORTED)' 2> /dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Exact versions; CONSTRAINTS= installs the newest ones that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=--constraint %)
CONFIG := ds_configs/quickstart_cpu.json
TOKENIZER_CONFIG := ds_configs/quickstart_visual_tokenizer_cpu.json

.PHONY: help quickstart test test-slow check lint format constraints clean-runs clean-venv

help:
	@echo "make quickstart   set up and pretrain a small BEiT-3 on the sample data (2 CPU ranks, ZeRO-3)"
	@echo "make test         set up, then formatting, lint, types and tests"
	@echo "make test-slow    the tests that take minutes"
	@echo "make format       format the code"
	@echo "make constraints  write the installed versions to constraints.txt"
	@echo "make clean-venv   delete .venv, so that the next command installs everything again"
	@echo "make clean-runs   delete runs/, so that the next quickstart starts anew"

$(VENV)/installed: pyproject.toml setup.py $(CONSTRAINTS)
	$(if $(PYTHON),,$(error no Python 3.11, 3.12 or 3.13 was found; name one: make PYTHON=/path/to/python))
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch, DeepSpeed and the rest into $(VENV) (a few minutes the first time)"
	$(PIP) --editable .
	touch $@

# torchscale is what one test compares the model with. Its own pins ask for versions that do not exist any more.
$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps torchscale==0.3.0
	touch $@

quickstart: $(VENV)/installed runs/quickstart/text.spm runs/quickstart/visual_tokenizer.safetensors
	PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 \
		$(BIN)/deepspeed --num_gpus 2 --module beit3_ds.train $(CONFIG)

runs/quickstart/text.spm: | $(VENV)/installed
	$(BIN)/beit3 train-text-tokenizer $(CONFIG)

runs/quickstart/visual_tokenizer.safetensors: | $(VENV)/installed
	$(BIN)/beit3 train $(TOKENIZER_CONFIG)

lint: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

check: lint
	$(BIN)/mypy

# mypy runs beside the tests, because it uses one core; its findings come last, where they are seen.
test: lint
	$(BIN)/mypy > $(VENV)/mypy.log 2>&1 & checker=$$!; \
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal --durations=25; tests=$$?; \
	wait $$checker; types=$$?; cat $(VENV)/mypy.log; \
	exit $$((tests ? tests : types))

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow

format: $(VENV)/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The lines that begin with # stay.
constraints: $(VENV)/installed-test
	{ grep '^#' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable; } > $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt constraints.txt

clean-venv:
	rm -rf $(VENV)

clean-runs:
	rm -rf runs

# Every target does its own set-up: a fresh clone needs only Python (3.11 or 3.12) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The versions that were tested (requirements.lock); pyproject.toml has the lowest that are taken.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock

.PHONY: demo test test-slow test-all test-planted test-demo test-notebooks parity report lint clean

demo: $(VENV)/.installed-run
	$(BIN)/python infer/generate.py --compare --prompt="Why is the sky blue?" --max_new_tokens=128 --stream

# On all cores, a file of tests on one: what its tests share is made once. In the order of the folders: those of `decode/` take longest.
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder --durations=15
# Programs as XLA compiles them for users. Without this it compiles quickly and optimizes nothing: see tests/surroundings.py.
AS_USERS := XLA_FLAGS=

test: $(VENV)/.installed-test
	$(PYTEST)

# The long ones alone: planted bugs, the rest of the grids, several processes, mutated files and command lines, kills.
test-slow: $(VENV)/.installed-test
	$(PYTEST) --dist=load -m "slow and not parity and not demo and not notebooks"

test-all: test test-slow

# The planted bugs alone, which must be seen.
test-planted: $(VENV)/.installed-test
	$(PYTEST) --dist=load -m slow -k "planted or seen" tests/decode/test_losslessness.py tests/decode/test_round.py

# The tests that need the built-in model, but for the longest.
test-demo: $(VENV)/.installed-test
	$(AS_USERS) $(PYTEST) -m "demo and not slow"

# Executes the notebooks, on a tiny model.
test-notebooks: $(VENV)/.installed-notebooks
	$(AS_USERS) $(PYTEST) -m notebooks

# Compares with transformers + PyTorch (CPU).
parity: $(VENV)/.installed-parity
	$(AS_USERS) $(PYTEST) -m parity

# PROMPTS=a.jsonl,b.jsonl; hours on a CPU, and goes on where it stopped.
report: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/report.py --prompts="$(PROMPTS)"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-run: pyproject.toml requirements.lock | $(BIN)/python
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-%: pyproject.toml requirements.lock | $(BIN)/python
	$(PIP) --editable ".[test$(if $(filter-out test,$*),$(comma)$*)]"
	touch $@ $(VENV)/.installed-run

comma := ,

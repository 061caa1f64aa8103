# Every target does its own set-up: a fresh clone needs only Python (3.11 or 3.12) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The versions that were tested (requirements.lock); pyproject.toml has the lowest that are taken.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock

.PHONY: demo test test-slow test-planted test-demo test-notebooks parity report lint clean

demo: $(VENV)/.installed-run
	$(BIN)/python infer/generate.py --compare --prompt="Why is the sky blue?" --max_new_tokens=128 --stream

# On all cores, a file of tests on one: what its tests share is made once.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

# Planted bugs, the rest of the grids, and several processes: a quarter of an hour on a quick machine.
test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

# The planted bugs alone, which must be seen.
test-planted: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses=auto -m slow -k "planted or seen" tests/decode/test_losslessness.py tests/decode/test_round.py

# The tests that need the built-in model, but for the longest.
test-demo: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile -m "demo and not slow"

# Executes the notebooks, on a tiny model.
test-notebooks: $(VENV)/.installed-notebooks
	$(BIN)/python -m pytest --numprocesses=auto -m notebooks

# Compares with transformers + PyTorch (CPU).
parity: $(VENV)/.installed-parity
	$(BIN)/python -m pytest --numprocesses=auto -m parity

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

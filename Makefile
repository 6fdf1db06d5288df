# make run    everything from nothing: environment, data, features, models, experiment, server, one prediction
# make test   environment if missing, then the whole test suite
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: run test test-quick lint types clean

run: $(VENV)/installed
	@$(BIN)/plait demo --serve

# Two processes at a time, a file of tests in one of them; WORKERS=0 runs all in one.
WORKERS ?= 2
test: $(VENV)/installed-test
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-quick: $(VENV)/installed-test
	@$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/installed-test
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/installed-test
	@$(BIN)/mypy

$(VENV)/installed: setup.cfg constraints.txt
	@deploy/system-packages "$(PYTHON)"
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "installing Plait and its libraries into $(VENV) (some minutes the first time)"
	@$(PIP) --upgrade pip setuptools
	@$(PIP) --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@$(PIP) --editable ".[test]"
	@touch $@

clean:
	find .plait -mindepth 1 ! -name .gitkeep -delete; rm -rf .pytest_cache .mypy_cache .ruff_cache

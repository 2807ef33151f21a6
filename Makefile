# One-line entry points. Each installs what it needs into .venv once; a second run installs nothing.
#   make demo       the built-in model answers several prompts at once
#   make test       the tests to run at every change         (TEST_ARGS="tests/client -k name" picks some of all)
#   make test-thorough  the others: chaos, fuzzing, hostile input, other people's clients, interpreted kernels, benchmarks
#   make test-all   both, with the whole grids and the slow tests
#   make chaos      200 times in each of three set-ups something is killed, stopped or cut while 72 streams go on
#   make fuzz       the codec and the scheduler's ports under random messages for ten minutes (FUZZ_S=60: one)
#   make check      formatting, lint, types, import arrows
# PYTHON chooses the interpreter that makes .venv; EXTRAS=test,cuda adds FlashInfer on a machine with a GPU; JOBS is
# how many tests run at once, FAULTS how often `make chaos` does harm.
PYTHON ?= python3
EXTRAS ?= test
TEST_ARGS ?= tests
JOBS ?= 2
FAULTS ?= 200
FUZZ_S ?= 600

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
INSTALLED := .venv/.installed-$(EXTRAS)
# The tests run other people's programs too, and kernels in Triton's interpreter: 800 and 690 MB that a demo does without.
TESTED := .venv/.installed-$(EXTRAS),clients,kernels
HOUSE := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-thorough test-all chaos fuzz check dev clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(INSTALLED)
	@$(BIN)/tandem demo

# What TEST_ARGS names is run whatever it is.
QUICK := $(if $(filter file,$(origin TEST_ARGS)),-m "not thorough")

test: $(TESTED)
	@$(BIN)/python -P -m pytest -n $(JOBS) --dist worksteal $(QUICK) $(TEST_ARGS)

test-thorough: $(TESTED)
	@$(BIN)/python -P -m pytest -n $(JOBS) --dist worksteal -m thorough $(TEST_ARGS)

test-all: $(TESTED)
	@TANDEM_TEST_GRID=full $(BIN)/python -P -m pytest -n $(JOBS) --dist worksteal $(TEST_ARGS)

chaos: $(INSTALLED)
	@TANDEM_TEST_GRID=full TANDEM_CHAOS_FAULTS=$(FAULTS) $(BIN)/python -P -m pytest -s tests/chaos

fuzz: $(INSTALLED)
	@TANDEM_FUZZ_S=$$(( $(FUZZ_S) / 4 )) $(BIN)/python -P -m pytest -n 0 --timeout $$(( $(FUZZ_S) + 900 )) tests/fuzz

check: dev
	@scripts/check

dev: .venv/.installed-dev

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Tandem needs Python 3.11 or newer; \
	$(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv .venv

.venv/.installed-%: $(HOUSE) | $(BIN)/python
	@echo "Installing Tandem into .venv (once; torch and transformers take a minute or two) ..."
	@$(PIP) -e ".[$*]"
	@touch $@

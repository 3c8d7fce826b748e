# Needs Python 3.11 or newer and make. `make demo` and `make test` set everything up by themselves, in .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
OUT ?= outputs
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# What `make demo` shows; PROMPT="..." shows that alone. The star is named for the last time at the sixth second.
DEMO := --seed 1 --prompt "a green circle bouncing on a blue sky" \
	--prompt-at 6 "a yellow star resting on a blue sky" \
	--prompt-at 11 "a red square sweeping on a blue sky, the camera pans to the side" \
	--prompt-at 21 "a red square sweeping on a blue sky, the camera pans back"

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Stamps are what make idempotence cheap: nothing is installed again until the pins or the package's metadata change.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "longtake needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing longtake into $(VENV) ..."
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing longtake and its test tools into $(VENV) ..."
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed

setup: $(VENV)/.installed-dev  ## .venv with everything that tests and checks need

demo: $(VENV)/.installed  ## generate a 30-second video that pans away and back, and say where it is
	@mkdir -p $(OUT)
	$(BIN)/longtake generate $(if $(PROMPT),--prompt "$(PROMPT)",$(DEMO)) --seconds 30 --output-path $(OUT)/demo.mp4
	@echo "the video is at $(abspath $(OUT)/demo.mp4)"

# One process and one thread per core: networks as small as those of the tests gain nothing from more threads.
test: $(VENV)/.installed-dev  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

check: $(VENV)/.installed-dev  ## lint, formatting, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/.installed  ## speed and memory on this machine's CPU, as JSON in outputs/
	@mkdir -p $(OUT)
	$(BIN)/longtake bench cpu --out $(OUT)/bench-cpu.json

format: $(VENV)/.installed-dev  ## apply the formatter and the safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove caches and outputs; the environment stays
	rm -rf $(OUT) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

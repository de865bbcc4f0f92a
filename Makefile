# What a person types. Everything runs in .venv, which any target makes if need be.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test check base clean

# Installs, then compiles DeepSpeed's operator once, so that no run has to.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[dev]"
	@echo "Compiling DeepSpeed's CPU operator (about 40 seconds)"
	$(BIN)/python -m ot_ray.training.extensions
	touch $(STAMP)

# The main job on this machine. ARGS="--keep" leaves the service running.
quickstart: $(STAMP)
	$(BIN)/python -m jobs.quickstart $(ARGS)

# Every test.
test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

# Style, types, layering, and the tests that take no processes and no minutes.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

# Pre-trains the small base model that ships in jobs/base, into runs/base.
base: $(STAMP)
	$(BIN)/python -m jobs.make_base

clean:
	rm -rf $(VENV) runs *.egg-info

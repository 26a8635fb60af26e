# Two commands set everything up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# By its exact version and before the rest, so that pip takes the wheel that was tested.
TORCH ?= torch==2.13.0
DEMO ?= demo-out
MODEL = examples/docs-bitnet-25m

.PHONY: demo test lint format clean

# Build the embedded model for this machine, run it, and say how fast it is.
demo: $(VENV)/.build
	$(BIN)/bitcompile build $(MODEL) -o $(DEMO) --force
	@echo
	$(BIN)/bitcompile run $(DEMO) --prompt "The following example creates a table" -n 48
	@echo
	$(BIN)/bitcompile bench $(DEMO) --prefill 256 --decode 128 --repeat 3
	@echo
	$(BIN)/bitcompile inspect $(DEMO)
	@echo
	@echo "The artifact lies in $(DEMO)/; its README.md shows how to load it."

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Types are checked on a normal install: an editable one hides the top-level folders from mypy.
lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror custom_ops/csrc/*.[ch] examples/c/*.[ch] tests/*.c tests/desktop/*.c tests/device/*.c tests/gpu/*.c
	rm -rf build/typecheck
	$(BIN)/python -m pip install --quiet --no-deps --target build/typecheck .
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p bitcompile

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i custom_ops/csrc/*.[ch] examples/c/*.[ch] tests/*.c tests/desktop/*.c tests/device/*.c tests/gpu/*.c

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.build: $(VENV)/.venv pyproject.toml
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install --editable ".[build,llm]"
	touch $@

$(VENV)/.dev: $(VENV)/.venv pyproject.toml
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@ $(VENV)/.build

clean:
	rm -rf build $(DEMO) *.egg-info

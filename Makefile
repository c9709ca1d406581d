# `make lab` opens the course, `make test` checks everything. Both set up what they need first, and can be run again.
#
#   PYTHON     the interpreter that builds .venv                make lab PYTHON=python3.12
#   LAB_FLAGS  passed on to JupyterLab                          make lab LAB_FLAGS="--no-browser --port=8899"
#   PIP_FLAGS  passed on to pip when packages are installed     make lab PIP_FLAGS="--proxy ..."
#   BITS       whose last bits the tests compute with           make test-bits BITS="2 3 alike" (tests/perturbed)
#   GPU_SPECS  random problems on the GPU                       make test-gpu GPU_SPECS=2000 GPU_RESULTS=benchmarks/h200

PYTHON ?= python3
LAB_FLAGS ?=
PIP_FLAGS ?=
BITS ?= 1 alike
GPU_SPECS ?= 200
GPU_RESULTS ?= results

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
# One kernel per core with one thread each, no widgets: a notebook prints the same on every run.
REPRODUCIBLE := FLASHLIB_NONINTERACTIVE=1 OMP_NUM_THREADS=1 PYTHONHASHSEED=0

# In a container one is root, where Jupyter wants to be told that this is meant.
LAB_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install weights lab test test-bits test-long test-gpu sanitize-gpu lint unit coverage nbcheck browser format exercises notebooks pins clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "flashlib needs Python 3.10 to 3.13; $(PYTHON) is: $$($(PYTHON) --version 2>&1)"; \
	  echo "Name another interpreter, for example: make lab PYTHON=python3.12"; exit 1; }
	@echo "== Installing flashlib into $(VENV) (a minute or two; more where PyTorch comes with CUDA)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	@touch $@

install: $(STAMP) ## Build .venv and install flashlib with everything the course and its tests need

weights: install ## Bring the weights of SmolLM2-135M (98 MB, once per user)
	@$(BIN)/flashlib weights

lab: install ## Open the course in JupyterLab, at chapter 00, in a copy of your own (my_course/), which updates are merged into
	@$(BIN)/python -m flashlib.course.workspace
	@$(BIN)/flashlib weights || echo "== The lab opens all the same; cells that run the model will show this message again."
	$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/my_course/notebooks/00_start_here.ipynb \
	  $(LAB_ROOT) $(LAB_FLAGS)

test: weights ## Run every check: lint, tests, notebooks, chapters in a browser. All of them run; any failure fails the whole
	@$(MAKE) --no-print-directory --keep-going lint unit nbcheck browser

test-bits: install ## Repeat the tests of numbers and grades with the last bits of other machines
	@for bits in $(BITS); do echo "== Tests with other last bits: $$bits"; \
	  PYTHONPATH=tests/perturbed FLASHLIB_PERTURB=$$bits OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile \
	    tests/core tests/kernels/test_interpreter.py tests/kernels/test_decode_kernels.py tests/inference tests/course tests/grader || exit 1; \
	done

test-long: install ## The tests of the grader that draw and all right solutions, over 20 rounds, a class of 200, and more ways for ranks to fail (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m flashlib.course.grader.rounds --rounds 20
	FLASHLIB_ROUNDS=20 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not gpu" -n 2 --dist loadfile --timeout 7200 tests/grader
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m long tests/parallel

test-gpu: install ## Check the kernels on this machine's GPU and write what came out to GPU_RESULTS (results/)
	@echo "== Tests on the GPU: pytest"
	FLASHLIB_GPU_SPECS=$(GPU_SPECS) FLASHLIB_GPU_RESULTS=$(GPU_RESULTS) $(BIN)/python -m pytest -q -m gpu tests/gpu

sanitize-gpu: install ## Run the kernels under compute-sanitizer (from the CUDA toolkit): memory errors, races, barriers
	$(BIN)/python tests/gpu/sanitize.py --out $(GPU_RESULTS) --compilers $(shell nproc 2>/dev/null || echo 4)

lint: install ## Check style and formatting, that imports run downwards, and types
	@echo "== Style: ruff"
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@echo "== Imports: import-linter"
	$(BIN)/lint-imports
	@echo "== Types: mypy"
	$(BIN)/mypy

# Each worker computes on one thread: on two cores, the threads of two workers would spend their time waiting for one another.
unit: install ## Run all tests but the notebooks
	@echo "== Tests: pytest"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

coverage: install ## Run the tests, and print for each file of the library how much of it they ran
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run --parallel-mode -m pytest -q
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

nbcheck: install ## Execute every notebook and compare every output with the committed one
	@echo "== Notebooks: nbval"
	$(REPRODUCIBLE) PYTHONPATH=tests/notebooks $(BIN)/python -m pytest -q -p notebook_report --nbval --nbval-current-env \
	  --nbval-sanitize-with tests/notebooks/sanitize.cfg --nbval-cell-timeout 60 -n 2 --dist loadscope notebooks/answers

browser: install ## Read, answer and write in chapters in headless Chromium. Without a browser: reported as not run
	@echo "== Chapters in a browser: playwright"
	$(BIN)/python -m pytest -q -m browser -p no:xdist tests/browser

format: install ## Format code and notebooks, and apply safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

exercises: install ## Write exercises/ from the solutions
	$(BIN)/python -m flashlib.course.stubs

notebooks: install ## Execute every chapter into notebooks/answers, and leave in notebooks/ what readers open: no output but the questions
	$(REPRODUCIBLE) $(BIN)/jupyter nbconvert --to notebook --execute --output-dir notebooks/answers \
	  --ExecutePreprocessor.record_timing=False --ExecutePreprocessor.timeout=60 $(NOTEBOOKS)
	$(BIN)/python -m flashlib.course.editions

pins: install ## Write constraints.txt for what pyproject.toml asks; UPGRADE=--upgrade takes newer versions
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --extra dev --no-annotate $(UPGRADE) \
	  --custom-compile-command "make pins" --output-file constraints.txt pyproject.toml

clean: ## Remove .venv and all caches (not the weights)
	rm -rf $(VENV) *.egg-info build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

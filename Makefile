# Everything runs in .venv, installed by uv from a lock with hashes. `make demo` and `make test` need only
# Python 3.11 to 3.13 with pip, and make. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
STAMP := $(VENV)/.installed
SOURCES := service workers tests benchmarks examples docs deploy

SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.DEFAULT_GOAL := help
.PHONY: help install demo test browser docs load soak storage scaling speed bench bench-run bench-gpu gpu-code lint format lock clean

help:           ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv from requirements-dev.txt

demo: $(STAMP)  ## real photographs, CNN against C4, from images to predictions and plots
	$(BIN)/python examples/demo.py

test: $(STAMP) browser  ## every test but the soaks
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

load: $(STAMP)   ## the service with 200 watchers, 1,000 jobs, 50 submissions at once, and kills at all moments
	$(BIN)/python benchmarks/service.py

soak: $(STAMP)   ## hundreds of faults against real runs, an hour or so; SOAK_FAULTS=200
	$(BIN)/python -m pytest -m soak -s -o faulthandler_timeout=0

storage: $(STAMP)  ## requests to object storage, verification over a network, compression
	$(BIN)/python benchmarks/storage.py

scaling: $(STAMP)  ## how many tiles a second the driver hands out, and how many workers that keeps busy
	$(BIN)/python benchmarks/scaling.py

speed: $(STAMP)  ## whether the kernels are as much faster than neural-tangents as they must be; half a minute
	$(BIN)/python benchmarks/bench.py --check

bench: $(STAMP)  ## kernels against neural-tangents, solvers against scipy, learning curves on 1,000 images; an hour
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/solving.py
	$(BIN)/python benchmarks/curves.py

bench-run: $(STAMP)  ## a whole run, 1,000 images from files to accuracies: where its time goes, and what others take
	$(BIN)/python benchmarks/pipeline.py

# With the packages of requirements-cuda.txt in .venv-cuda, or those of another interpreter: PYTHON_GPU=python3
bench-gpu: $(if $(PYTHON_GPU),,$(STAMP))  ## the engine gpu: whether it is right on a GPU, and how fast; BENCH=--quick
	@test -n "$(PYTHON_GPU)" || ! nvidia-smi >/dev/null 2>&1 || { \
	  { test -x .venv-cuda/bin/python || $(UV) venv --quiet --python $(PYTHON) .venv-cuda; } && \
	  $(UV) pip install --quiet --python .venv-cuda/bin/python --require-hashes --no-deps -r requirements-cuda.txt; }
	PYTHONPATH=service:workers $(or $(PYTHON_GPU),$$(test -x .venv-cuda/bin/python && echo .venv-cuda || echo $(VENV))/bin/python) \
	  benchmarks/gpu.py $(BENCH)

# NVIDIA's compiler is packaged for Linux; elsewhere there is nothing to check.
gpu-code: | $(UV)  ## the kernels of the engine gpu, compiled without a GPU: registers, instructions, the floor
	@test "$$(uname)" = Linux || { echo "gpu-code: NVIDIA's compiler runs on Linux only; nothing is checked"; exit 0; }; \
	  test -x .venv-nvcc/bin/python || $(UV) venv --quiet --python $(PYTHON) .venv-nvcc; \
	  $(UV) pip install --quiet --python .venv-nvcc/bin/python --require-hashes --no-deps -r requirements-nvcc.txt && \
	  PYTHONPATH=workers .venv-nvcc/bin/python benchmarks/gpu_code.py

lint: $(STAMP)  ## ruff and mypy --strict
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

# Without a browser, and without a way to install one, the tests of the page are skipped, with a reason.
browser:        ## Chromium, for the tests of the page
	@command -v chromium google-chrome >/dev/null || ! command -v apt-get >/dev/null || { \
	  $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends chromium >/dev/null; }

docs: $(STAMP)   ## the site, docs/_build/html; warnings are errors
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

lock: $(UV)  ## renew the locks; excludes.txt keeps TensorFlow out
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	  --excludes excludes.txt pyproject.toml --extra s3 --extra cluster --upgrade -o requirements.txt
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	  --excludes excludes.txt pyproject.toml --extra s3 --extra cluster --extra cuda -c requirements.txt --upgrade \
	  -o requirements-cuda.txt
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	  --group nvcc -c requirements-cuda.txt --upgrade -o requirements-nvcc.txt
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	  --excludes excludes.txt pyproject.toml --extra s3 --extra service --group dev -c requirements.txt --upgrade -o requirements-dev.txt

clean:          ## remove the environment and everything generated
	rm -rf $(VENV) .venv-cuda .venv-nvcc .uv runs plots examples/data docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(STAMP): requirements-dev.txt pyproject.toml | $(UV)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11 to 3.13 is needed; $(PYTHON) is $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(UV) venv --quiet --clear --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python --require-hashes --no-deps --compile-bytecode -r requirements-dev.txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

.uv/bin/uv:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target .uv uv

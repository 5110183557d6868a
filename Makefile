# Every target sets up what it needs (.venv from requirements-dev.txt, the compiled library) and is
# quick the second time. `make help` lists them.

PYTHON ?= python3
PROFILE ?= quick
CUDA ?= on
TORCH ?= 2.13.0
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
# Touched when the requirements are installed; another requirements file is another stamp.
DEPS := $(VENV)/.requirements-$(shell cksum requirements-dev.txt | cut -d ' ' -f 1)
INSTALL := $(VENV)/.installed

WHEEL_VENV := .venv-wheel
WHEEL_PY := $(WHEEL_VENV)/bin/python
WHEEL_DEPS := $(WHEEL_VENV)/.requirements-$(shell cksum requirements-wheel.txt | cut -d ' ' -f 1)
# Without CUDA kernels the wheel has the same name, so a folder of its own.
DIST := dist$(if $(filter off,$(CUDA)),/cpu)

.DEFAULT_GOAL := help
.PHONY: help build bench test test-all check format sanitize gpu-sanitize wheel wheel-test wheel-same nvcc clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

build: $(INSTALL)  ## the editable install with the compiled library
	@MMFAST_EMULATE_AMX=$${MMFAST_EMULATE_AMX:-1} $(PY) tools/native_build.py --pyb

bench: build  ## the benchmark suite, with report.html (PROFILE=quick or full)
	@$(PY) -m benchmarks --profile $(PROFILE) $(ARGS)

test: build  ## the tests, without the slow ones
	@$(PY) -m pytest $(ARGS)

test-all: build  ## every test; NVIDIA's CuTe headers are what fragment layouts are held against
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps nvidia-cutlass==4.2.0.0
	@$(PY) -m pytest -m "" $(ARGS)

check: $(DEPS)  ## ruff, mypy and clang-format; changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	@find csrc tools tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs -r $(VENV)/bin/clang-format --dry-run -Werror
	@echo "check: clean"

format: $(DEPS)  ## what check would complain about, as far as it mends itself
	$(PY) -m ruff check --fix --quiet . || true
	$(PY) -m ruff format .
	@find csrc tools tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs -r $(VENV)/bin/clang-format -i

sanitize: build  ## the CPU kernels under AddressSanitizer, UBSan and ThreadSanitizer
	@MMFAST_EMULATE_AMX=$${MMFAST_EMULATE_AMX:-1} $(PY) tools/sanitize.py $(ARGS)

gpu-sanitize: build  ## the CUDA kernels under compute-sanitizer, on a machine with a GPU
	@$(PY) tools/gpu_sanitize.py $(ARGS)

wheel: $(WHEEL_DEPS)  ## manylinux wheel, sdist, SHA256SUMS and SBOM in dist/ (CUDA=off: dist/cpu/)
	@$(WHEEL_PY) tools/wheel_release.py --cuda $(CUDA) $(ARGS)

wheel-test:  ## that wheel in a fresh environment (PYTHON=python3.x, TORCH=2.13.0, CUDA=on or off)
	@$(PYTHON) tools/wheel_check.py $(DIST)/mmfast-*-manylinux_*.whl --python $(PYTHON) --torch $(TORCH)

wheel-same:  ## whether dist/ has the same bytes as the release in the folder AS
	@cd $(DIST) && sha256sum --check --quiet $(abspath $(AS))/SHA256SUMS && echo "wheel-same: the same"

nvcc: $(WHEEL_DEPS)  ## NVIDIA's compiler from PyPI for `make wheel`, where no CUDA toolkit is
	@$(WHEEL_PY) -m pip install --quiet --disable-pip-version-check -r requirements-nvcc.txt

clean:  ## everything that was built; the environments stay
	rm -rf build dist *.egg-info mmfast/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  .benchmarks benchmarks/results
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: mmfast needs Python 3.10 or newer; name one with PYTHON=python3.x"; exit 1; }
	@echo "Setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "make: no venv; install it (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }

$(DEPS): requirements-dev.txt | $(PY)
	@echo "Installing requirements-dev.txt (the first time takes a few minutes)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@rm -f $(VENV)/.requirements-*
	@touch $@

$(WHEEL_PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: make wheel needs Python 3.11 or newer; name one with PYTHON=python3.x"; exit 1; }
	@echo "Setting up $(WHEEL_VENV)"
	@$(PYTHON) -m venv $(WHEEL_VENV) || \
	  { echo "make: no venv; install it (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }

$(WHEEL_DEPS): requirements-wheel.txt | $(WHEEL_PY)
	@echo "Installing requirements-wheel.txt (the first time takes a minute or two)"
	@$(WHEEL_PY) -m pip install --quiet --disable-pip-version-check -r requirements-wheel.txt
	@rm -f $(WHEEL_VENV)/.requirements-*
	@touch $@

$(INSTALL): $(DEPS) setup.py pyproject.toml mmfast/_version.py
	@MMFAST_BUILD=off $(PY) -m pip install --quiet --disable-pip-version-check --no-deps \
	  --no-build-isolation --editable .
	@touch $@

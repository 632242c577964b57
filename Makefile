#   make setup   a virtual environment with all that export, demo and tests need
#   make demo    export CSPDarknet53, verify the bundle, predict a few real images with it
#   make test    lint, then the tests; ARGS goes to pytest: make test ARGS="-m slow"
#   make lint    ruff, mypy and the import contracts
#   make bench   latency of the bundles in exported/
#   make test-cuda  tests and benchmark on an NVIDIA GPU, in less than 8 minutes once it is set up; PYTHON_CUDA=python3
#                takes an interpreter as it is, with the packages that it has, and installs nothing
#   make clean   remove what setup, demo and test made, but no model and no bundle

PYTHON ?= python3
VENV ?= .venv
EXTRAS := export,cpu,openvino,hub,report,sign,dev
ARGS ?=
PYTHON_CUDA ?=
VENV_CUDA ?= build/cuda-venv

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DATASET := /usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz
MAKEFLAGS += --no-print-directory

default: test

# Install the Debian package $(1); fails where there is no apt-get or no right to use it.
define apt_install
{ as_root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
  command -v apt-get >/dev/null && command -v $${as_root:-sh} >/dev/null && echo "== Debian package $(1)" && \
  { $$as_root apt-get update -qq || true; } && \
  $$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1); }
endef

setup: $(INSTALLED)
	@[ -f $(DATASET) ] || $(call apt_install,dataset-fashion-mnist) || \
	  echo "note: Fashion-MNIST is missing, which demo, training and some tests need; fix: apt-get install dataset-fashion-mnist" >&2

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: $(PYTHON): got $$($(PYTHON) --version 2>&1 | tail -n 1), expected Python 3.11 or later; fix: make setup PYTHON=python3.11" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(call apt_install,python3-venv) || true
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON): has no venv module; fix: apt-get install python3-venv" >&2; exit 1; }
	@echo "== virtual environment $(VENV)"
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  $(PYTHON) -m venv $$([ ! -f $(VENV)/pyvenv.cfg ] || echo --clear) $(VENV)
	@echo "== packages, as pinned in constraints.txt; the first time this takes minutes, most of them for torch"
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt setuptools
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation \
	  -e '.[$(EXTRAS)]'
	@touch $@

demo: setup
	@echo "== export cspdarknet53: TorchScript, ONNX, FP16, INT8"
	$(BIN)/cspdeploy export cspdarknet53 --fp16 --int8
	@echo "== verify what was exported"
	$(BIN)/cspdeploy verify
	@echo "== predict images of the Fashion-MNIST test split; each file is named by its true class"
	$(BIN)/python tests/demo_images.py build/demo
	$(BIN)/cspdeploy predict exported/cspdarknet53 build/demo/*.png

test: lint
	@echo "== pytest"
	@$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: setup
	@echo "== ruff check"
	@$(BIN)/ruff check .
	@echo "== ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "== mypy"
	@$(BIN)/mypy
	@echo "== lint-imports"
	@$(BIN)/lint-imports --no-logo

bench: setup
	$(BIN)/cspdeploy bench

# By itself: onnxruntime and onnxruntime-gpu in one environment are one module of chance. Whether there is a GPU is asked
# first, by the standard library alone, and what asks needs no package.
CUDA := tests/benchmarks/cuda

test-cuda:
	@$(or $(PYTHON_CUDA),$(PYTHON)) $(CUDA)/cuda_device.py
	@[ -n "$(PYTHON_CUDA)" ] || $(MAKE) VENV=$(VENV_CUDA) EXTRAS='export,gpu,dev' $(VENV_CUDA)/.installed
	@$(or $(PYTHON_CUDA),$(VENV_CUDA)/bin/python) $(CUDA) $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find cspdeploy tests -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: default setup demo test lint bench test-cuda clean

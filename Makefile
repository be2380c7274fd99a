# make demo · make test · make gpu
#
# Each does its own set-up with pip, in .venv, and a second run is quick. PYTHON is the Python to make .venv with; given to
# `make gpu` it is the very Python to run with, and nothing is installed. LONG=1 tunes and measures everything there, and
# MINUTES says how long it may take.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq

TORCH := torch==2.13.0
TRITON := triton==3.7.0
# Without an NVIDIA GPU, PyTorch's own CPU wheel: the default one brings gigabytes of CUDA along.
TORCH_INDEX := https://download.pytorch.org/whl/cpu

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test gpu clean

# What models here have drawn and written, for the page that `make demo` ends in.
PICTURES := stylegan_mixing.png biggan_digits.png sagan_digits.png progan_digits.png musenet_sample.png

say = @printf '\033[1m== %s\033[0m\n'

demo: $(VENV)/installed
	$(say) "What is built and usable here"
	@$(PY) -m gdl_kernels info
	$(say) "Is every kernel right on this machine?"
	@$(PY) -m gdl_kernels verify
	$(say) "MuseNet on Bach chorales, on our kernels and in plain PyTorch"
	@$(PY) -m models compare musenet
	$(say) "As much as fits into a minute, against PyTorch's own ways"
	@$(PY) -m benchmarks --quick --minutes 1 --json runs/demo.json
	@$(PY) -m benchmarks page runs/demo.json --out runs/demo.html $(addprefix --picture docs/,$(PICTURES))

test: $(VENV)/installed
	$(say) "ruff"
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --quiet --check .
	$(say) "mypy"
	@$(VENV)/bin/mypy
	$(say) "pytest"
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 8 --dist worksteal -m "not gpu"

GPU := -m benchmarks.gpu $(if $(LONG),--long) $(if $(MINUTES),--minutes $(MINUTES))
ifeq ($(origin PYTHON),file)
gpu: $(VENV)/installed
	@$(PY) $(GPU)
else
gpu:
	@$(PYTHON) $(GPU)
endif

clean:
	rm -rf $(VENV) build *.egg-info gdl_kernels/*.so gdl_kernels/_build_info.json

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo "Python 3.10 to 3.13 is needed, and $(PYTHON) is not one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(say) "Making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# pip says much about an index that can't be reached, and goes on without it: so it is asked first.
$(VENV)/torch: $(VENV)/created Makefile
	$(say) "Installing $(TORCH)"
	@index=(); \
	if ! command -v nvidia-smi >/dev/null && \
	    $(PY) -c 'import urllib.request as u; u.urlopen("$(TORCH_INDEX)/torch/", timeout=10)' 2>/dev/null; then \
	    index=(--extra-index-url $(TORCH_INDEX)); fi; \
	$(PIP) install "$${index[@]}" $(TORCH) 'setuptools>=77' wheel 'pybind11>=2.13'
	@touch $@

$(VENV)/compiled: $(VENV)/torch setup.py $(shell find csrc -type f)
	$(say) "Compiling the kernels"
	@GDL_KERNELS_REQUIRE_NATIVE=1 $(PY) setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/installed: $(VENV)/compiled pyproject.toml
	$(say) "Installing gdl_kernels and what its tests, models and pictures need"
	@GDL_KERNELS_REQUIRE_NATIVE=1 $(PIP) install --no-build-isolation $(TORCH) $(TRITON) -e '.[dev,models,plot,transformers,triton]'
	@touch $@

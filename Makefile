# `make demo` and `make test` are all a fresh clone needs; every target sets up .venv on first use.
# PYTHON picks the interpreter (3.11 or newer), WORKERS the test processes, CMAKE_ARGS goes to the build.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input install -q -c constraints.txt
SOURCES := setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: help setup demo test endurance lint format bench gpu mini claims clean
help:  ## what there is
	@grep -hE '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/'

# --- set-up: a stamp per step, so that nothing is done twice ---------------------------------------------------------
# torch goes first, at its pinned version, so that nothing else chooses a build of it.
$(VENV)/stamp-torch: constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@touch $@

$(VENV)/stamp-deps: $(VENV)/stamp-torch pyproject.toml
	$(PIP) "setuptools>=77" "pybind11>=2.13" ninja "cmake>=3.24"
	if command -v nvcc >/dev/null; then $(PIP) --no-deps nvidia-cutlass; fi   # headers only
	@touch $@

$(VENV)/stamp-build: $(VENV)/stamp-deps $(SOURCES)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PIP) --no-build-isolation -e ".[test]"
	@touch $@

$(VENV)/stamp-dev: $(VENV)/stamp-build
	$(PIP) ruff mypy clang-format pre-commit
	@touch $@

setup: $(VENV)/stamp-build  ## .venv with everything that runs and tests need, and the extension built

# --- what it is for --------------------------------------------------------------------------------------------------
demo: setup  ## answer questions about example pictures with the embedded model
	$(PY) examples/demo.py

test: setup  ## every test that needs no GPU
	$(PY) -m pytest -q -m "not gpu" -n $(WORKERS)

endurance: setup  ## what training promises about kills, damage and bad rows, hundreds of times; a small model from nothing
	$(PY) python_tests/endurance/training.py
	$(PY) python_tests/endurance/mini.py

lint: $(VENV)/stamp-dev  ## ruff, mypy, clang-format: nothing is changed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	find csrc -type f | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/stamp-dev  ## rewrite Python and C++ in the house style
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .
	find csrc -type f | xargs $(VENV)/bin/clang-format -i

bench: setup  ## the speed of every room on this machine
	set -e; for file in bench/bench_*.py; do $(PY) $$file; done

gpu:  ## on a machine with a GPU: build the CUDA half, run its tests and the benchmarks
	CMAKE_ARGS="-DSPHINX_CUDA=ON $(CMAKE_ARGS)" $(MAKE) setup
	$(PY) -m pytest -q -m gpu python_tests
	set -e; for file in bench/bench_*.py; do $(PY) $$file --device cuda; done

mini: setup  ## train the embedded model from nothing (two cores, an hour or two)
	$(PY) -m sphinx_fast.train.mini

claims: setup  ## after mini: the paper's claims at its size, docs/results.md
	$(PY) -m sphinx_fast.train.mini.claims

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info sphinx_fast/_C*.so $(VENV)/stamp-build
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

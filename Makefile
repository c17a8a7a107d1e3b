# make demo   install into .venv, train a float and a 4-bit network on the embedded images, pack it, run it (minutes)
# make test   install into .venv, run the tests
# make lint   ruff, types, import contracts
# Each needs Python >= 3.11, a C++17 compiler and, the first time, a network. A second call reuses .venv.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
# what an installation depends on: Python sources are used in place
built_from := pyproject.toml CMakeLists.txt $(wildcard csrc/*)

# One thread per worker: on few cores, torch's pools would fight each other.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test test-all lint clean
demo: $(VENV)/.train
	$(BIN)/bitspike demo

test: $(VENV)/.test
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(PYTEST)

test-all: $(VENV)/.test
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "bitspike needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# one stamp per extra: .train, .test, .dev (each holds the ones before it)
$(VENV)/.train $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(built_from) | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[$*]"
	@touch $@

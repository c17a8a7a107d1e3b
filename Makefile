# make demo   install into .venv, train a float and a 4-bit network on the embedded images, pack it, run it (minutes)
# make test   install into .venv, run the tests
# make sanitize, make fuzz   the C++ under AddressSanitizer and UBSan: tests, and ten minutes of hostile files
# make test-neon             the kernels for ARM, in an emulator
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

# what the C++ is tested with beyond `make test`
FUZZ_SECONDS ?= 600
FUZZ_SEED ?= 1
NATIVE_SECONDS ?= 60
SANITIZED := $(VENV)/sanitized
AARCH64 ?= aarch64-linux-gnu-g++
EMULATOR ?= qemu-aarch64 -cpu max

.PHONY: demo test test-all lint clean fuzz sanitize test-neon
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

# AddressSanitizer and UBSan: every kernel against the scalar one, then the runtime's Python tests on a sanitized build
sanitize: $(SANITIZED)/bitspike
	tests/native/build.sh $(VENV)/compare_kernels $${CXX:-c++} -fsanitize=address,undefined \
	  -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1
	$(VENV)/compare_kernels $(NATIVE_SECONDS)
	tests/fuzz/sanitized.sh $(BIN)/python $(SANITIZED) -m pytest -p no:cacheprovider -n 0 tests/deploy

# random and damaged artifacts through the reader and every set of kernels, on the sanitized build
fuzz: $(SANITIZED)/bitspike
	tests/fuzz/sanitized.sh $(BIN)/python $(SANITIZED) tests/fuzz/fuzz_artifacts.py $(FUZZ_SECONDS) $(FUZZ_SEED)

$(SANITIZED)/bitspike: $(VENV)/.test $(wildcard csrc/*)
	rm -rf $(SANITIZED)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(SANITIZED) \
	  --config-settings=cmake.define.BITSPIKE_SANITIZE=ON --config-settings=build-dir=build/sanitized .
	@touch $@

# the NEON kernels in an emulator
test-neon:
	@command -v $(firstword $(AARCH64)) > /dev/null || { echo "make test-neon needs a compiler for aarch64:" \
	  "apt install g++-aarch64-linux-gnu, or make test-neon AARCH64='...'"; exit 1; }
	@command -v $(firstword $(EMULATOR)) > /dev/null || { echo "make test-neon needs an emulator: apt install qemu-user"; exit 1; }
	mkdir -p $(VENV)
	tests/native/build.sh $(VENV)/compare_kernels_aarch64 $(AARCH64) -static
	$(EMULATOR) $(VENV)/compare_kernels_aarch64 $(NATIVE_SECONDS)

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

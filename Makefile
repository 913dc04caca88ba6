# `make run`   environment, package, main job on real data, report; goes on with a run that was
#              stopped, shows one that is finished (RUN=DIR names another)
# `make test`  environment, lint, types, build checks, all tests (long matrices sampled)
# `make test-all`  the same with every matrix whole

# `make gpu`   on a machine with a GPU, with a python that has torch, triton, numpy and pytest: the
#              kernels against their references, memory checks where there is compute-sanitizer,
#              times beside predictions in benchmarks/results/gpu.json (GPU_PYTHON names the python)

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart

# A missing compiler is an error here: what is measured and tested must be the compiled kernels.
export GOSE_NATIVE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN = $(VENV)/bin
SOURCES = pyproject.toml setup.py $(shell find csrc -type f)
CXX_SOURCES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# Tests run on two workers with one thread each; thread counts are tested by tests that set them.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: run test test-all gpu lint clean

run: $(VENV)/.run
	if [ -e $(RUN)/environment.json ]; then $(BIN)/gose run --resume $(RUN); \
	else $(BIN)/gose run quickstart --out $(RUN); fi

test: $(VENV)/.test lint
	$(call tests,)

test-all: $(VENV)/.test lint
	$(call tests,--whole)

# The best level of the machine runs everything; lower levels run the CPU kernels again. Triton's
# interpreter is a process of its own: it must be chosen before triton is imported.
define tests
	TRITON_INTERPRET=1 $(PYTEST) $(1) -n 2 --dist worksteal tests/kernels -k triton
	GOSE_ISA=portable $(PYTEST) $(1) -n 2 --dist worksteal tests/kernels -k cpu
	GOSE_ISA=avx2 $(PYTEST) $(1) -n 2 --dist worksteal tests/kernels -k cpu
	$(PYTEST) -m bench --benchmark-disable tests/bench
	$(PYTEST) $(1) -n 2 --dist worksteal tests
endef

GPU_PYTHON ?= python3
DEVICE_TESTS = -m pytest -q -c tests/gpu/device.ini tests/gpu/test_device.py -m gpu --device cuda

gpu:
	$(GPU_PYTHON) $(DEVICE_TESTS)
	if command -v compute-sanitizer; then for tool in memcheck racecheck; do \
	compute-sanitizer --tool $$tool --error-exitcode 1 $(GPU_PYTHON) $(DEVICE_TESTS) -k float32 \
	|| exit 1; done; fi
	$(GPU_PYTHON) -m benchmarks gpu --device cuda

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first, and the chosen one: every later requirement then finds it installed.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -m pip install -q "$(TORCH)" "setuptools>=77" ninja
	touch $@

$(VENV)/.run: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[data]"
	touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[test]"
	touch $@ $(VENV)/.run

clean:
	rm -rf build dist *.egg-info gose_kernels/*.so $(VENV)/.run $(VENV)/.test

# make demo: see it work.  make test: see that it works.  Both make their environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-all test-processors chaos lint types check format clean

demo: .venv/.demo
	$(BIN)/python -m jobs.demo

# Two files at a time, each process with one thread inside operations: many tests wait for processes to start.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: .venv/.dev
	$(PARALLEL) -m "not slow"

test-slow: .venv/.dev
	$(BIN)/python -m pytest -m slow

test-all: test test-slow test-processors

# The numeric tests as other processors would run them: without AVX-512, and without AVX2 too.
KERNELS := $(addprefix tests/kernels/,$(addsuffix .py,test_multiview test_window_sum test_window_attention \
	test_quantization test_simd jbu/test_jbu_cpu jbu/test_jbu_cpu_gradients jbu/test_jbu_cpu_independence))
NUMERIC = $(KERNELS) tests/pipeline/views tests/pipeline/upsamplers
# Told a name alone, numba keeps the features of the processor it runs on.
NUMBA_AVX2 := NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx,+avx2,+fma
test-processors: .venv/.dev
	ATEN_CPU_CAPABILITY=avx2 $(NUMBA_AVX2) $(PARALLEL) -m "not slow" -q $(NUMERIC)
	ATEN_CPU_CAPABILITY=default NUMBA_CPU_NAME=generic $(PARALLEL) -m "not slow" -q $(NUMERIC)

# The main job on a cluster on this machine while everything that it needs fails; the table in docs/cluster.md has its times.
chaos: .venv/.dev
	$(BIN)/python -m benchmarks.chaos

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m benchmarks.tables --check

types: .venv/.dev
	$(BIN)/mypy

check: lint types test

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# .venv with the extra of that name; with uv where it is there (seconds), else with venv and pip (minutes).
.venv/.%: pyproject.toml constraints.txt
	@echo "installing densefeat[$*] into .venv, some GB: torch comes with CUDA …"
	@if command -v uv >/dev/null 2>&1; then \
		uv venv --quiet --allow-existing --python $(PYTHON) .venv && \
		uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[$*]'; \
	else \
		$(PYTHON) -m venv .venv && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'; \
	fi
	@touch $@

clean:
	rm -rf .venv demo build *.egg-info

# make demo: see it work.  make test: see that it works.  Both make their environment in .venv first.
PYTHON ?= python3
EXTRAS ?= dev
BIN := .venv/bin

.PHONY: demo test test-slow test-all lint types check format clean

demo: .venv/.installed
	$(BIN)/python -m jobs.demo

test: .venv/.installed
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/.installed
	$(BIN)/python -m pytest -m slow

test-all: test test-slow

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed
	$(BIN)/mypy

check: lint types test

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# uv where it is there (seconds), else venv and pip (minutes).
.venv/.installed: pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
		uv venv --quiet --allow-existing --python $(PYTHON) .venv && \
		uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[$(EXTRAS)]'; \
	else \
		$(PYTHON) -m venv .venv && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'; \
	fi
	@touch $@

clean:
	rm -rf .venv demo build *.egg-info

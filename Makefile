# Every target installs what it needs into .venv on a fresh machine (uv if present, else pip).
PYTHON ?= python3
RUN := .venv/bin/python
export RAY_DISABLE_IMPORT_WARNING := 1
export RAY_DEDUP_LOGS := 0

.PHONY: demo test test-fast test-ray test-slow test-gpu check bench install

install: .venv/.ready

.venv/.ready: pyproject.toml
	@if [ ! -x $(RUN) ]; then \
		if command -v uv >/dev/null 2>&1; then uv venv -q .venv; else $(PYTHON) -m venv .venv; fi; fi
	@echo "installing raykd and what it needs into .venv (torch is some gigabytes: a few minutes)"
	@if command -v uv >/dev/null 2>&1; then uv pip install -q --python $(RUN) -e '.[dev]'; \
		else $(RUN) -m pip install -q --disable-pip-version-check -e '.[dev]'; fi
	@touch .venv/.ready

demo: install          ## two teachers trained on digits, then one student, on Ray
	$(RUN) -m raykd run jobs/digits_demo.py

test: test-fast test-ray   ## everything that is not slow or gpu

test-fast: install     ## no Ray cluster
	$(RUN) -m pytest -q -n 2 -m "not ray and not slow and not gpu"

test-ray: install      ## real Ray clusters
	$(RUN) -m pytest -q -m "ray and not slow and not gpu"

test-slow: install     ## what takes minutes: trained weights, long comparisons
	$(RUN) -m pytest -q -m "slow and not gpu"

test-gpu: install      ## needs a CUDA device
	$(RUN) -m pytest -q -m gpu

check: install         ## lint, format, types, import directions
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: install         ## ratios measured in one run, interleaved, medians
	$(RUN) -m benchmarks

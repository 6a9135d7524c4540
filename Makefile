# `make demo` and `make test` work from a bare checkout: they need Python 3.11+ and make, no more.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
VENV_DOCS := .venv/docs
PY := $(VENV)/bin/python
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
# uv where it is installed, else in the environment itself.
UV := $(or $(shell command -v uv 2>/dev/null),$(VENV)/bin/uv)
export HF_HUB_OFFLINE ?= 1
# Each module is compiled when it is first imported, and kept: most of what is installed never is.
unexport PYTHONDONTWRITEBYTECODE
DEMO := outputs/demo
MINUTES ?= 60
# Test processes of one thread each; a tiny machine still gets two, a large one is not flooded.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 2 ? 2 : n > 8 ? 8 : n)))

# Files of few but long tests are not left for the end, where one process would wait for the other.
LONG_FIRST := --no-loadscope-reorder tests/training tests/cli tests

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/installed ## the environment, in .venv; the other targets call it

$(VENV)/installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found: install one or give PYTHON=..."; exit 2; }
	@test -x $(PY) || { echo "creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@command -v uv >/dev/null 2>&1 || test -x $(VENV)/bin/uv || $(PY) -m pip install --quiet uv
	@echo "installing the locked packages"
	@$(UV) pip install --quiet --python $(PY) --require-hashes --requirement requirements.lock
	@$(UV) pip install --quiet --python $(PY) --no-deps --no-build-isolation --editable .
	@touch $@

lock: ## resolve the dependencies anew (hashes, no addresses)
	$(UV) pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 --extra dev --output-file requirements.lock pyproject.toml
	$(UV) pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 --group docs --output-file requirements-docs.lock

demo: setup ## real pixels -> tokens -> training -> held-out evaluation and report
	$(PY) -m blip3o_lit.train experiment=demo hydra.run.dir=$(DEMO) overwrite=true
	$(PY) -m blip3o_lit.evaluate ckpt=$(DEMO)/checkpoints/last.ckpt baselines=all solver_images=64 curve_images=32
	@echo "report: $(DEMO)/report.html"

test: setup ## the whole suite
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright blip3o_lit
	time $(PY) -m pytest -m "not soak" -n $(WORKERS) --dist loadfile --durations=20 $(LONG_FIRST)

soak: setup ## the long loops: kills, all resume pairs, the pages, and MINUTES=60 of fuzzing
	BLIP3O_SOAK_MINUTES=$(MINUTES) $(PY) -m pytest -m soak

bench: setup ## benchmarks, each beside its ceiling and its peers (ONLY=name for one)
	$(PY) -m benchmarks $(if $(ONLY),ONLY=$(ONLY))

format: setup ## format and sort imports
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .

results: setup ## docs/results.md from runs: two processes of one thread (100 minutes; stopped, it goes on)
	@OMP_NUM_THREADS=1 $(PY) scripts/results.py & OMP_NUM_THREADS=1 $(PY) scripts/results.py; wait
	@$(PY) scripts/results.py page

docs: $(VENV_DOCS)/installed ## the documentation as a site, in site/ (an environment of its own)
	$(VENV_DOCS)/bin/zensical build --strict --clean
	@echo "site: $(CURDIR)/site/index.html"

$(VENV_DOCS)/installed: requirements-docs.lock
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found: install one or give PYTHON=..."; exit 2; }
	@test -x $(VENV_DOCS)/bin/python || $(PYTHON) -m venv $(VENV_DOCS)
	@$(VENV_DOCS)/bin/python -m pip install --quiet --require-hashes --requirement requirements-docs.lock
	@touch $@

audit: setup $(VENV_DOCS)/installed ## licences of the locked packages, and known holes (pip-audit; asks api.osv.dev)
	@PATH="$(dir $(UV)):$$PATH" $(PY) scripts/audit.py

dist: setup ## the wheel and the source archive, in dist/
	$(PY) -m build --no-isolation

clean: ## remove the environment and what was built
	rm -rf $(VENV) $(VENV_DOCS) build dist site .cache *.egg-info .pytest_cache .ruff_cache

.PHONY: help setup lock demo test soak bench results format docs audit dist clean

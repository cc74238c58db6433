# Everything by one word: make setup | train | test | check | docs | test-gpu | soak | bench | format; setup-composer | test-composer.
# Every word installs what it needs first; a second call installs nothing.

PYTHON ?= python3
# An exact version, so that pip takes the build that this machine's index offers for it (CPU or CUDA).
TORCH ?= torch==2.13.0
# `make train YAML=yamls/dense.yaml ARGS="seed=1 max_duration=100ba"`
YAML ?= yamls/moe.yaml
ARGS ?=

# Compiled modules are kept, whatever the environment says: each of the tests' processes would compile them again.
export PYTHONDONTWRITEBYTECODE :=

PY := .venv/bin/python
# Named after TORCH: another TORCH is another installation.
BUILD := $(subst /,-,$(subst =,-,$(firstword $(TORCH))))
STAMP := .venv/.installed-$(BUILD)
# Composer's pins conflict with ours, so it has an environment of its own.
COMPOSER_PY := .venv-composer/bin/python
COMPOSER_STAMP := .venv-composer/.installed-$(BUILD)
# The site reads the package without importing it, so its environment has no torch.
DOCS_PY := .venv-docs/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup train test check docs test-gpu soak bench format setup-composer test-composer

help:
	@sed -n '1,2p' Makefile

setup: $(STAMP)

# The pip of Python 3.11 takes four times as long to choose versions. Of the modules, those are compiled that a run
# imports; most never are.
$(STAMP): setup.py Makefile
	rm -f .venv/.installed-*
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check --upgrade 'pip>=25'
	$(PY) -m pip install --disable-pip-version-check --no-compile $(TORCH)
	if $(PY) -c 'import triton' 2>/dev/null; then extras=dev; else extras=dev,triton; fi; \
	$(PY) -m pip install --disable-pip-version-check --no-compile -e ".[$$extras]"
	$(PY) -c 'import importlib, tests.forks; [importlib.import_module(name) for name in tests.forks.IMPORTED]'
	touch $@

train: setup
	$(PY) scripts/train.py $(YAML) $(ARGS)

# One process more than CI has cores: runs that hang, stop or lose a node are waited for.
test: setup
	$(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m 'not gpu'

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) scripts/bench/render_readme.py --check
	$(PY) scripts/reference/render.py --check

docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_PY) -m mkdocs build --strict -f scripts/docs/mkdocs.yml

.venv-docs/.installed: scripts/docs/requirements.txt
	test -x $(DOCS_PY) || $(PYTHON) -m venv .venv-docs
	$(DOCS_PY) -m pip install --disable-pip-version-check -r $<
	touch $@

test-gpu: setup
	$(PY) -m pytest -n 4 -m gpu

# Tests of faults in full: 10,000 fuzzed inputs, other ones each time, and 200 kills and resumes.
soak: setup
	FAULTS_INPUTS=10000 SOAK_CYCLES=200 $(PY) -m pytest tests/faults

bench: setup
	$(PY) scripts/bench/cpu_step.py
	$(PY) scripts/bench/render_readme.py

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(PY) scripts/bench/render_readme.py
	$(PY) scripts/reference/render.py

setup-composer: $(COMPOSER_STAMP)

$(COMPOSER_STAMP): composer-requirements.txt setup.py Makefile
	rm -f .venv-composer/.installed-*
	test -x $(COMPOSER_PY) || $(PYTHON) -m venv .venv-composer
	$(COMPOSER_PY) -m pip install --disable-pip-version-check $(TORCH)
	$(COMPOSER_PY) -m pip install --disable-pip-version-check -e . pytest
	$(COMPOSER_PY) -m pip install --disable-pip-version-check --no-deps -r composer-requirements.txt
	touch $@

test-composer: setup-composer
	$(COMPOSER_PY) -m pytest tests/integrations/test_composer.py

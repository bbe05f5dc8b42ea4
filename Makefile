# Needs Python >= 3.11, make and git. Everything is made inside this folder; only pip keeps its own cache elsewhere.
PYTHON ?= python3
BIN := .venv/bin
RUN := XDG_CACHE_HOME="$(CURDIR)/.cache" MPLCONFIGDIR="$(CURDIR)/.cache/matplotlib" KERAS_HOME="$(CURDIR)/.cache/keras" $(BIN)/python

.PHONY: demo test quick check bench docs clean

demo: .venv/demo.stamp ## let four rules race on a digit classifier; writes demo.png
	$(RUN) -m optimisers demo

test: check ## the linter, the type checker and every test, a process for each core
	$(RUN) -m pytest -n auto --dist worksteal

quick: .venv/test.stamp ## one case of each test, in less than two minutes on two cores
	$(RUN) -m pytest -n auto --dist worksteal --quick

check: .venv/test.stamp ## the linter and the type checker
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(RUN) -m pyright --pythonpath $(BIN)/python

bench: .venv/test.stamp ## milliseconds per step, beside the limit of this machine's memory
	$(RUN) -m benchmarks.numpy_engine

docs: .venv/docs.stamp ## write the pages of the rules anew, then the site, into site/
	$(RUN) -m docs.make_rules
	$(RUN) -m mkdocs build --strict

clean: ## forget the environment, the caches, the site and the picture
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis dist site demo.png
	find src tests -name __pycache__ -prune -exec rm -rf {} +

# A stamp is newer than pyproject.toml once its environment is complete, so a second call installs nothing.
.venv/%.stamp: pyproject.toml | $(BIN)/python
	@echo "Installing optimisers[$*] into .venv; this takes a minute or two."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "optimisers needs Python >= 3.11; write: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

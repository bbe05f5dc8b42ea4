# Needs Python >= 3.11, make and git. Everything is made inside this folder; only pip keeps its own cache elsewhere.
PYTHON ?= python3
NEWEST ?= $(firstword $(foreach v,3.14 3.13 3.12,$(shell python$(v) -c 'print("python$(v)")' 2>/dev/null)) $(PYTHON))
BIN := .venv/bin
RUN := XDG_CACHE_HOME="$(CURDIR)/.cache" MPLCONFIGDIR="$(CURDIR)/.cache/matplotlib" KERAS_HOME="$(CURDIR)/.cache/keras" $(BIN)/python

.PHONY: demo test quick test-oldest test-newest check bench bench-page docs release changelog clean

demo: .venv/demo.stamp ## let four rules race on a digit classifier; writes demo.png
	$(RUN) -m optimisers demo

test: check ## the linter, the type checker and every test, a process for each core
	$(RUN) -m pytest -n auto --dist worksteal

quick: .venv/test.stamp ## one case of each test, in less than two minutes on two cores
	$(RUN) -m pytest -n auto --dist worksteal --quick

test-oldest: ## the oldest versions that are declared; PyTorch's is gigabytes, WITHOUT=torch leaves it out
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check optax pytest \
	  $$($(PYTHON) tests/versions/bounds.py oldest --without $(WITHOUT))
	PYTHONPATH="$(CURDIR)/src" XDG_CACHE_HOME="$(CURDIR)/.cache" .venv-oldest/bin/python -m pytest tests/versions

test-newest: ## the newest of everything, on the newest Python that is here: the quick tests
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check \
	  $$($(NEWEST) tests/versions/bounds.py newest --without $(WITHOUT))
	PYTHONPATH="$(CURDIR)/src" XDG_CACHE_HOME="$(CURDIR)/.cache" MPLCONFIGDIR="$(CURDIR)/.cache/matplotlib" \
	  KERAS_HOME="$(CURDIR)/.cache/keras" .venv-newest/bin/python -m pytest -n auto --dist worksteal --quick

check: .venv/test.stamp ## the linter and the type checker
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(RUN) -m pyright --pythonpath $(BIN)/python

bench: .venv/test.stamp ## milliseconds per step, beside the limit of this machine's memory
	$(RUN) -m benchmarks.numpy_engine

bench-page: .venv/docs.stamp ## docs/benchmarks.md and its charts, from the tables under benchmarks/results
	$(RUN) -m docs.make_benchmarks

docs: .venv/docs.stamp ## write the pages of rules, gallery, scale and benchmarks anew, then the site, into site/
	$(RUN) -m docs.make_rules
	$(RUN) -m docs.make_gallery
	$(RUN) -m docs.make_scale
	$(RUN) -m docs.make_benchmarks
	$(RUN) -m mkdocs build --strict

release: .venv/release.stamp ## the wheel and the source distribution, checked, into dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

changelog: .venv/release.stamp ## gather changelog.d/ into CHANGELOG.md, under the version of pyproject.toml
	$(BIN)/python -m towncrier build --yes --name optimisers \
	  --version "$$($(BIN)/python -c 'import optimisers; print(optimisers.__version__)')"

clean: ## forget the environment, the caches, the site and the picture
	rm -rf .venv .venv-oldest .venv-newest .cache .pytest_cache .ruff_cache .hypothesis dist site demo.png
	find src tests -name __pycache__ -prune -exec rm -rf {} +

# A stamp is newer than pyproject.toml once its environment is complete, so a second call installs nothing.
.venv/%.stamp: pyproject.toml | $(BIN)/python
	@echo "Installing optimisers[$*] into .venv; this takes a minute or two."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "optimisers needs Python >= 3.11; write: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

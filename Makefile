# What CI does, by hand. Needs nothing but Python and make; `make venv` installs the rest into .venv.
PYTHON ?= python3
BIN ?= .venv/bin
SIDE_BY_SIDE := -n 2 --dist loadfile
OLDEST := 'torch==2.6.*' 'torchvision==0.21.*' 'timm==1.0.31' 'transformers==4.49.*' 'numpy==1.26.*'
CORE := tests/convert/test_convert.py tests/host/test_hosts.py tests/look/test_correlation.py \
	$(addprefix tests/files/test_,checkpoint.py reference.py saved_folders.py export.py)

.PHONY: venv fast full lint docs site package oldest constraints

venv:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[test]'

fast:  ## a test of everything
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "not slow"

full:  ## every test
	$(BIN)/pytest -n 3 --dist loadfile  # some wait for other processes

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs:  ## tables and pages that are written from files
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/scale_model.py
	$(BIN)/python benchmarks/host_table.py

site:  ## the documentation as a site, in the folder site
	$(BIN)/pip install -q -e '.[train,plot,docs]'
	$(BIN)/mkdocs build --strict

package:  ## wheel and sdist in dist, as they would be published
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/pip install -q build twine
	.venv-package/bin/python -m build
	.venv-package/bin/twine check --strict dist/*

oldest:  ## the core with the oldest versions that are supported, in a virtual environment of its own
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -e '.[test]' $(OLDEST)
	.venv-oldest/bin/pytest $(CORE)

constraints:  ## everything with the versions in constraints.txt, likewise
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/pip install -e '.[test]' -c constraints.txt
	.venv-constraints/bin/pytest $(SIDE_BY_SIDE) -m "not slow"

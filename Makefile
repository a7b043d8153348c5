# `make book` and `make test` are all that most people need; `make help` lists the rest.
PYTHON ?= python3
BIN := .venv/bin

ROOMS := core gradients weights recovery deploy scale
UNITS := $(ROOMS:%=tests/%) tests/test_package.py tests/test_docstrings.py
# What starts processes or the compiler, or is about large models, takes as long as all the others.
SLOW := process or compil or import or sharded or reads_and_writes

.DEFAULT_GOAL := help
.PHONY: help install book test quick mutants notebooks lint clean clean-all serve
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null || sed -n 's/^\([a-z-]*\):.*## /  make \1   /p' $(MAKEFILE_LIST)

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) book/install.py

install: .venv/.installed ## make .venv and install everything into it

book: .venv/.installed ## run the chapters and build the pages; prints where to open them
	@$(BIN)/python book/build.py

lint: .venv/.installed ## ruff, mypy, Biome for JavaScript, and which way imports point
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@PYTHONPATH=src $(BIN)/lint-imports --no-cache --no-logo
	@$(BIN)/python book/vendor.py check
	@$(BIN)/mypy

quick: lint ## under a minute, for who edits: lint, types and the unit tests, with few random examples each
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -x -q --hypothesis-profile=quick -k "not ($(SLOW))" $(UNITS)

test: lint book ## everything: lint, types, unit tests, notebooks, links, pages in a browser
	@GRADPRUNE_QUIET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -p book.built_run --nbval --nbval-current-env --nbval-cell-timeout=300 tests chapters

mutants: .venv/.installed ## for developers, up to an hour: change the code a little, here and there, and see whether a test notices
	@$(BIN)/python tests/mutants/run.py

notebooks: .venv/.installed ## run the notebooks in place and clean what must not be committed
	@$(BIN)/python book/notebooks.py

serve: book ## serve the built book on http://localhost:8000 (it also opens from disk)
	@$(BIN)/python -m http.server --directory book/_build/html --bind 127.0.0.1 8000

clean: ## remove what was built
	@rm -rf build book/_build mutants .import_linter_cache .pytest_cache .ruff_cache .mypy_cache .hypothesis

clean-all: clean ## remove also .venv and the fetched JavaScript
	@rm -rf .venv book/_vendor book/node_modules src/*.egg-info

# make demo       train three students on the benchtop, evaluate them beside their teacher, report
# make lint       ruff and mypy
# make test       lint, then the tests, on up to four cores; six to fifteen minutes on two
# make test-long  the tests that take long
# make test-gpu   the tests that need a CUDA GPU
# make readme     the report of the committed results, and the README's tables from it
# Tests that need chromium or pdflatex are skipped where there is none; scripts/install_debian.sh installs it.
# All of them make .venv first. PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := demo
DEMO_METRICS := fid,gold_utility,hps,oracle,spectrum
# Images of each model; `rgbench eval` alone makes 2,048.
DEMO_NUM := 256
# Of training; the recipes alone take 250. The README's students are those of whole recipes.
DEMO_STEPS := 150

PYTEST := $(BIN)/python -m pytest -q

.PHONY: demo readme lint test test-long test-gpu install clean
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "rgbench needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

# A run that is finished is not trained again, a figure that is there is not measured again.
demo: $(STAMP)
	for recipe in lcd rg_lcd lrm; do $(BIN)/rgbench train recipes/$$recipe.yaml train.steps=$(DEMO_STEPS) --out $(DEMO)/runs/$$recipe-s0 || exit; done
	$(BIN)/rgbench eval --metric $(DEMO_METRICS) --num $(DEMO_NUM) --runs $(DEMO)/runs --results $(DEMO)/results
	$(BIN)/rgbench report $(DEMO)/results --out $(DEMO)/report
	@echo "Open $(DEMO)/report/report.html"

# The README's tables and pictures, from the committed results of the packaged recipes; the studies have a page.
readme: $(STAMP)
	$(BIN)/rgbench report results --out results/report --model teacher,lcd,rg_lcd,lrm
	$(BIN)/python -m tools.readme

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint
	$(PYTEST) -m "not long and not gpu" -n auto --dist worksteal --durations 15 --durations-min 1

test-long: $(STAMP)
	$(PYTEST) -m "long and not gpu" --timeout 3600
	$(PYTEST) -m "hypothesis and not gpu" --hypothesis-profile search --timeout 3600

test-gpu: $(STAMP)
	$(PYTEST) -m gpu --timeout 1800

clean:
	rm -rf dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

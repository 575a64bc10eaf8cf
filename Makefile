# Everything a reader or author runs. Needs Python 3.11 or newer and make, nothing else.
#   make demo      install into .venv, run the CDRL chapter, say where to look
#   make test      install what tests need, run all tests
#   make sync      after editing a notebook: format, write the package, clean the notebooks
#   make check     package = notebooks, format, lint, types, repository rules, stored outputs up to date, the wheel; no network
#   make wheel-test  build the wheel, install it outside the clone, run there what is printed for strangers; no network
#   make measure   print measures of the code; BASE=COMMIT prints those of another commit beside them
#   make outputs   execute chapters whose stored outputs are stale, store the new ones (NB="05_cdrl": these; NB=--all: every one)
#   make book      build the book into _build/html, warnings are errors; notebooks to download are plain copies
#   make claims    run what is missing for the papers' claims and print the verdicts
#   make bench     time the sampler against its floor and its rivals
#   make reliability  kill, damage and fill up trainings of all systems, some minutes; every one must end as if nothing had happened
#   make gpu       train the long presets of GPU_PRESETS, on a machine with a GPU; GPU_ARGS are passed on to `ebmbook train`
# PYTHON=... chooses the interpreter; VENV=... uses an environment of your own, into which nothing is installed.

PYTHON ?= python3
VENV   ?= .venv
# system:preset pairs that `make gpu` trains, one after another; data sets that are not embedded must be in place
# (GPU_ROWS is the name of earlier versions)
GPU_PRESETS ?= $(if $(GPU_ROWS),$(GPU_ROWS),cdrl:digits cdrl:digits-cond cdrl:checkerboard cdrl:shapes-composition)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
BIN := $(VENV)/bin
BOOK := $(BIN)/python -c 'from ebmbook.shell.book import main; exit(main())'
COPIES := $(BIN)/python -c 'from ebmbook.shell.copies import main; exit(main())'
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export PYTHONHASHSEED := 0

# An environment named on the command line is taken as it is.
ifeq ($(origin VENV),command line)
RUNTIME :=
AUTHOR  :=
else
RUNTIME := $(VENV)/.installed-runtime
AUTHOR  := $(VENV)/.installed-author
endif

.PHONY: help demo test sync check wheel-test measure outputs book bench reliability gpu claims
help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3,11))' 2>/dev/null || { \
	  echo "ebmbook needs Python 3.11 or newer; '$(PYTHON) --version' says: $$( ($(PYTHON) --version) 2>&1 | sed 's/.*: //' )"; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@[ -e $(VENV) ] && kept=1 || kept=; $(PYTHON) -m venv $(VENV) || { [ "$$kept" ] || rm -rf $(VENV); \
	  echo "Python could not make a virtual environment; on Debian and Ubuntu install the package python3-venv."; exit 1; }

$(VENV)/.installed-runtime: settings.ini setup.py constraints.txt | $(BIN)/python
	@echo "Installing ebmbook into $(VENV) (PyTorch is large: a minute or more) ..."
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-author: settings.ini setup.py constraints.txt | $(BIN)/python
	@echo "Installing ebmbook with what tests and book need into $(VENV) ..."
	@$(PIP) -e '.[dev,book,latent,diagnostics]'
	@touch $@ $(VENV)/.installed-runtime

demo: $(RUNTIME)
	@mkdir -p runs/demo
	@start=$$(date +%s); \
	$(BIN)/papermill nbs/05_cdrl.ipynb runs/demo/05_cdrl.ipynb -k python3; \
	echo; echo "Done in $$(($$(date +%s)-start)) s. Open runs/demo/05_cdrl.ipynb in Jupyter, VS Code or any notebook viewer:"; \
	echo "  the curve of the live training should fall, and the grid of samples should read as handwritten digits."; \
	find runs -name '*.png' -newermt "@$$start" 2>/dev/null | sed 's/^/  picture: /' || true

test: $(AUTHOR)
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -rs -n 2 --dist loadfile --durations 40

sync: $(AUTHOR)
	$(BIN)/ruff format --quiet .
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

# all parts run, so that one look shows everything
check: $(AUTHOR)
	@bad=0; \
	echo "1. the package is what the notebooks export";  $(BOOK) export || bad=1; \
	echo "2. format";                                    $(BIN)/ruff format --quiet --check . || { echo "make sync formats"; bad=1; }; \
	echo "3. lint";                                      $(BIN)/ruff check --quiet --output-format concise . || bad=1; \
	echo "4. types of what others use";                  $(BIN)/python tests/types_public.py || bad=1; \
	echo "5. repository rules";                          $(BIN)/python -m pytest tests/test_repo.py -q --tb=short || bad=1; \
	echo "6. stored outputs belong to the code";         $(BOOK) stale || bad=1; \
	echo "7. what a stranger installs";                  $(BIN)/python tests/wheel.py || bad=1; \
	if [ $$bad = 0 ]; then echo "check: all well"; else echo "check: see above"; exit 1; fi

wheel-test: $(AUTHOR)
	@$(BIN)/python tests/wheel.py

measure: $(AUTHOR)
	@$(BIN)/python tests/measure.py $(BASE)

outputs: $(AUTHOR)
	$(BOOK) outputs $(NB)

book: $(AUTHOR)
	$(BIN)/jupyter-book build . -W -n --keep-going
	@$(COPIES)
	@echo "Open _build/html/index.html"

bench: $(AUTHOR)
	$(BIN)/ebmbook bench

reliability: $(AUTHOR)
	OMP_NUM_THREADS=1 $(BIN)/python tests/reliability.py

gpu: $(RUNTIME)
	@for pair in $(GPU_PRESETS); do \
	  echo "== $$pair"; $(BIN)/ebmbook train "$${pair%%:*}" -p preset "$${pair##*:}" $(GPU_ARGS); done

claims: $(RUNTIME)
	$(BIN)/ebmbook claims --run

# The commands of the project. `make` alone lists them.
#
# The environment is .venv in this folder. It is built on first use and again when the requirements change; a build that
# was interrupted starts over. uv installs it: 38 s where pip needs minutes.

VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
UV_VERSION := 0.13.9
RUNTIME := $(VENV)/.runtime
TESTING := $(VENV)/.testing
INSTALLING := $(VENV)/.installing

# The first Python that is new enough; `make PYTHON=/path/to/python ...` overrides.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if $$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1; then echo $$p; break; fi; done)

ARGS ?=
PORT ?= 5000

# Container images often set it. Without stored bytecode every process of a run compiles every package that it imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help sweep test ui check bench lock clean

help:
	@echo 'make sweep [ARGS="--num-trials 20 --epochs 30"]   build .venv, run the main job (rayjobs/sweep.py --help)'
	@echo 'make ui    [PORT=5000]                            browse the results of local runs with MLflow'
	@echo 'make test  [ARGS=tests/methods]                   build .venv with the test packages, run all tests'
	@echo 'make check                                        lint, format check, types'
	@echo 'make bench [ARGS=--quick]                         every script of benchmarks/; JSON lines'
	@echo 'make lock                                         pin the newest packages that pyproject.toml allows'
	@echo 'make clean                                        remove .venv and caches; results stay'

sweep: $(RUNTIME)
	$(BIN)/python rayjobs/sweep.py $(ARGS)

# Three processes, the first beside the two others: the tests marked `commands` run whole commands and mostly wait for
# processes to start, one after the other; those marked `cluster` start Ray clusters of their own, which must not run in
# the process of the session's cluster. A selection by ARGS may leave some of them empty (exit status 5).
COMMANDS_LOG := $(VENV)/commands-tests.log
test: $(TESTING)
	@trap 'kill $$commands 2>/dev/null' EXIT INT TERM; \
	$(BIN)/python -m pytest -m commands $(ARGS) > $(COMMANDS_LOG) 2>&1 & commands=$$!; \
	$(BIN)/python -m pytest -m "not cluster and not commands" $(ARGS); first=$$?; \
	$(BIN)/python -m pytest -m cluster $(ARGS); second=$$?; \
	echo 'Tests of whole commands (running since the start) ...'; \
	wait $$commands; third=$$?; cat $(COMMANDS_LOG); \
	for code in $$first $$second $$third; do \
		[ $$code -eq 0 ] || { [ -n "$(ARGS)" ] && [ $$code -eq 5 ]; } || exit $$code; done

# One worker process: SQLite has one writer.
ui: $(RUNTIME)
	$(BIN)/mlflow server --backend-store-uri sqlite:///$(CURDIR)/mlflow.db --host 127.0.0.1 --port $(PORT) --workers 1

check: $(TESTING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(TESTING)
	@for script in benchmarks/[a-z]*.py; do \
		echo "# $$script" >&2; PYTHONPATH=. $(BIN)/python $$script $(ARGS) || exit 1; done

COMPILE = $(UV) pip compile pyproject.toml --universal --python-version 3.11 --no-header --no-annotate --quiet --upgrade
lock: $(UV)
	@(echo '# Every package of a run, pinned; made by `make lock` from pyproject.toml. Edit that file, not this one.'; \
		$(COMPILE)) > $(VENV)/runtime.txt && $(COMPILE) --extra test -c $(VENV)/runtime.txt > $(VENV)/all.txt
	@cp $(VENV)/runtime.txt requirements.txt
	@(echo '# What the tests need on top; made by `make lock`.'; echo '-r requirements.txt'; \
		grep -vxFf requirements.txt $(VENV)/all.txt) > requirements-test.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUNTIME): requirements.txt | $(UV)
	$(call install,requirements.txt)
	@touch $@

$(TESTING): requirements-test.txt requirements.txt | $(UV)
	$(call install,requirements-test.txt)
	$(install_detectron2)
	@touch $(RUNTIME) $@

# The marker outlives an interrupted installation, which may leave half of a package that looks complete.
define install
	@if [ -e $(INSTALLING) ]; then echo 'The last installation was interrupted: starting over.'; $(new_environment); fi
	@touch $(INSTALLING)
	@echo 'Installing the packages of $(1) into $(VENV) ...'
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(UV) pip install --quiet -r $(1)
	@rm $(INSTALLING)
endef

# detectron2 itself is installed from its git repository (README). The tests take the Python part of release 0.6, which a
# package index has; its C++ part is not in that package, and torchvision has what the detectors here need of it. The
# build must not find a compiler, or it looks for the sources that are missing.
NO_NINJA := $(VENV)/no-ninja
define install_detectron2
	@mkdir -p $(NO_NINJA) && printf '#!/bin/sh\nexit 1\n' > $(NO_NINJA)/ninja && chmod +x $(NO_NINJA)/ninja
	@CC=true CXX=true PATH="$(CURDIR)/$(NO_NINJA):$$PATH" VIRTUAL_ENV=$(CURDIR)/$(VENV) \
		$(UV) pip install --quiet --no-build-isolation --no-deps pb1-detectron2==0.6
endef

new_environment = $(PYTHON) -m venv --clear $(VENV) && $(BIN)/python -m pip install --quiet uv==$(UV_VERSION)

# An environment that is there and works is used as it is.
$(UV):
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c '$(NEW_ENOUGH)'; then \
		echo 'Python 3.11 or newer is needed, and "$(or $(PYTHON),python3)" is not. Install one and name it:' >&2; \
		echo '  make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)' >&2; exit 1; fi
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		$(BIN)/python -m pip install --quiet uv==$(UV_VERSION); fi
	@$@ --version >/dev/null 2>&1 || { $(new_environment); }

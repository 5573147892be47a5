# aufsd: the commands of this checkout. `make help` lists them.
# Everything is installed into a virtual environment in .venv; nothing outside the checkout changes,
# but for Debian's packages that `make demo` and the tests can use, where root runs them.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test lint format bench test-vm install clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(VENV)/installed: pyproject.toml client/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "aufsd needs Python 3.11 or later: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
		|| { echo "this Python has no venv; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e './client[cli,trio]' -e '.[dev]'
	@touch $@

demo: $(VENV)/installed ## load a root file system, stack two layers, mount, change, export, compare
	$(BIN)/python demo/demo.py

test: lint ## linters, then every test that this machine can run; says which tiers are off
	$(BIN)/python -m pytest

lint: $(VENV)/installed ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed ## rewrite the sources as ruff format wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed ## measure, each case as a ratio to a yardstick of the same run
	$(BIN)/python -m bench

test-vm: $(VENV)/installed ## run the tests in a virtual machine: make test-vm KERNEL=path/to/bzImage
	tests/vm/run $(KERNEL)

clean: ## remove what these commands made
	rm -rf $(VENV) build client/build *.egg-info client/*.egg-info

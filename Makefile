# Everything runs in .venv, which the first target that needs it builds.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(if $(shell $(name) -c 'import sys, venv, ensurepip; print(sys.version_info[:2] in ((3, 11), (3, 12)) or "")' 2>/dev/null | grep True),$(name))))
RUN := PYTHONDONTWRITEBYTECODE=1 .venv/bin/python
STAMP := .venv/.installed
PACKAGES := seqray train tune serve demo

.PHONY: help setup demo test check format clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## build .venv with every package pinned (PYTHON=... chooses the interpreter)

demo: $(STAMP)  ## the whole road on a made-up shop: prepare, train, tune, serve, ask
	$(RUN) -m demo

test: $(STAMP)  ## the tests
	$(RUN) -m pytest -q

check: $(STAMP)  ## lint, format check and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: $(STAMP)  ## put the code into shape
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:  ## remove .venv and all caches (.seqray holds runs and bundles and stays)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build dist seqray.egg-info
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The commands run from the checkout, so only what they need is installed, not the project itself.
$(STAMP): pyproject.toml constraints.txt
ifeq ($(strip $(PYTHON)),)
	@echo "error: needs Python 3.11 or 3.12 with venv (Debian: apt install python3-venv), as python3.11, python3.12 or python3;" >&2
	@echo "       or name one: make setup PYTHON=/path/to/python" >&2
	@exit 1
else
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	  || { echo "error: $(PYTHON) is not Python 3.11 or 3.12 with venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*project["dependencies"], *sum(project["optional-dependencies"].values(), []), sep="\n")' > .venv/requirements.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r .venv/requirements.txt
	@touch $@
endif

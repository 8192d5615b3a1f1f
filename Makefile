# Every target sets up what it needs in a virtual environment of its own (.venv).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test exactness real exhaustive check lint types doctest clean

# Two environments' worth of packages, installed in order of need: a demo needs no test tools.
$(VENV)/.python:
	@echo "Setting up $(VENV) (once) ..."
	@$(PYTHON) -c 'import sys; sys.exit("jaxspec needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.python
	@echo "Installing jaxspec ..."
	@$(PIP) install --editable '.[models]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.python
	@echo "Installing jaxspec with its test and development tools ..."
	@$(PIP) install --editable '.[models,train,grammar,test,dev]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## a real model, several tokens per forward
	@$(BIN)/jaxspec demo

# Neighbours share compiled programs: worksteal keeps them on one worker for as long as it can.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# Most of the tests' time is the compiler's. What these flags leave out makes programs faster, not
# other ones: level 0 where little is run, level 1 where laws take many samples. What depends on how
# programs are compiled (`optimized`: copies, last bits) and the real model are compiled as for users.
# Empty (make test HASTE=): so is everything.
HASTE := --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
LEVEL  = XLA_FLAGS="$(strip $(XLA_FLAGS) $(if $(HASTE),$(HASTE) --xla_backend_optimization_level=$(1)))"
OTHERS := exactness or law or exhaustive or optimized or real_model

test: $(VENV)/.dev  ## the tests most people run
	$(call LEVEL,0) $(PYTEST) -m "not ($(OTHERS))"

exactness: $(VENV)/.dev  ## the laws of all rules, the exactness matrix and its planted bugs
	$(call LEVEL,1) $(PYTEST) -m "(exactness or law) and not (optimized or real_model or exhaustive)"

real: $(VENV)/.dev  ## the real model, and what depends on how programs are compiled
	$(PYTEST) -m "(optimized or real_model) and not exhaustive"

exhaustive: $(VENV)/.dev  ## the whole product of the matrix's axes: hours on 2 cores
	$(PYTEST) -m exhaustive

check: lint types doctest  ## what CI runs beside the tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

doctest: $(VENV)/.dev
	$(call LEVEL,0) $(PYTEST) --doctest-modules jaxspec models/jaxspec_models

clean:
	rm -rf $(VENV)

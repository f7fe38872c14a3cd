# Two commands are all that a newcomer needs: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test lint format figures reference results-small clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than 3.10; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment; install its venv module"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(INSTALLED)  ## Set up, then run the main job on a bundled clip
	$(BIN)/rlt compare src/rlt/assets/traffic.mp4
	$(BIN)/rlt inspect src/rlt/assets/traffic.mp4 --output output/demo

test: $(INSTALLED)  ## Set up, then run the tests
	$(BIN)/python -m pytest

lint: $(INSTALLED)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## Put code into the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: $(INSTALLED)  ## Measure the figures of the README again and write them into it
	$(BIN)/rlt compare src/rlt/assets/traffic.mp4 --json docs/results/compare.json
	$(BIN)/rlt benchmark tokenize --json docs/results/tokenize.json
	$(BIN)/rlt benchmark embed --json docs/results/embed.json
	$(BIN)/rlt benchmark forward --json docs/results/forward.json
	$(BIN)/rlt inspect src/rlt/assets/traffic.mp4 --stride 2 --size 224x384 --output output/readme
	cp output/readme/contact_sheet.png docs/images/contact_sheet.png
	$(BIN)/python scripts/write_tables.py

reference: $(INSTALLED)  ## Write docs/configuration.md from the code
	$(BIN)/python scripts/write_reference.py

DATA ?= ../shared/data
results-small: $(INSTALLED)  ## Train and evaluate on small real data sets in DATA (hours), and write docs/results.md
	$(BIN)/python scripts/results_small.py $(DATA)
	$(BIN)/python scripts/write_tables.py

clean:  ## Remove the environment and everything made
	rm -rf $(VENV) output build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

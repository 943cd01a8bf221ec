# Everything a fresh machine needs: `make quickstart` and `make test` create .venv and install into it themselves.
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu    takes torch from another wheel index
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
QUICKSTART ?=
export RAY_USAGE_STATS_ENABLED = 0
export RAY_AUTH_MODE ?= disabled
export HF_HUB_OFFLINE ?= 1

.PHONY: setup quickstart smoke test test-slow check format parity bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (about two minutes; torch is the big download)"
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "motionrft needs Python 3.11 or newer, this is " + sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e '.[quickstart,viz,tracking,dev]'
	@touch $@

quickstart: setup
	$(BIN)/motionrft quickstart $(QUICKSTART)

smoke: setup
	$(BIN)/motionrft quickstart --preset smoke --run-dir runs/smoke $(QUICKSTART)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow and not parity'

# Recorded reference arrays live outside the repository; MOTIONRFT_SHARED names their folder. Absent ones fail here.
parity: setup
	MOTIONRFT_REQUIRE_GOLDEN=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m parity

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	for name in memory convert ingest; do $(BIN)/motionrft bench $$name || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

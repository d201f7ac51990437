# The commands of this project. `make setup` is part of each of them, so a fresh clone needs only one.
#
# Indexes, mirrors and proxies are yours: pip's own settings apply. Variables you may set:
#   PYTHON=python3.12       another interpreter, 3.11 or newer
#   TORCH=torch==2.13.0     another build, e.g. TORCH="torch==2.13.0 --index-url URL" for CPU or one CUDA
#   PYTEST_ARGS="-k store"  passed on by `make test`
#   KDSR_DATA=FOLDER        benchmark data, for the checks and measurements that need it

PYTHON ?= python3.11
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.kdsr-setup
PIP := $(BIN)/python -m pip --disable-pip-version-check

# These make pages, pictures and files for the docs, or are shared; none measures.
DRAWS := bench/degradation_samples.py bench/render_results.py bench/join_comparisons.py bench/measured.py
# These need programs that `make setup` does not bring; each says which.
APART := bench/serve.py bench/soak.py
MEASURES := $(filter-out $(DRAWS) $(APART),$(sort $(wildcard bench/*.py)))

.PHONY: demo test test-long lint format bench setup browser clean

demo: setup ## the whole main job on a few photographs; ends with a table and a picture
	$(BIN)/python jobs/demo.py

test: setup browser ## all tests but the long ones; the S3 ones start their own server
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not long" $(PYTEST_ARGS)

test-long: setup ## those that hit, stop and begin again whole jobs: some 25 minutes on two cores
	$(BIN)/python -m pytest -m long $(PYTEST_ARGS)

lint: setup ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## repair what can be repaired
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## measure; each script prints JSON
	set -e; for script in $(MEASURES); do $(BIN)/python $$script; done

setup: $(STAMP) ## create .venv with everything in it

# torch comes first: with it in place nothing else asks for another build. spandrel comes without its
# dependencies because it asks for torchvision, which has no build that fits a CPU build of torch.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or newer, or name yours: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is too old; kdsr needs Python 3.11 or newer" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(TORCH)
	$(PIP) install -c constraints.txt -e '.[dev,s3-local,teachers]'
	$(PIP) install -c constraints.txt --no-deps spandrel
	@touch $@

# Whoever is not root, or has no apt, gets the reason beside the skipped test.
browser: ## Chromium for the test of the server's page, where apt can bring it
	@for name in chromium chromium-browser google-chrome; do command -v $$name; done | grep -q . || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; \
	} || echo "note: no Chromium; the test of the server's page will be skipped" >&2

clean: ## remove what the commands made, .venv too
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

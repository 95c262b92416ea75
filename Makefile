# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
SETUP = $(VENV)/.complete
SUDO = $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: demo test test-long gpu-test slurm-test check fix generate docs bench clean

demo: $(SETUP)  ## train a small DiT on drawn butterflies, on two CPU processes
	@echo "== dfmspec run specs/butterfly_tiny_cpu.yaml: draws its data, trains, saves, evaluates and samples (about 4 minutes on 2 cores)"
	@$(BIN)/dfmspec validate specs/butterfly_tiny_cpu.yaml
	$(BIN)/dfmspec run specs/butterfly_tiny_cpu.yaml

test: $(SETUP) check  ## everything that must hold, in at most 20 minutes on 2 cores
	@echo "== tests (parity of layouts, resume, kills, the how-to's commands, rules, plans)"
	$(BIN)/python -m pytest -m "not long and not slurm and not gpu" -n 2 --dist loadgroup

test-long: $(SETUP)  ## what takes minutes each: parity of four ranks and FP8, blends, namespaces, kills, fuzzing; at most 25 minutes on 2 cores
	@echo "== long tests"
	$(BIN)/python -m pytest -m "long and not slurm and not gpu" -n 2 --dist loadgroup

gpu-test: $(SETUP)  ## parity of layouts, kernels, steps on the GPUs of this machine (extra gpu; GPUS=N: on the first N)
	@echo "== tests on GPUs"
	$(if $(GPUS),CUDA_VISIBLE_DEVICES=$$(seq -s, 0 $$(($(GPUS) - 1)))) $(BIN)/python -m pytest -m gpu -n 4 --dist loadgroup tests/gpu tests/trainer

slurm-test: $(SETUP)  ## runs of two nodes under a real Slurm on this machine (Debian's slurm-wlm and munge; needs root)
	@echo "== tests under Slurm: it is installed when absent; what the tests start, they stop"
	@command -v slurmctld >/dev/null && command -v munged >/dev/null || { $(SUDO) apt-get update -qq && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null; }
	$(SUDO) $(BIN)/python -m pytest -m slurm tests/slurm

check: $(SETUP)  ## format, lint, types, import contracts, density, generated files
	@echo "== format, lint, types, import contracts, density, generated files"
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports
	@$(BIN)/python tools/density.py --check && $(BIN)/python tools/generate.py --check

fix: $(SETUP)
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format . ; $(BIN)/python tools/generate.py

generate: $(SETUP)
	$(BIN)/python tools/generate.py

docs: $(SETUP)  ## the documentation as a site of its own, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

bench: $(SETUP)  ## start-up time of the commands, and validation beside a peer
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/validate.py

# torch first, and the CPU build: left to pip, a newer one would come with gigabytes of CUDA.
$(SETUP): pyproject.toml constraints.txt
	@echo "== setting up $(VENV): Python packages, with the CPU build of torch (some minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "dfmspec needs Python 3.11 or newer")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps roc-validator==0.13.0
	@$(BIN)/python -m compileall -q dfmspec
	@touch $@
	@echo "== ready: $(BIN)/dfmspec"

clean:
	rm -rf $(VENV) runs data build/site

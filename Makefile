# Every target makes the virtual environment first and installs only what changed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# A quarter of the sources is left until it is imported, if ever: tests, and models of transformers
COMPILE := $(BIN)/python -m compileall -qq -x '/tests?/|/transformers/models/(?!auto/)'
export RAY_USAGE_STATS_ENABLED ?= 0
.DEFAULT_GOAL := help
.PHONY: help install demo serve dashboard test test-slow test-all check types lint docs fuzz fuzz-formats chaos chaos-short audit sbom k8s-check integration gpu-check format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## make the virtual environment and install everything into it

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (about 3 minutes and 2.4 GB the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON="; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch
	@$(COMPILE) -j 1 $(VENV)/lib & $(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@$(COMPILE) -j 0 $(VENV)/lib || true # on all cores, as pip does not; some are for other Pythons
	@touch $@

demo: install ## train, register, serve, hot-swap and measure three tenants (ARGS: --small, --keep)
	@$(BIN)/pedro demo $(ARGS)

serve: install ## serve every registered adapter on 127.0.0.1:8000
	@$(BIN)/pedro serve $(ARGS)

dashboard: install ## open the dashboard on 127.0.0.1:8501 (ARGS="--port N")
	@$(BIN)/pedro dashboard $(ARGS)

test: install ## the fast tests
	@echo "== tests without the slow ones"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 10 $(ARGS)

test-slow: install ## the slow tests: kills, clusters, the demo, the browser
	@echo "== slow tests, two files at a time"; $(BIN)/python tests/run_slow.py $(ARGS)

test-all: test test-slow ## every test

check: install ## formatting, lint, types, import rules, documentation, Kubernetes, known vulnerabilities
	@$(MAKE) --no-print-directory -j 2 types lint docs k8s-check audit

types: install # most of the time of `check`: the others run beside it
	@echo "== mypy"; $(BIN)/mypy

lint: install
	@echo "== ruff format"; $(BIN)/ruff format --check .
	@echo "== ruff"; $(BIN)/ruff check .
	@echo "== import rules"; $(BIN)/lint-imports --no-cache

docs: install ## build the documentation into site/ (strict, without network)
	@echo "== documentation"; NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

fuzz: install ## fuzz every route and every reader of files (FUZZ=60 examples per route; the count is printed, and kept in FUZZ_OUT=FILE)
	@FUZZ=$${FUZZ:-60} $(BIN)/python -m pytest tests/test_gateway_fuzz.py $(ARGS)
	@FUZZ=$${FUZZ:-60} PEDRO_SCHEMAS=1000 $(BIN)/python -m pytest tests/test_hostile_inputs.py \
		tests/test_serving_shapes.py::test_answers_to_random_schemas_always_validate_with_any_adapter -n logical --dist load $(ARGS)

fuzz-formats: install ## search readers of weights, GGUF and adapter configs by coverage, 60 s each (needs `pip install atheris`; ARGS: --seconds N)
	@$(BIN)/python tests/fuzz_by_coverage.py $(ARGS)

audit: install ## ask osv.dev which installed packages have known vulnerabilities (skipped, with the reason, if it does not answer)
	@echo "== known vulnerabilities"; $(BIN)/python -m jobs.supply_chain audit

sbom: install ## write dist/sbom.cdx.json, a bill of materials with licences, and count the licences
	@$(BIN)/python -m jobs.supply_chain sbom $(ARGS)

chaos: install ## clients and jobs while everything around them gets killed (20 minutes; ARGS: --batches CLIENTS, --rounds N)
	@$(BIN)/python -m jobs.bench load --out jobs/results/chaos.json $(ARGS)

chaos-short: install ## a small version of the same, as in the slow tests (under 4 minutes)
	@$(BIN)/python -m pytest tests/chaos -m slow -s $(ARGS)

k8s-check: install ## the Kubernetes manifests against schemas and rules, offline and without kubectl
	@echo "== manifests"; $(BIN)/python -m pytest tests/test_k8s_guide.py tests/test_k8s_manifests.py tests/test_k8s_network.py \
		tests/test_k8s_ports.py tests/test_k8s_rendering.py $(ARGS)

integration: install ## the manifests as local processes, the guide walked, roll-outs and a drain (10 minutes; ARGS: --keep, --until STEP, --skip STEP …)
	@PYTHONPATH=tests:. $(BIN)/python -m integration $(ARGS)

gpu-check: ## check and measure on a GPU (nine minutes; only needs torch, transformers, peft and pytest in PYTHON)
	@PYTHONPATH=platform:. $(PYTHON) -m jobs.gpu_check $(ARGS)

format: install ## rewrite the code as `make check` wants it
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean: ## stop what runs and remove the local platform state (.pedro)
	@test ! -x $(BIN)/pedro || $(BIN)/pedro down --yes
	@rm -rf .pedro

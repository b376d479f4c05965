# Each target sets up .venv on its first use (and again when pyproject.toml or constraints.txt
# changed). Needs Python >= 3.11 with venv and pip; nothing is installed outside .venv.
#   make demo SEEDS=5            make demo-grpo SEEDS=5            PYTHON=python3.12 make test
# constraints.txt says how to take a torch without CUDA.
PYTHON ?= python3
SEEDS ?= 1

BIN := .venv/bin
INSTALLED := .venv/.installed

# Lanes apart from .venv: the oldest versions that pyproject.toml allows, and the newest there are.
LANE_TESTS ?= -m "not slow"
LANE = test -x $(1)/bin/python || $(PYTHON) -m venv $(1); \
	$(1)/bin/python -m pip install --disable-pip-version-check --quiet $(2) --editable ".[dev]" && \
	$(1)/bin/python -m pytest -p no:cacheprovider --numprocesses 2 --dist loadfile $(LANE_TESTS)

.PHONY: help demo demo-grpo docs test test-lowest test-newest check results

help:
	@echo "make demo   compare selection methods on a small model; leaves runs/demo/report.html (SEEDS=$(SEEDS))"
	@echo "make demo-grpo  compare ways of choosing problems for GRPO; leaves runs/demo-grpo (SEEDS=$(SEEDS))"
	@echo "make docs   build the documentation, into build/site"
	@echo "make test   run every test"
	@echo "make test-lowest  install the oldest versions allowed into .venv-lowest, and run the fast tests"
	@echo "make test-newest  install the newest versions there are into .venv-newest, and run them"
	@echo "make check  lint, check types, run the fast tests"
	@echo "make results  write what a GPU measured (recipes/results/gpu_*.json) into the documentation"

demo: $(INSTALLED)
	@echo "== Demo: $(SEEDS) seed(s) on this machine's CPU, into runs/demo"
	$(BIN)/python -m onlinesel.recipes.demo --seeds $(SEEDS) --output runs/demo
	@echo "== Done. Open runs/demo/report.html"

demo-grpo: $(INSTALLED)
	@echo "== GRPO demo: $(SEEDS) seed(s) on this machine's CPU, into runs/demo-grpo"
	$(BIN)/python -m onlinesel.recipes.demo_grpo --seeds $(SEEDS) --output runs/demo-grpo
	@echo "== Done. Open runs/demo-grpo/mixed/report.html and runs/demo-grpo/digits/report.html"

# Not --quiet: warnings that are not shown are not counted. The variable silences the theme's notice.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "== Done. Open build/site/index.html"

# Two processes, a file to one of them: files share what is costly to launch.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# constraints-lowest.txt needs Python 3.11 or 3.12: NumPy 1.26 has no wheel for 3.13.
test-lowest:
	$(call LANE,.venv-lowest,--constraint constraints-lowest.txt)

test-newest:
	$(call LANE,.venv-newest,--upgrade --upgrade-strategy eager)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

results: $(INSTALLED)
	$(BIN)/python -m onlinesel.bench.gpu.page recipes/results docs/evidence.md docs/gpu.md

$(INSTALLED): pyproject.toml constraints.txt
	@echo "== Installing onlinesel and its tools into .venv (the first time takes some minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet \
		--constraint constraints.txt --editable ".[dev]"
	touch $@

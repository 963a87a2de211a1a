# make demo         from nothing: install, compress the bundled model by 25 % and 30 %, verify, compare, print the table
# make test         from nothing: install, lint, type-check, run every test but those that serve
# make serve-check  set up vLLM in an environment of its own and serve the bundled model, original and pruned; hold
#                   reapkit serve to it
# make eval-check   set up the benchmarks' libraries in an environment of its own, and run reapkit eval against scripted servers; with
#                   REAPKIT_SHARED_DATA also the canonical solutions, 200 mutants and tau2's reference actions
# make bench        peak memory of observing 4 and 16 layers, which must not grow with the depth; time and memory of inspect, plan and
#                   prune --dry-run on checkpoints of 96,103 and 138,721 tensors
# make quantize-check  set up llm-compressor in an environment of its own and quantise a pruned, dequantised model afresh
# make study        every criterion and merger on the bundled model, made for a GPU; writes docs/study.md and its plots
# make docs         run every family's checks and write docs/architectures.md from the results
# make hub-check    observe and prune MiniMax-M2's 96,103 tensors from a hub on loopback, and print the bytes that docs/hub.md shows
# make torture      kill compress 200 times at random moments, kill it at every system call that changes a file, refuse each of these
#                   calls with every error of a disk; writes out/torture.json and the counts in docs/reliability.md
# make fuzz         100,000 strangers' files through every reader; writes benchmarks/fuzz.json, of which docs/reliability.md has a table
# make soak         compress for 30 minutes with kills, memory and open files flat (SOAK_MINUTES); counts as above
# make budget       peak memory of observing at two activation budgets, which must follow them within 10 %
# make site         the documentation as a site in out/site, and every link in it checked
# make screenshots  the pictures of m2-nano's report in docs/pictures, taken in a headless Chromium
# make clean        remove what the above left

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

SOAK_MINUTES ?= 30
# Of each benchmark's canonical solutions the first so many, all where it is empty; and mutants of them.
EVAL_PROBLEMS ?=
EVAL_MUTANTS ?= 200

.PHONY: demo test lint serve-check eval-check quantize-check hub-check docs site screenshots torture fuzz soak budget bench study clean

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py --out out

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2

serve-check: $(INSTALLED)
	PYTHON=$(PYTHON) tests/serve/setup.sh .venv-vllm
	REAPKIT_REQUIRE_SERVE=1 $(BIN)/python -m pytest -m serve tests/serve

eval-check:
	PYTHON=$(PYTHON) tests/eval/setup.sh .venv-eval
	HF_HUB_OFFLINE=1 .venv-eval/bin/python -m pytest --noconftest -m eval tests/eval/test_inspect.py
	.venv-eval/bin/python tests/eval/replay.py out/replay
	test -z "$$REAPKIT_SHARED_DATA" || .venv-eval/bin/python tests/eval/grade.py "$$REAPKIT_SHARED_DATA/benchmarks/MATH-500.jsonl.gz"
	test -z "$$REAPKIT_SHARED_DATA" || .venv-eval/bin/python tests/eval/canonical.py "$$REAPKIT_SHARED_DATA/benchmarks" \
		$(if $(EVAL_PROBLEMS),--problems $(EVAL_PROBLEMS))
	test -z "$$REAPKIT_SHARED_DATA" || .venv-eval/bin/python tests/eval/mutants.py "$$REAPKIT_SHARED_DATA/benchmarks" --count $(EVAL_MUTANTS)

quantize-check: $(INSTALLED)
	test -x .venv-quantize/bin/python || $(PYTHON) -m venv .venv-quantize
	.venv-quantize/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	.venv-quantize/bin/python -m pip install --quiet --disable-pip-version-check llmcompressor==0.14.0.1
	REAPKIT_REQUIRE_QUANTIZE=1 $(BIN)/python -m pytest -m quantize tests/test_requantize.py

hub-check: $(INSTALLED)
	$(BIN)/python -m pytest -s -m "giant or not giant" tests/test_hub.py

docs: $(INSTALLED)
	mkdir -p out
	$(BIN)/python -m pytest -n 2 tests/test_families.py --junitxml=out/families.xml
	$(BIN)/python tests/architectures_page.py out/families.xml

screenshots: $(INSTALLED)
	rm -rf out/screenshots
	$(BIN)/reapkit compress models/m2-nano --data models/m2-nano/data/calibration.jsonl --ratio 0.25 -o out/screenshots
	$(BIN)/reapkit compare models/m2-nano out/screenshots --data models/m2-nano/data/heldout.jsonl --json > out/fidelity.json
	mv out/fidelity.json out/screenshots/reapkit/fidelity.json
	$(BIN)/reapkit report out/screenshots -o out/report.html
	PYTHONPATH=tests $(BIN)/python tests/screenshots.py docs/pictures out/report.html

site: $(INSTALLED)
	$(BIN)/python -m mkdocs build --quiet

torture: $(INSTALLED)
	rm -rf out/torture/kills-* out/torture/disk-*
	REAPKIT_TORTURE=1 REAPKIT_KILLS=200 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/test_kills.py tests/test_boundaries.py
	$(BIN)/python tests/reliability_page.py

fuzz: $(INSTALLED)
	nice $(BIN)/python benchmarks/fuzz.py -o benchmarks/fuzz.json

soak: $(INSTALLED)
	mkdir -p out/torture
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py --minutes $(SOAK_MINUTES) --json out/torture/soak.json
	$(BIN)/python tests/reliability_page.py

budget: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/activation_budget.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/observe_memory.py
	$(BIN)/python benchmarks/inventories.py

study: $(INSTALLED)
	$(BIN)/python benchmarks/study.py run --out out/study
	$(BIN)/python benchmarks/study.py render --out out/study

clean:
	rm -rf $(VENV) .venv-vllm .venv-eval .venv-quantize out build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The README's commands. Everything runs inside .venv, which is set up once and again when its inputs change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -type f) setup.py

.PHONY: demo test full bench lint format clean trust fuzz differential faults soak sanitize

demo: $(VENV)/built
	$(BIN)/kdfast demo

test: $(VENV)/built
	$(BIN)/pytest -m "not full"

# What takes longer than CI should: every test, and the benchmark's whole table.
full: $(VENV)/built
	$(BIN)/pytest
	$(BIN)/kdfast bench loss --out benchmarks/results

bench: $(VENV)/built
	$(BIN)/kdfast bench loss
	$(BIN)/pytest benchmarks --benchmark-columns=median,iqr,rounds

# What looks for faults that no test names, for SECONDS each; tests/trust says what each does.
SECONDS ?= 60
PART := $(shell expr $(SECONDS) / 3)
TRUST := OMP_NUM_THREADS=1 $(BIN)/python tests/trust

trust: fuzz differential faults soak sanitize

# Native decoders under libFuzzer, Python's reader, and the bits of golden caches.
fuzz: $(VENV)/built
	$(TRUST)/fuzz.py --seconds $(SECONDS)
	$(TRUST)/reader_fuzz.py --seconds $(PART)
	$(TRUST)/bits.py --seconds $(PART)

# kd_loss against formulas written out.
differential: $(VENV)/built
	$(TRUST)/differential.py --seconds $(SECONDS)

# Processes killed, and disks that fail, at every step.
faults: $(VENV)/built
	$(TRUST)/kills.py --seconds $(SECONDS)
	$(TRUST)/disk_faults.py --seconds $(PART)

soak: $(VENV)/built
	$(TRUST)/soak.py --seconds $(SECONDS)

sanitize: $(VENV)/built
	$(TRUST)/sanitize.py --seconds $(SECONDS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name "*.h" -o -name "*.cpp" -o -name "*.cu")
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name "*.h" -o -name "*.cpp" -o -name "*.cu")

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

# Editable: Python changes need no rebuild, native ones do.
$(VENV)/built: $(VENV)/installed $(NATIVE) pyproject.toml
	$(BIN)/pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info kdfast/*.so output

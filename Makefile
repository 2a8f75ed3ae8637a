# `make demo` and `make test` set up everything they need; a second call does only what changed.
# Another interpreter: make PYTHON=python3.13. Another environment: make VENV=/path/to/venv.

PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,\
  $(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))) python3)
VENV ?= .venv
# Arguments of `promptkd demo`, for example DEMO="--seeds 3 --output runs/demo".
DEMO ?=
# Test files run side by side, this many at a time.
JOBS ?= auto
# Damaged pictures that `make fuzz` decodes.
FUZZ_FILES ?= 40000
# How long `make fuzz-guided` runs.
FUZZ_SECONDS ?= 120

BIN := $(abspath $(VENV))/bin
STAMPS := $(abspath $(VENV))/.stamps
MANIFEST := --manifest-path rust/Cargo.toml
RUST_SOURCES := rust/Cargo.toml rust/Cargo.lock rust/build.rs $(shell find rust/src rust/shim -type f)

# The test programs of cargo link with the interpreter's own library.
CARGO_ENV = PYO3_PYTHON=$(BIN)/python LD_LIBRARY_PATH="$$($(BIN)/python -c \
  'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))'):$$LD_LIBRARY_PATH"
# The environment as if active: maturin looks for zig by PATH, and refuses to choose between two.
MATURIN = env -u CONDA_PREFIX VIRTUAL_ENV=$(abspath $(VENV)) PATH="$(BIN):$$PATH" $(BIN)/maturin

# What cargo-fuzz passes to the compiler.
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
GUIDED_FLAGS = --cfg fuzzing -Zsanitizer=address -Cpasses=sancov-module \
  -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
  -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares

export PIP_DISABLE_PIP_VERSION_CHECK = 1
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# List the targets.
.PHONY: help
help:
	@awk '/^# /{text=substr($$0, 3)} /^\.PHONY: / && text {printf "  make %-10s %s\n", $$2, text; text=""}' $(MAKEFILE_LIST)

# Teach and distil on the pictures that come with the package; print and draw the table.
.PHONY: demo
demo: setup
	$(BIN)/promptkd demo $(DEMO)

# Run the quick tests: Python and Rust.
.PHONY: test
test: test-python test-rust

.PHONY: test-python test-rust
test-python: setup
	$(BIN)/pytest -m "not long" -n $(JOBS) --dist loadfile
test-rust: setup
	$(CARGO_ENV) cargo test $(MANIFEST) --locked

# Run the slow proofs: packaging, kill tests, seeds, fuzzing.
.PHONY: test-long
test-long: test-long-python fuzz

.PHONY: test-long-python
test-long-python: setup $(STAMPS)/browser
	$(BIN)/pytest -m long --durations=10 -n $(JOBS) --dist loadfile

# Decode FUZZ_FILES damaged pictures, other ones than `make test` does.
.PHONY: fuzz
fuzz: setup
	PROMPTKD_FUZZ_FILES=$(FUZZ_FILES) PROMPTKD_FUZZ_SEED=1000000 $(CARGO_ENV) \
	  cargo test $(MANIFEST) --locked --test fuzz -- --nocapture

# Fuzz the decoder for FUZZ_SECONDS, guided by coverage, under the address sanitizer (needs a C++ compiler).
.PHONY: fuzz-guided
fuzz-guided: setup
	mkdir -p rust/fuzz/found rust/fuzz/artifacts
	RUSTC_BOOTSTRAP=1 RUSTFLAGS="$(GUIDED_FLAGS)" ASAN_OPTIONS=detect_leaks=0 $(CARGO_ENV) \
	  cargo run --release --locked --manifest-path rust/fuzz/Cargo.toml --target $(HOST) -- \
	  -max_total_time=$(FUZZ_SECONDS) -timeout=20 -rss_limit_mb=4096 -print_final_stats=1 \
	  -artifact_prefix=rust/fuzz/artifacts/ rust/fuzz/found rust/fuzz/corpus

# Run every linter and type checker; change nothing.
.PHONY: lint
lint: lint-python lint-types lint-rust

.PHONY: lint-python lint-types lint-rust
lint-python: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
lint-types: setup
	$(BIN)/mypy
	$(BIN)/stubtest promptkd._rust
lint-rust: setup
	cargo fmt $(MANIFEST) --check
	$(CARGO_ENV) cargo clippy $(MANIFEST) --locked --all-targets -- -D warnings

# Bring the sources into the form that `make lint` asks for.
.PHONY: format
format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	cargo fmt $(MANIFEST)

# Build the documentation into site/; a warning is an error.
.PHONY: docs
docs: setup $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Run every benchmark; each prints a table and writes benches/results/<bench>.json.
.PHONY: bench
bench: setup
	$(BIN)/pytest benches
	$(BIN)/python benches/summary.py

# Build the release wheel (Linux: glibc 2.28 and newer, through zig) and the sdist into dist/.
.PHONY: wheel
wheel: setup $(STAMPS)/zig
	rm -rf dist
	$(MATURIN) sdist --out dist
ifeq ($(shell uname -s),Linux)
	CARGO_TARGET_DIR=rust/target/wheel $(MATURIN) build --release --locked --zig \
	  --compatibility manylinux_2_28 --out dist
else
	CARGO_TARGET_DIR=rust/target/wheel $(MATURIN) build --release --locked --out dist
endif

# Make the environment: system packages, .venv, dependencies, the compiled extension.
.PHONY: setup
setup: $(STAMPS)/extension

# Remove the environment and everything built.
.PHONY: clean
clean:
	rm -rf $(VENV) dist site rust/target python/promptkd/_rust*.so

$(STAMPS)/venv: scripts/system_packages.sh
	sh scripts/system_packages.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	mkdir -p $(STAMPS) && touch $@

# torch and its CUDA libraries take a minute or two.
$(STAMPS)/dependencies: $(STAMPS)/venv pyproject.toml
	$(BIN)/python -m pip install --progress-bar off --group dev
	touch $@

# Editable: Python sources are used where they lie, so only Rust and pyproject.toml count.
$(STAMPS)/extension: $(STAMPS)/dependencies $(RUST_SOURCES)
	$(MATURIN) develop --release --locked --extras plots,tensorboard,datasets,export,serve,text
	touch $@

# The page of `promptkd serve` is driven in it.
$(STAMPS)/browser: scripts/system_packages.sh $(STAMPS)/venv
	sh scripts/system_packages.sh $(PYTHON) browser
	touch $@

$(STAMPS)/docs: pyproject.toml $(STAMPS)/dependencies
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

$(STAMPS)/zig: $(STAMPS)/dependencies
	$(BIN)/python -m pip install --quiet ziglang
	touch $@

# `make demo` and `make test`, as root on Debian 12 or 13, install what they need; README.md says more.

export PATH := $(PATH):/usr/sbin:/sbin

SETUP := bench/setup.sh
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: help demo test lint bench soak test-vm install-deps clean

help:
	@echo "make demo          ten real guests, unified: what it saves; one booted and upgraded"
	@echo "make test          lint, then every test (root; some 10 minutes)"
	@echo "make lint          ruff, mypy, lint-imports"
	@echo "make bench         python -m bench unify, against jdupes, hardlink and rdfind"
	@echo "make soak          the long forms of the tests"
	@echo "make test-vm       Debian 12 under qemu: its kernel, guests below systemd, a shutdown, arm64"
	@echo "make install-deps  only install what the others need"
	@echo "make clean         remove the venv and caches"

demo:
	@$(SETUP) demo
	$(BIN)/python -m bench.demo

test:
	@$(SETUP) test
	@$(MAKE) --no-print-directory lint
	$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder tests/e2e tests/root tests/unit

lint:
	@$(SETUP) lint
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench:
	@$(SETUP) bench
	$(BIN)/python -m bench unify

soak:
	@$(SETUP) test
	VTEST_SOAK=1 $(PYTEST) -o timeout=7200 tests/root tests/e2e $(wildcard tests/soak)

test-vm:
	@$(SETUP) test-vm
	$(BIN)/python tests/vm/run

install-deps:
	@$(SETUP) all

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

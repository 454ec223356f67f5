# SPDX-License-Identifier: Apache-2.0
# How bottomhalf is installed, tested and measured. `make` alone prints the targets.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DISK ?= demo.qcow2
# What `make test` hands to pytest: make test TESTS=tests/aio PYTEST_ARGS='-x -k timer'
TESTS ?= tests
PYTEST_ARGS ?=
# How long `make soak` loads the daemon, and how many seeds its simulated tests get.
SOAK_SECONDS ?= 600
SOAK_SEEDS ?= 500

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install run test lint types tests without bench soak strangers clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## make .venv with the package (editable), its commands in .venv/bin

$(STAMP): pyproject.toml scripts/venv.sh
	@scripts/venv.sh $(VENV)
	@touch $@

run: install ## serve DISK=image (or a demonstration image made here) over NBD
	@test -e '$(DISK)' || { test '$(DISK)' = demo.qcow2 && $(BIN)/python scripts/make_demo.py demo.qcow2; } || \
		{ echo "run: there is no $(DISK)" >&2; exit 1; }
	$(BIN)/bottomhalf serve '$(DISK)'

test: install strangers lint tests without ## all checks and all tests

lint: install types ## ruff, and mypy in strict mode
	$(BIN)/ruff check .
	$(BIN)/ruff check --select D100,D101,D103 src

types: install
	$(BIN)/mypy src benchmarks

tests: install ## the tests alone: TESTS=path PYTEST_ARGS='-x -k word'
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(TESTS)

bench: install ## measure beside QEMU and nbdkit: ONLY=name JSON=file ROUNDS=5 BENCH_SECONDS=2 BENCH_ARGS=...
	$(BIN)/python -m benchmarks $(if $(ONLY),--only '$(ONLY)') $(if $(JSON),--json '$(JSON)') \
		$(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(BENCH_SECONDS),--seconds $(BENCH_SECONDS)) $(BENCH_ARGS)

# What io_uring's absence could break: the hosts, the event core's pollers, drivers, exports, tools.
WITHOUT := tests/host/contract tests/host/linux/test_engines.py tests/host/linux/test_linux_aio.py tests/aio/test_pollers.py tests/drivers/test_file.py tests/drivers/test_host_device.py \
	tests/block/test_copy_range.py tests/block/test_load.py tests/exports/test_nbd_lifecycle.py tests/tools/test_serve.py \
	tests/tools/test_doctor.py tests/tools/test_bh_nbd.py

without: install ## the tests that matter where the kernel refuses io_uring, and where it has no asynchronous I/O
	$(BIN)/python -m pytest --forbid io_uring --seeds 2 $(PYTEST_ARGS) $(WITHOUT)
	$(BIN)/python -m pytest --forbid io_uring=ENOSYS,linux-aio=ENOSYS --seeds 2 $(PYTEST_ARGS) $(WITHOUT)

soak: install strangers ## long tests: many seeds, then SOAK_SECONDS=600 of verified load from 200 clients
	HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest --soak --seeds $(SOAK_SEEDS) $(PYTEST_ARGS) $(TESTS)
	$(BIN)/python -m pytest --forbid io_uring,linux-aio $(PYTEST_ARGS) $(TESTS)
	$(BIN)/python -m pytest --forbid io_uring=ENOSYS $(PYTEST_ARGS) $(TESTS)
	$(BIN)/python scripts/soak.py --seconds $(SOAK_SECONDS)

strangers: ## install the foreign programs that tests compare with (apt; skips what it may not install)
	@scripts/strangers.sh

clean: ## remove .venv, caches and the demonstration image
	rm -rf $(VENV) build dist demo.qcow2 demo.raw .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find src -name '*.egg-info' -type d -prune -exec rm -rf {} +

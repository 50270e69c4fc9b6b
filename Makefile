# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# make run         one node here, with a container and a VM       LISTEN= PORT= STATE=
# make lab         one to nine emulated hosts with real KVM       NODES= LISTEN= PORT=

STATE ?= /var/lib/atoll
LISTEN ?= 127.0.0.1
PORT ?= 8006
NODES ?= 1
export STATE LISTEN PORT

BINARIES = -p atoll-api -p atoll-vmm -p atoll-relay -p atoll-container-rt
WEB = api/web/dist/index.html
WEB_SOURCES = $(shell git ls-files api/web 2>/dev/null || find api/web -type f -not -path '*/node_modules/*')

.PHONY: help build run stop clean lab lab-stop test lint bench fuzz soak

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

build: $(WEB) ## release binaries in target/release, the web page inside atolld
	@run/deps.sh build
	cargo build --release --locked $(BINARIES)

run: ## start a node with a container and a VM; again: changes nothing
	@run/deps.sh build run
	@$(MAKE) --no-print-directory build
	@BIN=$(CURDIR)/target/release run/up.sh

stop: ## end the node and its guests; what they stored stays
	@BIN=$(CURDIR)/target/release run/down.sh

clean: stop ## remove the node's state
	@run/down.sh --remove-state

lab: ## the same on NODES emulated Debian hosts with KVM, ports from PORT on
	@run/deps.sh build run test
	@$(MAKE) --no-print-directory build
	cargo build --locked -p atoll-tests --bin atoll-lab
	@ATOLL_BIN_DIR=target/release target/debug/atoll-lab up --nodes $(NODES) --listen $(LISTEN) --port $(PORT)

lab-stop: ## end the lab
	@target/debug/atoll-lab down

# The crates that are a library for others, too: their documentation has no broken link.
DOCUMENTED = -p atoll-vmm -p atoll-vmm-protocol -p atoll-relay -p atoll-devices -p atoll-disk -p atoll-thread -p atoll-firmware

lint: ## formatting, clippy and documentation, as CI does
	cargo fmt --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --quiet --no-deps --locked $(DOCUMENTED)
	cd firmware/probe && cargo fmt --check && cargo clippy --release --locked --target-dir ../../target/probe -- -D warnings

test: ## every test but the slow ones of soak; the table goes to target/test/summary.tsv
	@run/deps.sh build run test
	@$(MAKE) --no-print-directory $(WEB)
	@run/test.sh

fuzz: ## every fuzz target guided by coverage, SECONDS each; the table goes to target/fuzz/summary.tsv
	@run/deps.sh build
	@run/fuzz.sh $(or $(SECONDS),60) $(TARGETS)

soak: ## the slow forms, and the lab's tests that are too slow for each run: 20 boots with 4 vCPUs, 20 moves between hosts and 10 disturbed ones in the lab, 100 of the probe guest, ten minutes a fuzz target, whole suites
	@run/deps.sh build run test
	cargo build --workspace --bins --locked
	run/fuzz.sh 600
	ATOLL_MIGRATION_SEEDS=100 cargo nextest run --locked --profile soak -p atoll-vmm --test migration --test migration_network \
		-E 'test(exactly_one_runs)'
	ATOLL_LAB_BOOTS=20 ATOLL_LAB_DATA_MIB=1024 ATOLL_LAB_MOVES=20 ATOLL_LAB_SEEDS=10 cargo nextest run --locked --profile soak -p atoll-tests --test lab
	ATOLL_JUDGES=whole cargo nextest run --locked --profile soak -p atoll-container-rt --test judges

bench: build ## side by side with the peers; the table goes to target/bench/summary.tsv
	@run/deps.sh run test bench
	cargo build --release --locked -p atoll-benches
	target/release/atoll-benches

$(WEB): $(WEB_SOURCES)
	cd api/web && npm ci --no-audit --no-fund --loglevel=error && npm run --silent build
	@touch $@

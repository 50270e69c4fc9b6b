# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
.PHONY: help test
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16
test: ## every test
	cargo nextest run --workspace --no-fail-fast

# Everything here runs as root on Debian 12 or 13. `make setup` brings what the other targets need;
# each of them sees to it first, which takes a second when there is nothing to do.

PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
# pytest's exit status 5: there was no test to run
pytest = $(PYTEST) $(1) || [ $$? -eq 5 ]
# The file with the most tests comes first, and that with the fewest, which takes everything down, last.
TWO_FILES_AT_A_TIME := --numprocesses 2 --dist loadfile
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-down test lint format test-unit test-functional test-e2e test-routes bench clean

help:  ## Show what there is
	@awk -F ':.*## ' '/^[a-z0-9%-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## Install what the other targets need
	@test/host/setup.sh

demo: setup  ## Bring up a homeserver in a disposable host
	$(PYTHON) test/host/demo.py up

demo-down: setup  ## Remove it
	$(PYTHON) test/host/demo.py down

test: lint test-unit test-functional test-e2e  ## Run all checks and tests

lint: setup  ## Check Python, YAML and shell scripts
	.venv/bin/ruff check --quiet .
	.venv/bin/ruff format --quiet --diff .
	.venv/bin/yamllint --strict .
	grep -rlZE --exclude-dir=.git --exclude-dir=.venv '^#!/bin/(ba)?sh' . | xargs -0 --no-run-if-empty shellcheck

format: setup  ## Lay out Python as lint wants it
	.venv/bin/ruff check --quiet --select I --fix .
	.venv/bin/ruff format .

test-unit: setup  ## Run the tests of pure logic
	$(call pytest,test/unit)

test-functional: setup  ## Run the tests of Salt modules, states and templates
	$(call pytest,test/functional $(TWO_FILES_AT_A_TIME))

test-e2e: setup  ## Apply the formula in disposable hosts and use the homeserver
	$(call pytest,test/host test/e2e $(TWO_FILES_AT_A_TIME))

test-routes: setup  ## Prove the routes against releases of Synapse, or against one: SYNAPSE=1.164.0
	$(PYTHON) test/routes/proof.py $(SYNAPSE)

bench: setup  ## Run all benchmarks
	$(PYTHON) test/bench/bench.py

bench-%: setup  ## Run one of them
	$(PYTHON) test/bench/bench.py $*

clean:  ## Remove every host, and what setup made
	python3 test/host/host.py clean
	rm -rf .venv

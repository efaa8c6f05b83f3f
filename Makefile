# Everything runs in .venv, which is made when it is missing or older than what it is made of. Needs Python 3.11 and a package registry.
#
#   make demo [STACK=s3]    the main job: audit, kill -9, resume, proof
#   make demo-refunds       refunds wait for people, while no process runs
#   make demo-research      a planner and its child runs, one corrected by a fork
#   make demo-compliance    Pydantic AI agents: kill -9, resume, approvals, a fork
#   make test               the tests, crash sweeps sampled
#   make crash-sweep        every store operation of every flow as a crash point
#   make soak               200 runs over 3 workers, while flows and workers are killed for 10 minutes
#   make bench              what a step, a suspension and a fork cost; writes bench/results/
#   make lint types         ruff, mypy

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made
STACK ?= local
# Test processes: one a core, at most four, because each may start services of its own.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-refunds demo-research demo-compliance test crash-sweep soak bench lint types clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/pip || python3.11 -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m examples.license_audit.demo --stack $(STACK) $(ARGS)

demo-refunds: $(STAMP)
	$(BIN)/python -m examples.refund_approval.demo $(ARGS)

demo-research: $(STAMP)
	$(BIN)/python -m examples.research_fanout.demo $(ARGS)

demo-compliance: $(STAMP)
	$(BIN)/python -m examples.compliance_agent.demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadscope $(ARGS)

crash-sweep: $(STAMP)
	KITARU_SWEEP=all $(BIN)/python -m pytest -q -n $(JOBS) -m sweep $(ARGS)

soak: $(STAMP)
	$(BIN)/python -m tests.soak $(ARGS)

bench: $(STAMP)
	$(BIN)/python bench/step_overhead.py $(ARGS)
	$(BIN)/python bench/suspend_resume.py
	$(BIN)/python bench/fork.py

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf .kitaru-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

# One word each. Everything runs inside .venv, which `make setup` builds; `setup` costs seconds when nothing changed.
PY := .venv/bin/python
PYTHON ?= python3.11
TORCH ?= torch==2.13.0
BENCHES := spine engine_cpu router kv_transfer goodput prediction
ROOMS := tandem core engine worker prefill_worker decode_worker kvtransfer router cluster sim cli

.PHONY: setup demo test check proto bench sim sim-nightly stories gpu peers clean
setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "installing (torch first, then the rest; about two minutes the first time)"
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt "$(TORCH)"
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[server,dev]"
	@$(PY) -c "from engine.native import load_kernels; load_kernels()" # built here once, so that no start waits for it
	@touch $@

demo: setup
	@$(PY) -m cli.demo

test: setup
	@$(PY) -m pytest -n 3 --dist loadfile

check: setup
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .
	@.venv/bin/mypy $(ROOMS)
	@.venv/bin/lint-imports --no-cache
	@$(PY) -m pytest -q tests/test_tidy.py

proto: setup
	@$(PY) -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. --grpc_python_out=. proto/tandem/v1/*.proto

bench: setup
	@for name in $(BENCHES); do $(PY) -m benchmarks.$$name --quick --json benchmarks/results/$$name.json || exit 1; done

peers: setup
	@$(PY) -m benchmarks.peers

gpu: setup # nothing of ours needs a GPU yet; pytest says so with status 5
	@$(PY) -m pytest -m gpu tests || test $$? -eq 5

sim: setup # the product on virtual time, random clusters under random faults; SEED=n COUNT=1 replays one
	@$(PY) -m cli.sim_sweep --seed $(or $(SEED),0) --count $(or $(COUNT),200)

sim-nightly: setup
	@$(PY) -m cli.sim_sweep --seed $(or $(SEED),$$(date +%s)) --count $(or $(COUNT),20000)

stories: setup # every property test on examples of its own; SEED=n replays them
	@$(PY) -m pytest -n 3 --dist loadfile -m hypothesis --hypothesis-profile=default --hypothesis-seed=$(or $(SEED),$$(date +%s))

clean:
	rm -rf .venv .peers

# Each target sets up what it needs in .venv; a second run finds it there.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo test test-fast test-engine test-newest setup lint compat doctor bench bench-interference bench-lanes bench-pressure bench-programs bench-cost gpu-check client-check torture torture-contents torture-host soak coverage mutants clean

demo: setup
	@$(RUN)/agentserve demo

# What needs no engine runs in two processes, then the engines run alone; both run whatever becomes of the other.
test: setup
	@status=0; $(HALVES) WHICH="not engine" || status=1; $(RUN)/python -m pytest -m engine tests || status=1; exit $$status

# Everything that needs neither an engine nor more than a few seconds: one to two minutes, in two processes.
test-fast: setup
	@$(HALVES) WHICH="not engine and not slow"

# Both run to their end; what they say is printed when they have ended. One process imports vLLM, the other one need not: some tests
# of compat/ read vLLM's sources only. Of those that need no vLLM, some run in the first, so that both end at the same time.
HALVES = $(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target test-with-vllm test-without
SOURCES_ONLY := compat/test_contract.py compat/test_ray_contract.py compat/test_verdicts.py
COMPAT := $(filter-out $(SOURCES_ONLY),$(patsubst tests/%,%,$(wildcard tests/compat/test_*.py)))
WITH_VLLM := steps lanes gpu torture $(COMPAT) package/test_bad_input.py package/test_package.py docs bench/test_load_simulated.py
test-with-vllm:
	@$(RUN)/python -m pytest -q -m "$(WHICH)" $(addprefix tests/,$(WITH_VLLM))

test-without:
	@$(RUN)/python -m pytest -q -m "$(WHICH)" tests $(addprefix --ignore=tests/,$(WITH_VLLM) engine)

test-engine: setup
	@$(RUN)/python -m pytest -m engine tests

# The Python sources of the newest supported vLLM, fetched once (340 MB), on the kernels of the installed CPU build.
test-newest: setup
	@$(RUN)/python -m pytest tests/compat/test_newest.py

doctor: setup
	@$(RUN)/agentserve doctor

lint: setup
	@$(RUN)/ruff check . && $(RUN)/ruff format --check . && $(RUN)/mypy

# What the code relies on in vLLM, looked up in its sources: of the installed one, or of VLLM=0.33.0, fetched once (340 MB).
compat: setup
	@$(RUN)/python tools/compat.py $(if $(VLLM),--version $(VLLM))

# 20 minutes on an otherwise idle machine; into bench-results/.
bench: setup
	@$(RUN)/agentserve bench run --workload react --agents 4 --arms stock stock-chunk=256 agentserve --rounds 3
	@$(RUN)/agentserve bench run --workload coding --agents 4 --arms stock stock-chunk=256 agentserve --rounds 3

# Half an hour.
bench-interference: setup
	@$(RUN)/python -m benchmarks.interference --path engine --rounds 3 --arms stock lanes time-sliced-40ms time-sliced-20ms time-sliced-12ms --output docs/results/interference-engine.json
	@$(RUN)/python -m benchmarks.interference --path http --rounds 3 --arms stock stock-chunk=256 time-sliced-20ms time-sliced-40ms --output docs/results/interference-http.json

bench-cost: setup
	@$(RUN)/python -m pytest -q -s -o addopts= -p no:cacheprovider benchmarks/test_step_cost.py

# A quarter of an hour.
bench-lanes: setup
	@$(RUN)/python -m benchmarks.interference --path engine --rounds 3 --output docs/results/lanes-engine.json \
	  --arms stock stock-chunk=256 time-sliced-40ms lanes auto-40ms auto-20ms auto-12ms

# Sixteen agents, 43,000 tokens of live context, over KV caches of that size, a half and a quarter of it; three tool gaps on every
# server. 18 servers, 54 measured parts; the table at the end is printed again by `agentserve bench table bench-results/pressure`.
PRESSURE := bench-results/pressure
bench-pressure: setup
	@for tokens in 43008 21504 10752; do $(RUN)/agentserve bench run --workload pressure --gap-s 0.2 1 5 --kv-tokens $$tokens \
	  --arms stock agentserve --rounds 3 --slo-factor 0 --output $(PRESSURE)/kv-$$tokens || exit 1; done
	@$(RUN)/agentserve bench table $(PRESSURE)

# Programs on the engine at three loads, then the simulator against the engine: 36 servers, then 8 engines, two minutes each.
PLAS := program_quantum_ms=100
bench-programs: setup
	@for load in 0.5 0.8 0.95; do $(RUN)/agentserve bench run --workload programs --programs 48 --load $$load --slo-factor 0 --rounds 3 \
	  --arms stock agentserve-time-sliced agentserve-time-sliced:policy=plas,$(PLAS) agentserve-time-sliced:policy=atlas,$(PLAS) || exit 1; done
	@$(RUN)/python -m vllm_agentserve.simulator.agreement --programs 32 --load 0.9 --rounds 2 --anonymous \
	  --policies stock fcfs plas atlas --output docs/results/agreement.json

# Random episodes in every mode and order, every answer compared with stock's; then the lane is killed fifty times under load.
torture: setup
	@$(RUN)/python -m tests.torture.run --episodes 4 --output docs/results/torture.json
	@AGENTSERVE_LANE_KILLS=50 $(RUN)/python -m pytest --timeout 3600 tests/engine/test_lanes_faults.py -k "again_and_again"

# Twenty thousand short requests with shared prefixes that come in the same steps, with a lane: what KV blocks hold is compared.
torture-contents: setup
	@$(RUN)/python -m tests.torture.run_crowds --requests 20000 --output docs/results/torture-contents.json

# Host memory under random calls on vLLM's scheduler, without a model: ten million KV blocks are compared with what was computed.
torture-host: setup
	@$(RUN)/python -m tests.torture.run_host --blocks 10000000 --output docs/results/torture-host.json

# One engine under such episodes for an hour, and a picture of its memory.
soak: setup
	@$(RUN)/python -m tests.torture.soak --minutes 60 --output docs/results/soak.json --picture docs/results/soak.png

# Lines and branches of policy/ and scheduler/ that the tests without an engine reach: two minutes.
coverage: setup
	@$(RUN)/python -m coverage run -m pytest -q -m "not engine" tests/policy tests/steps tests/package/test_config.py
	@$(RUN)/python -m coverage report > docs/results/coverage.txt; status=$$?; cat docs/results/coverage.txt; exit $$status

# Two thousand small changes in policy/, one at a time: which do its tables notice? Ten minutes.
mutants: setup
	@rm -rf mutants && $(RUN)/mutmut run && $(RUN)/mutmut results | sed 's/^ *//' | { grep -E 'survived|timeout' || true; } > docs/results/mutants.txt && $(RUN)/mutmut export-cicd-stats
	@cp mutants/mutmut-cicd-stats.json docs/results/mutants.json

# Clients of others against a server of ours, in an environment of their own. The table goes into bench-results/clients.
CLIENTS := .venv-clients
client-check: setup $(CLIENTS)/ready
	@AGENTSERVE_CLIENTS=$(CLIENTS) $(RUN)/python -m pytest -v --timeout 1800 tests/clients

$(CLIENTS)/ready: tests/clients/requirements.txt
	@echo "installing the clients into $(CLIENTS) (some minutes)"
	@$(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip --disable-pip-version-check install -q -r tests/clients/requirements.txt
	@touch $@

# Under ten minutes on a machine with one NVIDIA GPU; into bench-results/gpu-check.
gpu-check: setup
	@$(RUN)/python -m vllm_agentserve.gpucheck --output bench-results/gpu-check

setup:
	@test -n "$(PYTHON)" || { echo "error: no CPython 3.11 to 3.13 found: install one, or name it with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) tools/bootstrap.py --venv $(VENV)

clean:
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

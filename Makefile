# Everything sets itself up in .venv first; a second run takes seconds.
python := .venv/bin/python
sources := dejavu common services deploy loadtest models tests

.PHONY: demo serve test test-layouts simulate leaks kv-kills chaos soak check format gpu-check setup clean

demo: setup ## start the system, stream a completion, show where it ran
	@$(python) -m deploy.demo

serve: setup ## start the system and stay up (options: make serve ARGS="--token-stages 2")
	@.venv/bin/dejavu serve $(ARGS)

test: setup ## all tests
	@OMP_NUM_THREADS=1 $(python) -m pytest $(ARGS)

test-layouts: setup ## every cut of the stages and every model family, through real processes (8 minutes)
	@OMP_NUM_THREADS=1 $(python) -m pytest -m matrix $(ARGS)

simulate: setup ## the deciding code of all services on a simulated network: deaths and losses by 2,000 seeds (make simulate SEEDS=100, SEEDS=500:1000, JOBS=2)
	@OMP_NUM_THREADS=1 $(python) -m loadtest.simulate --seeds $(or $(SEEDS),2000) $(if $(JOBS),--jobs $(JOBS)) $(ARGS)

leaks: setup ## 1,000 requests, cancelled and disconnected at random: every KV block must come back
	@$(python) -m loadtest.leaks --requests 1000 $(ARGS) -- --prompt-stages 2 --token-stages 2

check: setup ## format, lint, types, imports
	$(python) -m ruff format --check $(sources)
	$(python) -m ruff check $(sources)
	$(python) -m mypy $(sources)
	.venv/bin/lint-imports

format: setup ## put the code in shape
	$(python) -m ruff format $(sources)
	$(python) -m ruff check --fix $(sources)

gpu-check: ## everything that needs a GPU (options: make gpu-check ARGS="-k swap")
	@deploy/gpu_check.sh $(ARGS)

kv-kills: setup ## kill either side of a KV transfer 1,000 times (options: make kv-kills ARGS="--runs 50")
	@OMP_NUM_THREADS=1 $(python) -m loadtest.kv_kills $(ARGS)

chaos: setup ## real faults under real streams (options: make chaos ARGS="--fault token-kill --runs 30")
	@$(python) -m loadtest.chaos --json chaos.json $(ARGS)

soak: setup ## full load for half an hour, in which nothing may be taken for dead (options: make soak ARGS="--minutes 5")
	@$(python) -m loadtest.soak --json soak.json $(ARGS)

setup:
	@deploy/setup.sh

clean:
	rm -rf .venv .venv-gpu build dist *.egg-info

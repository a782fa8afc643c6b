# One command each. All of them make the environment first (.venv, some minutes and gigabytes, once).
PYTHON ?= python3
BIN := .venv/bin

# Side by side in as many processes. More start more Rays at once, each with a dozen processes, and nodes miss their time-outs.
LANES ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(LANES) --dist loadgroup --no-loadscope-reorder

.PHONY: demo serve test test-slow test-families test-browser test-random models check clean bench bench-gpu bench-cpu soak soak-nodes

demo: .venv/installed ## a picture through the bundled demo VAE, over HTTP and through a Ray handle
	$(BIN)/python tools/demo.py

serve: .venv/installed ## the same server, kept running: http://127.0.0.1:8000
	$(BIN)/remote-vae-serve run serve_config.yaml

test: .venv/installed ## on every change, in minutes
	$(PYTEST)

test-slow: .venv/installed ## what is slow by nature: whole servers in each of their modes, demos that are interrupted, the autoscaler's delays, every autoencoder
	$(PYTEST) -m 'slow or families or browser'

test-families: .venv/installed ## of that, every autoencoder of diffusers against its own pipeline; `test` runs one of each layout
	$(PYTEST) tests/families -m ''

test-browser: .venv/installed ## our mp4 and the JavaScript client in a real Chromium; skipped where there is none
	$(BIN)/python -m pytest -m browser

test-random: .venv/installed ## the tests of `test` in another order each time, which it prints: SEED=<number> repeats one
	$(PYTEST) -p randomly $(if $(SEED),--randomly-seed=$(SEED))

models: .venv/installed ## docs/models.md, measured anew
	$(BIN)/python tools/models_page.py --measure

bench: .venv/installed ## what serving costs beside its peers: a table and a drawing in benchmarks/results
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]' && $(BIN)/python -m benchmarks

bench-gpu: .venv/installed ## what decoding takes on this machine's GPU: tables in benchmarks/results
	$(BIN)/python -m benchmarks.gpu

bench-cpu: .venv/installed ## what decoding takes on this machine's processor, beside OpenVINO and ONNX Runtime: benchmarks/results/cpu.md
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]' && $(BIN)/python -m benchmarks.cpu

soak: .venv/installed ## half an hour of requests while its parts are killed, one every 20 s; MINUTES=5 is a short one, HAPROXY=1 under HAProxy
	$(BIN)/python -m benchmarks.soak --strict --minutes $(or $(MINUTES),30) $(if $(HAPROXY),--haproxy)

soak-nodes: .venv/installed ## nodes that are lost, fall silent and are drained meanwhile, on a Ray of several; HAPROXY=1 as above
	$(BIN)/python -m benchmarks.nodes $(if $(HAPROXY),--haproxy)

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python cluster/generate.py --check

clean:
	rm -rf .venv dist build demo-output .mypy_cache .pytest_cache .ruff_cache

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

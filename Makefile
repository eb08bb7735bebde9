# retinaserve: two commands matter, `make serve` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One ONNX Runtime for every target: the cpu and the gpu wheel overwrite each other.
RUNTIME ?= $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
COCO := models
COCO_WEIGHTS := coco
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: serve serve-ray install check lint fast-test test test-foreign test-slow coverage format docs reliability sbom audit coco client demo-model ablations article bench docker-test docker-requirements clean

serve: $(VENV)/.service-$(RUNTIME) ## serve the demo model on http://127.0.0.1:8000
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m service # large pages, see docs/benchmarks.md

serve-ray: $(VENV)-ray-$(RUNTIME)/.installed ## the same through Ray Serve, from an environment of its own, see docs/scaling.md
	RAY_USAGE_STATS_ENABLED=0 $(<D)/bin/serve run cluster.serve:app $(ARGUMENTS)

$(VENV)-ray-$(RUNTIME)/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$(RUNTIME),ray]'
	touch $@

coco: $(COCO)/coco.onnx ## downloads torchvision's COCO weights, exports them, serves them on http://127.0.0.1:8000
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m service --model $<

$(COCO)/coco.onnx: | install
	mkdir -p $(COCO)
	$(BIN)/python -m training import --arch retinanet_resnet50_fpn_v2 --weights $(COCO_WEIGHTS) --out $(COCO)/coco.pt
	$(BIN)/python -m training export --model $(COCO)/coco.pt --out $@ --name coco

install: $(VENV)/.everything-$(RUNTIME) ## all that a contributor needs

check: lint $(if $(filter test,$(MAKECMDGOALS)),,fast-test) ## format, lint, types, fast tests (once, if `test` is asked for too): run it before every commit

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fast-test: install
	$(BIN)/python -m pytest -q -m "not slow"

test: install ## the whole test suite; prints minutes by folder
	$(BIN)/python -m pytest --durations 15

# A folder of tests/foreign has a requirements.txt, which is all that its environment holds, pytest included.
FOREIGN := $(patsubst tests/foreign/%/requirements.txt,%,$(wildcard tests/foreign/*/requirements.txt))

test-foreign: $(FOREIGN:%=.venv-%/.installed) ## what cannot share .venv: each folder of tests/foreign, in its .venv-NAME
	$(if $(FOREIGN),,@echo "test-foreign: no folder of tests/foreign has a requirements.txt, so there is nothing to run")
	@for name in $(FOREIGN); do .venv-$$name/bin/python -m pytest tests/foreign/$$name || exit 1; done

.venv-%/.installed: tests/foreign/%/requirements.txt
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

test-slow: install .venv-label-studio/.installed ## run by hand: the deeper backbones exported, the GPU benchmark on a CPU, and tasks of `service detect` in a real Label Studio
	LABEL_STUDIO=$(CURDIR)/.venv-label-studio/bin/label-studio $(BIN)/python -m pytest tests/slow

.venv-%/.installed: tests/slow/%.txt
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

coverage: install ## the lines of model and service that their tests run: at least 95 %
	$(BIN)/python -m pytest -q --cov=model --cov=service --cov-report=term-missing:skip-covered --cov-fail-under=95 tests/model tests/service

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

DEMO := $(BIN)/python -m training train --preset demo --data data/shapes
DEMO_BOXES := --init runs/demo/best.pt --steps 3600 --learning-rate 1e-3 --warmup-steps 50 --box-loss-weight 4 --freeze-batch-norm-from 0.5

demo-model: install data/shapes ## trains model/pretrained/shapes*.onnx again: hours on a CPU; stop and start it as you like
	$(DEMO) --out runs/demo --resume
	$(DEMO) --out runs/demo-1 --resume $(DEMO_BOXES) --seed 1
	$(DEMO) --out runs/demo-2 --resume $(DEMO_BOXES) --seed 2
	$(BIN)/python -m training average runs/demo-1/best.pt runs/demo-2/best.pt --data data/shapes --out runs/demo-mean.pt
	$(BIN)/python -m training export --model runs/demo-mean.pt --out model/pretrained/shapes.onnx --name shapes
	$(BIN)/python -m training export --model runs/demo-mean.pt --out model/pretrained/shapes-int8.onnx --name shapes \
		--precision int8 --calibration data/shapes

data/shapes: | install
	rm -rf $@.unfinished
	$(BIN)/python -m training demo --out $@.unfinished --images 8000 --validation-images 500 --seed 0
	mv $@.unfinished $@

ablations: install data/article ## checks the claims of "The intuition behind RetinaNet": 50 minutes on two cores, docs/ablations.md at the end; stop and start it as you like
	$(BIN)/python -m training ablations --data data/article --out runs/article --page docs

article: ablations ## the name that it had

data/article: | install
	rm -rf $@.unfinished
	$(BIN)/python -m training demo --out $@.unfinished --images 3000 --validation-images 150 --seed 0
	mv $@.unfinished $@

docs: install ## writes docs/configuration.md from the settings
	$(BIN)/python -m tests.support.configuration > docs/configuration.md.unfinished
	mv docs/configuration.md.unfinished docs/configuration.md

bench: install ## the benchmarks that docs/benchmarks.md holds; nothing else should run on the machine
	$(BIN)/python -m tests.benchmarks.speed
	$(BIN)/python -m tests.benchmarks.service
	$(BIN)/python -m tests.benchmarks.cpu
	$(BIN)/python -m tests.benchmarks.scale
	$(BIN)/python -m tests.benchmarks.compare
	$(BIN)/python -m tests.benchmarks.compare --resnet50 --clients 1 8 --requests 20 --rounds 2

reliability: install ## every gate of docs/reliability.md at full length, then each against a build with a fault: hours; stop and start it as you like
	$(BIN)/python -m tests.reliability
	$(BIN)/python -m tests.reliability --control

AUDIT := .venv-audit

sbom: $(AUDIT)/.installed ## bills of material of the images, CycloneDX, in build/
	mkdir -p build
	for runtime in cpu gpu; do $(AUDIT)/bin/cyclonedx-py requirements docker/requirements-$$runtime.txt --pyproject pyproject.toml \
	  --output-reproducible --output-file build/sbom-$$runtime.json || exit 1; done

audit: $(AUDIT)/.installed ## known vulnerabilities of what the images and a contributor install; asks PyPI, and fails where that has no answer
	for list in constraints.txt docker/requirements-cpu.txt docker/requirements-gpu.txt; do \
	  $(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps --requirement $$list || exit 1; done

$(AUDIT)/.installed:
	$(PYTHON) -m venv --clear $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0 pip-audit==2.10.1
	touch $@

client: install ## the Python client's wheel and sdist, in client/dist
	$(PIP) build
	rm -rf client/dist
	$(BIN)/python -m build --outdir client/dist client

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

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup data check train evaluate export web serve doctor slurm k8s ui lint format test test-cluster test-images fuzz bench
.PHONY: package images lock licenses clean

CONFIG ?= configs/digits.yaml
ARGS ?=
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3))
VENV ?= .venv
# Where to take torch from instead of the lock file, for example https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
UI_PORT ?= 5000
SERVE_PORT ?= 8000
# For `make slurm`: machines, GPUs on each (nothing: the CPUs), VERBS if not the whole chain, more options of sbatch
NODES ?= 1
GPUS ?=
SBATCH ?=
# For `make k8s`: trainjob (with the Kubeflow Trainer) or indexed-job (without any operator)
K8S ?= indexed-job
# For `make images`: which of docker/NAME.Dockerfile, and what builds them (docker, podman or buildah) if not the first that works
IMAGES ?= serve train
BUILDER ?=
# For `make fuzz`
SECONDS ?= 60
FUZZ ?= build/fuzz
LIBJPEG ?=

# What runs a model in the browser, from the npm registry
ONNXRUNTIME_WEB := onnxruntime-web-1.30.0
ONNXRUNTIME_WEB_SHA512 := ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca590a5cdc57bb2f35ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61
VENDOR := pipeline/export/web/vendor

READY := $(VENV)/.ready
SHARDLINE := $(VENV)/bin/shardline
SETTINGS := --config $(CONFIG) $(ARGS)
# Files of tests side by side: many of them wait for a server, a time-out or a process more than they compute.
# (A process of pytest that dies ends all of it: with another in its place it would wait for the lost file for ever.)
TWO_AT_ONCE := --numprocesses 2 --dist loadfile --max-worker-restart 0
CUDA_PACKAGES := torch|torchvision|triton|cuda-.*|nvidia-.*
COMPILE := uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-annotate --no-header pyproject.toml

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  CONFIG=FILE          the run's configuration (now $(CONFIG))"
	@echo "  ARGS='--key value'   settings that differ from it, for example ARGS='--trainer.max_epochs 5'"
	@echo "  PROCS=N              training processes (default: one a GPU, 2 on a CPU)"

setup: $(READY) ## build the environment in .venv; every other target does so when it is needed

$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python found; install Python 3.11 or newer with its venv module" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old; name Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
	@test -x $(VENV)/bin/python || { mkdir -p $(VENV); free=$$(df -Pm $(VENV) | awk 'NR == 2 { print $$4 }'); \
		needed=$(if $(TORCH_INDEX),3000,7500); test "$$free" -ge "$$needed" || { rmdir $(VENV) 2> /dev/null || true; \
		echo "error: $(VENV) needs $$needed MB, and its disk has $$free MB left; make room, or name another place: make VENV=/path" >&2; \
		exit 2; }; }
	@echo "setting up $(VENV) (once; torch is a large download)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@install() { $(VENV)/bin/pip install --disable-pip-version-check --no-input --quiet "$$@" >> $(VENV)/setup.log 2>&1 || \
			{ tail -n 15 $(VENV)/setup.log >&2; echo "error: set-up failed; all of it is in $(VENV)/setup.log" >&2; exit 2; }; }; \
	: > $(VENV)/setup.log; \
	if [ -z "$(TORCH_INDEX)" ]; then \
		install --no-deps --require-hashes -r requirements.lock; \
	else \
		awk '/^[a-z]/ { skip = $$0 ~ /^($(CUDA_PACKAGES))==/ } !skip' requirements.lock > $(VENV)/without-torch.lock; \
		install --no-deps --require-hashes -r $(VENV)/without-torch.lock; \
		install --no-deps --index-url $(TORCH_INDEX) $$(grep -oE '^(torch|torchvision)==[0-9.]+' requirements.lock); \
	fi; \
	install --no-deps --no-build-isolation --editable .
	@$(VENV)/bin/python -c 'import pipeline.data.native._jpeg' 2> /dev/null || \
		echo "the native decoder was not built (no C compiler, or no headers of libjpeg-turbo): torchvision.io decodes; make native"
	@touch $@

native: $(READY) ## the decoder in C, where set-up could not build it: needs cc and libjpeg-turbo's headers
	@rm -rf build/native; mkdir -p build; \
	$(VENV)/bin/python setup.py --quiet build_ext --inplace --force --build-temp build/native --build-lib build/native \
		> build/native.log 2>&1 || true; \
	$(VENV)/bin/python -c 'import pipeline.data.native._jpeg' 2> /dev/null || \
		{ grep -iE 'error|not found|no such' build/native.log | head -n 3 | cut -c 1-200 >&2 || true; \
		echo "error: the native decoder was not built; install what it needs (Debian, Ubuntu: apt-get install gcc libjpeg-dev)" >&2; exit 2; }
	@$(VENV)/bin/python -c 'from pipeline.data import native; print("crops are decoded by", native.describe(None))'

data: $(READY) ## raw images -> shards in data/NAME
	$(SHARDLINE) shard $(SETTINGS)

check: data ## shards -> verdicts on data, seed, network
	$(SHARDLINE) check $(SETTINGS)

train: check ## everything from nothing to a validated ONNX file in runs/NAME/export
	$(SHARDLINE) train $(SETTINGS)
	$(SHARDLINE) evaluate $(SETTINGS)
	$(SHARDLINE) export $(SETTINGS)

evaluate: $(READY) ## best checkpoint -> accuracy on the test split
	$(SHARDLINE) evaluate $(SETTINGS)

export: $(READY) ## best checkpoint -> validated ONNX
	$(SHARDLINE) export $(SETTINGS)

web: $(VENDOR)/.$(ONNXRUNTIME_WEB) ## fetch what a page needs to run a model (export.targets: [web]); npm

$(VENDOR)/.$(ONNXRUNTIME_WEB):
	@command -v npm > /dev/null || { echo "error: npm is not installed (Debian, Ubuntu: apt-get install npm)" >&2; exit 2; }
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	package=$$folder/$(ONNXRUNTIME_WEB).tgz; \
	npm pack --silent --pack-destination "$$folder" $(ONNXRUNTIME_WEB:onnxruntime-web-%=onnxruntime-web@%) > /dev/null || \
		{ echo "error: npm cannot fetch $(ONNXRUNTIME_WEB); is its registry reachable?" >&2; exit 2; }; \
	echo "$(ONNXRUNTIME_WEB_SHA512)  $$package" | sha512sum --check --status || \
		{ echo "error: $(ONNXRUNTIME_WEB) is not the package that the Makefile expects: its sha512 differs" >&2; exit 2; }; \
	tar -xzf "$$package" -C "$$folder" package/dist/ort.wasm.bundle.min.mjs package/dist/ort-wasm-simd-threaded.wasm; \
	mkdir -p $(VENDOR); \
	install -m 644 "$$folder/package/dist/ort-wasm-simd-threaded.wasm" $(VENDOR)/; \
	install -m 644 "$$folder/package/dist/ort.wasm.bundle.min.mjs" $(VENDOR)/ort.wasm.bundle.min.js  # some servers know no .mjs
	@touch $@

serve: $(READY) ## the exported model answers over HTTP, with a page to drop photos on: SERVE_PORT=8000
	$(SHARDLINE) serve --port $(SERVE_PORT) $(SETTINGS)

doctor: $(READY) ## what a long job would trip over, on this machine
	$(SHARDLINE) doctor $(SETTINGS)

slurm: $(READY) ## the whole chain, or VERBS of it, as a Slurm job: NODES=4 GPUS=8
	sbatch --nodes=$(NODES) $(if $(GPUS),--gpus-per-node=$(GPUS)) $(SBATCH) configs/slurm/chain.sbatch $(SETTINGS)

k8s: ## the whole chain on Kubernetes: K8S=trainjob or K8S=indexed-job
	kubectl apply -k configs/kubernetes/$(K8S)

ui: $(READY) ## look at the runs in a browser: links to curves, comparison and model
	$(SHARDLINE) ui $(SETTINGS) --port $(UI_PORT)

lint: $(READY) ## ruff, mypy --strict, import order
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

format: $(READY) ## let ruff rewrite what it can
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

test: $(READY) ## every test
	@OMP_NUM_THREADS=1 $(VENV)/bin/pytest $(TWO_AT_ONCE)

test-cluster: $(READY) ## a real Slurm and two hosts on this machine; root, slurm-wlm, munge, iproute2, kubectl
	@OMP_NUM_THREADS=1 $(VENV)/bin/pytest $(TWO_AT_ONCE) -m cluster tests/cluster

test-images: $(READY) ## builds the images without a daemon; root, buildah, podman, runc, mmdebstrap
	@OMP_NUM_THREADS=1 $(VENV)/bin/pytest -m images tests/images

# The decoder in C with the sanitizers and libFuzzer. LIBJPEG: where a libjpeg.a was built with `-fsanitize=fuzzer-no-link,address`, so
# that the search sees into it too, in place of the system's.
$(FUZZ)/decoder: tests/fuzz/decoder.c $(wildcard pipeline/data/native/*.[ch])
	@command -v clang > /dev/null || { echo "error: clang is not installed (Debian, Ubuntu: apt-get install clang)" >&2; exit 2; }
	@mkdir -p $(FUZZ)
	clang -std=c11 -g -O2 -ffp-contract=off -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Ipipeline/data/native \
		$(if $(LIBJPEG),-I$(LIBJPEG)/include) $< $(filter-out %/module.c,$(filter pipeline/%.c,$^)) \
		$(or $(LIBJPEG:%=%/lib/libjpeg.a),-ljpeg) -lm -o $@

fuzz: $(FUZZ)/decoder ## inputs that libFuzzer makes up, against the decoder in C: SECONDS=600; clang
	@mkdir -p $(FUZZ)/corpus
	$(FUZZ)/decoder -max_total_time=$(SECONDS) -max_len=12000 -rss_limit_mb=2000 -timeout=60 -print_final_stats=1 \
		-dict=tests/fuzz/jpeg.dict -artifact_prefix=$(FUZZ)/ $(FUZZ)/corpus tests/fuzz/corpus

bench: $(READY) ## our loader and loop beside others, on this machine; table and picture in bench/results
	$(SHARDLINE) bench data $(ARGS)

# The files in a wheel bear the time of the last commit, so the same commit gives the same bytes.
package: $(READY) web ## source distribution and wheel, in dist/; the wheel has the native decoder and its libjpeg in it
	@BIN=$(VENV)/bin SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || date +%s) docker/package.sh . dist

images: ## container images and what each holds (dist/sbom-NAME.json), by docker, podman or buildah: IMAGES="serve train"
	@BUILDER=$(BUILDER) docker/build.sh $(IMAGES)

lock: ## every lock file anew from pyproject.toml, by uv; what is locked stays where it still fits
	@command -v uv >/dev/null || { echo "error: no uv found, which resolves the lock files; install it: pip install uv" >&2; exit 2; }
	$(COMPILE) --extra train --extra serve --extra tracking --extra server --extra dev -o requirements.lock
	$(COMPILE) --constraint requirements.lock --extra serve --extra tracking -o docker/serve.lock
	$(COMPILE) --constraint requirements.lock --extra train --extra serve --extra s3 -o docker/train.lock
	$(COMPILE) --constraint requirements.lock --extra server -o docker/mlflow.lock

licenses: $(READY) ## docs/licenses.md from the lock files
	@$(VENV)/bin/python docker/licenses.py

clean: ## remove caches and builds; never runs, data or .venv
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	find docker pipeline tests -name __pycache__ -type d -exec rm -rf {} +

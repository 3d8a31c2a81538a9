# `make help` lists the verbs. Everything made lies under .venvs/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
# the tests start hundreds of interpreters, which would compile everything each time
unexport PYTHONDONTWRITEBYTECODE
# where rustup puts cargo, which a shell that was there before does not know
export PATH := $(PATH):$(HOME)/.cargo/bin

PYTHONS := $(shell scripts/find-pythons)
VERSIONS := $(foreach python,$(PYTHONS),$(firstword $(subst =, ,$(python))))
# the oldest interpreter runs everything; the others run what depends on the interpreter
FIRST := $(firstword $(VERSIONS))
OTHERS := $(wordlist 2,99,$(VERSIONS))
interpreter = $(lastword $(subst =, ,$(filter $(1)=%,$(PYTHONS))))
VENV := .venvs/$(FIRST)
PYTHON := $(VENV)/bin/python
UV := .venvs/tools/bin/uv

SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
PYTEST = $(SUDO) env $(if $(SIDEROLINK_NATIVE),SIDEROLINK_NATIVE=$(SIDEROLINK_NATIVE)) PATH="$(abspath $(VENV)/bin):$$PATH:/usr/sbin:/sbin" $(PYTHON) -m pytest
ARGS ?=
NATIVE := $(wildcard native/src/*.rs) native/Cargo.toml native/Cargo.lock native/rustfmt.toml
comma := ,
space := $(subst ,, )
# the Debian package of the kernel that `make test-kernel` boots
KERNEL ?= linux-image-amd64
IN_THE_VM = $(PYTHON) scripts/kernel_vm.py --kernel $(KERNEL) --resident $(VENV)/kernel-files \
	$(abspath $(PYTHON)) -m pytest -q -p no:cacheprovider -o timeout=120
# half of the time that tests/kernel takes; the other half is links, some of which have to grow two minutes old
KERNEL_SERVERS := $(foreach name,absence other_users restart server ten_thousand_peers two_servers,tests/kernel/test_$(name).py)

COVERED_WELL := $(subst $(space),$(comma),$(addprefix siderolink/,common/wireguard/noise/* common/wireguard/packets/* common/transport/* server/admission/* server/store/*))

.PHONY: help setup native native-check native-tests native-sanitized needs demo demo-ha test check lint types fresh format proto docs unit netns interop examples dist verify-dist test-kernel kernel-servers kernel-links others h2-range pure all-tests coverage bench bench-recovery soak clean

help: ## this list
	@sed -n 's/^\([a-z0-9 -]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 32

setup: $(VENV)/.ready ## a virtual environment with the package and the developer's tools

native: setup ## the optional compiled core of the data plane, if Rust is installed; with NEEDED=1 it is an error if not
	@scripts/build-native $(UV) $(VENV) $(NEEDED)

needs: ## the Debian packages that the tests use (apt-get, as root or by sudo)
	@scripts/install-needs test

demo: setup ## a server and two machines, in temporary network namespaces
	@$(PYTHON) -m siderolink demo $(ARGS)

demo-ha: setup ## three servers with a temporary Postgres; one is killed, one drained. As root; needs Postgres's programs
	@$(SUDO) $(PYTHON) -m siderolink demo --several-servers $(ARGS)

test: needs native check ## every check and every test, on every interpreter and with the kernel's WireGuard
	@echo "beside what follows: tests that take minutes, the kernel's WireGuard, and other interpreters"
	@$(PYTEST) -q -m long $(ARGS) >.venvs/long.log 2>&1 & long=$$!; \
	{ status=0; $(MAKE) docs || status=$$?; $(MAKE) test-kernel || status=$$?; $(MAKE) others || status=$$?; $(MAKE) h2-range || status=$$?; \
	[ -z "$(SIDEROLINK_NATIVE)" ] || $(MAKE) pure || status=$$?; exit $$status; } >.venvs/beside.log 2>&1 & beside=$$!; \
	status=0; $(MAKE) all-tests || status=$$?; \
	wait $$long || status=$$?; wait $$beside || status=$$?; cat .venvs/long.log .venvs/beside.log; exit $$status

check: lint types fresh native-check ## all checks that do not run the code

native-check: ## rustfmt and clippy, if Rust is installed
	@if ! command -v cargo >/dev/null; then echo "native: not checked, there is no cargo"; \
	else $(MAKE) --silent .venvs/native-checked; fi

.venvs/native-checked: $(NATIVE)
	@echo "native"
	@cd native && cargo fmt --check
	@cd native && CARGO_TARGET_DIR=../.venvs/native-target cargo clippy --quiet --all-targets -- -D warnings
	@touch $@

native-tests: ## the crate's own tests
	@cd native && CARGO_TARGET_DIR=../.venvs/native-target cargo test --quiet --no-default-features $(ARGS)

native-sanitized: setup ## the compiled core under the address sanitizer, by its tests and a fuzzer (SECONDS=60), and its index arithmetic by Miri
	@PYTHON=$(abspath $(PYTHON)) native/address-sanitizer $(or $(SECONDS),60)
	@if cargo +nightly miri --version >/dev/null 2>&1; then \
		cd native && CARGO_TARGET_DIR=../.venvs/native-miri cargo +nightly miri test --quiet --no-default-features; \
	else echo "Miri was left out: rustup toolchain install nightly --component miri"; fi

lint: setup ## format and lint
	@echo "lint"
	@$(PYTHON) -m ruff format --check --quiet .
	@$(PYTHON) -m ruff check --quiet .
	@$(VENV)/bin/lint-imports >.venvs/imports.log || { cat .venvs/imports.log; exit 1; }

types: setup ## mypy, strict
	@echo "types"
	@$(PYTHON) -m mypy

fresh: setup ## check that generated code and pages match their sources
	@echo "fresh"
	@$(PYTHON) scripts/generate_pb.py --check
	@$(PYTHON) scripts/generate_docs.py --check

format: setup ## format the code and fix what can be fixed automatically
	@$(PYTHON) -m ruff format .
	@$(PYTHON) -m ruff check --fix .

proto: setup ## generate siderolink/common/pb from siderolink/common/proto
	@$(PYTHON) scripts/generate_pb.py

unit: setup ## tests without requirements
	@$(PYTHON) -m pytest tests/unit $(ARGS)

netns interop examples: setup needs ## tests in network namespaces; with other WireGuard and gRPC implementations; of the examples
	@$(PYTEST) tests/$@ $(ARGS)

test-kernel: setup needs ## the kernel's own WireGuard, in two virtual machines at once; KERNEL=linux-image-rt-amd64 for another kernel
	@scripts/install-needs kernel
	@$(PYTHON) scripts/kernel_vm.py --kernel $(KERNEL) --fetch
	@VM_FILES=$(abspath $(VENV))/kernel-files $(PYTHON) -m pytest -q --collect-only -p no:cacheprovider tests/kernel $(ARGS) >/dev/null || \
		{ echo "tests/kernel cannot be read, or ARGS leaves no test of it" >&2; exit 1; }
	@echo "two machines at once, each of which is heard of when it ends, after two to five minutes"
	@$(MAKE) --jobs=2 --output-sync=target kernel-servers kernel-links

# ARGS may leave one half without a test (status 5), but not both: that was seen to before
kernel-servers:
	@$(IN_THE_VM) $(KERNEL_SERVERS) $(ARGS) || [ $$? -eq 5 ]

kernel-links:
	@$(IN_THE_VM) tests/kernel $(KERNEL_SERVERS:%=--ignore=%) $(ARGS) || [ $$? -eq 5 ]

.PHONY: test-talos-client
# a Go module of its own, so that nothing of it comes into the package
test-talos-client: setup needs ## the machines' own client package (Go, from the module proxy) through `siderolink forward`
	@cd tests/talos_client && go build -o $(abspath $(VENV))/talos-client .
	@$(SUDO) env TALOS_CLIENT=$(abspath $(VENV))/talos-client PATH="$(abspath $(VENV)/bin):$$PATH:/usr/sbin:/sbin" $(PYTHON) -m pytest tests/talos_client $(ARGS)

.PHONY: test-go-peers
test-go-peers: setup needs ## machines and servers made of grpc-go and wireguard-go (Go, from the module proxy) against ours
	@cd tests/go_peers && go build -o $(abspath $(VENV))/go-peers .
	@$(SUDO) env GO_PEERS=$(abspath $(VENV))/go-peers PATH="$(abspath $(VENV)/bin):$$PATH:/usr/sbin:/sbin" $(PYTHON) -m pytest tests/go_peers $(ARGS)

.PHONY: test-talosctl
# not part of `make test`: the build takes many minutes
test-talosctl: setup needs ## the machines' real command-line client, talosctl (Go, from the module proxy), through `siderolink forward`
	@cd tests/talos_client && go build -o $(abspath $(VENV))/talos-client .
	@cd tests/talosctl && timeout 2400 nice -n 19 go build -o $(abspath $(VENV))/talosctl github.com/siderolabs/talos/cmd/talosctl
	@$(SUDO) env TALOS_CLIENT=$(abspath $(VENV))/talos-client TALOSCTL=$(abspath $(VENV))/talosctl PATH="$(abspath $(VENV)/bin):$$PATH:/usr/sbin:/sbin" \
		$(PYTHON) -m pytest tests/talosctl $(ARGS)

h2-range: setup ## tests of the gRPC layer with the lowest and the newest h2 that grpclib allows
	@scripts/h2-range $(UV) $(VENV)

others: $(OTHERS:%=others-%)

others-%: .venvs/%/.ready needs
	@echo "unit tests, and links in namespaces, on Python $*"
	@SIDEROLINK_NATIVE= $(MAKE) VENV=.venvs/$* some-tests

pure: setup needs ## unit tests and links in namespaces without the compiled core
	@echo "unit tests, and links in namespaces, without the compiled core"
	@SIDEROLINK_NATIVE=0 $(MAKE) some-tests

some-tests:
	@$(PYTEST) -q -m "not long" tests/unit tests/netns/test_link.py tests/netns/test_server.py $(ARGS)

all-tests: setup needs
	@echo "everything on Python $(FIRST)"
	@$(PYTEST) -q -m "not long" --cov --cov-report= $(ARGS)
	@if [ -z "$(ARGS)" ]; then $(MAKE) coverage; fi

coverage: ## the coverage of the last whole run; the most important packages need 90 percent
	@$(SUDO) $(PYTHON) -m coverage report --skip-covered --skip-empty --sort=cover
	@$(SUDO) $(PYTHON) -m coverage report --format=total --include='$(COVERED_WELL)' --fail-under=90 | sed 's/^/branch coverage in percent of the engine, packets, transport, admission and store: /'

bench: setup needs ## benchmarks beside other programs: tables, and .venvs/bench/throughput.{json,svg}
	@$(UV) pip install --quiet --python $(PYTHON) --group bench
	@$(SUDO) env PATH="$$PATH" $(PYTHON) benchmarks/throughput.py --save .venvs/bench $(ARGS)
	@for file in $(filter-out $(addprefix benchmarks/,throughput.py recovery.py store.py),$(wildcard benchmarks/*.py)); do $(SUDO) $(PYTHON) "$$file"; done
	@$(PYTHON) benchmarks/store.py joins

bench-recovery: setup needs ## how soon links recover from a killed server, a cut stream, a network outage
	@$(SUDO) env PATH="$(abspath $(VENV)/bin):$$PATH:/usr/sbin:/sbin" $(PYTHON) benchmarks/recovery.py $(ARGS)

faults: setup needs ## faults of several servers with one database: outages, stopped servers, network splits; some minutes
	@$(PYTEST) tests/faults $(ARGS)

soak: setup needs ## ten minutes of random faults; then all machines must be connected and nothing leaked
	@SOAK_SECONDS=600 $(MAKE) netns ARGS="-k soak -m long -s -o timeout=900 $(ARGS)"

docs: setup ## the documentation site in .venvs/site: reference pages generated, links and search checked, no external requests
	@$(PYTHON) scripts/generate_docs.py
	@scripts/make-docs $(UV) $(call interpreter,$(FIRST))
	@$(PYTHON) scripts/check-search .venvs/site

dist: $(UV) ## wheel and sdist in dist/: reproducible, checked by twine, installed into fresh environments with the lowest and newest versions
	@scripts/make-dist $(abspath $(UV)) $(call interpreter,$(FIRST))
	@scripts/dist-range $(abspath $(UV)) --untested $(PYTHONS)

verify-dist: setup dist ## the chart, the compose file, the image, the first hour, the Debian packages in booted Debians, the wheel's tests with the lowest and newest versions; 40 minutes, not part of `make test`
	@scripts/install-needs dist
	@scripts/chart_trial
	@$(SUDO) env PATH="$$PATH:/usr/sbin:/sbin" $(PYTHON) scripts/compose_trial.py
	@$(SUDO) scripts/image_trial bookworm $(abspath $(PYTHON))
	@$(SUDO) scripts/first_hour_trial bookworm
	@for suite in bookworm trixie; do $(SUDO) scripts/deb_trial $(abspath $(UV)) $$suite || exit 1; done
	@scripts/dist-range $(abspath $(UV)) $(PYTHONS)
	@echo "== all is well: everything that is shipped"

clean: ## remove what make made
	rm -rf .venvs dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venvs/tools/bin/uv:
	@$(if $(FIRST),,scripts/install-needs python; echo "Python 3.11 or newer is needed; run make again if it was just installed" >&2; exit 1)
	@scripts/install-needs python $(call interpreter,$(FIRST))
	@$(call interpreter,$(FIRST)) -m venv .venvs/tools
	@.venvs/tools/bin/python -m pip install --quiet --disable-pip-version-check uv

.PRECIOUS: .venvs/%/.ready
.venvs/%/.ready: pyproject.toml | $(UV)
	@echo "installing for Python $*"
	@scripts/make-venv $(UV) $(call interpreter,$*) .venvs/$*
	@touch $@

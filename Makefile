# `make demo` and `make test` are all a newcomer needs; each does its own set-up and is quick when that was done before.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
WORKERS ?= 2
PYTEST_ARGS ?=

# package: why it is needed. With package=program the program is enough, wherever it comes from.
RUN_PACKAGES := \
	python3-venv:the-virtual-environment \
	qemu-system-x86:runs-the-virtual-machines \
	qemu-utils:disks-and-snapshots \
	mmdebstrap:builds-the-guest-image \
	mtools:boot-partition-of-the-image \
	dosfstools:boot-partition-of-the-image \
	syslinux:boot-loader-of-the-image \
	syslinux-common:boot-loader-of-the-image \
	fdisk:partition-table-of-the-image \
	e2fsprogs:file-system-of-the-image \
	debian-archive-keyring:verifies-the-packages-of-Debian \
	openssh-client:ansible-and-machine-ssh
TEST_PACKAGES := \
	openssh-server:stub-guests-are-local-sshds \
	bubblewrap:keeps-stub-guests-apart \
	git:the-peer-of-the-diff-benchmark \
	postgresql:every-test-of-the-Hub-runs-on-it-too \
	nodejs=node:runs-a-client-of-the-node-that-is-written-in-JavaScript \
	npm=npm:fetches-that-client

.PHONY: help
help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# $(1): a list of package:why. Installs what is missing, saying which and why, with sudo when not root.
define install_packages
	missing=""
	for item in $(1); do
		package="$${item%%:*}"
		program="$${package#*=}"
		if [ "$$program" != "$$package" ] && command -v "$$program" >/dev/null; then continue; fi
		package="$${package%%=*}"
		if ! dpkg-query -W -f='$${Status}' "$$package" 2>/dev/null | grep -q 'ok installed'; then
			missing="$$missing $$package"
			echo "needed: $$package ($$(echo "$${item#*:}" | tr '-' ' '))"
		fi
	done
	if [ -n "$$missing" ]; then
		if ! command -v apt-get >/dev/null; then
			echo "This is no Debian or Ubuntu; install what is named above with your package tool, then run make again." >&2
			exit 1
		fi
		sudo=""; [ "$$(id -u)" = 0 ] || sudo="sudo"
		echo "Installing them with apt-get$${sudo:+ (through sudo)} …"
		$$sudo apt-get update -qq
		DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq --no-install-recommends $$missing >/dev/null
	fi
endef

.PHONY: packages
packages:
	@$(call install_packages,$(RUN_PACKAGES))

.PHONY: test-packages
test-packages:
	@$(call install_packages,$(TEST_PACKAGES))

$(STAMP): requirements.lock pyproject.toml | packages
	@python=""
	for candidate in python3 python3.13 python3.12 python3.11; do
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
			python="$$candidate"
			break
		fi
	done
	if [ -z "$$python" ]; then echo "autovibe needs Python 3.11 or newer; there is none on PATH." >&2; exit 1; fi
	echo "Setting up $(VENV) ($$("$$python" --version)) …"
	[ -x $(BIN)/python ] || "$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -m compileall -q autovibe  # so that no start of a program does it again
	touch $@

.PHONY: setup
setup: $(STAMP)  ## system packages and .venv

.PHONY: demo
demo: setup  ## one machine, end to end, on a real VM
	@$(BIN)/autovibe demo

.PHONY: lint
lint: setup  ## ruff, mypy --strict, import contracts
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

.PHONY: test
test: setup test-packages lint  ## everything, on SQLite and PostgreSQL, with real guests
	@$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

.PHONY: bench
bench: setup test-packages  ## figures against peers measured in the same run
	@$(BIN)/python -m tests.bench

.PHONY: lock
lock:  ## renew requirements.lock (needs uv)
	@uv pip compile pyproject.toml --all-extras --group dev --python-version 3.11 --universal --upgrade \
		--generate-hashes --no-emit-index-url --no-annotate --no-header -q -o requirements.lock

.PHONY: clean
clean:  ## what set-up and tests made in this directory
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist build

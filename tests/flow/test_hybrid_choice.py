"""The default decision for hybrid KV caches, as engines take it: by the model's layers and by the connector."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from kvferry import LLM
from kvferry.config import KVTransferConfig
from kvferry.contract import KVConnectorBase_V1, KVConnectorFactory, KVConnectorMetadata, SupportsHMA
from kvferry.engine.hybrid import HybridChoice, decide_hybrid
from kvferry.errors import ConfigError
from kvferry.testing.stub_model import StubModel

WINDOWS = (None, 64, 64, 64)
"""One layer sees all of a request, three see 64 tokens."""


class Incapable(KVConnectorBase_V1):
    """Takes one KV cache group."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...
    def wait_for_layer_load(self, layer_name: str) -> None: ...
    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None: ...
    def wait_for_save(self) -> None: ...
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None: ...
    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()


class Capable(Incapable, SupportsHMA):
    """Takes several."""

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        return False, None


class Composite(Capable):
    """Has parts, and supports several groups when all of them do."""

    @classmethod
    def supports_hma_config(cls, kv_transfer_config: KVTransferConfig) -> bool:
        parts = kv_transfer_config.kv_connector_extra_config["connectors"]
        return all(KVConnectorFactory.supports_hma_config(KVTransferConfig.parse(part)) for part in parts)


def connector(name: str, *parts: dict[str, Any]) -> dict[str, Any]:
    extra = {"connectors": list(parts)} if parts else {}
    return {
        "kv_connector": name, "kv_role": "kv_both", "kv_connector_module_path": __name__,
        "kv_connector_extra_config": extra,
    }  # fmt: skip


def multi(*parts: dict[str, Any]) -> dict[str, Any]:
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [*parts]},
    }


CAPABLE, INCAPABLE = connector("Capable"), connector("Incapable")
SUPPORTING = {
    "none": {},
    "capable": CAPABLE,
    "all parts capable": connector("Composite", CAPABLE, CAPABLE),
    "nested, all capable": connector("Composite", CAPABLE, connector("Composite", CAPABLE)),
    "MultiConnector, all capable": multi(CAPABLE, CAPABLE),
    "MultiConnector, nested": multi(CAPABLE, multi(CAPABLE), connector("Composite", CAPABLE)),
}
UNSUPPORTING = {
    "incapable": INCAPABLE,
    "no part capable": connector("Composite", INCAPABLE, INCAPABLE),
    "mixed parts": connector("Composite", CAPABLE, INCAPABLE),
    "nested, mixed": connector("Composite", CAPABLE, connector("Composite", INCAPABLE, CAPABLE)),
    "MultiConnector, none capable": multi(INCAPABLE, INCAPABLE),
    "MultiConnector, mixed": multi(CAPABLE, INCAPABLE),
    "MultiConnector, nested and mixed": multi(CAPABLE, multi(CAPABLE, INCAPABLE)),
}


def engine(transfer: Any, windows: Any = WINDOWS, **settings: Any) -> LLM:
    return LLM(StubModel(windows=windows), num_kv_blocks=32, kv_transfer_config=transfer, **settings)


def is_on(transfer: Any, windows: Any = WINDOWS, **settings: Any) -> bool:
    with engine(transfer, windows, **settings) as llm:
        tokens = list(range(100))
        assert llm.generate(tokens)[0].error is None  # whatever was decided, the engine works
        return not llm.config.scheduler_config.disable_hybrid_kv_cache_manager


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "hybrid" in r.getMessage()]


@pytest.mark.parametrize("transfer", SUPPORTING.values(), ids=SUPPORTING)
def test_on_when_layers_differ_and_all_connectors_support_it(transfer, caplog):
    assert is_on(transfer)
    assert is_on(transfer, disable_hybrid_kv_cache_manager=False)
    assert not is_on(transfer, disable_hybrid_kv_cache_manager=True)
    assert warnings(caplog) == []


@pytest.mark.parametrize("transfer", UNSUPPORTING.values(), ids=UNSUPPORTING)
def test_a_connector_without_support_switches_it_off_and_the_cost_is_told(transfer, caplog):
    assert not is_on(transfer)
    # The longest request, 31 blocks of 16: 496 tokens in 4 layers, against 496 in one and 64 in three.
    (warning,) = warnings(caplog)
    for words in ("Incapable", "496 tokens", "1984 tokens", "instead of 688", "2.9 times", "True to accept"):
        assert words in warning
    caplog.clear()
    assert not is_on(transfer, disable_hybrid_kv_cache_manager=True)
    assert warnings(caplog) == []


@pytest.mark.parametrize("transfer", UNSUPPORTING.values(), ids=UNSUPPORTING)
def test_insisting_on_it_is_an_error_that_names_connector_and_both_remedies(transfer):
    with pytest.raises(ConfigError) as caught:
        engine(transfer, disable_hybrid_kv_cache_manager=False)
    for words in ("Incapable", "leave Incapable out", "disable_hybrid_kv_cache_manager=True"):
        assert words in str(caught.value)
    assert "Capable " not in str(caught.value).replace("Incapable", "")


@pytest.mark.parametrize("windows", [(None, None), (64, 64), (None, 4096), None], ids=str)
@pytest.mark.parametrize("setting", [None, True, False])
def test_not_needed_where_all_layers_keep_alike(windows, setting, caplog):
    assert not is_on(INCAPABLE, windows, disable_hybrid_kv_cache_manager=setting)
    assert warnings(caplog) == []


def test_the_reason_is_part_of_the_choice():
    assert decide_hybrid(None, None, [None, 8], 64) == HybridChoice(
        True, "layers keep 8 or 64 tokens of a request, and no connector objects"
    )
    assert "Capable supports it" in decide_hybrid(KVTransferConfig.parse(CAPABLE), None, [None, 8], 64).reason
    assert "disable_hybrid_kv_cache_manager is set" in decide_hybrid(None, True, [None, 8], 64).reason
    assert "not needed" in decide_hybrid(None, None, [8, 9], 8).reason

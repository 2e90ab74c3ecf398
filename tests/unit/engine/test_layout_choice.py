"""Who decides the KV layout and the kernel blocks, and what the user is told."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from kvferry import LLM
from kvferry.engine.config import EngineOptions
from kvferry.engine.layout_choice import LAYOUTS, choose_kernel_block, choose_layout
from kvferry.errors import ConfigError
from kvferry.testing.faulty import FaultyConnector
from kvferry.testing.stub_model import StubModel


@pytest.mark.parametrize(("name", "means"), [("NHD", "LBNHC"), ("HND", "LBHNC"), ("auto", "auto"), ("BLHNC", "BLHNC")])
def test_names_and_short_names(name: str, means: str) -> None:
    assert EngineOptions(kv_cache_layout=name).kv_cache_layout == means


@pytest.mark.parametrize(
    ("name", "hint"),
    [("BLNCH", "did you mean 'BLNHC'"), ("lbnhc", "did you mean 'LBNHC'"), ("?", "known:"), (3, "known:")],
)
def test_unknown_names_are_refused_with_the_known_ones(name: Any, hint: str) -> None:
    with pytest.raises(ConfigError, match="kv_cache_layout") as caught:
        EngineOptions(kv_cache_layout=name)
    assert hint in str(caught.value)
    assert "LBHNC" in str(caught.value)


def test_the_user_goes_before_the_connector_and_that_before_the_default() -> None:
    choice = choose_layout("auto", None, None)
    assert (choice.layout, choice.warning) == ("BLNHC", None)
    for required, layout in (("LBHNC", "LBHNC"), ("HND", "LBHNC"), ("NHD", "LBNHC")):
        choice = choose_layout("auto", "Picky", required)
        assert (choice.layout, choice.warning) == (layout, None)
        assert f"Picky requires {required}" in choice.reason
        assert choose_layout(layout, "Picky", required).warning is None
    choice = choose_layout("BLNHC", "Picky", "HND")
    assert choice.layout == "BLNHC"
    assert all(word in str(choice.warning) for word in ("Picky", "HND", "kv_cache_layout=BLNHC"))
    choice = choose_layout("auto", "Picky", "LHBNC")
    assert choice.layout == "BLNHC"
    assert all(word in str(choice.warning) for word in ("Picky", "LHBNC", *LAYOUTS))


@pytest.mark.parametrize(
    ("setting", "block_size", "use_v2", "tokens"),
    [
        (None, 128, False, 128), (None, 128, True, 32), (None, 48, True, 16), (None, 16, True, 16),
        (None, 24, True, 24), (16, 128, True, 16), (128, 128, True, 128), (128, 128, False, 128), (1, 4, True, 1),
    ],
)  # fmt: skip
def test_kernel_blocks(setting: int | None, block_size: int, use_v2: bool, tokens: int) -> None:
    assert choose_kernel_block(setting, block_size, use_v2) == tokens


def test_kernel_blocks_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="kernel_block_size=48 does not divide block_size=128"):
        choose_kernel_block(48, 128, True)
    with pytest.raises(ConfigError, match=r"needs the second model runner.*use_v2_model_runner=True"):
        choose_kernel_block(16, 128, False)
    with pytest.raises(ConfigError, match="kernel_block_size=0"):
        EngineOptions(kernel_block_size=0)


@pytest.mark.parametrize(("setting", "layout", "num_warnings"), [("auto", "LBHNC", 0), ("NHD", "LBNHC", 1)])
def test_an_engine_obeys_its_connector_or_warns(
    setting: str, layout: str, num_warnings: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FaultyConnector, "get_required_kvcache_layout", classmethod(lambda cls, config: "HND"))
    transfer = {
        "kv_connector": "FaultyConnector",
        "kv_connector_module_path": "kvferry.testing.faulty",
        "kv_role": "kv_both",
    }
    with LLM(StubModel(), num_kv_blocks=5, kv_cache_layout=setting, kv_transfer_config=transfer) as llm:
        assert llm.config.cache_config.kv_cache_layout == llm.kv_cache_config.kv_cache_layout == layout
        (view, *_) = llm.kv_caches.values()
        assert (view.stride(1) > view.stride(2)) == (layout == "LBHNC")
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "layout" in r.getMessage()]
    assert len(warnings) == num_warnings

"""Exceptions in class hooks: an error that names class, hook and cause, and a line in the log."""

from __future__ import annotations

import logging
from inspect import getattr_static
from typing import Any

import pytest
from tests.multi_children import host_config, transfer

from kvferry import LLM
from kvferry.contract import KVConnectorBase_V1
from kvferry.contract.class_hooks import ask_class
from kvferry.contract.hooks import HOOKS, HookSide
from kvferry.errors import ConfigError, ContractError
from kvferry.examples.decode_bench import DecodeBenchConnector
from kvferry.multi.connector import MultiConnector
from kvferry.testing.stub_model import StubModel

CLASS_HOOKS = [hook.name for hook in HOOKS if hook.side is HookSide.CLASS]
ASKED_AT_START = ["supports_hma_config", "supports_v2_model_runner_config", "get_required_kvcache_layout"]
NAMED = [{"kv_connector": f"{__name__}:Raising", "kv_role": "kv_both"}]


class Raising(DecodeBenchConnector):
    """One of its class hooks raises, as a test says."""


def let_raise(monkeypatch: pytest.MonkeyPatch, hook: str, error: Exception) -> None:
    def raising(cls: type[Any], *args: Any) -> Any:
        raise error

    assert isinstance(getattr_static(KVConnectorBase_V1, hook), classmethod)
    monkeypatch.setattr(Raising, hook, classmethod(raising), raising=False)


def assert_named(caught: pytest.ExceptionInfo[ContractError], caplog: pytest.LogCaptureFixture, hook: str) -> None:
    assert f"{__name__}.Raising.{hook} raised KeyError: 'lost'" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert f"Raising.{hook} raised KeyError" in record.getMessage()
    assert record.exc_info is not None


@pytest.mark.parametrize("in_multi", [False, True])
@pytest.mark.parametrize("hook", ASKED_AT_START)
def test_a_start_names_class_hook_and_cause(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hook: str, in_multi: bool
) -> None:
    let_raise(monkeypatch, hook, KeyError("lost"))
    (named,) = NAMED
    extra = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"connectors": NAMED}}
    with pytest.raises(ContractError) as caught:
        LLM(StubModel(), kv_transfer_config=extra if in_multi else named, num_kv_blocks=8, block_size=4)
    assert_named(caught, caplog, hook)


@pytest.mark.parametrize("hook", CLASS_HOOKS)
def test_a_child_of_a_multi_connector_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hook: str
) -> None:
    if hook == "build_kv_connector_stats":
        return  # MultiConnector makes all children's statistics itself
    let_raise(monkeypatch, hook, KeyError("lost"))
    arguments: dict[str, tuple[Any, ...]] = {
        "get_required_kvcache_layout": (host_config(transfer(NAMED)),),
        "requires_piecewise_for_cudagraph": ({"connectors": NAMED},),
        "build_prom_metrics": (host_config(transfer(NAMED)), {}, [], {}),
    }
    with pytest.raises(ContractError) as caught:
        getattr(MultiConnector, hook)(*arguments.get(hook, (transfer(NAMED),)))
    assert_named(caught, caplog, hook)


def test_errors_raised_on_purpose_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ConfigError("layout of the child: set another")
    let_raise(monkeypatch, "get_required_kvcache_layout", error)
    with pytest.raises(ConfigError) as caught:
        ask_class(Raising, "get_required_kvcache_layout", None)
    assert caught.value is error

"""Our contract against vLLM's own classes of the same names."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import KVTransferConfig as VllmTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory as VllmFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import base as vllm_base

from kvferry import SamplingParams
from kvferry.config import KVTransferConfig
from kvferry.contract import KVConnectorBase_V1, base
from kvferry.contract.hooks import HOOKS_BY_NAME
from kvferry.contract.views import RequestView
from kvferry.errors import HostError
from kvferry.vllm import LoadRecoveryExampleConnector
from vllm import SamplingParams as VllmSamplingParams


def public_names(cls: type) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_") and name != "role"}


def test_every_hook_of_vllm_has_a_row() -> None:
    hooks = public_names(vllm_base.KVConnectorBase_V1) | public_names(vllm_base.SupportsHMA)
    assert hooks == {name for name, hook in HOOKS_BY_NAME.items() if not hook.is_own}


def test_our_base_takes_vllms_arguments_and_has_its_abstract_methods() -> None:
    assert KVConnectorBase_V1.__abstractmethods__ == vllm_base.KVConnectorBase_V1.__abstractmethods__
    for name in public_names(vllm_base.KVConnectorBase_V1):
        theirs = inspect.getattr_static(vllm_base.KVConnectorBase_V1, name)
        ours = inspect.getattr_static(KVConnectorBase_V1, name)
        assert type(ours) is type(theirs), name
        if callable(theirs):
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name


def test_transfer_config_has_vllms_fields_and_defaults() -> None:
    theirs = {f.name: f for f in dataclasses.fields(VllmTransferConfig)}
    ours = {f.name: f for f in dataclasses.fields(KVTransferConfig)}
    assert set(ours) - set(theirs) == {"on_shadow"}
    default_theirs, default_ours = VllmTransferConfig(), KVTransferConfig()
    for name in set(theirs) - {"engine_id"}:
        assert getattr(default_ours, name) == getattr(default_theirs, name), name


def test_cache_hit_sources_have_vllms_names() -> None:
    assert [source.name for source in base.CacheHitSource] == [source.name for source in vllm_base.CacheHitSource]


def test_vllm_resolves_our_class_instead_of_its_own() -> None:
    config = VllmTransferConfig(
        kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_module_path="kvferry.vllm"
    )
    resolved = VllmFactory.get_connector_class(config)
    assert resolved.__module__ == "kvferry.vllm"
    assert issubclass(resolved, vllm_base.KVConnectorBase_V1)
    assert VllmFactory.supports_hma_config(config)
    built_in = VllmFactory.get_connector_class(
        VllmTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
    )
    assert built_in is not resolved


def answers(results: base.KVConnectorTransferResults) -> Any:
    connector: Any = object.__new__(LoadRecoveryExampleConnector)
    connector.has_guard = True  # as a MultiConnector's child
    connector._worker_side = SimpleNamespace(get_transfer_results=lambda finished: results)
    connector._scheduler_side = None
    return connector.get_transfer_results(set())


def test_failed_blocks_are_told_to_vllm_as_failed_requests() -> None:
    failure = base.LoadFailure("b", 0, 3)
    found = answers(base.KVConnectorTransferResults({"s"}, {"a", "b", "c"}, {"c"}, {failure}))
    assert type(found) is vllm_base.KVConnectorTransferResults
    assert (found.finished_sending, found.finished_recving) == ({"s"}, {"a", "b", "c"})
    assert found.failed_recving == {"b", "c"}


def test_a_childs_failure_that_vllm_cannot_be_told_of_is_raised() -> None:
    with pytest.raises(HostError, match="the load of b failed"):
        answers(base.KVConnectorTransferResults(failed_blocks={base.LoadFailure("b", 0, 3)}))


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_first_tokens_of_vllm_are_not_those_of_our_engine_where_a_seed_decides(
    temperature: float, seed: int | None
) -> None:
    """Both repeat their own draws, from generators of their own. All else that is equal has equal facts."""
    settings: dict[str, Any] = {"temperature": temperature, "seed": seed, "top_k": 5, "repetition_penalty": 1.1}
    theirs, ours = (
        RequestView(SimpleNamespace(sampling_params=kind(**settings))).sampling_facts
        for kind in (VllmSamplingParams, SamplingParams)
    )
    assert (theirs == ours) == (temperature == 0 or seed is None)


def test_naming_the_module_imports_no_connector() -> None:
    ours = "'kvferry.examples', 'kvferry.lmcache', 'kvferry.multi', 'kvferry.offloading', 'kvferry.p2p'"
    heavy = f"({ours}, 'torch', 'vllm', 'numba', 'lmcache')"
    code = f"import sys, kvferry.vllm; print([m for m in sys.modules if m.startswith({heavy})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

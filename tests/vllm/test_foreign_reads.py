"""The embedded engine offers what vLLM's own connectors read, or says that it lacks it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector
from vllm_reads import attribute_reads

from kvferry import LLM, SamplingParams
from kvferry.testing.stub_model import StubModel
from kvferry.vllm.shown import LACKS

READS = attribute_reads()
OBJECTS: dict[str, Any] = {}


class Keeping(DecodeBenchConnector):
    """Keeps what it is given, under the names of vllm_reads."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        OBJECTS.update(vllm_config=vllm_config, kv_cache_config=kv_cache_config)

    def on_new_request(self, request: Any) -> None:
        OBJECTS["request"] = request

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        OBJECTS["scheduler_output"] = scheduler_output
        OBJECTS["cached_requests"] = scheduler_output.scheduled_cached_reqs
        for new in scheduler_output.scheduled_new_reqs:
            OBJECTS["new_request"] = new
        return super().build_connector_meta(scheduler_output)


def offered_by(model: Any) -> dict[str, Any]:
    OBJECTS.clear()
    transfer = {"kv_connector": f"{__name__}:Keeping", "kv_role": "kv_both"}
    with LLM(model, num_kv_blocks=9, max_model_len=64, kv_transfer_config=transfer) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
        assert llm.counters.hook_errors == llm.counters.contract_errors == {}
    return dict(OBJECTS)


@pytest.fixture(scope="module")
def of_a_language_model(tiny_llama: str) -> dict[str, Any]:
    return offered_by(tiny_llama)


@pytest.fixture(scope="module")
def of_the_stub_model() -> dict[str, Any]:
    return offered_by(StubModel())


def read(objects: dict[str, Any], path: str) -> Any:
    first, *names = path.split(".")
    found = objects[first]
    for name in names:
        if found is None:
            return None  # as in vLLM, where connectors ask for None first
        found = getattr(found, name)
    return found


def test_the_source_is_read() -> None:
    """A few that are known, one of each way in which the reader follows objects; and nothing of other classes."""
    assert len(READS) > 100
    assert {
        "vllm_config.attention_config.hisparse_config",
        "vllm_config.cache_config.get_resolved_kv_cache_layout",
        "vllm_config.parallel_config.data_parallel_index",
        "vllm_config.scheduler_config.disable_hybrid_kv_cache_manager",
        "kv_cache_config.needs_kv_cache_zeroing",
        "new_request.prefill_token_ids",
        "cached_requests.resumed_req_ids",
        "request.kv_transfer_params",
        "scheduler_output.kv_connector_block_state",
    } <= READS.keys()
    assert "request.slot_mapping" not in READS  # of LMCache's own requests


@pytest.mark.parametrize("path", sorted(READS))
def test_what_connectors_read_is_there(of_a_language_model: dict[str, Any], path: str) -> None:
    try:
        read(of_a_language_model, path)
    except AttributeError as error:
        raise AssertionError(f"{path}, read by {sorted(READS[path])}: {error}") from error


@pytest.mark.parametrize("path", sorted(READS))
def test_what_a_model_without_configuration_lacks_is_said(of_the_stub_model: dict[str, Any], path: str) -> None:
    if path in LACKS:
        with pytest.raises(AttributeError, match=f"{path} is not offered by kvferry's embedded engine: {LACKS[path]}"):
            read(of_the_stub_model, path)
    else:
        read(of_the_stub_model, path)


def test_nothing_is_listed_that_nobody_reads() -> None:
    assert LACKS.keys() <= READS.keys()


@pytest.mark.parametrize("path", ["vllm_config.nonsense", "vllm_config.model_config.nonsense", "request.nonsense"])
def test_what_is_missing_is_an_attribute_error_that_says_so(of_the_stub_model: dict[str, Any], path: str) -> None:
    *above, name = path.split(".")
    owner = read(of_the_stub_model, ".".join(above))
    assert not hasattr(owner, name)
    assert getattr(owner, name, 7) == 7
    with pytest.raises(AttributeError, match=f"{path} is not offered by kvferry's embedded engine; run this connector"):
        getattr(owner, name)


def test_values_are_the_engines(of_a_language_model: dict[str, Any]) -> None:
    config, model = of_a_language_model["vllm_config"], of_a_language_model["vllm_config"].model_config
    assert config.cache_config.get_resolved_kv_cache_layout().name == "BLNHC"
    assert model.is_multimodal_model is False
    assert config.attention_config.hisparse_config is None
    assert (model.get_vocab_size(), model.hf_text_config.model_type) == (512, "llama")
    assert model.get_layers_start_end_indices(config.parallel_config) == (0, 3)
    assert (model.max_model_len, config.scheduler_config.max_num_seqs) == (64, 64)
    assert config.num_lookahead_tokens == 0
    new = of_a_language_model["new_request"]
    assert (new.prompt_token_ids, new.prefill_token_ids) == ([1, 2, 3], [1, 2, 3])
    assert of_a_language_model["scheduler_output"].num_scheduled_tokens == {}


def test_configurations_are_copied_as_vllms_multi_connector_does(of_a_language_model: dict[str, Any]) -> None:
    for owner in (of_a_language_model["vllm_config"], of_a_language_model["vllm_config"].model_config):
        twin = copy.copy(owner)
        twin.kv_transfer_config = 7
        assert getattr(owner, "kv_transfer_config", None) != 7
        assert getattr(twin, "max_model_len", None) == getattr(owner, "max_model_len", None)

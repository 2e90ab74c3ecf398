"""vLLM's JSON for connectors that bear the same name here: each is taken, or refused with what to write instead."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import vllm.distributed.kv_transfer.kv_connector.v1 as vllms
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from kvferry import ConfigError
from kvferry.config import KVTransferConfig
from kvferry.contract.factory import KVConnectorFactory
from kvferry.contract.host import host_info
from kvferry.engine.config import EngineOptions
from kvferry.engine.plan import plan_engine
from kvferry.proxy.bodies import ClientCall, prefill_body
from kvferry.testing.stub_model import StubModel

V1 = Path(vllms.__file__).parent
SOURCES = {
    "OffloadingConnector": ["offloading_connector.py", "offloading/*.py", "../../../../v1/kv_offload/*.py"],
    "NixlConnector": ["nixl/*.py"],
    "MultiConnector": ["multi_connector.py"],
    "ExampleConnector": ["example_connector.py"],
    "ExampleHiddenStatesConnector": ["example_hidden_states_connector.py"],
    "DecodeBenchConnector": ["decode_bench_connector.py"],
}
"""Connector -> files of vLLM's that read its settings."""
BASE: dict[str, dict[str, Any]] = {
    "OffloadingConnector": {"cpu_bytes_to_use": 1 << 20, "weights_version": "1"},
    "NixlConnector": {"weights_version": "1"},
    "ExampleConnector": {"weights_version": "1", "shared_storage_path": "kv"},
    "ExampleHiddenStatesConnector": {"shared_storage_path": "hs"},
}
_READS = re.compile(r"""(?:extra_config(?:\.get\(|\[)|get_from_extra_config\()\s*["']([a-z_]+)["']""")


def keys_of(connector: str) -> set[str]:
    """The settings that vLLM's connector reads, by its source."""
    files = [file for pattern in SOURCES[connector] for file in V1.glob(pattern)]
    assert files, connector
    return {key for file in files for key in _READS.findall(file.read_text())}


def parse(connector: str, extra: dict[str, Any]) -> None:
    """As an engine does before its start; ConfigError where it would refuse."""
    transfer = KVTransferConfig(
        connector, kv_role="kv_both", kv_connector_extra_config={**BASE.get(connector, {}), **extra}
    )
    plan = plan_engine(StubModel(), EngineOptions(num_kv_blocks=32, hidden_state_layers=(1,)), transfer)
    found = KVConnectorFactory.get_connector_class(transfer)
    if hasattr(found, "sides"):
        info = replace(host_info(plan.config, plan.kv_cache_config), hidden_state_layers=(1,))
        found.sides[0].check(info)


@pytest.mark.parametrize("connector", SOURCES)
def test_no_setting_of_vllms_is_merely_unknown(connector: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that nothing takes is given to each key: what is refused says why, and never "is unknown"."""
    monkeypatch.chdir(tmp_path)
    keys = keys_of(connector)
    assert keys, "vLLM reads its settings in another way now"
    said = {}
    for key in keys:
        try:
            parse(connector, {key: ["nothing takes this"]})
        except ConfigError as err:
            said[key] = str(err)
    assert not {key: text for key, text in said.items() if "is unknown" in text}


@pytest.mark.parametrize(
    ("connector", "extra"),
    [
        ("OffloadingConnector", {"block_size": 64, "cpu_bytes_to_use": 1000000}),
        ("OffloadingConnector", {"block_size": 48, "cpu_bytes_to_use": 1e6, "spec_name": "CPUOffloadingSpec"}),
        ("OffloadingConnector", {"blocks_per_chunk": 4, "spec_name": "TieringOffloadingSpec", "secondary_tiers": []}),
        ("MultiConnector", {"connectors": [
            {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
                "cpu_bytes_to_use": 1 << 20, "weights_version": "1"}},
            {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
                "shared_storage_path": "local_storage", "weights_version": "1"}},
        ]}),
        ("NixlConnector", {"backends": ["UCX"]}),
        ("NixlConnector", {"enforce_handshake_compat": True, "enable_cross_layers_blocks": True}),
        ("ExampleConnector", {"shared_storage_path": "local_storage"}),
        ("ExampleHiddenStatesConnector", {"shared_storage_path": "hs", "use_synchronization_lock": False}),
        ("DecodeBenchConnector", {"fill_mean": 0.015, "fill_std": 0.0}),
        ("DecodeBenchConnector", {"startup_fill": False}),
    ],
    ids=str,
)  # fmt: skip
def test_documented_settings_are_taken(
    connector: str, extra: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parse(connector, extra)


@pytest.mark.parametrize(
    ("connector", "extra", "instead"),
    [
        ("NixlConnector", {"backends": ["UCX", "GDS"]}, "UCX backend"),
        ("NixlConnector", {"num_threads": 4}, '"ucx"'),
        ("NixlConnector", {"kv_lease_duration": 480}, "lease_s"),
        ("NixlConnector", {"enforce_handshake_compat": False}, "what differs"),
        ("NixlConnector", {"bidirectional_kv_xfer": True}, "OffloadingConnector"),
        ("NixlPushConnector", {"push_registration_timeout": 30}, "load_s"),
        ("ExampleHiddenStatesConnector", {"allow_custom_save_path": True}, "clients choose no paths"),
        ("ExampleHiddenStatesConnector", {"num_writer_threads": 8}, "max_pending_files"),
        ("OffloadingConnector", {"store_threshold": 2}, "leave the key out"),
    ],
    ids=str,
)
def test_what_is_refused_says_what_to_write(
    connector: str, extra: dict[str, Any], instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        parse(connector, extra)
    assert instead in str(caught.value)
    assert f"{next(iter(extra))}=" in str(caught.value)


@pytest.mark.parametrize(
    ("protocol", "body"),
    [
        (CompletionRequest, {"prompt": "a", "logprobs": 2, "echo": False}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2}),
    ],
)
def test_proxys_prefill_leg_is_one_that_vllm_takes(protocol: Any, body: dict[str, Any]) -> None:
    """vLLM's fields that need another field go from the leg together with that field."""
    answer = {
        "stream": True, "stream_options": {"include_usage": True}, "logprob_token_ids": [5], "stop": ["x"],
        "include_stop_str_in_output": True, "return_token_ids": True, "return_tokens_as_token_ids": True,
        "min_tokens": 3, "max_tokens": 9,
    }  # fmt: skip
    protocol.model_validate(body | answer)
    leg = json.loads(prefill_body(ClientCall("/v1/completions", body | answer), "t"))
    protocol.model_validate(leg)
    assert leg["max_tokens"] == 1


@pytest.mark.parametrize(
    "body",
    [
        {"echo": True},
        {"echo": True, "top_logprobs": None},
        {"echo": True, "logprobs": None},
        {"echo": False},
        {"prompt_logprobs": 0},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_chat", [True, False])
def test_proxy_does_not_split_what_asks_for_log_probabilities_of_the_prompt(
    body: dict[str, Any], is_chat: bool
) -> None:
    """vLLM gives such a request no hits, so that the decode engine would compute the prompt again."""
    if is_chat:
        chat = {**body, "messages": [{"role": "user", "content": "a"}]}
        asked = ChatCompletionRequest.model_validate(chat).to_sampling_params(5, {}).prompt_logprobs
        why = ClientCall("/v1/chat/completions", chat).whole_because
    else:
        completion = {**body, "prompt": [1]}
        asked = CompletionRequest.model_validate(completion).to_sampling_params(5, {}).prompt_logprobs
        why = ClientCall("/v1/completions", completion).whole_because
    assert (why is not None) is (asked is not None)

"""What one engine has stored, engines with other settings of the model never find: every connector that stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.fake_lmcache import CHUNK_TOKENS, FakeServer

from kvferry import LLM, SamplingParams
from kvferry.testing.stub_model import StubModel

PROMPT = [(i * 31 + i * i) % 1000 for i in range(2 * CHUNK_TOKENS + 5)]
YARN = {"rope_type": "yarn", "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "long_factor": [4.0], "original_max_position_embeddings": 64}
Start = Callable[..., LLM]


class ConfiguredModel(StubModel):
    """A stub with a configuration, whose numbers do not depend on it."""

    def __init__(self, **keys: Any) -> None:
        super().__init__()
        config = {"transformers_version": "5", "_name_or_path": "here", "hidden_size": 8, **keys}
        self.hf_config = SimpleNamespace(to_dict=lambda: config, architectures=["Stub"])


@pytest.fixture(params=["OffloadingConnector", "ExampleConnector", "LMCacheMPConnector"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """Start engines that share a store which outlives each of them."""
    engines: list[LLM] = []
    server = FakeServer()
    extra = {
        "OffloadingConnector": {
            "cpu_bytes_to_use": 1 << 22, "secondary_tiers": [{"type": "fs", "path": str(tmp_path / "kv")}],
        },
        "ExampleConnector": {"shared_storage_path": str(tmp_path / "kv")},
        "LMCacheMPConnector": {"server_urls": [server.url], "staging_bytes": 1 << 16, "lookup_timeout_s": 60.0},
    }[request.param]  # fmt: skip

    def make(model: StubModel, weights_version: str = "1", **options: Any) -> LLM:
        transfer = {
            "kv_connector": request.param, "kv_role": "kv_both",
            "kv_connector_extra_config": {**extra, "weights_version": weights_version},
        }  # fmt: skip
        engines.append(LLM(model, block_size=16, num_kv_blocks=128, kv_transfer_config=transfer, **options))
        return engines[-1]

    yield make
    for llm in engines:
        llm.shutdown()
    server.close()


def hit(llm: LLM, **request: Any) -> int:
    """Tokens that came from the store; the engine has written all it owes when this returns."""
    output = llm.generate(PROMPT, SamplingParams(max_tokens=3, temperature=0), **request)[0]
    assert output.outputs[0].token_ids == StubModel().expected_tokens(PROMPT, 3)
    llm.shutdown()
    return int(output.num_external_tokens)


def test_settings_that_change_kv_are_another_store(start: Start) -> None:
    plain = {"rope_parameters": {"rope_type": "default"}, "text_config": {"rms_norm_eps": 1e-6}}
    assert hit(start(ConfiguredModel(**plain))) == 0
    others = [
        {"rope_parameters": YARN},
        {"rope_scaling": YARN},
        {"text_config": {"rms_norm_eps": 1e-5}},
        {"layer_types": ["full_attention"] * 200 + ["sliding_attention"]},
        {"layer_types": ["full_attention"] * 201},
        {"quantization_config": {"bits": 4}},
        {"eos_token_id": 7},  # LongCat's embeddings depend on it
    ]
    for keys in others:
        assert hit(start(ConfiguredModel(**{**plain, **keys}))) == 0, keys
    assert hit(start(ConfiguredModel(**plain), weights_version="2")) == 0
    assert hit(start(ConfiguredModel(**plain)), cache_salt="tenant") == 0
    harmless = {"_name_or_path": "elsewhere", "transformers_version": "6", "use_cache": False}
    assert hit(start(ConfiguredModel(**plain, **harmless))) >= 2 * CHUNK_TOKENS - 16
    assert hit(start(ConfiguredModel(**plain), max_model_len=1000)) > 0, "plain positions do not depend on it"


def test_the_longest_request_counts_where_rope_picks_its_factors_by_it(start: Start) -> None:
    assert hit(start(ConfiguredModel(rope_parameters=LONGROPE), max_model_len=1000)) == 0
    assert hit(start(ConfiguredModel(rope_parameters=LONGROPE), max_model_len=2000)) == 0
    assert hit(start(ConfiguredModel(rope_parameters=LONGROPE), max_model_len=1000)) > 0
    by_kind = {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "dynamic"}}
    assert hit(start(ConfiguredModel(rope_parameters=by_kind), max_model_len=1000)) == 0
    assert hit(start(ConfiguredModel(rope_parameters=by_kind), max_model_len=2000)) == 0


def test_a_model_with_a_long_configuration_is_stored(start: Start) -> None:
    keys = {f"key_{i}": [i] * 300 for i in range(300)}
    assert hit(start(ConfiguredModel(**keys))) == 0
    assert hit(start(ConfiguredModel(**keys))) > 0
    assert hit(start(ConfiguredModel(**{**keys, "key_7": [*[7] * 299, 8]}))) == 0

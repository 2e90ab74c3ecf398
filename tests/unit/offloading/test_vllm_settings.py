"""vLLM's own settings of connectors that bear the same name: each holds here, or is an error that says what instead."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.errors import ConfigError
from kvferry.examples.decode_bench import DecodeBenchConfig
from kvferry.offloading.config import ChunkGeometry, OffloadingConfig
from kvferry.types import AttentionKind, GroupInfo

BASE = {"cpu_bytes_to_use": 1 << 30}


def chunk_tokens(block_tokens: int, **settings: Any) -> int:
    group = GroupInfo(0, ("layer",), block_tokens, AttentionKind.FULL, None)
    return ChunkGeometry.of(OffloadingConfig.parse({**BASE, **settings}), [group], [4096], 1).chunk_tokens


@pytest.mark.parametrize(
    ("block_tokens", "settings", "expected"),
    [
        (16, {}, 64), (16, {"block_size": 48}, 48), (128, {"block_size": 256}, 256),
        (16, {"blocks_per_chunk": 3}, 48), (128, {"blocks_per_chunk": 1}, 128), (8, {"blocks_per_chunk": 4}, 32),
    ],
)  # fmt: skip
def test_the_size_of_chunks_as_vllm_says_it(block_tokens: int, settings: dict[str, Any], expected: int) -> None:
    assert chunk_tokens(block_tokens, **settings) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"spec_name": "CPUOffloadingSpec"}, {"spec_name": "TieringOffloadingSpec"}, {"eviction_policy": "lru"},
        {"store_threshold": 0}, {"store_threshold": 1}, {"offload_prompt_only": False},
        {"self_describing_kv_events": False}, {"canonical_layout": False},
    ],
    ids=str,
)  # fmt: skip
def test_what_holds_anyway_may_be_said(settings: dict[str, Any]) -> None:
    assert OffloadingConfig.parse({**BASE, **settings}) == OffloadingConfig.parse(BASE)


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({"block_size": 40}, ["block_size=40", "multiple of 16", "32 and 48"]),
        ({"block_size": 64, "blocks_per_chunk": 2}, ["block_size", "blocks_per_chunk", "give one"]),
        ({"chunk_tokens": 64, "block_size": 64}, ["chunk_tokens", "block_size", "give one"]),
        ({"blocks_per_chunk": 0}, ["blocks_per_chunk=0", "at least 1"]),
        ({"eviction_policy": "arc"}, ["eviction_policy='arc'", "least recently"]),
        ({"store_threshold": 2}, ["store_threshold=2", "leave the key out"]),
        ({"offload_prompt_only": True}, ["offload_prompt_only=True", "answers too"]),
        ({"spec_name": "MySpec", "spec_module_path": "my"}, ["spec_name='MySpec'", "secondary_tiers"]),
        ({"max_tracker_size": 5}, ["max_tracker_size=5", "store_threshold"]),
        ({"self_describing_kv_events": True}, ["self_describing_kv_events=True", "by key"]),
        ({"canonical_layout": True}, ["canonical_layout=True"]),
    ],
    ids=str,
)
def test_what_cannot_hold_says_what_instead(settings: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        chunk_tokens(16, **settings)
    for text in texts:
        assert text in str(caught.value)


def test_defaults_of_the_noise_are_vllms() -> None:
    assert (DecodeBenchConfig().fill_mean, DecodeBenchConfig().fill_std) == (0.015, 0.0)

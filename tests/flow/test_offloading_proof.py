"""A bit that flips in host memory never reaches a token: the engine's answers stay those of the model's definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvferry import LLM, SamplingParams
from kvferry.testing.stub_model import StubModel

pytestmark = pytest.mark.usefixtures("runner")

PROMPT = [(i * 31 + i * i) % 1000 for i in range(300)]


@pytest.fixture
def make_llm() -> Iterator[Callable[..., LLM]]:
    engines: list[LLM] = []

    def make(windows: tuple[int | None, ...], policy: str, **extra: Any) -> LLM:
        transfer = {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": policy,
            "kv_connector_extra_config": {"weights_version": "1", "cpu_bytes_to_use": 1 << 22, **extra},
        }
        options = {"block_size": 16, "num_kv_blocks": 256, "kv_transfer_config": transfer}
        engines.append(LLM(StubModel(windows=windows), **options))
        return engines[-1]

    yield make
    for llm in engines:
        llm.shutdown()


def flip_everywhere(llm: LLM, position: str) -> int:
    """One bit of every chunk in host memory: of its first, middle or last byte. How many chunks there are."""
    side: Any = llm.connector.side  # type: ignore[union-attr]
    chunks = side.store._host.chunks()
    for chunk in chunks:
        offset = {"first": 0, "middle": chunk.payload_bytes // 2, "last": chunk.payload_bytes - 1}[position]
        side._arena.slot_view(chunk.ref.slot)[offset] ^= 1
    return len(chunks)


@pytest.mark.parametrize("windows", [(None,), (40, 40, None)], ids=["one group", "hybrid"])
@pytest.mark.parametrize("load_async", [True, False])
@pytest.mark.parametrize("position", ["first", "middle", "last"])
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_one_flipped_bit_never_reaches_a_token(
    make_llm: Any, windows: Any, load_async: bool, position: str, policy: str
) -> None:
    llm = make_llm(windows, policy, load_async=load_async)
    greedy = SamplingParams(max_tokens=5, temperature=0)
    expected = StubModel(windows=windows).expected_tokens(PROMPT, 5)
    assert llm.generate(PROMPT, greedy)[0].outputs[0].token_ids == expected
    while llm.has_requests():
        llm.step()
    assert llm.reset_prefix_cache()
    assert flip_everywhere(llm, position) > 0
    output = llm.generate(PROMPT, greedy)[0]
    if policy == "fail":
        assert output.error is not None
    else:
        assert output.outputs[0].token_ids == expected
    side: Any = llm.connector.side
    assert side.store.stats().invalidated["load"] > 0
    assert side.get_kv_connector_stats().media["host"].failures["load TierCorrupt"] > 0
    llm.check_integrity()
    assert llm.reset_prefix_cache()
    assert llm.generate(PROMPT, greedy)[0].outputs[0].token_ids == expected, "nothing bad is left behind"

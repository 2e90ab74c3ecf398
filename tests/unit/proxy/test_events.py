"""Events pass unchanged and whole, however the network cuts them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from kvferry.proxy import events
from kvferry.proxy.events import is_end, may_tell, verdicts, whole_events

STREAM = b'data: {"choices": [{"text": "a\\n\\nb"}]}\n\n: ping\r\n\r\ndata: {"n": 2}\n\ndata: [DONE]\n\n'


def collect(pieces: list[bytes]) -> list[bytes]:
    async def source() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def run() -> list[bytes]:
        return [batch async for batch in whole_events(source())]

    return asyncio.run(run())


@pytest.mark.parametrize("seed", range(20))
def test_any_cutting_gives_the_same_bytes_in_whole_events(seed: int) -> None:
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(1, len(STREAM)), 8))
    pieces = [STREAM[a:b] for a, b in zip([0, *cuts], [*cuts, len(STREAM)], strict=True)]
    batches = collect(pieces)
    assert b"".join(batches) == STREAM, f"seed {seed}"
    assert all(batch.endswith((b"\n\n", b"\r\n\r\n")) for batch in batches), f"seed {seed}"
    assert is_end(batches[-1])


def test_half_an_event_is_left_out() -> None:
    assert collect([b"data: 1\n\nda", b"ta: 2"]) == [b"data: 1\n\n"]
    assert collect([b"data: 1"]) == []


def test_event_without_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_MAX_EVENT_BYTES", 100)
    with pytest.raises(ValueError, match="longer than 100"):
        collect([b"x" * 60] * 3)


def test_what_events_say() -> None:
    assert len(list(verdicts(STREAM))) == 2
    with pytest.raises(ValueError):
        list(verdicts(b"data: {\n\n"))
    assert may_tell(b'data: {"kv_transfer_params":{"num_recomputed_tokens":3}}\n\n')
    assert may_tell(b'data: {"choices":[{"finish_reason":"error"}]}\n\n')
    assert not may_tell(STREAM)
    assert not is_end(b'data: {"choices": [{"text": "[DONE]"}]}\n\n')

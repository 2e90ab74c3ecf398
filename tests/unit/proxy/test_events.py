"""Events pass unchanged and whole, however the network cuts them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator

import pytest

from kvferry.proxy.events import end_of, verdicts, whole_events

STREAM = (
    b'data: {"choices": [{"index": 0, "text": "a\\n\\nb"}]}\n\n: ping\r\n\r\ndata: {"choices": []}\n\ndata: [DONE]\n\n'
)


def collect(pieces: list[bytes], limit_bytes: int = 1000) -> list[bytes]:
    def hold(num_bytes: int) -> None:
        if num_bytes > limit_bytes:
            raise ValueError(f"longer than {limit_bytes}")

    async def source() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def run() -> list[bytes]:
        return [batch async for batch in whole_events(source(), hold)]

    return asyncio.run(run())


@pytest.mark.parametrize("seed", range(20))
def test_any_cutting_gives_the_same_bytes_in_whole_events(seed: int) -> None:
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(1, len(STREAM)), 8))
    pieces = [STREAM[a:b] for a, b in zip([0, *cuts], [*cuts, len(STREAM)], strict=True)]
    batches = collect(pieces)
    assert b"".join(batches) == STREAM, f"seed {seed}"
    assert all(batch.endswith((b"\n\n", b"\r\n\r\n")) for batch in batches), f"seed {seed}"
    assert end_of(batches[-1]) == len(batches[-1])


def test_half_an_event_is_left_out() -> None:
    assert collect([b"data: 1\n\nda", b"ta: 2"]) == [b"data: 1\n\n"]
    assert collect([b"data: 1"]) == []


def test_event_without_end_is_bounded_and_whole_ones_are_not_held() -> None:
    with pytest.raises(ValueError, match="longer than 100"):
        collect([b"x" * 60] * 3, 100)
    assert len(collect([b"x" * 60 + b"\n\n"] * 3, 100)) == 3


def test_event_cut_into_single_bytes_takes_time_in_proportion() -> None:
    """With the square of it, a quarter of a terabyte would be copied."""
    event = b"data: " + b"a" * (1 << 19) + b"\n\n"
    begun_s = time.process_time()
    assert collect([event[i : i + 1] for i in range(len(event))], len(event)) == [event]
    assert time.process_time() - begun_s < 10


def test_what_events_say() -> None:
    assert len(list(verdicts(STREAM))) == 2
    with pytest.raises(ValueError):
        list(verdicts(b"data: {\n\n"))
    with pytest.raises(ValueError):
        list(verdicts(b"data: [1]\n\n"))
    assert end_of(STREAM + b"data: 5\n\n") == len(STREAM)
    assert end_of(b'data: {"choices": [{"text": "[DONE]"}]}\n\n') is None
    assert end_of(b"data: [DONE]\n") is None

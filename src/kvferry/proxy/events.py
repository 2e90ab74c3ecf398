"""Server-sent events on their way through: whole ones only, unchanged, so that an error can follow any of them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

from kvferry.proxy.bodies import Verdict, judge

_MAX_EVENT_BYTES = 16 << 20
_TELLING = (b'"num_recomputed_tokens"', b'"error"')
DONE = b"data: [DONE]\n\n"


async def whole_events(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """The same bytes, cut behind events only; what is no whole event at the end is left out.

    Raises ValueError for an event that does not end.
    """
    rest = b""
    async for piece in pieces:
        rest += piece
        ends = [at + len(mark) for mark in (b"\n\n", b"\r\n\r\n") if (at := rest.rfind(mark)) >= 0]
        if ends:
            yield rest[: max(ends)]
            rest = rest[max(ends) :]
        elif len(rest) > _MAX_EVENT_BYTES:
            raise ValueError(f"an event is longer than {_MAX_EVENT_BYTES} bytes")


def verdicts(events: bytes) -> Iterator[Verdict]:
    """What each of these events says; ValueError when one is no JSON."""
    for line in events.splitlines():
        name, _, data = line.partition(b":")
        if name == b"data" and data.strip() != b"[DONE]":
            yield judge(json.loads(data))


def may_tell(events: bytes) -> bool:
    """Whether `verdicts` is worth its parsing in the middle of a stream."""
    return any(mark in events for mark in _TELLING)


def is_end(events: bytes) -> bool:
    """Whether the stream ends with these events in good order."""
    return events.rstrip().endswith(b"[DONE]")

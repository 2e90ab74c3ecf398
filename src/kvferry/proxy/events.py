"""Server-sent events on their way through: whole ones only, unchanged, so that an error can follow any of them."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

from kvferry.proxy.replies import ReplyVerdict, judge_event

DONE = b"data: [DONE]\n\n"
_MARKS = (b"\n\n", b"\r\n\r\n")  # what ends an event
_IS_DONE = re.compile(rb"^data:[ \t]*\[DONE\][ \t]*(?:\n\n|\r\n\r\n)", re.MULTILINE)


async def whole_events(pieces: AsyncIterator[bytes], hold: Callable[[int], None]) -> AsyncGenerator[bytes]:
    """The same bytes, cut behind events only; what is no whole event at the end is left out.

    `hold` is told how many bytes have come of an event that has not ended, and raises ValueError where those are too
    many. Takes time in proportion to the bytes, however they are cut.
    """
    rest = bytearray()
    async for piece in pieces:
        seen = max(0, len(rest) - 3)  # a mark may have begun there
        rest += piece
        ends = [at + len(mark) for mark in _MARKS if (at := rest.rfind(mark, seen)) >= 0]
        if ends:
            events = bytes(rest[: max(ends)])
            del rest[: max(ends)]
            hold(len(rest))
            yield events
        else:
            hold(len(rest))


def verdicts(events: bytes) -> Iterator[ReplyVerdict]:
    """What each of these events says; ValueError when one is of a wrong shape."""
    for line in events.splitlines():
        name, _, data = line.partition(b":")
        if name == b"data" and data.strip() != b"[DONE]":
            yield judge_event(data)


def end_of(events: bytes) -> int | None:
    """Where the stream ends in good order, if it does with these events: behind [DONE]."""
    found = _IS_DONE.search(events)
    return found.end() if found else None

"""Requests that are repeated until answered, and answers that are remembered: what makes loss and repeats harmless."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, Generic, TypeVar

from kvferry.p2p.messages import Message

V = TypeVar("V")


def row(item: object, names: str) -> dict[str, Any]:
    """These attributes as plain values, for snapshots."""
    values = {name: getattr(item, name) for name in names.split()}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


_SLOWEST = 8  # times the first interval


@dataclass(slots=True)
class NativeCall:
    """One request under way to one life (generation) of a peer; None: to whoever answers there."""

    peer: str
    generation: str | None
    message: Message
    interval_s: float
    next_s: float
    deadline_s: float


class Calls:
    """Open requests by (kind, id). Pure; the owner sends what `due` answers."""

    def __init__(self, retry_s: float) -> None:
        self._retry_s = retry_s
        self._calls: dict[tuple[str, str], NativeCall] = {}

    def start(
        self, kind: str, key: str, peer: str, generation: str | None, message: Message, now: float, deadline_s: float
    ) -> None:
        """Send at the next `due`, and again until `answered` or the deadline. Takes the place of an equal one."""
        self._calls[kind, key] = NativeCall(peer, generation, message, self._retry_s, now, deadline_s)

    def answered(self, kind: str, key: str, by: str | None = None) -> bool:
        """End a request, or one to this peer alone; False when none was open."""
        call = self._calls.get((kind, key))
        if call is None or by not in (None, call.peer):
            return False
        del self._calls[kind, key]
        return True

    def has(self, kind: str, key: str, now: float) -> bool:
        """Whether this request is open."""
        call = self._calls.get((kind, key))
        return call is not None and now < call.deadline_s

    def due(self, now: float, reaches: Callable[[str, str | None], bool]) -> list[NativeCall]:
        """Requests to send now; those past their deadline are dropped. `reaches(peer, generation)`: worth sending."""
        due = []
        for key, call in list(self._calls.items()):
            if now >= call.deadline_s:
                del self._calls[key]
            elif now >= call.next_s:
                call.next_s = now + call.interval_s
                call.interval_s = min(2 * call.interval_s, _SLOWEST * self._retry_s)
                if reaches(call.peer, call.generation):
                    due.append(call)
        return due

    def next_deadline(self) -> float:
        """When `due` has something to do."""
        return min((min(call.next_s, call.deadline_s) for call in self._calls.values()), default=inf)

    def __len__(self) -> int:
        return len(self._calls)


class Remembered(Generic[V]):
    """The last value per key, for `keep_s`; bounded: when full, nothing new is taken (nothing old is lost early)."""

    def __init__(self, keep_s: float, max_size: int) -> None:
        self._keep_s = keep_s
        self._max_size = max_size
        self._values: OrderedDict[str, tuple[float, V]] = OrderedDict()

    def put(self, key: str, value: V, now: float) -> bool:
        """Remember; False when there is no room."""
        if key not in self._values and len(self._values) >= self._max_size:
            return False
        self._values[key] = (now + self._keep_s, value)
        self._values.move_to_end(key)
        return True

    def get(self, key: str) -> V | None:
        """What was put last, or None."""
        entry = self._values.get(key)
        return entry[1] if entry else None

    def forget(self, key: str) -> None:
        """Drop one key."""
        self._values.pop(key, None)

    def expire(self, now: float) -> None:
        """Drop what is older than `keep_s`."""
        while self._values and next(iter(self._values.values()))[0] <= now:
            self._values.popitem(last=False)

    def __len__(self) -> int:
        return len(self._values)

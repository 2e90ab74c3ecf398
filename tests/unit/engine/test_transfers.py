"""How long blocks are held."""

from __future__ import annotations

from typing import Any

from kvferry.engine.transfers import Transfers


class TickingClock:
    """Each look at it is later than the one before, as on a machine."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now(self) -> float:
        self._now_s += 0.25
        return self._now_s


def test_nothing_is_held_for_no_time_and_never_for_less() -> None:
    unused: Any = None
    transfers = Transfers(unused, unused, TickingClock(), unused)
    assert [transfers.oldest_held_s() for _ in range(3)] == [0.0, 0.0, 0.0]

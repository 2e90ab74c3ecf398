"""Loads under way and blocks that a connector still holds: what must wait for a completion before it moves on.

    load   a request waits for its KV; ends with `finished_recving`, success or not
    held   blocks of a request that is gone: a load may still write to them (ends with `finished_recving`), or a send
           still reads them (ends with `finished_sending`). Freed when everything awaited has come.

Time alone frees nothing, for a transfer that was given up may still run: past their deadline held blocks are late,
which is logged and counted, and stay until the connector reports or is shut down. Late, duplicate and unknown
completions change nothing and are counted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from kvferry.clock import Clock
from kvferry.engine.block_pool import Block, BlockPool
from kvferry.engine.config import SchedulerConfig
from kvferry.engine.guard import HostCounters
from kvferry.engine.request import Request

logger = logging.getLogger(__name__)

_MAX_OLD_IDS = 10_000


class HoldReason(StrEnum):
    """Why blocks without a request are held."""

    LOADING = "loading"  # a load of the request may still write to them
    SENDING = "sending"  # a send may still read them
    LATE_LOAD = "late_load"  # the same past their deadline
    LATE_SEND = "late_send"
    QUARANTINED = "quarantined"  # for good: the connector failed to shut down


@dataclass(slots=True)
class AsyncLoad:
    """An asynchronous load into a request's blocks."""

    request: Request
    num_local_tokens: int
    """Tokens that were there before; the load brings those behind them."""
    num_good_tokens: int
    """Tokens before the first block reported as bad."""
    deadline_s: float


@dataclass(slots=True)
class HeldBlocks:
    """Blocks whose request is gone, and the completions they wait for."""

    blocks: list[Block]
    since_s: float
    awaits_sending: bool
    awaits_recving: bool
    deadline_s: float = 0.0
    is_late: bool = False
    is_quarantined: bool = False

    @property
    def reason(self) -> HoldReason:
        """Why they are held; a write is worse than a read."""
        if self.is_quarantined:
            return HoldReason.QUARANTINED
        if self.awaits_recving:
            return HoldReason.LATE_LOAD if self.is_late else HoldReason.LOADING
        return HoldReason.LATE_SEND if self.is_late else HoldReason.SENDING


class Transfers:
    """Book of loads and held blocks, by request id."""

    def __init__(self, pool: BlockPool, counters: HostCounters, clock: Clock, config: SchedulerConfig) -> None:
        self._pool = pool
        self._counters = counters
        self._clock = clock
        self._config = config
        self.loads: dict[str, AsyncLoad] = {}
        self.held: dict[str, HeldBlocks] = {}
        self._old_ids: dict[str, None] = {}

    # ---- loads ------------------------------------------------------------------------------------------------

    def start_load(self, request: Request, num_local_tokens: int) -> None:
        """The request now waits for its `num_computed_tokens` tokens behind the local ones to arrive."""
        deadline_s = self._clock.now() + self._config.load_timeout_s
        num_tokens = request.num_computed_tokens
        self.loads[request.request_id] = AsyncLoad(request, num_local_tokens, num_tokens, deadline_s)

    def is_loading(self, request_id: str) -> bool:
        """True while the request waits for its load."""
        return request_id in self.loads

    def loading_requests(self) -> list[Request]:
        """Requests that wait for their loads, oldest first."""
        return [load.request for load in self.loads.values()]

    def shorten_load(self, request_id: str, first_bad_token: int) -> None:
        """Note that the load is good only before this token; with a bad block among the local ones, not at all."""
        load = self.loads[request_id]
        num_good = first_bad_token if first_bad_token >= load.num_local_tokens else 0
        load.num_good_tokens = min(load.num_good_tokens, num_good)

    def take_late_loads(self) -> list[Request]:
        """End the loads whose deadline is over; their blocks must be set aside."""
        now_s = self._clock.now()
        late = [load.request for load in self.loads.values() if load.deadline_s <= now_s]
        for request in late:
            del self.loads[request.request_id]
        return late

    # ---- held blocks ------------------------------------------------------------------------------------------

    def release(self, request_id: str, blocks: list[Block], awaits_sending: bool, awaits_recving: bool) -> None:
        """Free the blocks of a request that is gone, or hold them until what they await has come.

        Ends the request's load as far as the request is concerned. Blocks held for the same id before stay held.
        """
        self.loads.pop(request_id, None)
        if not (awaits_sending or awaits_recving):
            self._pool.free_blocks(blocks)
            return
        now_s = self._clock.now()
        held = self.held.setdefault(request_id, HeldBlocks([], now_s, awaits_sending, awaits_recving))
        held.blocks.extend(blocks)
        held.awaits_sending |= awaits_sending
        held.awaits_recving |= awaits_recving
        timeout_s = self._config.load_timeout_s if awaits_recving else self._config.send_timeout_s
        held.deadline_s = max(held.deadline_s, now_s + timeout_s)

    def finished_recving(self, request_id: str) -> AsyncLoad | None:
        """A load ended. The load when its request waits for it; else held blocks may come free."""
        load = self.loads.pop(request_id, None)
        if load is None:
            held = self.held.get(request_id)
            self._settle(request_id, held is not None and held.awaits_recving)
            if held is not None:
                held.awaits_recving = False
                self._free_if_settled(request_id, held)
        return load

    def finished_sending(self, request_id: str) -> None:
        """A send ended; held blocks may come free."""
        held = self.held.get(request_id)
        self._settle(request_id, held is not None and held.awaits_sending)
        if held is not None:
            held.awaits_sending = False
            self._free_if_settled(request_id, held)

    def note_late(self) -> None:
        """Log and count held blocks whose deadline is over."""
        now_s = self._clock.now()
        for request_id, held in self.held.items():
            if held.deadline_s <= now_s and not (held.is_late or held.is_quarantined):
                what, held.is_late = held.reason.value, True
                self._counters.late_transfers += 1
                logger.warning(
                    "%s: still %s after %.0f s; its %d blocks stay held until the connector reports or is shut down",
                    request_id, what, now_s - held.since_s, len(held.blocks),
                )  # fmt: skip

    def connector_gone(self, is_safe: bool) -> None:
        """No completion will come any more: free what is held if no copy can run (`is_safe`), else keep it for good."""
        assert not self.loads, "loads must be set aside first"
        if is_safe:
            for held in self.held.values():
                self._pool.free_blocks(held.blocks)
            self.held.clear()
            return
        for held in self.held.values():
            held.is_quarantined = True
        self._counters.quarantined_blocks = sum(len(held.blocks) for held in self.held.values())
        num_blocks = self._counters.quarantined_blocks
        logger.error("%d blocks stay out of use for good: a transfer may still write or read them", num_blocks)

    # ---- what is known ----------------------------------------------------------------------------------------

    def held_blocks(self) -> Iterator[Block]:
        """All held blocks."""
        return (block for held in self.held.values() for block in held.blocks)

    def has_late(self) -> bool:
        """True while transfers that are past their deadline hold blocks."""
        return any(held.is_late and not held.is_quarantined for held in self.held.values())

    def is_awaited(self) -> bool:
        """True while held blocks can be expected to come free: some are neither late nor quarantined."""
        return any(not (held.is_late or held.is_quarantined) for held in self.held.values())

    def num_held_blocks(self) -> dict[str, int]:
        """Held blocks by `HoldReason`."""
        counts: Counter[str] = Counter()
        for held in self.held.values():
            counts[held.reason.value] += len(held.blocks)
        return dict(counts)

    def oldest_held_s(self) -> float:
        """For how long the oldest of them have been held, in seconds; 0 without any."""
        now_s = self._clock.now()
        return now_s - min((held.since_s for held in self.held.values()), default=now_s)

    def remember(self, request_id: str) -> None:
        """A request ended: completions that name it later are late, not unknown. The last 10,000 are remembered."""
        self._old_ids[request_id] = None
        if len(self._old_ids) > _MAX_OLD_IDS:
            del self._old_ids[next(iter(self._old_ids))]

    def is_old(self, request_id: str) -> bool:
        """True for a request that has ended."""
        return request_id in self._old_ids or request_id in self.held

    def check_integrity(self) -> None:
        """Assert that nothing is held for nothing."""
        assert all(h.awaits_sending or h.awaits_recving or h.is_quarantined for h in self.held.values())
        assert all(h.since_s <= h.deadline_s for h in self.held.values())
        assert all(not load.request.is_finished() for load in self.loads.values())

    def _settle(self, request_id: str, was_awaited: bool) -> None:
        if not was_awaited:
            self._counters.late_completions += 1
            logger.debug("%s: nobody waited for this completion", request_id)

    def _free_if_settled(self, request_id: str, held: HeldBlocks) -> None:
        if not (held.awaits_sending or held.awaits_recving):
            del self.held[request_id]
            self._pool.free_blocks(held.blocks)

"""Loads under way and blocks that a connector still holds: what must wait for a completion before it moves on.

    load   a request waits for its KV; ends with `finished_recving`, success or not
    held   blocks of a request that is gone: a load may still write to them (ends with `finished_recving`), or a send
           still reads them (ends with `finished_sending`). Freed when everything awaited has come.

Late, duplicate and unknown completions change nothing and are counted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from kvferry.engine.block_pool import Block, BlockPool
from kvferry.engine.connector_host import HostCounters
from kvferry.engine.request import Request

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Load:
    """An asynchronous load into a request's blocks."""

    request: Request
    num_good_tokens: int
    """Tokens before the first block reported as bad."""
    deadline_s: float


@dataclass(slots=True)
class HeldBlocks:
    """Blocks without a request, and the completions they wait for."""

    blocks: list[Block]
    awaits_sending: bool
    awaits_recving: bool


class Transfers:
    """Book of loads and held blocks, by request id."""

    def __init__(self, pool: BlockPool, counters: HostCounters) -> None:
        self._pool = pool
        self._counters = counters
        self.loads: dict[str, Load] = {}
        self.held: dict[str, HeldBlocks] = {}

    def start_load(self, request: Request, deadline_s: float) -> None:
        """The request now waits for `num_computed_tokens` tokens to arrive in its blocks."""
        self.loads[request.request_id] = Load(request, request.num_computed_tokens, deadline_s)

    def is_loading(self, request_id: str) -> bool:
        """True while the request waits for its load."""
        return request_id in self.loads

    def loading_requests(self) -> list[Request]:
        """Requests that wait for their loads, oldest first."""
        return [load.request for load in self.loads.values()]

    def shorten_load(self, request: Request, first_bad_token: int | None) -> None:
        """Note that a block of the load is bad (None: none is)."""
        if first_bad_token is not None:
            load = self.loads[request.request_id]
            load.num_good_tokens = min(load.num_good_tokens, first_bad_token)

    def take_late_loads(self, now_s: float) -> list[Request]:
        """End the loads whose deadline is over; their blocks must be set aside."""
        late = [load.request for load in self.loads.values() if load.deadline_s <= now_s]
        for request in late:
            del self.loads[request.request_id]
        return late

    def release(self, request_id: str, blocks: list[Block], awaits_sending: bool, awaits_recving: bool) -> None:
        """Free the blocks of a request that is gone, or hold them until what they await has come.

        Ends the request's load as far as the request is concerned. Blocks held for the same id before stay held.
        """
        self.loads.pop(request_id, None)
        if not (awaits_sending or awaits_recving):
            self._pool.free_blocks(blocks)
            return
        held = self.held.setdefault(request_id, HeldBlocks([], awaits_sending, awaits_recving))
        held.blocks.extend(blocks)
        held.awaits_sending |= awaits_sending
        held.awaits_recving |= awaits_recving

    def finished_recving(self, request_id: str) -> Load | None:
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

    def held_blocks(self) -> Iterator[Block]:
        """All held blocks."""
        return (block for held in self.held.values() for block in held.blocks)

    def check_integrity(self) -> None:
        """Assert that nothing is held for nothing."""
        assert all(held.awaits_sending or held.awaits_recving for held in self.held.values())
        assert all(not load.request.is_finished() for load in self.loads.values())

    def _settle(self, request_id: str, was_awaited: bool) -> None:
        if not was_awaited:
            self._counters.unknown_completions += 1
            logger.debug("%s: nobody waited for this completion", request_id)

    def _free_if_settled(self, request_id: str, held: HeldBlocks) -> None:
        if not (held.awaits_sending or held.awaits_recving):
            del self.held[request_id]
            self._pool.free_blocks(held.blocks)

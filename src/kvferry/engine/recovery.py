"""Recovery from loads that failed: what a worker's report means for this engine, and shared blocks repaired once.

When several running requests hold the same bad block, the oldest computes it again; the others stand still at that
block until it has, and then go on behind it. If the oldest ends or loses its blocks first, the next one computes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from kvferry.contract import KVConnectorOutput, LoadFailure
from kvferry.engine.connector_host import SchedulerConnector
from kvferry.engine.kv_manager import KVManager
from kvferry.engine.request import Request
from kvferry.engine.transfers import Transfers

Breach = Callable[[str, str], None]
"""Called with (hook, what is wrong with its answer)."""


@dataclass(slots=True)
class FailedLoads:
    """What a step's report says about loads that failed."""

    bad_block_ids: set[int] = field(default_factory=set)
    request_ids: set[str] = field(default_factory=set)
    """Nothing of these requests' loads may be used."""
    past_request_ids: set[str] = field(default_factory=set)
    """Of them, those that name a block which their request had and has freed, or never had."""


def leave_unknown_out(
    reported: KVConnectorOutput, live_ids: Container[str], transfers: Transfers, connector: SchedulerConnector
) -> None:
    """Strike out of a report what names requests this engine never had; what is late comes to nothing later."""
    failed_ids = {failure.request_id for failure in reported.failed_blocks}
    sets = (reported.finished_sending or set(), reported.finished_recving or set(), reported.failed_recving)
    named = [request_id for ids in (*sets, failed_ids) for request_id in ids]
    unknown = {name for name in named if name not in live_ids and not transfers.is_old(name)}
    if unknown:
        connector.counters.unknown_completions += sum(name in unknown for name in named)
        connector.breach("get_transfer_results", f"named {sorted(unknown)}: there are no such requests")
        for ids in sets:
            ids.difference_update(unknown)
    # A position of a load that was set aside is none of the blocks that its request has now.
    loadable = {name for name in failed_ids if name in live_ids and name not in transfers.held}
    reported.failed_blocks = {failure for failure in reported.failed_blocks if failure.request_id in loadable}
    connector.counters.late_completions += len(failed_ids - unknown - loadable)


def read_failures(reported: KVConnectorOutput, manager: KVManager, breach: Breach) -> FailedLoads:
    """Turn blocks and positions reported as bad into block ids of this engine.

    A block id out of range is a breach and left out. So is a position without a block in its request's table; nothing
    of that request's load may then be used, for which block was meant is not known.
    """
    num_blocks = len(manager.block_pool.blocks)
    unknown_ids = {block_id for block_id in reported.invalid_block_ids if not 0 < block_id < num_blocks}
    if unknown_ids:
        breach("get_block_ids_with_load_errors", f"named blocks {sorted(unknown_ids)}: ids are 1 to {num_blocks - 1}")
    failed = FailedLoads(reported.invalid_block_ids - unknown_ids, set(reported.failed_recving))
    for failure in reported.failed_blocks:
        block_id = _block_at(failure, manager)
        if block_id is not None:
            failed.bad_block_ids.add(block_id)
        else:
            failed.request_ids.add(failure.request_id)
            if manager.has_freed(failure.request_id):
                failed.past_request_ids.add(failure.request_id)
            breach("get_transfer_results", f"named {failure}: the request has no block there")
    return failed


def _block_at(failure: LoadFailure, manager: KVManager) -> int | None:
    tables = manager.get_block_ids(failure.request_id)
    if 0 <= failure.group_id < len(tables) and 0 <= failure.block_index < len(tables[failure.group_id]):
        return tables[failure.group_id][failure.block_index] or None  # no failure of the null block means anything
    return None


class SharedRepairs:
    """Who stands still until older requests have computed the blocks again that they share."""

    def __init__(self, manager: KVManager) -> None:
        self._manager = manager
        self._waiting: dict[str, tuple[Request, list[Request]]] = {}

    def strike(self, request: Request, older: Sequence[Request]) -> bool:
        """The request was cut back to before a bad block, and `older` ones were before it, in the order they go.

        True when it now waits for one of them.
        """
        self._waiting.pop(request.request_id, None)
        if self._leader(request, older) is not None:
            self._waiting[request.request_id] = (request, list(older))
        return self.is_waiting(request)

    def is_waiting(self, request: Request) -> bool:
        """True while the request must not compute."""
        return request.request_id in self._waiting

    def forget(self, request_id: str) -> None:
        """The request has lost its blocks; those behind it look for another, or go themselves, in `settle`."""
        self._waiting.pop(request_id, None)

    def settle(self) -> list[Request]:
        """Move waiting requests behind the blocks that are good again; returns those that need not wait any longer."""
        done = [request for request, older in list(self._waiting.values()) if self._catch_up(request, older)]
        for request in done:
            del self._waiting[request.request_id]
        return done

    def _catch_up(self, request: Request, older: Sequence[Request]) -> bool:
        size = self._manager.block_size
        while (leader := self._leader(request, older)) is not None:
            end = request.num_computed_tokens + size
            if leader.num_computed_tokens < end:
                return False
            if end >= request.num_tokens:  # its last token is for itself to compute
                return True
            request.num_computed_tokens = end
        return True

    def _leader(self, request: Request, older: Sequence[Request]) -> Request | None:
        """The first of `older` that still shares the block at which the request stands."""
        index = request.num_computed_tokens // self._manager.block_size
        shares = self._manager.share_block
        return next((other for other in older if shares(other.request_id, request.request_id, index)), None)

    def check_integrity(self, admitted: Sequence[Request]) -> None:
        """Assert that only admitted requests wait, at a block's start, and no two for each other."""
        admitted_ids = {request.request_id for request in admitted}
        for request_id, (request, older) in self._waiting.items():
            assert request_id in admitted_ids, f"{request_id} waits for a repair but has no blocks"
            assert request.num_computed_tokens % self._manager.block_size == 0
            for other in older:
                behind = self._waiting.get(other.request_id, (other, []))[1]
                assert request not in behind, f"{request_id} and {other.request_id} wait for each other"

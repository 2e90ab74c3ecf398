"""Why a request's prefix was a hit or not, and what the request waits for. No token ids, no text.

    request_id, state, finish_reason, error, age_s
    waits_for     null, or {"what": ..., and figures}: its turn | place | blocks | the next step | connector lookup |
                  load | release (of blocks, after its end)
    tokens        prompt, output, computed so far; of the prompt: from_device, from_connector {source: tokens},
                  to_compute
    ranges        runs of tokens: {"tokens": [first, end], "place", "reason", "loaded", "group"?, "connector"?}
    asked         "at admission": as it was when the blocks were given out; "now": the request has not come so far

A chunk's whereabouts change all the time, so they are asked at the moment of the decision: see `Explainer.admitted`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

from kvferry.clock import Clock
from kvferry.contract import PrefixRange
from kvferry.engine.config import SchedulerConfig
from kvferry.engine.connector_host import SchedulerConnector
from kvferry.engine.kv_manager import KVCacheBlocks
from kvferry.engine.request import Request, RequestStatus
from kvferry.engine.scheduler import Scheduler

MAX_ENDED = 256


@dataclass(frozen=True, slots=True)
class _Admission:
    """What was found when a request first got its blocks (or, before that, is found now)."""

    num_local_tokens: int
    ranges: list[PrefixRange]


class Explainer:
    """Remembers admissions of live requests and the explanations of the last ended ones. Scheduler's thread only."""

    def __init__(
        self, config: SchedulerConfig, scheduler: Scheduler, connector: SchedulerConnector, clock: Clock
    ) -> None:
        self._max_running = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._scheduler = scheduler
        self._connector = connector
        self._clock = clock
        self._is_enabled = False
        self._live: dict[str, Request] = {}
        self._admissions: dict[str, _Admission] = {}
        self._ended: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def enable(self) -> None:
        """Remember admissions and ends from now on."""
        self._is_enabled = True
        self._connector.on_admission = self.admitted

    def added(self, request: Request) -> None:
        """The scheduler has taken the request."""
        self._live[request.request_id] = request

    def admitted(self, request: Request, blocks: KVCacheBlocks) -> None:
        """The request gets its blocks, of which only its hits have content yet; only the first time counts."""
        if request.admitted_s is None:
            num_hits = min(
                sum(1 for _ in takewhile(lambda block: block.is_null or block.block_hash is not None, table))
                for table in blocks.blocks
            )
            self._admissions[request.request_id] = self._look(request, num_hits)

    def take_ends(self, requests: Iterable[Request]) -> None:
        """Keep the explanations of those that ended."""
        for request in requests:
            if not request.is_finished():
                continue
            del self._live[request.request_id]
            if self._is_enabled:
                self._ended[request.request_id] = self._explain(request)
                self._admissions.pop(request.request_id, None)
                if len(self._ended) > MAX_ENDED:
                    self._ended.popitem(last=False)

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """The explanation, or None for an id that is unknown (any more)."""
        request = self._live.get(request_id)
        if request is not None:
            return self._explain(request)
        ended = self._ended.get(request_id)
        if ended is None:
            return None
        held = self._scheduler.transfers.held.get(request_id)
        if held is None:
            return ended
        awaited = [name for name, is_due in (("send", held.awaits_sending), ("load", held.awaits_recving)) if is_due]
        return ended | {"waits_for": {"what": "release", "num_blocks": len(held.blocks), "until": awaited}}

    def live_requests(self) -> list[dict[str, Any]]:
        """Id, state and age of each."""
        return [self._brief(request) for request in self._live.values()]

    def _brief(self, request: Request) -> dict[str, Any]:
        end_s = self._clock.now() if request.finished_s is None else request.finished_s
        return {
            "request_id": request.request_id,
            "state": self._state(request),
            "finish_reason": request.status.finish_reason,
            "error": request.error,
            "age_s": round(end_s - request.arrival_s, 6),
        }

    def _explain(self, request: Request) -> dict[str, Any]:
        admission = self._admissions.get(request.request_id)
        found = admission or (_Admission(0, []) if request.is_finished() else self._look_ahead(request))
        num_local = found.num_local_tokens if request.admitted_s is None else request.num_local_tokens
        return {
            **self._brief(request),
            "waits_for": self._waits_for(request),
            "tokens": {
                "prompt": request.num_prompt_tokens,
                "output": request.num_output_tokens,
                "computed": request.num_computed_tokens,
                "from_device": num_local,
                "from_connector": dict(request.external_hit_sources),
                "to_compute": request.num_prompt_tokens - num_local - request.num_external_tokens,
            },
            "num_preemptions": request.num_preemptions,
            "num_load_failures": request.num_load_failures,
            "ranges": _ranges(found, request.num_external_tokens),
            "asked": "now" if admission is None else "at admission",
        }

    def _look_ahead(self, request: Request) -> _Admission:
        return self._look(request, len(self._scheduler.manager.get_computed_blocks(request).blocks[0]))

    def _look(self, request: Request, num_hit_blocks: int) -> _Admission:
        num_local = num_hit_blocks * self._scheduler.manager.block_size
        return _Admission(num_local, self._connector.explain(request, num_local))

    # ---- what it waits for ------------------------------------------------------------------------------------

    def _state(self, request: Request) -> str:
        if request.is_finished():
            return "finished"
        if request.status is RequestStatus.RUNNING:
            return "running"
        return "loading" if self._scheduler.transfers.is_loading(request.request_id) else "waiting"

    def _waits_for(self, request: Request) -> dict[str, Any] | None:
        if request.is_finished() or request.status is RequestStatus.RUNNING:
            return None
        scheduler, now_s = self._scheduler, self._clock.now()
        load = scheduler.transfers.loads.get(request.request_id)
        if load is not None:
            return {"what": "load", "gives_up_in_s": round(load.deadline_s - now_s, 6)}
        asked_s = self._connector.asked_since_s(request.request_id)
        if asked_s is not None:
            return {"what": "connector lookup", "since_s": round(now_s - asked_s, 6)}
        if len(scheduler.running) >= self._max_running:
            return {"what": "place", "num_running": len(scheduler.running)}
        num_ahead = sum(other.arrival_index < request.arrival_index for other in scheduler.waiting)
        if num_ahead:
            return {"what": "its turn", "num_ahead": num_ahead}
        num_needed = scheduler.manager.num_blocks_to_come(request)
        num_free = scheduler.manager.block_pool.get_num_free_blocks()
        what = "blocks" if num_needed > num_free else "the next step"
        return {"what": what, "num_needed": num_needed, "num_free": num_free}


def _ranges(found: _Admission, num_loaded: int) -> list[dict[str, Any]]:
    """The engine's own hits, and what the connector says of the rest, cut where loading ended."""
    ranges: list[dict[str, Any]] = []
    local = found.num_local_tokens
    if local:
        mine = PrefixRange(0, local, "device", "in the engine's prefix cache")
        ranges.append({**mine.as_dict(), "loaded": False})
    loaded_end = local + num_loaded
    for item in found.ranges:
        cut = [loaded_end] if item.first_token < loaded_end < item.end_token else []
        for first, end in pairwise([item.first_token, *cut, item.end_token]):
            ranges.append({**item.as_dict(), "tokens": [first, end], "loaded": item.is_claimed and end <= loaded_end})
    return ranges

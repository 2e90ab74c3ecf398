"""Continuous batching: who computes which tokens in the next step, and what a step's result means.

    add -> waiting -> running -> finished          ordinary life
           waiting -> loading -> loaded -> running the connector loads KV asynchronously
           running -> waiting                      preempted: blocks ran out, to be computed again

Who came first goes first, in every queue and for ever: a request that lost its blocks or waited for a load keeps its
place. Each running request computes at least one token in every step; the rest of the token budget goes to prompts,
the oldest first, so that a long prompt delays nobody's output. What is left admits loaded, then waiting requests. One
enters only if all its tokens so far fit beside what the others still need for theirs, so prompts do not evict each
other half-way. Blocks become findable in the prefix cache only after the step that filled them succeeded.
"""

from __future__ import annotations

import logging
from bisect import insort
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from operator import attrgetter

from kvferry.clock import Clock
from kvferry.contract import CacheHitSource
from kvferry.engine.block_pool import Block
from kvferry.engine.config import SchedulerConfig
from kvferry.engine.connector_host import NO_MATCH, ExternalMatch, SchedulerConnector
from kvferry.engine.handover import take_over
from kvferry.engine.kv_manager import KVCacheBlocks, KVManager
from kvferry.engine.outputs import BatchItem, BlockState, SchedulerOutput, SchedulerStats, StepPlan, StepResult
from kvferry.engine.recovery import SharedRepairs, leave_unknown_out, read_failures
from kvferry.engine.request import NoToken, Request, RequestStatus, Sampled, SampledToken
from kvferry.engine.transfers import Transfers
from kvferry.errors import ConfigError
from kvferry.types import NULL_BLOCK_ID

logger = logging.getLogger(__name__)

_MAX_LOAD_FAILURES = 3
_arrival = attrgetter("arrival_index")


class Scheduler:
    """Decides. Single-threaded; owns the life of requests and their block tables."""

    def __init__(
        self,
        config: SchedulerConfig,
        manager: KVManager,
        connector: SchedulerConnector,
        *,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        recompute_failed_loads: bool,
        clock: Clock,
    ) -> None:
        self.manager = manager
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.loaded: deque[Request] = deque()
        self.transfers = Transfers(manager.block_pool, connector.counters, clock, config)
        self.num_preemptions = 0
        # Each running request takes a token in every step, so more than the budget cannot run.
        self._max_running = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._config = config
        self._connector = connector
        self._repairs = SharedRepairs(manager)
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._recompute_failed_loads = recompute_failed_loads
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._news: dict[str, Request] = {}  # got a token or ended since the last `update`
        self._finished_ids: set[str] = set()
        self._sync_loads: dict[str, int] = {}
        self._unsafe_blocks: list[Block] = []  # a load that could not be planned may write to them in this step
        self._restarted_ids: set[str] = set()
        self._progress_s = clock.now()

    # ---- requests ---------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Queue a request. ConfigError when it cannot ever run."""
        self.check_request(request)
        if request.request_id in self._requests:
            raise ConfigError(f"request_id={request.request_id!r} is the id of a request that has not finished")
        if request.request_id in self._news:
            raise ConfigError(
                f"request_id={request.request_id!r} is the id of a request whose end is yet to be returned"
            )
        if request.request_id in self.transfers.held:
            raise ConfigError(f"request_id={request.request_id!r} is the id of a request whose blocks are still held")
        if request.kv_transfer_params and not self._connector.is_active:
            logger.warning("%s: kv_transfer_params are ignored, there is no connector", request.request_id)
        self._requests[request.request_id] = request
        self._connector.on_new_request(request)
        self._queue(request)

    def _queue(self, request: Request) -> None:
        insort(self.waiting, request, key=_arrival)

    def check_request(self, request: Request) -> None:
        """ConfigError when the request cannot ever run."""
        if request.num_tokens >= self._max_model_len:
            raise ConfigError(
                f"the prompt has {request.num_tokens} tokens; with at least one to generate the limit is "
                f"max_model_len={self._max_model_len}"
            )

    def abort_request(self, request_id: str) -> None:
        """End a request in whatever state it is; unknown and finished ids are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, RequestStatus.FINISHED_ABORTED)

    def abort_all(self) -> None:
        """End every request."""
        for request_id in list(self._requests):
            self.abort_request(request_id)

    def has_unfinished_requests(self) -> bool:
        """True while a request has yet to finish, or its end to be returned by `update`."""
        return bool(self._requests or self._news)

    def has_requests(self) -> bool:
        """True while stepping does something: for requests, or for blocks and work the connector still holds.

        Not for ever: held blocks count only until their deadline.
        """
        return self.has_unfinished_requests() or self.transfers.is_awaited() or self.has_loose_ends()

    def has_loose_ends(self) -> bool:
        """True while finished requests are yet to be announced to workers or the connector has work to push."""
        return bool(self._finished_ids) or self._connector.has_pending_push_work()

    def stats(self) -> SchedulerStats:
        """How busy it is."""
        pool = self.manager.block_pool
        return SchedulerStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting) + len(self.loaded),
            num_loading=len(self.transfers.loads),
            num_preemptions=self.num_preemptions,
            kv_cache_usage=1 - pool.get_num_free_blocks() / (len(pool.blocks) - 1),
            num_held_blocks=self.transfers.num_held_blocks(),
            oldest_held_s=self.transfers.oldest_held_s(),
        )

    # ---- the plan ---------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Plan the next step; may be empty. Exactly one `update` with its result must follow."""
        plan = StepPlan(self._config.max_num_batched_tokens, SchedulerOutput(BlockState(self.manager)))
        plan.output.preempted_req_ids, self._restarted_ids = self._restarted_ids & self._requests.keys(), set()
        self._give_up_late_loads()
        self.transfers.note_late()
        self._settle_repairs()
        self._schedule_running(plan)
        if not plan.output.preempted_req_ids and not plan.waits_for_frees:
            self._schedule_loaded(plan)
            self._schedule_waiting(plan)
        self._check_stall(plan)
        plan.output.finished_req_ids, self._finished_ids = self._finished_ids, set()
        self._sync_loads = plan.sync_loads
        self._connector.build_meta(plan.output)
        return plan.output

    def _schedule_running(self, plan: StepPlan) -> None:
        able = [request for request in self.running if not self._repairs.is_waiting(request)]
        num_behind = len(able)
        for request in able:
            num_behind -= 1  # one token is kept for each of them
            if plan.waits_for_frees:
                return
            num_new = min(request.num_tokens - request.num_computed_tokens, plan.budget_tokens - num_behind)
            target = request.num_computed_tokens + num_new
            if request.status is RequestStatus.RUNNING and self._make_room(request, target, plan):
                self._add(request, num_new, plan)

    def _make_room(self, request: Request, num_tokens: int, plan: StepPlan) -> bool:
        """Preempt the youngest until `request` fits `num_tokens`. False: it was the youngest, or frees are near."""
        while not self.manager.can_allocate(request, num_tokens):
            if self._connector.has_pending_block_frees() and not self._is_stalled():
                plan.waits_for_frees = plan.lacks_blocks = True
                return False
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request, plan: StepPlan) -> None:
        self.running.remove(request)
        self._repairs.forget(request.request_id)
        self.manager.free(request.request_id)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._queue(request)
        plan.output.preempted_req_ids.add(request.request_id)

    def _schedule_loaded(self, plan: StepPlan) -> None:
        """Admit requests whose asynchronous load has ended; their blocks are theirs already."""
        ready = (request for request in list(self.loaded) if not self._repairs.is_waiting(request))
        for request in ready:
            if not self._has_room(plan):
                return
            num_new = min(request.num_tokens - request.num_computed_tokens, plan.budget_tokens)
            if not self.manager.can_allocate(request, request.num_computed_tokens + num_new):
                plan.lacks_blocks = True
                return
            self.loaded.remove(request)
            self.manager.allocate(request, request.num_computed_tokens + num_new)
            blocks = self.manager.get_blocks(request.request_id)
            self._connector.blocks_allocated(request, blocks, request.num_computed_tokens, NO_MATCH)
            self._run(request, num_new, plan)

    def _schedule_waiting(self, plan: StepPlan) -> None:
        passed_over = []
        while self.waiting and self._has_room(plan):
            request = self.waiting[0]
            computed = self.manager.get_computed_blocks(request)
            match = self._match(request, len(computed.blocks[0]) * self.manager.block_size)
            if match is not None and not self._try_admit(request, computed, match, plan):
                break
            if self.waiting and self.waiting[0] is request:  # still looking, or its load could not be started
                passed_over.append(self.waiting.popleft())
        self.waiting.extendleft(reversed(passed_over))

    def _has_room(self, plan: StepPlan) -> bool:
        return plan.budget_tokens > 0 and len(self.running) < self._max_running

    def _match(self, request: Request, num_local: int) -> ExternalMatch | None:
        if request.num_load_failures >= _MAX_LOAD_FAILURES:
            return NO_MATCH
        return self._connector.match(request, num_local)

    def _try_admit(self, request: Request, computed: KVCacheBlocks, match: ExternalMatch, plan: StepPlan) -> bool:
        """Give the first waiting request its blocks and start it, or its load. False when it does not fit now."""
        num_local = len(computed.blocks[0]) * self.manager.block_size
        num_computed = num_local + match.num_tokens
        if not self.manager.can_admit(request, computed, num_computed, self._num_reserved_blocks()):
            plan.lacks_blocks = True
            return False
        num_new = 0 if match.is_async else min(request.num_tokens - num_computed, plan.budget_tokens)
        self._connector.allocating(request, match)
        self.manager.begin(request, computed, num_computed)
        self.manager.allocate(request, num_computed + num_new)
        blocks = self.manager.get_blocks(request.request_id)
        is_planned = self._connector.blocks_allocated(request, blocks, num_local, match)
        if not is_planned and match.is_async:
            self._set_aside(request)
            return True
        if match.num_tokens and not match.is_async:
            # Even when the connector failed: whatever it still loads must land before the forward overwrites it.
            plan.output.has_sync_kv_loads = True
        if not is_planned:
            if not self.manager.can_continue(request.request_id, num_local):
                self._unsafe_blocks += self.manager.detach(request.request_id)
                request.num_load_failures = _MAX_LOAD_FAILURES
                return True
            match = NO_MATCH
            num_computed, num_new = num_local, min(request.num_tokens - num_local, plan.budget_tokens)
        self.waiting.popleft()
        if request.admitted_s is None:
            request.admitted_s = self._clock.now()
        self._note_sources(request, num_local, match.num_tokens)
        request.num_computed_tokens = num_computed
        if match.is_async:
            request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
            self.transfers.start_load(request, num_local)
            return True
        if match.num_tokens:
            plan.sync_loads[request.request_id] = num_local
        self._run(request, num_new, plan)
        return True

    def _num_reserved_blocks(self) -> int:
        """Blocks that admitted requests still need for the tokens they have."""
        admitted = [*self.running, *self.loaded, *self.transfers.loading_requests()]
        return sum(self.manager.num_blocks_to_come(request) for request in admitted)

    def _note_sources(self, request: Request, num_local: int, num_external: int) -> None:
        if request.num_preemptions == 0:
            request.num_local_tokens, request.num_external_tokens = num_local, num_external
            if sum(request.external_hit_sources.values()) != num_external:
                # Part of a load failed: whose part it was is known only where there is one source.
                sources = list(request.external_hit_sources)
                source = sources[0] if len(sources) == 1 else CacheHitSource.EXTERNAL_UNSPECIFIED.value
                request.external_hit_sources = {source: num_external} if num_external else {}

    def _run(self, request: Request, num_new: int, plan: StepPlan) -> None:
        self._add(request, num_new, plan)
        request.num_tokens_when_admitted = request.num_tokens
        request.status = RequestStatus.RUNNING
        insort(self.running, request, key=_arrival)

    def _add(self, request: Request, num_new: int, plan: StepPlan) -> None:
        new_ids = self.manager.allocate(request, request.num_computed_tokens + num_new)
        plan.add(request, num_new, new_ids, self.manager.get_block_ids(request.request_id))

    # ---- the result -------------------------------------------------------------------------------------------

    def update(self, plan: SchedulerOutput, result: StepResult) -> list[Request]:
        """Take a step's result in: tokens, ends, completions.

        Returns the requests that got a token or ended since the last call, aborted ones too.
        """
        reported = result.connector_output
        self.manager.block_pool.free_blocks(self._unsafe_blocks)
        self._unsafe_blocks = []
        leave_unknown_out(reported, self._requests, self.transfers, self._connector)
        failed = read_failures(reported, self.manager, self._connector.breach)
        failed_ids = self._sync_loads.keys() & failed.request_ids
        if result.sync_loads_unproved:
            failed_ids = set(self._sync_loads)
        if result.failures_lost:
            failed.request_ids |= self.transfers.loads.keys()
            for request in self.transfers.loading_requests():
                request.num_load_failures = _MAX_LOAD_FAILURES  # a late report must not end a second load of that id
        # Connectors must not keep what was computed over any of these, whoever reported it and how.
        failed_loads = {request_id: self._sync_loads[request_id] for request_id in failed_ids}
        reported.invalid_block_ids = failed.bad_block_ids | self._blocks_behind(failed_loads)
        past_ids = failed.past_request_ids - self._sync_loads.keys() - self.transfers.loads.keys()
        discarded = self._strike_bad_blocks(failed.bad_block_ids, past_ids) | self._fail_sync_loads(failed_ids)
        for item in plan.batch:
            if item.request.request_id not in discarded:
                self._advance(item, result.sampled)
        self._connector.worker_reported(reported, had_forward=bool(plan.batch))
        self._complete_loads((reported.finished_recving or set()) - self._sync_loads.keys(), failed.request_ids)
        for request_id in reported.finished_sending or ():
            self.transfers.finished_sending(request_id)
        self._settle_repairs()
        for request in self.running:
            self.manager.free_unneeded(request.request_id, request.num_computed_tokens)
        if self._connector.end_step():
            self._switch_connector_off()
        news, self._news = self._news, {}
        return list(news.values())

    def _advance(self, item: BatchItem, sampled: dict[str, Sampled]) -> None:
        request = item.request
        token = sampled.get(request.request_id)
        if isinstance(token, NoToken):
            self._finish(request, RequestStatus.FINISHED_ERROR, token.reason)
            return
        request.num_computed_tokens += item.num_tokens
        self.manager.cache_blocks(request, request.num_computed_tokens)
        if token is not None:
            self._take_token(request, token)

    def _take_token(self, request: Request, token: SampledToken) -> None:
        """The request's next token is known; maybe it is the last."""
        if request.first_token_s is None:
            request.first_token_s = self._clock.now()
        self._news[request.request_id] = request
        request.append_token(token)
        status = request.read(token.token_id, self._eos_token_ids, self._max_model_len)
        if status is not None:
            self._finish(request, status)

    def _finish(self, request: Request, status: RequestStatus, error: str | None = None) -> None:
        """End a request from any state. Its blocks go back now, or when the connector lets go of them."""
        was_loading = self.transfers.is_loading(request.request_id)
        self._unqueue(request)
        if request.detokenizer is not None:
            request.detokenizer.flush()
        request.status, request.error, request.finished_s = status, error, self._clock.now()
        num_blocks = -(-request.num_computed_tokens // self.manager.block_size)
        self.manager.free_unneeded(request.request_id, request.num_computed_tokens - 1)  # it may be redone elsewhere
        block_ids = tuple(table[:num_blocks] for table in self.manager.get_block_ids(request.request_id))
        keep, params = self._connector.request_finished(request, block_ids)
        if status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED):
            request.output_kv_transfer_params = params
        elif error and params and "load_error" in params:
            request.error = f"{error}: {params['load_error']}"
            # Who computes a failed load again ends with an error of another cause.
            request.error_param = None if self._recompute_failed_loads else params.get("load_error_param")
        self.transfers.release(request.request_id, self.manager.detach(request.request_id), keep, was_loading)
        self.transfers.remember(request.request_id)
        self._repairs.forget(request.request_id)
        del self._requests[request.request_id]
        self._news[request.request_id] = request
        self._finished_ids.add(request.request_id)

    def _unqueue(self, request: Request) -> None:
        for queue in (self.running, self.loaded, self.waiting):
            if request in queue:
                queue.remove(request)

    # ---- loads that end, fail, or never end -------------------------------------------------------------------

    def _blocks_behind(self, num_local: Mapping[str, int]) -> set[int]:
        """Ids of the blocks of these requests that lie behind so many tokens: where their loads begin."""
        size = self.manager.block_size
        return {
            block_id
            for request_id, num_tokens in num_local.items()
            for table in self.manager.get_block_ids(request_id)
            for block_id in table[num_tokens // size :]
        } - {NULL_BLOCK_ID}

    def _fail_sync_loads(self, request_ids: Collection[str]) -> set[str]:
        """Back to what was there before the load; returns the requests, aborted ones too."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None and request.num_computed_tokens > self._sync_loads[request_id]:
                self._fail_load(request, self._sync_loads[request_id])
        return set(request_ids)

    def _strike_bad_blocks(self, bad_ids: set[int], past_ids: Collection[str]) -> set[str]:
        """Requests that hold blocks whose load failed go back to before the first of them; returns those.

        A block that no load of this step was for has been read before: then those that had blocks and freed them may
        have had it, and go back to the start.
        """
        if not bad_ids and not past_ids:
            return set()
        is_late = bool(past_ids) or not bad_ids <= self._blocks_being_loaded()
        self.manager.withdraw(bad_ids, all_content=bool(past_ids))
        for request in self.transfers.loading_requests():
            first_bad = self.manager.first_bad_token(request.request_id, bad_ids)
            if first_bad is not None:
                self.transfers.shorten_load(request.request_id, first_bad)
        struck: list[Request] = []
        for request in [*self.running, *self.loaded]:
            is_suspect = is_late and self.manager.has_freed(request.request_id)
            first_bad = 0 if is_suspect else self.manager.first_bad_token(request.request_id, bad_ids)
            if first_bad is not None:
                self._strike(request, first_bad, struck)
        return {request.request_id for request in struck}

    def _blocks_being_loaded(self) -> set[int]:
        loads = self._sync_loads | {name: load.num_local_tokens for name, load in self.transfers.loads.items()}
        return {block.block_id for block in self._held_blocks()} | self._blocks_behind(loads)

    def _held_blocks(self) -> Iterator[Block]:
        """Blocks that no request has but a transfer may still use."""
        return chain(self.transfers.held_blocks(), self._unsafe_blocks)

    def _strike(self, request: Request, first_bad: int, struck: list[Request]) -> None:
        if request.status is RequestStatus.RUNNING and request.num_tokens > request.num_tokens_when_admitted:
            # Tokens were chosen by what the block held and may have been seen: they cannot be taken back.
            self._connector.counters.load_failures += 1
            request.num_computed_tokens = min(first_bad, request.num_computed_tokens)
            self._finish(request, RequestStatus.FINISHED_ERROR, "its KV cache was found bad after it had been used")
        else:
            sources = request.num_local_tokens, request.num_external_tokens, request.external_hit_sources
            self._fail_load(request, first_bad)
            is_on = request.status is RequestStatus.RUNNING or request in self.loaded
            if is_on and self._repairs.strike(request, struck):
                # What it will take over is known only when its wait is over.
                request.num_local_tokens, request.num_external_tokens, request.external_hit_sources = sources
        struck.append(request)

    def _settle_repairs(self) -> None:
        for request in self._repairs.settle():
            self._keep_tokens(request, request.num_computed_tokens)

    def _fail_load(self, request: Request, num_good_tokens: int) -> None:
        """Keep only the first tokens of an admitted request, or end it, as `kv_load_failure_policy` says."""
        self._connector.counters.load_failures += 1
        request.num_load_failures += 1
        num_good = min(num_good_tokens, request.num_computed_tokens)
        must_restart = not self.manager.can_continue(request.request_id, num_good)
        self._keep_tokens(request, 0 if must_restart else num_good)
        if not self._recompute_failed_loads:
            self._finish(request, RequestStatus.FINISHED_ERROR, "its KV cache failed to load")
        elif must_restart and request.status is not RequestStatus.WAITING_FOR_REMOTE_KVS:
            self._restart(request)

    def _restart(self, request: Request) -> None:
        """Queue an admitted request again: a window group has freed what going on behind its good tokens would read."""
        self._unqueue(request)
        self._repairs.forget(request.request_id)
        self.manager.free(request.request_id)
        request.num_computed_tokens = 0
        if request.status is RequestStatus.RUNNING:
            request.status = RequestStatus.PREEMPTED
            request.num_preemptions += 1
            self._restarted_ids.add(request.request_id)
        self._queue(request)

    def _keep_tokens(self, request: Request, num_tokens: int) -> None:
        request.num_computed_tokens = num_tokens
        num_local = min(request.num_local_tokens, num_tokens)
        self._note_sources(request, num_local, min(request.num_external_tokens, num_tokens - num_local))

    def _complete_loads(self, received_ids: Iterable[str], failed_ids: set[str]) -> None:
        for request_id in failed_ids & self.transfers.loads.keys():
            self.transfers.shorten_load(request_id, 0)  # also when its end is reported in a later step
        for request_id in received_ids:
            load = self.transfers.finished_recving(request_id)
            if load is None:
                continue
            if load.num_good_tokens < load.request.num_computed_tokens:
                self._fail_load(load.request, load.num_good_tokens)
            if not load.request.is_finished():
                self._promote(load.request)

    def _promote(self, request: Request) -> None:
        """A load has ended: on to running with what it brought, or back to the start when that is nothing."""
        request.status = RequestStatus.PREEMPTED if request.num_preemptions else RequestStatus.WAITING
        self.manager.cache_blocks(request, request.num_computed_tokens)
        if take_over(request, self._take_token):
            return
        # The last token is computed in any case: its logits choose the next one.
        num_computed = min(request.num_computed_tokens, request.num_tokens - 1)
        if num_computed and not self.manager.can_continue(request.request_id, num_computed):
            # A window that begins with a block: what the load brought does not reach one token further back.
            num_computed, request.num_load_failures = 0, _MAX_LOAD_FAILURES
            self._keep_tokens(request, 0)
        request.num_computed_tokens = num_computed
        if num_computed == 0:
            self.manager.free(request.request_id)
            self._queue(request)
            return
        insort(self.loaded, request, key=_arrival)

    def _set_aside(self, request: Request) -> None:
        """Compute a request anew without the connector; what may still be written to its old blocks harms nobody."""
        blocks = self.manager.detach(request.request_id)
        self.transfers.release(request.request_id, blocks, awaits_sending=False, awaits_recving=True)
        request.num_load_failures = _MAX_LOAD_FAILURES
        request.num_computed_tokens = 0
        self._note_sources(request, 0, 0)

    def _give_up_late_loads(self) -> None:
        for request in self.transfers.take_late_loads():
            logger.warning("%s: the KV of this request did not arrive in time", request.request_id)
            self._give_up_load(request, "its KV cache did not arrive in time")

    def _give_up_load(self, request: Request, error: str) -> None:
        """Compute a loading request without its load, or end it, as `kv_load_failure_policy` says."""
        self._connector.counters.load_failures += 1
        self._set_aside(request)
        request.status = RequestStatus.PREEMPTED if request.num_preemptions else RequestStatus.WAITING
        self._queue(request)
        if not self._recompute_failed_loads:
            self._finish(request, RequestStatus.FINISHED_ERROR, error)

    def _switch_connector_off(self, reason: str = "") -> None:
        """End a connector that fails again and again; who waits for it goes on without, what it holds comes free.

        Not so when its worker failed to stop, for a copy of its may then still run: such blocks are lost for good.
        """
        is_safe = self._connector.switch_off(reason)
        for request in self.transfers.loading_requests():
            self._give_up_load(request, "the connector that was loading its KV cache was switched off")
        self.transfers.connector_gone(is_safe)
        if is_safe:
            self.manager.drop_pins(self._held_blocks())

    def _check_stall(self, plan: StepPlan) -> None:
        """Let nobody wait for ever: when none got blocks for too long, something ends.

        That is a connector whose transfers do not end, else the first request in line.
        """
        if plan.output.batch or self.transfers.loads or not plan.lacks_blocks:
            self._progress_s = self._clock.now()
        elif self._is_stalled() and not self.running and self.transfers.has_late() and self._connector.is_active:
            self._progress_s = self._clock.now()
            self._switch_connector_off("its transfers do not end, and the blocks they hold leave none to run with")
        elif self._is_stalled() and not self.running:
            request = self.loaded[0] if self.loaded else self.waiting[0]
            self._progress_s = self._clock.now()
            self._finish(
                request, RequestStatus.FINISHED_ERROR, "no KV blocks came free: all are pinned by the connector"
            )

    def _is_stalled(self) -> bool:
        return self._clock.now() - self._progress_s > self._config.stall_timeout_s

    def check_integrity(self) -> None:
        """Assert that queues, states, tables and pool agree."""
        self.manager.check_integrity(self._held_blocks())
        self.transfers.check_integrity()
        self._repairs.check_integrity([*self.running, *self.loaded])
        queued = [*self.waiting, *self.running, *self.loaded, *self.transfers.loading_requests()]
        assert len({r.request_id for r in queued}) == len(queued), "a request stands in two queues"
        assert {r.request_id for r in queued} == set(self._requests), "a request is lost or undead"
        assert all(r.status is RequestStatus.RUNNING for r in self.running)
        assert all(r.num_computed_tokens == 0 for r in self.waiting)
        assert len(self.running) <= self._max_running
        for queue in (self.waiting, self.running, self.loaded):
            assert sorted(queue, key=_arrival) == list(queue), "a request lost its place"
        for request in queued:
            assert 0 <= request.num_computed_tokens <= request.num_tokens
            assert self.manager.num_missing_blocks(request, request.num_computed_tokens) == 0

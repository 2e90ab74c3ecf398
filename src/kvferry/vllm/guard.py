"""The border to a connector inside vLLM, which has none of its own: nothing that a hook raises ends the engine.

What a hook raises, and an answer that vLLM would end of, is logged, counted and answered for:

    a load     has failed, as kv_load_failure_policy says: vLLM is told of its request (asynchronous) or of its blocks
               (synchronous). Where it cannot be known whether the load still runs, its blocks are set aside.
    a send     is held, with its blocks, until the connector reports it or is shut down
    the rest   as if the connector had nothing

A hook that fails in MAX_STEPS steps in a row switches the connector off: it is shut down on its workers, which ends
whatever it had under way, and then in the scheduler. The two sides tell each other by envelopes around the connector's
own metadata and reports. docs/contract.md has the table; HostError where vLLM has no words for a failure.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base as vllm_base

from kvferry.contract.base import KVConnectorTransferResults, KVConnectorWorkerMetadata
from kvferry.contract.clauses import (
    Clause,
    broken_block_ids,
    broken_finish,
    broken_match,
    broken_meta,
    broken_results,
)
from kvferry.contract.pins import PinLedger
from kvferry.contract.stats import ConnectorStats
from kvferry.contract.streaks import Streaks
from kvferry.contract.views import block_ids_of
from kvferry.errors import ContractError, HostError
from kvferry.multi.messages import MultiMetadata
from kvferry.multi.requests import Completions
from kvferry.types import NULL_BLOCK_ID

logger = logging.getLogger(__name__)

MAX_STEPS = 5
"""A hook that fails in this many steps in a row switches its connector off."""
_MAX_ASIDE = 8
"""So does every block set aside beyond one in this many of the pool."""
_ONLY = 0
"""The index of the one connector, in the terms of a MultiConnector."""


@dataclass(slots=True)
class Envelope(MultiMetadata):
    """One step's orders: `children` holds the connector's own, None when there are none; and what workers must know."""

    sync_blocks: dict[str, set[int]] = field(default_factory=dict)
    """Request -> blocks that its synchronous load must fill before they are read in this step."""
    unplanned: set[str] = field(default_factory=set)
    """Asynchronous loads that the scheduler side failed to plan."""


@dataclass(slots=True)
class GuardedReport(KVConnectorWorkerMetadata):
    """One step's report: the connector's own, and what its guard has seen, on one or more ranks."""

    inner: Any = None
    num_errors: int = 0
    """Hooks that failed since the last report."""
    is_off: bool = False
    num_shut_down: int = 0
    """Ranks on which the connector, switched off, was shut down in this step."""
    may_still_run: bool = False
    """That raised on one of them: what was under way there may go on."""
    given_up: Counter[str] = field(default_factory=Counter)
    """Loads reported as failed which may still run -> ranks."""
    settled: Counter[str] = field(default_factory=Counter)
    """Such loads that have ended after all -> ranks."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> GuardedReport:
        """Both ranks' reports."""
        if not isinstance(other, GuardedReport):
            raise ContractError("all ranks must run the same connector")
        inners = [inner for inner in (self.inner, other.inner) if inner is not None]
        return GuardedReport(
            inners[0].aggregate(inners[1]) if len(inners) == 2 else next(iter(inners), None),
            self.num_errors + other.num_errors,
            self.is_off or other.is_off,
            self.num_shut_down + other.num_shut_down,
            self.may_still_run or other.may_still_run,
            self.given_up + other.given_up,
            self.settled + other.settled,
        )


class HookGuard:
    """Calls the hooks of one instance; what they raise stays here. Once it is off, none but `shutdown` is called."""

    def __init__(self, name: str, shut_down: Callable[[], None]) -> None:
        self.num_errors = 0
        self.is_off = False
        self.is_shut_down = False
        self.may_still_run = False
        """True when the shutdown raised: what was under way may go on."""
        self._name = name
        self._shut_down = shut_down
        self._streaks = Streaks(MAX_STEPS)
        self._traced: set[tuple[str, type[Exception]]] = set()

    def call(
        self, hook: str, default: Any, ask: Callable[..., Any], *args: Any, check: Clause | None = None, **kwargs: Any
    ) -> Any:
        """The hook's answer, or `default`: when it raises, when `check` names a broken clause, or when all is off."""
        return self.attempt(hook, default, ask, *args, check=check, **kwargs)[0]

    def attempt(
        self, hook: str, default: Any, ask: Callable[..., Any], *args: Any, check: Clause | None = None, **kwargs: Any
    ) -> tuple[Any, bool]:
        """As `call`; and False when the hook failed."""
        if self.is_off:
            return default, True
        self._streaks.note_call(hook)
        try:
            answer = ask(*args, **kwargs)
        except Exception as err:  # a host hook: what one request brings along must not end the engine
            self._note(hook, err)
            return default, False
        broken = check(answer) if check is not None else None
        if broken is None:
            return answer, True
        self._note(hook, ContractError(f"{self._name}.{hook} answered {answer!r}: {broken}"))
        return default, False

    def _note(self, hook: str, error: Exception) -> None:
        self.num_errors += 1
        self._streaks.note_failure(hook, f"{type(error).__name__}: {error}")
        trace = None if (hook, type(error)) in self._traced else error
        self._traced.add((hook, type(error)))
        logger.error("%s.%s failed; the engine continues without it: %r", self._name, hook, error, exc_info=trace)

    def stats(self, ask: Callable[[], Any]) -> Any:
        """`get_kv_connector_stats`, of one of kvferry's connectors."""
        return self.call("get_kv_connector_stats", None, ask)

    def end_step(self) -> None:
        """Switch the connector off when one of its hooks has failed too often."""
        if reason := self._streaks.end_step():
            self.switch_off(reason)

    def switch_off(self, reason: str) -> None:
        """No hook is called from now on. Idempotent; the shutdown is the caller's."""
        if not self.is_off:
            self.is_off = True
            logger.error(
                "%s is switched off; the engine continues without the connector: %s. Fix the cause, whose traceback is "
                "above, and start the engine again: a new engine uses the connector again",
                self._name,
                reason,
            )

    def shut_down(self) -> None:
        """Shut the instance down, once. What that raises is logged."""
        if self.is_shut_down:
            return
        self.is_shut_down = True
        try:
            self._shut_down()
        except Exception:  # a host hook, as above
            self.num_errors += 1
            self.may_still_run = True
            logger.exception("%s.shutdown failed", self._name)


class SchedulerGuard(HookGuard):
    """The scheduler's instance: knows which loads were promised, and holds the blocks of those that may still run."""

    def __init__(self, name: str, shut_down: Callable[[], None], kv_cache_config: Any, num_ranks: int) -> None:
        super().__init__(name, shut_down)
        self._block_sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
        self._num_blocks: int = kv_cache_config.num_blocks
        self._num_ranks = num_ranks
        self._num_shut_down = 0
        self._next = Envelope()
        self._claims: dict[str, tuple[int, bool]] = {}
        """Request -> (local tokens, asynchronous?) of its last claim."""
        self._loads: dict[str, list[int]] = {}
        """Asynchronous loads under way -> their blocks."""
        self._refused: set[str] = set()
        self._tails: set[str] = set()
        self._pins: PinLedger | None = None
        """The connector's own."""
        self._aside_pins: PinLedger | None = None
        self._aside: dict[str, list[int]] = {}
        self._given_up: Counter[str] = Counter()

    @property
    def is_closing(self) -> bool:
        """Off, and not yet shut down on all sides: the engine must step for that."""
        return self.is_off and not self.is_shut_down

    def stats(self, ask: Callable[[], ConnectorStats | None]) -> ConnectorStats | None:
        """`get_kv_connector_stats`, with what went wrong on all sides among the fallbacks."""
        stats: ConnectorStats | None = super().stats(ask)
        counts = {"hook raised": self.num_errors, "switched off": int(self.is_off)}
        counts = {reason: count for reason, count in counts.items() if count}
        if not counts:
            return stats
        stats = stats or ConnectorStats()
        return replace(stats, fallbacks={**stats.fallbacks, **counts})

    def pool_view(self, pool: Any) -> Any:
        """The block pool as the connector is to see it: its pins can be taken back."""
        if not isinstance(pool, PinLedger):
            self._pins, self._aside_pins = PinLedger(pool), PinLedger(pool)
            return self._pins
        return pool

    def new_request(self, ask: Callable[..., Any], request: Any) -> None:
        """`on_new_request`."""
        self._next.new_req_ids = (*self._next.new_req_ids, request.request_id)
        self.call("on_new_request", None, ask, request)

    def match(self, ask: Callable[..., Any], request: Any, num_local: int) -> tuple[int | None, bool]:
        """`get_num_new_matched_tokens`; a request whose lookup or load has failed is not asked for again."""
        if request.request_id in self._refused:
            return 0, False
        check = partial(broken_match, num_local=num_local, num_tokens=request.num_tokens)
        (num_tokens, is_async), ok = self.attempt(
            "get_num_new_matched_tokens", (0, False), ask, request, num_local, check=check
        )
        if not ok:
            self._refused.add(request.request_id)
        self._claims[request.request_id] = num_local, is_async
        return num_tokens, is_async

    def allocated(self, ask: Callable[..., Any], request: Any, blocks: Any, num_external: int) -> None:
        """`update_state_after_alloc`."""
        request_id = request.request_id
        num_local, is_async = self._claims.pop(request_id, (0, False)) if num_external else (0, False)
        loaded = self._loaded_blocks(blocks, num_local, num_external)
        if num_external and is_async:
            self._next.async_loads[request_id] = _ONLY
            self._loads[request_id] = loaded
        elif num_external:
            self._next.sync_blocks[request_id] = set(loaded)
        _, ok = self.attempt("update_state_after_alloc", None, ask, request, blocks, num_external)
        if num_external and not ok:
            self._next.unplanned.add(request_id)
            self._set_aside(request_id, loaded)

    def _loaded_blocks(self, blocks: Any, num_local: int, num_external: int) -> list[int]:
        end = num_local + num_external
        tables = block_ids_of(blocks) if num_external else ()
        found = [
            block_id
            for size, table in zip(self._block_sizes, tables, strict=False)
            for block_id in table[num_local // size : -(-end // size)]
        ]
        return [block_id for block_id in found if block_id != NULL_BLOCK_ID]

    def _set_aside(self, request_id: str, block_ids: Collection[int]) -> None:
        """Its load has failed, and yet may run, or begin: the blocks go to nobody until it has ended."""
        self._refused.add(request_id)
        if request_id in self._aside or self._aside_pins is None:
            return
        self._aside[request_id] = list(block_ids)
        self._aside_pins.touch([self._aside_pins.blocks[block_id] for block_id in block_ids])
        num_aside = sum(map(len, self._aside.values()))
        if num_aside * _MAX_ASIDE > self._num_blocks:
            self.switch_off(f"loads that failed and may still run hold {num_aside} of {self._num_blocks} blocks")

    def orders(self, ask: Callable[..., Any], scheduler_output: Any) -> Envelope:
        """`build_connector_meta`."""
        envelope, self._next = self._next, Envelope()
        own, ok = self.attempt("build_connector_meta", None, ask, scheduler_output, check=broken_meta)
        if not ok:
            for request_id, block_ids in envelope.sync_blocks.items():
                self._set_aside(request_id, block_ids)
            for request_id in envelope.async_loads:
                self._set_aside(request_id, self._loads.get(request_id, ()))
        envelope.children = (own,)
        envelope.switched_off = frozenset({_ONLY}) if self.is_off else frozenset()
        return envelope

    def reported(self, ask: Callable[..., Any], output: Any) -> None:
        """`update_connector_output`. One that was not told of failed loads is switched off: it might keep their KV."""
        envelope = output.kv_connector_worker_meta
        report = envelope if isinstance(envelope, GuardedReport) else GuardedReport()
        self.num_errors += report.num_errors
        for request_id, num_ranks in report.given_up.items():
            self._given_up[request_id] += num_ranks
            self._set_aside(request_id, self._loads.get(request_id, ()))
        self._settle(report.settled)
        own = replace(output, kv_connector_worker_meta=report.inner)
        _, ok = self.attempt("update_connector_output", None, ask, own)
        if not ok and (output.invalid_block_ids or output.failed_recving):
            self.switch_off("the connector did not learn of failed loads and might store KV computed over them")
        if report.is_off:
            self.switch_off("its worker is")
        for request_id in output.finished_recving or ():
            self._loads.pop(request_id, None)
        self._close(report)

    def _settle(self, settled: Counter[str]) -> None:
        self._given_up.subtract(settled)
        for request_id in settled:
            if self._given_up[request_id] <= 0 and self._aside_pins is not None:
                del self._given_up[request_id]
                block_ids = self._aside.pop(request_id, [])
                self._aside_pins.free_blocks([self._aside_pins.blocks[block_id] for block_id in block_ids])

    def _close(self, report: GuardedReport) -> None:
        """Once the workers are shut down, this side is, and all pins are taken back unless something may still run."""
        self.may_still_run |= report.may_still_run
        self._num_shut_down += report.num_shut_down
        if not self.is_closing or self._num_shut_down < self._num_ranks:
            return
        self.shut_down()
        ledgers = [ledger for ledger in (self._pins, self._aside_pins) if ledger is not None]
        num_pins = 0 if self.may_still_run else sum(ledger.release_all() for ledger in ledgers)
        self._aside.clear()
        logger.error("%s is shut down; %d blocks unpinned", self._name, num_pins)

    def tail(self, ask: Callable[..., Any], request: Any, *args: Any) -> bool:
        """`register_finished_partial_tail`."""
        is_kept = bool(self.call("register_finished_partial_tail", False, ask, request, *args))
        if is_kept:
            self._tails.add(request.request_id)
        return is_kept

    def finish(self, hook: str, ask: Callable[..., Any], request: Any, block_ids: Any) -> Any:
        """`request_finished` and `request_finished_all_groups`."""
        request_id = request.request_id
        answer = self.call(hook, (False, None), ask, request, block_ids, check=broken_finish)
        self._next.ended[request_id] = (_ONLY,) if answer[0] or request_id in self._tails else ()
        self._claims.pop(request_id, None)
        self._tails.discard(request_id)
        self._refused.discard(request_id)
        return answer


_PREPARING = ("handle_preemptions", "bind_connector_metadata", "start_load_kv")
"""Where asynchronous loads begin."""
_LOADING = (*_PREPARING, "has_connector_metadata", "wait_for_layer_load", "wait_for_save")
"""After whose failure a step's synchronous loads are not proved."""


class WorkerGuard(HookGuard):
    """A worker's instance: knows which loads and sends are under way, and tells vLLM how each has ended."""

    def __init__(self, name: str, shut_down: Callable[[], None], kv_cache_config: Any) -> None:
        super().__init__(name, shut_down)
        self._num_groups = len(kv_cache_config.kv_cache_groups)
        self._completions = Completions(1)
        self._step = Envelope()
        self._has_orders = False
        self._in_doubt: set[str] = set()
        """Loads of this step that may or may not have begun."""
        self._given_up: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._news = GuardedReport()
        self._was_off = False

    def prepare(self, hook: str, ask: Callable[..., Any], metadata: Any) -> None:
        """`handle_preemptions` and `bind_connector_metadata`: the first of them begins the step."""
        if metadata is not self._step:
            self._begin(metadata)
        self.act(hook, ask, *metadata.children)

    def _begin(self, envelope: Envelope) -> None:
        self._step, self._in_doubt = envelope, set()
        if envelope.switched_off:
            self.switch_off("its scheduler instance is")
        if self.is_off and not self.is_shut_down:
            self.shut_down()
            self._news.num_shut_down, self._news.may_still_run = 1, self.may_still_run
        off = {_ONLY} if self.is_off else set()
        is_over = self.is_shut_down and not self.may_still_run
        self._completions.begin_step(envelope, off, {_ONLY} if is_over else set())
        self._has_orders = not self.is_off and envelope.children[_ONLY] is not None
        if self.is_off and not is_over:
            self._give_up(self._completions.loading_ids())
        elif not self._has_orders:
            self._give_up(envelope.async_loads)
        self._give_up(envelope.unplanned)
        if not self._has_orders:
            self._doubt_sync_loads()
        for request_id in envelope.unplanned & envelope.sync_blocks.keys():
            self._bad_blocks |= envelope.sync_blocks[request_id]

    def _give_up(self, request_ids: Iterable[str]) -> None:
        """These loads have failed, and may still run: the scheduler sets their blocks aside."""
        for request_id in self._completions.fail(_ONLY, set(request_ids)):
            self._given_up.add(request_id)
            self._news.given_up[request_id] = 1

    def _doubt_sync_loads(self) -> None:
        for block_ids in self._step.sync_blocks.values():
            self._bad_blocks |= block_ids

    def act(self, hook: str, ask: Callable[..., Any], *args: Any, default: Any = None, **kwargs: Any) -> Any:
        """A hook of a step for which there are orders; none is called in others."""
        if not self._has_orders:
            return default
        answer, ok = self.attempt(hook, default, ask, *args, **kwargs)
        if not ok and hook in _LOADING:
            self._doubt_sync_loads()
        if not ok and hook in _PREPARING:
            self._in_doubt |= self._step.async_loads.keys()
            self._has_orders = hook != "bind_connector_metadata"  # half bound: nothing else could make sense of it
        return answer

    def results(self, ask: Callable[..., Any], ask_blocks: Callable[[], Any], finished_req_ids: set[str]) -> Any:
        """`get_transfer_results`, and with it `get_block_ids_with_load_errors`: neither can be trusted alone."""
        found, has_results = self.attempt(
            "get_transfer_results", KVConnectorTransferResults(), ask, finished_req_ids, check=broken_results
        )
        blocks, has_blocks = self.attempt("get_block_ids_with_load_errors", (), ask_blocks, check=broken_block_ids)
        self._bad_blocks |= set(blocks)
        failed = found.failed_recving | {failure.request_id for failure in getattr(found, "failed_blocks", ())}
        self._place(failed - found.finished_recving)
        settled = found.finished_recving & self._given_up
        self._given_up -= settled
        self._news.settled.update(settled)
        if not has_blocks:
            failed |= self._completions.loading_ids()
        self._completions.report(
            _ONLY, KVConnectorTransferResults(found.finished_sending, found.finished_recving, failed)
        )
        self._give_up(self._in_doubt if has_results else self._completions.loading_ids())
        if not (has_results and has_blocks):
            self._doubt_sync_loads()
        done = self._completions.take()
        return vllm_base.KVConnectorTransferResults(done.finished_sending, done.finished_recving, done.failed_recving)

    def _place(self, failed: set[str]) -> None:
        """Of loads that are no asynchronous ones, or not at their end: as blocks what vLLM knows by blocks."""
        for request_id in failed & self._step.sync_blocks.keys():
            self._bad_blocks |= self._step.sync_blocks[request_id]
        unknown = failed - self._step.sync_blocks.keys() - self._completions.loading_ids() - self._given_up
        if unknown & self._completions.live_ids():
            raise HostError(
                f"the load of {', '.join(sorted(unknown))} failed, which was reported after its step, and vLLM has "
                "computed with it: report failed loads no later than in their step"
            )

    def bad_blocks(self) -> set[int]:
        """`get_block_ids_with_load_errors`. HostError for several groups: vLLM knows of no blocks there."""
        bad, self._bad_blocks = self._bad_blocks - {NULL_BLOCK_ID}, set()
        if bad and self._num_groups > 1:
            raise HostError(
                "a synchronous load failed, and with hybrid KV caches vLLM accepts no report of that failure: load "
                "asynchronously (load_async), or start vLLM with --disable-hybrid-kv-cache-manager"
            )
        return bad

    def report(self, ask: Callable[[], Any]) -> GuardedReport | None:
        """`build_connector_worker_meta`, the last report of a step."""
        self._completions.take_accepted()
        news, self._news = self._news, GuardedReport()
        news.inner = self.call("build_connector_worker_meta", None, ask)
        self.end_step()
        news.is_off, self._was_off = self.is_off and not self._was_off, self.is_off
        news.num_errors, self.num_errors = self.num_errors, 0
        return None if news == GuardedReport() else news

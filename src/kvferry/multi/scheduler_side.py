"""The scheduler's half of the MultiConnector: who loads, who must report, and each child's own view of the reports."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import Any

from kvferry.clock import Clock, SystemClock
from kvferry.contract.base import CacheHitSource, KVConnectorHandshakeMetadata, KVConnectorRole
from kvferry.contract.clauses import broken_finish, broken_match, broken_sources
from kvferry.contract.explain import PrefixRange
from kvferry.contract.kv_cache import KVCacheConfig, KVConnectorOutput
from kvferry.contract.pins import ManagerView, PinLedger
from kvferry.contract.stats import ConnectorStats
from kvferry.contract.views import BlockIds, as_groups, block_ids_of
from kvferry.errors import ConfigError, ContractError
from kvferry.multi.base import MultiBase
from kvferry.multi.child import Child
from kvferry.multi.config import LoadPolicy
from kvferry.multi.messages import (
    ChildReport,
    MultiHandshake,
    MultiMetadata,
    MultiWorkerMetadata,
    as_events,
    source_path,
    with_source,
)
from kvferry.multi.requests import ChildClaim, Claims, Match, RankCounts
from kvferry.types import NULL_BLOCK_ID

logger = logging.getLogger(__name__)

_PARAMS_BY_CHILD = "children"


class ResetOutcome(Enum):
    """What became of one child's `reset_cache`."""

    DONE = "done"
    FAILED = "failed"
    NOT_IMPLEMENTED = "not implemented"


class MultiSchedulerHooks(MultiBase):
    """The hooks that engines call on the scheduler instance."""

    def __init__(
        self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: KVCacheConfig, clock: Clock | None = None
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config, clock)
        self.last_reset: dict[str, ResetOutcome] = {}
        """By child's label, what became of the last `reset_cache`."""
        policy = LoadPolicy(self.settings.load_policy)
        self._claims = Claims(policy, self.settings.lookup_wait_s, clock or SystemClock())
        self._next = MultiMetadata()
        self._new_req_ids: list[str] = []
        self._open_loads: dict[str, ChildClaim] = {}
        """Asynchronous loads that have not been reported yet."""
        self._ledgers: dict[int, PinLedger] = {}
        self._num_closed_ranks: Counter[int] = Counter()
        self._views = [_ReportView(self._num_ranks()) for _ in self.children]

    # ---- engine start -----------------------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Every child binds it, with a block pool that remembers the child's pins."""
        self._kv_cache_manager = kv_cache_manager
        for child in self.children:
            ledger = self._ledgers[child.index] = PinLedger(kv_cache_manager.block_pool)
            child.connector.bind_kv_cache_manager(ManagerView(kv_cache_manager, ledger))

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """For hosts that call it without a manager."""
        for child in self.children:
            ledger = self._ledgers[child.index] = PinLedger(gpu_block_pool)
            child.connector.bind_gpu_block_pool(ledger)

    def get_finished_count(self) -> int | None:
        """ConfigError when the children differ: one count serves the whole engine."""
        answers = {child.label: child.connector.get_finished_count() for child in self.children}
        counts = {label: answer or self._num_ranks() for label, answer in answers.items()}
        for view, count in zip(self._views, counts.values(), strict=True):
            view.set_num_ranks(count)
        if len(set(counts.values())) > 1:
            raise ConfigError(
                f"the connectors expect end-of-transfer reports from different numbers of workers: {counts}"
            )
        return next((answer for answer in answers.values() if answer), None)

    def _num_ranks(self) -> int:
        parallel = getattr(self._vllm_config, "parallel_config", None)
        sizes = ("tensor_parallel_size", "pipeline_parallel_size")
        tp_size, pp_size = (int(getattr(parallel, name, 1) or 1) for name in sizes)
        return tp_size * pp_size

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """Each child gets what its own workers sent."""
        for child in self.children:
            child.connector.set_xfer_handshake_metadata(_handshakes_of(child, metadata))

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """Each child gets what its own workers sent."""
        for child in self.children:
            child.connector.set_xfer_handshake_metadata_pp_aware(_handshakes_of(child, metadata))

    @property
    def requires_kv_delivery(self) -> bool:
        """True when any child requires it."""
        return any(child.connector.requires_kv_delivery for child in self.children)

    @property
    def supports_divergent_local_hybrid_hits(self) -> bool:
        """True when all children do."""
        return all(child.connector.supports_divergent_local_hybrid_hits for child in self.children)

    # ---- lookup and load --------------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Told to every child, and to the workers, which keep early reports of known requests only."""
        self._new_req_ids.append(request.request_id)
        for child in self._active():
            child.tell("on_new_request", request)

    def _active(self) -> list[Child]:
        return [child for child in self.children if not child.is_off]

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """The claim that `load_policy` chooses; None while a child that may have a better one is still looking.

        Once one child has a hit, that wait takes at most `lookup_wait_s`. Bad claims count as none.
        """
        check = partial(broken_match, num_local=num_computed_tokens, num_tokens=request.num_tokens)
        answers: list[Match] = [
            (0, False)
            if child.is_off
            else child.ask("get_num_new_matched_tokens", (0, False), request, num_computed_tokens, check=check)
            for child in self.children
        ]
        return self._claims.choose(request.request_id, num_computed_tokens, answers)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        """The load owner's answer."""
        claim = self._claims.of(request.request_id)
        default = super().get_loaded_kv_cache_group_ids(request)
        if claim is None:
            return default
        groups: tuple[int, ...] = self.children[claim.child].ask("get_loaded_kv_cache_group_ids", default, request)
        return groups

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The load owner is given the tokens to load, the others 0. What the owner raises is raised after all calls."""
        request_id = request.request_id
        claim = self._claims.of(request_id) if num_external_tokens else None
        self._claims.admitted(request_id)
        error: Exception | None = None
        if claim is not None:
            self._note_load(request_id, claim, blocks, num_external_tokens)
        for child in self._active():
            is_owner = claim is not None and child.index == claim.child
            raised = child.tell("update_state_after_alloc", request, blocks, num_external_tokens if is_owner else 0)
            error = raised if is_owner else error
        if num_external_tokens and claim is None:
            raise ContractError(f"{request_id}: {num_external_tokens} tokens are to be loaded that no child claims")
        if error is not None:
            raise error
        if claim is not None and self.children[claim.child].is_off:
            raise ContractError(f"{request_id}: {self.children[claim.child].label} is switched off and cannot load")

    def _note_load(self, request_id: str, claim: ChildClaim, blocks: Any, num_external_tokens: int) -> None:
        if claim.is_async:
            self._next.async_loads[request_id] = claim.child
            self._open_loads[request_id] = claim
            return
        block_ids = self._next.sync_loads.setdefault(claim.child, set())
        end = claim.num_local_tokens + num_external_tokens
        groups = self._kv_cache_config.kv_cache_groups
        for group, table in zip(groups, block_ids_of(blocks), strict=False):
            size = group.kv_cache_spec.block_size
            block_ids.update(table[claim.num_local_tokens // size : -(-end // size)])
        block_ids.discard(NULL_BLOCK_ID)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[CacheHitSource, int]:
        """The load owner's answer."""
        claim = self._claims.of(request.request_id)
        default = super().get_external_cache_hit_sources(request, num_external_tokens)
        if claim is None:
            return default
        sources: dict[CacheHitSource, int] = self.children[claim.child].ask(
            "get_external_cache_hit_sources",
            default,
            request,
            num_external_tokens,
            check=partial(broken_sources, num_external=num_external_tokens),
        )
        return sources

    def build_connector_meta(self, scheduler_output: Any) -> MultiMetadata:
        """Each child's orders, and what the workers must know of requests."""
        metadata, self._next = self._next, MultiMetadata()
        metadata.new_req_ids, self._new_req_ids = tuple(self._new_req_ids), []
        metadata.children = tuple(
            None if child.is_off else child.ask("build_connector_meta", None, scheduler_output)
            for child in self.children
        )
        metadata.switched_off = frozenset(child.index for child in self.children if child.is_off)
        return metadata

    def has_pending_block_frees(self) -> bool:
        """True when any child says so."""
        return any(child.ask("has_pending_block_frees", False) for child in self.children)

    def has_pending_push_work(self) -> bool:
        """True when any child says so, and until one that was switched off is closed."""
        return any(child.is_closing or child.ask("has_pending_push_work", False) for child in self.children)

    # ---- reports ----------------------------------------------------------------------------------------------

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Every child gets what its own workers reported. Bad blocks go to all: what was computed over them is bad."""
        metadata = connector_output.kv_connector_worker_meta
        reports: tuple[ChildReport, ...] = ()
        bad_block_ids = set(connector_output.invalid_block_ids)
        if isinstance(metadata, MultiWorkerMetadata):
            reports = metadata.children
            bad_block_ids |= metadata.unproved_block_ids
        stats = connector_output.kv_connector_stats
        by_label = stats.children if isinstance(stats, ConnectorStats) else {}
        for child, view in zip(self.children, self._views, strict=True):
            report = reports[child.index] if reports else ChildReport()
            child.num_worker_errors += report.num_errors
            child.num_broken_answers += report.num_broken_answers
            if report.is_off:
                child.switch_off("its worker instance is")
            own = view.of(report)
            for request_id in own["finished_recving"]:
                self._open_loads.pop(request_id, None)
            output = replace(
                connector_output,
                kv_connector_stats=by_label.get(child.label),
                invalid_block_ids=set(bad_block_ids),
                **own,
            )
            error = child.tell("update_connector_output", output)
            if error is not None and (bad_block_ids or output.failed_recving):
                child.switch_off("the connector did not learn of failed loads and might store KV computed over them")
            self._close(child, report.num_closed_ranks)

    def _close(self, child: Child, num_newly_closed_ranks: int) -> None:
        """Once its workers are all shut down, the child's scheduler instance is, and its pins are taken back."""
        self._num_closed_ranks[child.index] += num_newly_closed_ranks
        if self._num_closed_ranks[child.index] >= self._num_ranks() and child.is_closing and child.close():
            num_pins = self._ledgers[child.index].release_all() if child.index in self._ledgers else 0
            logger.error("MultiConnector's child %s is shut down; %d blocks unpinned", child.label, num_pins)

    def take_events(self) -> Iterable[Any]:
        """All children's events, each with its source."""
        return [
            with_source(event, child.label)
            for child in self.children
            for event in child.ask("take_events", [], reads=as_events)
        ]

    # ---- ends -------------------------------------------------------------------------------------------------

    def register_finished_partial_tail(self, request: Any, block_ids: Any, partial_tail_offloads: Any) -> bool:
        """True when any child takes the tail over; each that does will report the request as sent."""
        takers = [
            child
            for child in self._active()
            if child.ask("register_finished_partial_tail", False, request, block_ids, partial_tail_offloads)
        ]
        for child in takers:
            self._claims.add_tail(request.request_id, child.index)
        return bool(takers)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished_all_groups`, for hosts that pass the only group's list."""
        return self.request_finished_all_groups(request, as_groups(block_ids))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Keep the blocks until every child that wants to has reported. Parameters flat, and by child's label.

        While one child still loads the request's blocks, the others are shown only those filled before the load.
        ContractError, and no child is asked, when there are several groups and a child supports only one.
        """
        for child in self.children:
            if len(block_ids) > 1 and not child.is_hma:
                raise ContractError(f"{child.label} supports one KV cache group, the host passed {len(block_ids)}")
        promised = self._claims.end(request.request_id)
        load = self._open_loads.pop(request.request_id, None)
        params: dict[str, dict[str, Any]] = {}
        for child in self.children:
            is_filled = load is None or load.child == child.index
            filled = block_ids if is_filled or load is None else self._first_blocks(block_ids, load.num_local_tokens)
            delays, child_params = _finish(child, request, filled)
            if delays:
                promised.add(child.index)
            if child_params is not None:
                params[child.label] = child_params
        self._next.ended[request.request_id] = tuple(sorted(promised))
        return bool(promised), _merged_params(params)

    def _first_blocks(self, block_ids: BlockIds, num_tokens: int) -> BlockIds:
        groups = self._kv_cache_config.kv_cache_groups
        sizes = [group.kv_cache_spec.block_size for group in groups]
        return tuple(table[: num_tokens // size] for table, size in zip(block_ids, sizes, strict=False))

    def reset_cache(self) -> bool:
        """Every child is asked. True only when all have done it; `last_reset` says what became of each."""
        self.last_reset = {child.label: _reset(child) for child in self.children}
        for label, outcome in self.last_reset.items():
            is_done = outcome is ResetOutcome.DONE
            logger.log(logging.INFO if is_done else logging.WARNING, "reset_cache of %s: %s", label, outcome.value)
        return all(outcome is ResetOutcome.DONE for outcome in self.last_reset.values())

    def explain_prefix(self, request: Any, num_computed_tokens: int) -> list[PrefixRange]:
        """All children's answers, each with its source."""
        claim = self._claims.of(request.request_id)
        owner = None if claim is None else claim.child
        return [
            replace(
                found,
                source=source_path(child.label, found.source),
                is_claimed=found.is_claimed and child.index == owner,
            )
            for child in self.children
            for found in child.ask("explain_prefix", [], request, num_computed_tokens, reads=list)
        ]


class _ReportView:
    """One child's reports as it would see them alone: an id is complete when enough ranks have reported it."""

    def __init__(self, num_ranks: int) -> None:
        self.set_num_ranks(num_ranks)

    def set_num_ranks(self, num_ranks: int) -> None:
        """How many ranks report each id. Forgets what was counted so far."""
        self._sent = RankCounts(num_ranks)
        self._received = RankCounts(num_ranks)
        self._failed: set[str] = set()

    def of(self, report: ChildReport) -> dict[str, Any]:
        """The child's own fields of a KVConnectorOutput."""
        received = self._received.add(report.received)
        self._failed |= report.failed
        failed = self._failed & received
        self._failed -= failed
        return {
            "finished_sending": self._sent.add(report.sent),
            "finished_recving": received,
            "failed_recving": failed,
            "kv_cache_events": _events_of_ranks(report.events),
            "kv_connector_worker_meta": report.worker_meta,
        }


def _events_of_ranks(answers: list[Any]) -> Any:
    """One rank's answer as it came; those of several ranks as one list."""
    if len(answers) <= 1:
        return answers[0] if answers else None
    return [event for answer in answers for event in as_events(answer)]


def _handshakes_of(child: Child, metadata: dict[Any, KVConnectorHandshakeMetadata]) -> dict[Any, Any]:
    found = {}
    for rank, shake in metadata.items():
        if not isinstance(shake, MultiHandshake):
            raise ConfigError(f"worker {rank} sent a {type(shake).__name__}: all workers must run the MultiConnector")
        if child.label in shake.children:
            found[rank] = shake.children[child.label]
    return found


def _finish(child: Child, request: Any, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
    if child.is_off:
        return False, None
    hook, argument = "request_finished_all_groups", block_ids
    if not child.is_hma:
        hook, argument = "request_finished", block_ids[0]  # type: ignore[assignment]
    answer: tuple[bool, dict[str, Any] | None] = child.ask(hook, (False, None), request, argument, check=broken_finish)
    return answer


def _merged_params(by_child: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Keys that one child alone has, flat, and all of them by child's label; clashing keys only there."""
    if not by_child:
        return None
    flat: dict[str, Any] = {}
    clashes: set[str] = set()
    for params in by_child.values():
        clashes |= flat.keys() & params.keys()
        flat.update(params)
    flat = {key: value for key, value in flat.items() if key not in clashes and key != _PARAMS_BY_CHILD}
    clashes.discard(_PARAMS_BY_CHILD)  # nested connectors have one each
    if clashes:
        logger.warning(
            "kv_transfer_params of %s clash in %s: read them under %r",
            ", ".join(by_child),
            ", ".join(sorted(clashes)),
            _PARAMS_BY_CHILD,
        )
    return {**flat, _PARAMS_BY_CHILD: {label: dict(params) for label, params in by_child.items()}}


def _reset(child: Child) -> ResetOutcome:
    answer, error = child.ask_or_error("reset_cache", False)
    if isinstance(error, NotImplementedError) or answer is None:
        return ResetOutcome.NOT_IMPLEMENTED
    return ResetOutcome.DONE if answer else ResetOutcome.FAILED

"""The worker's half of the MultiConnector: every child works; completions are forwarded when all is reported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from kvferry.clock import Clock
from kvferry.contract.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from kvferry.contract.clauses import broken_block_ids, broken_results
from kvferry.contract.kv_cache import KVCacheConfig
from kvferry.errors import ConfigError, ContractError
from kvferry.multi.base import MultiBase
from kvferry.multi.child import Child
from kvferry.multi.messages import (
    MultiHandshake,
    MultiMetadata,
    MultiWorkerMetadata,
    as_events,
    with_source,
)
from kvferry.multi.requests import Completions

if TYPE_CHECKING:
    import torch


class MultiWorkerHooks(MultiBase):
    """The hooks that engines call on worker instances.

    What a child raises while one of its loads is under way is raised to the host once all children were called, so
    that the host takes the load as failed; otherwise it costs that child alone.
    """

    def __init__(
        self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: KVCacheConfig, clock: Clock | None = None
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config, clock)
        self._completions = Completions(len(self.children))
        self._begun = MultiMetadata()
        self._bound: list[Child] = []
        self._broken: set[int] = set()
        """Children that raised in this step."""
        self._save_failed: set[int] = set()
        """Children whose save raised in this step; their loads are waited for all the same."""
        self._loading: set[int] = set()
        """Children whose loads this step begins, or finds under way."""
        self._events: list[list[Any]] = [[] for _ in self.children]
        self._reported_errors = [(0, 0, False) for _ in self.children]
        self._unproved_block_ids: set[int] = set()
        self._bad_block_ids: set[int] = set()
        """Reported by children, not yet to the host."""
        self._newly_closed: set[int] = set()

    # ---- engine start -----------------------------------------------------------------------------------------

    def get_mem_pool_context(self) -> AbstractContextManager[Any] | None:
        """The only child's that has one; ConfigError when two have."""
        contexts = {child.label: child.connector.get_mem_pool_context() for child in self.children}
        wanted = {label: context for label, context in contexts.items() if context is not None}
        if len(wanted) > 1:
            raise ConfigError(f"{' and '.join(wanted)} both want to allocate the KV memory: use one of them")
        return next(iter(wanted.values()), None)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Every child registers them."""
        for child in self.children:
            child.connector.register_kv_caches(dict(kv_caches))

    def set_host_xfer_buffer_ops(self, copy_operation: Any) -> None:
        """Passed to every child."""
        self._tell_all("set_host_xfer_buffer_ops", copy_operation)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Each child's under its label; None when no child has any."""
        shakes = {child.label: child.connector.get_handshake_metadata() for child in self.children}
        found = {label: shake for label, shake in shakes.items() if shake is not None}
        return MultiHandshake(found) if found else None

    def reset_capture_state(self) -> None:
        """Told to every child."""
        self._tell_all("reset_capture_state")

    # ---- a step -----------------------------------------------------------------------------------------------

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Told to every child, with its own orders."""
        orders = self._begin(kv_connector_metadata)
        self._raise_if_loading({child: child.tell("handle_preemptions", meta) for child, meta in orders})

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Every child binds its own orders; one that has none, or is switched off, takes no part in the step."""
        orders = self._begin(connector_metadata)
        self._connector_metadata = connector_metadata
        self._bound = [child for child, _ in orders]
        self._raise_if_loading({child: child.tell("bind_connector_metadata", meta) for child, meta in orders})

    def _begin(self, metadata: KVConnectorMetadata) -> list[tuple[Child, Any]]:
        """Take a step's news in, once. The children that have orders in it."""
        if not isinstance(metadata, MultiMetadata):
            raise ContractError(f"a MultiConnector was given {type(metadata).__name__}, not its own metadata")
        if metadata is not self._begun:
            self._begun = metadata
            self._broken = set()
            self._save_failed = set()
            for index in metadata.switched_off:
                self.children[index].switch_off("its scheduler instance is")
            off = [child for child in self.children if child.is_off]
            self._newly_closed |= {child.index for child in off if child.is_closing and child.close()}
            closed = {child.index for child in off if child.is_closed}
            self._completions.begin_step(metadata, {child.index for child in off}, closed)
            self._loading = set(metadata.sync_loads) | self._completions.loading()
        pairs = zip(self.children, metadata.children, strict=True)
        return [(child, meta) for child, meta in pairs if meta is not None and not child.is_off]

    def _raise_if_loading(self, errors: dict[Child, Exception | None]) -> None:
        """After all children were called: raise what one raised that is loading."""
        raised = {child: error for child, error in errors.items() if error is not None}
        self._broken.update(child.index for child in raised)
        for child, error in raised.items():
            if self._loads_now(child) or (child.index in self._loading and not child.is_off):
                self._unproved_block_ids |= self._begun.sync_loads.get(child.index, set())
                raise error

    def _loads_now(self, child: Child) -> bool:
        return child.index in self._begun.sync_loads

    def has_connector_metadata(self) -> bool:
        """True between bind and clear, when it is so for every child that takes part."""
        is_bound = self._connector_metadata is not None
        return is_bound and all(child.ask("has_connector_metadata", True) for child in self._taking_part())

    def _taking_part(self) -> list[Child]:
        return [
            child for child in self._bound if not child.is_off and child.index not in self._broken | self._save_failed
        ]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Every child starts its loads. ContractError when one that takes no part should have loaded for this step."""
        errors: dict[Child, Exception | None] = {}
        for child in self._bound:
            if not child.is_off:
                errors[child] = child.tell("start_load_kv", forward_context, **kwargs)
        for index in self._begun.sync_loads:
            child = self.children[index]
            if child not in errors:
                errors[child] = ContractError(f"{child.label} built no orders for the loads that it claimed")
        self._raise_if_loading(errors)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait for every child; for one that loads for this step also when its saves failed, or it was switched off."""
        taking_part, loads = self._taking_part(), self._begun.sync_loads.keys() - self._broken
        waiting = [child for child in self._bound if child in taking_part or child.index in loads]
        self._raise_if_loading({child: child.tell("wait_for_layer_load", layer_name) for child in waiting})

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Every child may save."""
        for child in self._taking_part():
            if child.tell("save_kv_layer", layer_name, kv_layer, attn_metadata, **kwargs) is not None:
                self._save_failed.add(child.index)

    def finish_forward(self) -> None:
        """Told to every child that takes part."""
        for child in self._taking_part():
            child.tell("finish_forward")

    def wait_for_save(self) -> None:
        """Told to every child that is bound. What one raises that loaded for this step is taken for its failure."""
        errors = {child: child.tell("wait_for_save") for child in self._bound if not child.is_off}
        self._raise_if_loading({child: error for child, error in errors.items() if self._loads_now(child)})

    def clear_connector_metadata(self) -> None:
        """Every child that is bound lets go of its orders."""
        for child in self._bound:
            child.tell("clear_connector_metadata")
        self._bound = []
        self._connector_metadata = None

    # ---- reports ----------------------------------------------------------------------------------------------

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """As `get_transfer_results`, in the older form."""
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending or None, results.finished_recving or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Each id once: sends when every child that promised one has reported, loads when their owner has.

        When this raises, nothing is lost: what the other children reported comes with the next call.
        """
        errors: dict[Child, Exception | None] = {}
        for child in self.children:
            results, errors[child] = child.ask_or_error(
                "get_transfer_results", None, set(finished_req_ids), check=broken_results
            )
            if results is not None:
                self._completions.report(child.index, results)
        self._raise_if_loading(errors)
        return self._completions.take()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """All children's. When this raises, they come with the next call."""
        errors: dict[Child, Exception | None] = {}
        for child in self.children:
            answer, errors[child] = child.ask_or_error("get_block_ids_with_load_errors", set(), check=broken_block_ids)
            self._bad_block_ids.update(answer)
        self._raise_if_loading(errors)
        for child, error in errors.items():
            if error is not None and child.index in self._loading:  # off: but an end of its may be told in this step
                raise error
        bad_block_ids, self._bad_block_ids = self._bad_block_ids, set()
        return bad_block_ids

    def get_kv_connector_kv_cache_events(self) -> list[Any] | None:
        """All children's events, each with its source; None when there are none."""
        found = []
        for child in self.children:
            answer, events = child.ask("get_kv_connector_kv_cache_events", (None, []), reads=_read_once)
            if events:
                self._events[child.index].append(answer)
                found += [with_source(event, child.label) for event in events]
        return found or None

    def build_connector_worker_meta(self) -> MultiWorkerMetadata | None:
        """Each child's own report, with what Multi knows of it; None when there is nothing to tell."""
        reports = self._completions.take_accepted()
        for child, report in zip(self.children, reports, strict=True):
            report.worker_meta = child.ask("build_connector_worker_meta", None)
            report.events, self._events[child.index] = self._events[child.index], []
            told_errors, told_broken, was_off = self._reported_errors[child.index]
            report.num_errors = child.num_errors - told_errors
            report.num_broken_answers = child.num_broken_answers - told_broken
            report.is_off = child.is_off and not was_off
            report.num_closed_ranks = int(child.index in self._newly_closed)
            self._reported_errors[child.index] = (child.num_errors, child.num_broken_answers, child.is_off)
        self._newly_closed.clear()
        unproved, self._unproved_block_ids = self._unproved_block_ids, set()
        if not unproved and all(report.is_empty() for report in reports):
            return None
        return MultiWorkerMetadata(tuple(reports), unproved)


def _read_once(answer: Any) -> tuple[Any, list[Any]]:
    """A child's events as they came and as a list; iterators can be read but once."""
    events = as_events(answer)
    return (events if isinstance(answer, Iterator) else answer), events

"""LoadRecoveryExampleConnector: an example of a connector, and of how an engine recovers from loads that fail.

It keeps every full block in the memory of the worker and loads it for requests with the same prefix, except that it
drops the blocks it is told to drop and says so, in one of the three ways the contract knows. Whatever it drops, the
engine's output must be the same: that is what it is for.

    scheduler side   knows which keys are stored; claims, plans loads and stores
    worker side      holds the bytes; copies, drops, reports

The two talk through step metadata and worker reports only, so they may be in different processes. KV dies with the
worker: this is no cache for production.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvferry.config import parse_settings
from kvferry.contract.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    LoadFailure,
)
from kvferry.contract.facade import facade_mixin
from kvferry.contract.host import HostInfo
from kvferry.contract.kv_cache import KVConnectorOutput
from kvferry.contract.sides import SchedulerSide, WorkerSide
from kvferry.contract.views import BlockIds, RequestView, StepView
from kvferry.errors import ConfigError, did_you_mean
from kvferry.kv.keys import UNIT_TOKENS, Identity, KeyChain

if TYPE_CHECKING:
    import torch

_WHERE = "kv_connector_extra_config"
_REPORTS = ("block_ids", "positions", "request")


@dataclass(frozen=True, slots=True)
class LoadRecoveryConfig:
    """Settings of the example, in `kv_connector_extra_config`."""

    fail_block_indexes: tuple[int, ...] = field(default=(), metadata={"minimum": 0})
    """Positions, in the request's block table, of the blocks to drop; positions that are not loaded do not count."""
    fail_every_nth_load: int = field(default=1, metadata={"minimum": 1})
    """Interval of drops: every n-th load of a request drops blocks; 1 drops in every load."""
    report_by: str = "block_ids"
    """Report of a drop, one of `block_ids` (get_block_ids_with_load_errors), `positions` (failed_blocks: only
    the dropped blocks and what follows are computed again; kvferry's engine alone reads it) or `request`
    (failed_recving: nothing of the load is used; vLLM reads it with `load_async` only)."""
    load_async: bool = False
    """True: load while other requests run. False: load right before the forward."""
    capacity_blocks: int = field(default=4096, metadata={"minimum": 1})
    """Largest number of stored blocks; beyond it, no block is stored."""

    @classmethod
    def parse(cls, host: HostInfo) -> LoadRecoveryConfig:
        """Read the settings; ConfigError names what is wrong with them, or with the engine they are for."""
        config = parse_settings(cls, host.extra_config, _WHERE)
        way, size = config.report_by, host.groups[0].block_tokens
        if way not in _REPORTS:
            raise ConfigError(f"{_WHERE}.report_by={way!r} is unknown{did_you_mean(way, _REPORTS)}")
        if size % UNIT_TOKENS:
            raise ConfigError(f"block_size={size}: this connector needs a multiple of {UNIT_TOKENS} tokens")
        return config


@dataclass(frozen=True, slots=True)
class RecoveryMove:
    """One block of a request, and the key of its content."""

    index: int
    block_id: int
    key: bytes


@dataclass(slots=True)
class LoadRecoveryMetadata(KVConnectorMetadata):
    """A step's orders."""

    loads: dict[str, list[RecoveryMove]] = field(default_factory=dict)
    """By request id."""
    stores: list[RecoveryMove] = field(default_factory=list)
    forget_all: bool = False


@dataclass(slots=True)
class LoadRecoveryReport(KVConnectorWorkerMetadata):
    """What a worker has made of them, by key. A block is there when every worker has its shard."""

    stored: set[bytes] = field(default_factory=set)
    failed: set[bytes] = field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> LoadRecoveryReport:
        """Of two ranks."""
        assert isinstance(other, LoadRecoveryReport)
        return LoadRecoveryReport(self.stored & other.stored, self.failed | other.failed)


@dataclass(slots=True)
class _RecoveredRequest:
    view: RequestView
    chain: KeyChain
    num_local_tokens: int = 0


class LoadRecoverySchedulerSide(SchedulerSide):
    """Knows which blocks the workers hold."""

    def __init__(self, host: HostInfo) -> None:
        super().__init__(host)
        self.config = LoadRecoveryConfig.parse(host)
        self.stored: set[bytes] = set()
        """Keys that can be loaded. A key whose load failed is out until it is stored again, so nothing loops."""
        self._block_tokens = host.groups[0].block_tokens
        self._requests: dict[str, _RecoveredRequest] = {}
        self._loads: dict[str, list[RecoveryMove]] = {}
        self._forget_all = False

    @classmethod
    def check(cls, host: HostInfo) -> list[str]:
        """Settings and block size."""
        LoadRecoveryConfig.parse(host)
        return []

    def on_new_request(self, request: RequestView) -> None:
        """Begin to hash the request, if its tokens alone (and its salt and media) tell what its KV is."""
        if not request.has_unhashable_input and request.lora_path is None:
            chain = KeyChain(Identity(self.host.model, request.cache_salt), request.multimodal_items)
            self._requests[request.request_id] = _RecoveredRequest(request, chain)

    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Claim the stored blocks behind the local ones; a synchronous load leaves a token to compute."""
        state = self._requests.get(request.request_id)
        is_late = not self.config.load_async and self.host.must_load_early(request)
        if state is None or request.skip_reading_prefix_cache or is_late:
            return 0, False
        state.num_local_tokens = num_computed_tokens
        limit = request.num_tokens if self.config.load_async else request.num_tokens - 1
        num_tokens = num_computed_tokens
        for _, key in self._keys(state, num_computed_tokens, limit):
            if key not in self.stored:
                break
            num_tokens += self._block_tokens
        num_external = num_tokens - num_computed_tokens
        return num_external, self.config.load_async and num_external > 0

    def _keys(self, state: _RecoveredRequest, first: int, end: int) -> Iterator[tuple[int, bytes]]:
        """(index, key) of the blocks that tokens [first, end) complete, as far as their tokens are known."""
        if state.chain.num_media != len(state.view.multimodal_items):
            return  # media came later: the chain does not know them
        state.chain.extend(state.view.token_ids)
        size = self._block_tokens
        for index in range(first // size, min(end, state.chain.num_hashed_tokens) // size):
            yield index, state.chain.value_at((index + 1) * size)

    def update_state_after_alloc(self, request: RequestView, block_ids: BlockIds, num_external_tokens: int) -> None:
        """Plan the load of the claimed blocks."""
        if num_external_tokens:
            state = self._requests[request.request_id]
            first = state.num_local_tokens
            self._loads[request.request_id] = list(self._moves(state, first, first + num_external_tokens, block_ids[0]))

    def _moves(self, state: _RecoveredRequest, first: int, end: int, table: list[int]) -> Iterator[RecoveryMove]:
        for index, key in self._keys(state, first, end):
            yield RecoveryMove(index, table[index], key)

    def build_connector_meta(self, step: StepView) -> LoadRecoveryMetadata:
        """The planned loads, and a store of each block that this step completes and nobody has stored."""
        metadata = LoadRecoveryMetadata(self._loads, forget_all=self._forget_all)
        self._loads, self._forget_all = {}, False
        for item in step.scheduled:
            state = self._requests.get(item.request_id)
            if state is not None:
                end_tokens = item.num_computed_tokens + item.num_scheduled_tokens
                moves = self._moves(state, item.num_computed_tokens, end_tokens, item.block_ids[0])
                metadata.stores.extend(move for move in moves if move.key not in self.stored)
        del metadata.stores[max(0, self.config.capacity_blocks - len(self.stored)) :]
        return metadata

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Learn what is stored. What was computed beside a failed load, whoever's, may be wrong and does not count."""
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, LoadRecoveryReport):
            failures = getattr(connector_output, "failed_blocks", ())
            if not (failures or connector_output.invalid_block_ids or connector_output.failed_recving):
                self.stored |= report.stored
            self.stored -= report.failed

    def request_finished(self, request: RequestView, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        """Forget the request."""
        self._requests.pop(request.request_id, None)
        return False, None

    def reset_cache(self) -> bool:
        """Forget all blocks, the workers' with the next step."""
        self.stored.clear()
        self._forget_all = True
        return True


class LoadRecoveryWorkerSide(WorkerSide):
    """Holds this rank's bytes of each block."""

    def __init__(self, host: HostInfo) -> None:
        super().__init__(host)
        self.config = LoadRecoveryConfig.parse(host)
        self._layers: list[torch.Tensor] = []
        self._blocks: dict[bytes, list[torch.Tensor]] = {}
        self._num_loads = 0
        self._bad_ids: set[int] = set()
        self._results = KVConnectorTransferResults()
        self._report = LoadRecoveryReport()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Split each layer into logical blocks (which may be several of the tensor's own)."""
        num_blocks = self.host.num_blocks
        self._layers = [tensor.view(num_blocks, -1, *tensor.shape[1:]) for tensor in kv_caches.values()]

    def start_load_kv(self, metadata: KVConnectorMetadata) -> None:
        """Run all loads, dropping the blocks that are to be dropped."""
        assert isinstance(metadata, LoadRecoveryMetadata)
        if metadata.forget_all:
            self._blocks.clear()
        for request_id, moves in metadata.loads.items():
            self._num_loads += 1
            drops = self.config.fail_block_indexes if self._num_loads % self.config.fail_every_nth_load == 0 else ()
            for move in moves:
                self._load(request_id, move, is_dropped=move.index in drops)
            if self.config.load_async:
                self._results.finished_recving.add(request_id)

    def _load(self, request_id: str, move: RecoveryMove, is_dropped: bool) -> None:
        if not is_dropped and move.key in self._blocks:
            for layer, content in zip(self._layers, self._blocks[move.key], strict=True):
                layer[move.block_id].copy_(content)
            return
        self._report.failed.add(move.key)
        if self.config.report_by == "block_ids":
            self._bad_ids.add(move.block_id)
        elif self.config.report_by == "positions":
            self._results.failed_blocks.add(LoadFailure(request_id, 0, move.index))
        else:
            self._results.failed_recving.add(request_id)

    def wait_for_save(self, metadata: KVConnectorMetadata) -> None:
        """Copy what the step computed."""
        assert isinstance(metadata, LoadRecoveryMetadata)
        for move in metadata.stores:
            self._blocks[move.key] = [layer[move.block_id].clone() for layer in self._layers]
            self._report.stored.add(move.key)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Loads that ended, and by position or request those that failed."""
        results, self._results = self._results, KVConnectorTransferResults()
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The blocks that were dropped."""
        bad_ids, self._bad_ids = self._bad_ids, set()
        return bad_ids

    def build_connector_worker_meta(self) -> LoadRecoveryReport:
        """What was stored, and what failed to load."""
        report, self._report = self._report, LoadRecoveryReport()
        return report

    def shutdown(self) -> None:
        """Let go of all bytes; nothing runs in the background."""
        self._blocks.clear()


class LoadRecoveryExampleConnector(
    facade_mixin(LoadRecoverySchedulerSide, LoadRecoveryWorkerSide, KVConnectorRole.SCHEDULER),  # type: ignore[misc]
    KVConnectorBase_V1,
):
    """Stores blocks in memory, loads them, and drops some on purpose; settings: `LoadRecoveryConfig`."""

    supports_v2_model_runner = True

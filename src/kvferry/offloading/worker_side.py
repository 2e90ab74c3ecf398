"""Worker side of the OffloadingConnector: runs copy jobs between pool blocks and arena slots on a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvferry.contract.base import KVConnectorMetadata, KVConnectorTransferResults, LoadFailure
from kvferry.contract.host import HostInfo
from kvferry.contract.sides import WorkerSide
from kvferry.errors import HostError, TierCorrupt
from kvferry.kv.arena import Arena, ArenaInfo
from kvferry.kv.keys import Digest
from kvferry.kv.layout import KVLayout
from kvferry.offloading.copier import Copier, make_copier
from kvferry.offloading.messages import (
    ChunkPart,
    CopyJob,
    CopyReport,
    OffloadingHandshake,
    OffloadingStepMetadata,
    OffloadingWorkerReport,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _CopyOrder:
    job: CopyJob
    is_load: bool
    arena: ArenaInfo
    mark: Any


class OffloadingWorkerSide(WorkerSide):
    """Loads run before stores. Synchronous loads run in the caller; all else on the copy thread, so no hook waits."""

    def __init__(self, host: HostInfo) -> None:
        super().__init__(host)
        self._layout: KVLayout | None = None
        self._copier: Copier | None = None
        self._arena: Arena | None = None
        self._arena_lock = threading.Lock()
        self._loads_started: OffloadingStepMetadata | None = None
        self._unsaved: OffloadingStepMetadata | None = None
        self._wake = threading.Condition()
        self._loads: deque[_CopyOrder] = deque()
        self._stores: deque[_CopyOrder] = deque()
        self._done: deque[tuple[_CopyOrder, CopyReport]] = deque()
        self._reports: list[CopyReport] = []
        self._bad_blocks: set[int] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="kvferry-copy", daemon=True)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Normalise the layout and start the copy thread."""
        host = self.host
        self._layout, anchors = KVLayout.from_tensors(kv_caches, host.groups, host.num_blocks, host.page_form)
        self._copier = make_copier(anchors)
        self._thread.start()

    def get_handshake_metadata(self) -> OffloadingHandshake:
        """The layout as the scheduler side needs it."""
        assert self._layout is not None, "register_kv_caches comes first"
        return OffloadingHandshake(
            self.host.rank,
            self._layout.payload_description(),
            tuple(group.block_bytes for group in self._layout.groups),
        )

    def handle_preemptions(self, metadata: KVConnectorMetadata) -> None:
        """Start asynchronous loads already now, so that they overlap this step's forward.

        When the step before ended in an exception (Ctrl-C), its stores are reported as failed.
        """
        assert isinstance(metadata, OffloadingStepMetadata)
        if self._unsaved is not None:
            for job in self._unsaved.stores:
                report = CopyReport(job.job_id, self.host.rank, (None,) * len(job.parts), "HostError: the step failed")
                self._reports.append(report)
        self._loads_started = self._unsaved = metadata
        self._enqueue(metadata, [job for job in metadata.loads if job.is_async], is_load=True)

    def start_load_kv(self, metadata: KVConnectorMetadata) -> None:
        """Run synchronous loads to their end."""
        assert isinstance(metadata, OffloadingStepMetadata)
        if self._loads_started is not metadata:
            self.handle_preemptions(metadata)
        assert self._copier is not None
        for job in metadata.loads:
            if not job.is_async:
                order = _CopyOrder(job, True, metadata.arena, self._copier.mark())
                self._done.append((order, self._run(order)))

    def wait_for_save(self, metadata: KVConnectorMetadata) -> None:
        """Queue the stores; the scheduler side has pinned their blocks."""
        assert isinstance(metadata, OffloadingStepMetadata)
        self._unsaved = None
        self._enqueue(metadata, metadata.stores, is_load=False)

    def _enqueue(self, metadata: OffloadingStepMetadata, jobs: list[CopyJob], *, is_load: bool) -> None:
        if not jobs:
            return
        assert self._copier is not None
        mark = self._copier.mark()
        with self._wake:
            queue = self._loads if is_load else self._stores
            queue.extend(_CopyOrder(job, is_load, metadata.arena, mark) for job in jobs)
            self._wake.notify()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Asynchronous loads that ended, and what failed: by block ids, with several groups by position or request."""
        results = KVConnectorTransferResults()
        while self._done:
            order, report = self._done.popleft()
            self._reports.append(report)
            if not order.is_load:
                continue
            failed = [part for part, ok in zip(order.job.parts, report.digests, strict=True) if ok is None]
            if order.job.is_async:
                results.finished_recving.add(order.job.request_id)
            self._report_failed(order.job, failed, results)
        return results

    def _report_failed(self, job: CopyJob, failed: list[ChunkPart], results: KVConnectorTransferResults) -> None:
        if len(self.host.groups) == 1:
            self._bad_blocks.update(block for part in failed for block in part.block_ids)
        elif self.host.reads_failed_blocks:
            for part in failed:
                positions = range(part.first_position, part.first_position + len(part.block_ids))
                results.failed_blocks |= {LoadFailure(job.request_id, part.group_id, i) for i in positions}
        elif failed:
            results.failed_recving.add(job.request_id)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of failed parts since the last call."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def build_connector_worker_meta(self) -> OffloadingWorkerReport | None:
        """Reports of all jobs that ended since the last step."""
        reports, self._reports = self._reports, []
        return OffloadingWorkerReport(reports) if reports else None

    def shutdown(self) -> None:
        """Finish the copy that is running, drop the rest, release the arena. HostError when the copy does not end."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(_JOIN_TIMEOUT_S)
            if self._thread.is_alive():
                raise HostError(f"a copy has not ended {_JOIN_TIMEOUT_S:.0f} s after shutdown: its blocks may change")
        if self._arena is not None and self._copier is not None:
            self._copier.unmap_host()
            self._arena.close()

    # ---- copy thread ------------------------------------------------------------------------------------------

    def _main(self) -> None:
        while (order := self._next()) is not None:
            self._done.append((order, self._run(order)))

    def _next(self) -> _CopyOrder | None:
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._loads or self._stores)
            if self._closing:
                return None
            return self._loads.popleft() if self._loads else self._stores.popleft()

    def _run(self, order: _CopyOrder) -> CopyReport:
        digests: list[bytes | None] = []
        error = None
        started_s = time.perf_counter()
        for part in order.job.parts:
            try:
                digests.append(self._load(order, part) if order.is_load else self._store(order, part))
            except Exception as err:  # a copy thread's boundary: the job fails, the engine lives
                logger.warning("%s of job %d failed: %s", "load" if order.is_load else "store", order.job.job_id, err)
                digests.append(None)
                error = f"{type(err).__name__}: {err}"
        return CopyReport(order.job.job_id, self.host.rank, tuple(digests), error, time.perf_counter() - started_s)

    def _store(self, order: _CopyOrder, part: ChunkPart) -> bytes:
        arena, layout, copier = self._resources(order.arena)
        slot = part.slots[self.host.rank]
        group = layout.groups[part.group_id]
        proof = Digest()
        copier.gather(order.mark, group.block_ranges(part.block_ids), arena.slot_address(slot.slot), proof)
        # It may be another request's NaN that spoilt this prompt's KV: stored, it would for ever.
        payload = arena.slot_view(slot.slot)[: len(part.block_ids) * group.block_bytes]
        if not self.host.keeps_nan_apart and not group.is_finite(payload):
            raise HostError(f"the KV in blocks {list(part.block_ids)} has a NaN or an infinity")
        return proof.digest()

    def _load(self, order: _CopyOrder, part: ChunkPart) -> bytes:
        arena, layout, copier = self._resources(order.arena)
        slot = part.slots[self.host.rank]
        group = layout.groups[part.group_id]
        start = part.first_block * group.block_bytes
        end = start + len(part.block_ids) * group.block_bytes
        # The digest is of the whole chunk, also where a load wants only some of its blocks: of these as they arrived.
        payload, proof = arena.slot_view(slot.slot)[: part.payload_bytes], Digest() if part.digests else None
        if proof is not None:
            proof.update(payload[:start])
        if arena.generation(slot.slot) == slot.generation:
            address = arena.slot_address(slot.slot) + start
            copier.scatter(order.mark, address, group.block_ranges(part.block_ids), proof)
        if arena.generation(slot.slot) != slot.generation:
            raise TierCorrupt(f"slot {slot.slot} was given to another chunk while it was to be loaded")
        if proof is not None:
            proof.update(payload[end:])
            if proof.digest() != part.digests[self.host.rank]:
                raise TierCorrupt(f"the chunk in slot {slot.slot} changed in host memory")
        return b""

    def _resources(self, info: ArenaInfo) -> tuple[Arena, KVLayout, Copier]:
        if self._layout is None or self._copier is None:
            raise HostError("the host ran a step before register_kv_caches")
        with self._arena_lock:
            if self._arena is None or self._arena.info != info:
                self._arena = Arena.attach(info)
                self._copier.map_host(self._arena.address, info.num_slots * info.slot_bytes)
            return self._arena, self._layout, self._copier

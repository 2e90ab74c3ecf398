"""Worker side of the built-in LMCacheMPConnector: one thread talks to the server and copies, no hook waits for it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvferry.contract.base import KVConnectorMetadata, KVConnectorTransferResults
from kvferry.contract.host import HostInfo
from kvferry.contract.identity import model_identity, settings_identity
from kvferry.contract.sides import WorkerSide
from kvferry.errors import ConfigError, HostError, TransferError
from kvferry.kv.layout import KVLayout
from kvferry.lmcache.config import LMCacheConfig, builtin_config
from kvferry.lmcache.lookups import RETRY_S, RETRY_TIMEOUT_S
from kvferry.lmcache.messages import (
    LMCacheHandshake,
    LMCacheMetadata,
    LMCacheReport,
    ServerTransfer,
    TransferReport,
)
from kvferry.lmcache.session import ChunkCorrupt, ServerChunks, ServerSession, TransferRefused
from kvferry.lmcache.wire import ServerConnection
from kvferry.offloading.copier import Copier, make_copier
from kvferry.types import AttentionKind, GroupInfo

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_FORMAT = "kvferry-lmcache-1"
_DRAIN_S = 5.0


class _TransferOrder(NamedTuple):
    job: ServerTransfer
    is_load: bool
    mark: Any


class LMCacheWorkerSide(WorkerSide):
    """Loads run before stores. While the server is gone, loads fail at once and stores are dropped."""

    def __init__(self, host: HostInfo) -> None:
        super().__init__(host)
        self.config = builtin_config(host.extra_config, "worker")
        self._group = only_group(host)
        self._connection = ServerConnection(self.config.url)
        self._handshake: LMCacheHandshake | None = None
        self._make_session: Callable[[], ServerSession] | None = None
        self._session: ServerSession | None = None
        self._copier: Copier | None = None
        self._next_try_s = 0.0
        self._wake = threading.Condition()
        self._loads: deque[_TransferOrder] = deque()
        self._stores: deque[_TransferOrder] = deque()
        self._done: deque[tuple[_TransferOrder, TransferReport]] = deque()
        self._reports: list[TransferReport] = []
        self._step: int | None = None
        self._closes_at_s: float | None = None
        self._thread = threading.Thread(target=self._main, name="kvferry-lmcache", daemon=True)

    # ---- hooks ------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find the server and register with it. Blocks for at most some 15 s. HostError when there is no fitting
        server, ConfigError when its chunks do not fit this engine; both say what to do."""
        layout, anchors = KVLayout.from_tensors(kv_caches, (self._group,), self.host.num_blocks, self.host.page_form)
        group = layout.groups[0]
        chunk_tokens = self._connection.probe(http_port=self.config.http_port)
        geometry = ServerChunks.of(chunk_tokens, group.block_tokens, group.block_bytes, self.config.staging_bytes)
        model_name = _model_name(self.host, self.config, geometry, layout)
        self._copier = copier = make_copier(anchors)
        self._handshake = LMCacheHandshake(chunk_tokens, model_name)
        self._make_session = lambda: ServerSession(
            self._connection, geometry, group, copier, self.host.rank, keeps_nan_apart=self.host.keeps_nan_apart
        )
        self._register(chunk_tokens)
        logger.info("LMCache server %s: chunks of %d tokens, model %s", self.config.url, chunk_tokens, model_name)
        self._thread.start()

    def get_handshake_metadata(self) -> LMCacheHandshake:
        """What the scheduler side needs."""
        assert self._handshake is not None, "register_kv_caches comes first"
        return self._handshake

    def handle_preemptions(self, metadata: KVConnectorMetadata) -> None:
        """Start the step's loads and the stores of earlier steps; the scheduler side holds their blocks."""
        assert isinstance(metadata, LMCacheMetadata)
        self._step = metadata.step
        if not metadata.loads and not metadata.stores:
            return
        assert self._copier is not None
        mark = self._copier.mark()
        with self._wake:
            self._loads.extend(_TransferOrder(job, True, mark) for job in metadata.loads)
            self._stores.extend(_TransferOrder(job, False, mark) for job in metadata.stores)
            self._wake.notify()

    def start_load_kv(self, metadata: KVConnectorMetadata) -> None:
        """Nothing: loads have begun in `handle_preemptions`, to overlap the forward."""

    def wait_for_save(self, metadata: KVConnectorMetadata) -> None:
        """Nothing: this step's blocks are stored when its outcome is known."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Loads that ended; of a failed one nothing may be used."""
        results = KVConnectorTransferResults()
        while self._done:
            order, report = self._done.popleft()
            self._reports.append(report)
            if order.is_load:
                results.finished_recving.add(order.job.request_id)
                if report.error is not None:
                    results.failed_recving.add(order.job.request_id)
        return results

    def build_connector_worker_meta(self) -> LMCacheReport | None:
        """Jobs that ended, and which step this report is of."""
        reports, self._reports = self._reports, []
        return LMCacheReport(self._step, reports) if reports or self._step is not None else None

    def shutdown(self) -> None:
        """Send what is queued (a few seconds at most), tell the server, release the staging. HostError when the
        thread does not end."""
        with self._wake:
            self._closes_at_s = time.monotonic() + _DRAIN_S
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(_DRAIN_S + 2 * self.config.mq_timeout)
            if self._thread.is_alive():
                raise HostError("a transfer to LMCache has not ended at shutdown: its blocks may change")
        self._end_session()
        self._connection.close()

    # ---- the thread -------------------------------------------------------------------------------------------

    def _main(self) -> None:
        while not self._is_over():
            order = self._next()
            if self._session is None:
                self._look_for_server()  # also while orders keep coming
            if order is not None:
                self._done.append((order, self._run(order)))
            elif self._session is not None:
                self._guarded(lambda session: session.ping(self.config.mq_timeout))
        self._guarded(lambda session: session.unregister(RETRY_TIMEOUT_S))

    def _is_over(self) -> bool:
        if self._closes_at_s is None:
            return False
        is_idle = not self._loads and not self._stores
        return is_idle or self._session is None or time.monotonic() > self._closes_at_s

    def _next(self) -> _TransferOrder | None:
        """The next order; None when it is time for a sign of life, or to look for the server."""
        wait_s = RETRY_S if self._session is None else self.config.heartbeat_interval
        with self._wake:
            self._wake.wait_for(lambda: self._closes_at_s is not None or self._loads or self._stores, wait_s)
            queue = self._loads or self._stores
            return queue.popleft() if queue else None

    def _run(self, order: _TransferOrder) -> TransferReport:
        started_s, job, was_there = time.perf_counter(), order.job, self._session is not None
        error = self._guarded(lambda session: self._transfer(session, order))
        if error is not None and was_there:
            logger.warning("%s of %s: %s", "load" if order.is_load else "store", job.request_id, error)
        text = None if error is None else f"{type(error).__name__}: {error}"
        bad = error.chain_value if isinstance(error, ChunkCorrupt) else None
        return TransferReport(job.job_id, self.host.rank, text, time.perf_counter() - started_s, bad)

    def _transfer(self, session: ServerSession, order: _TransferOrder) -> None:
        transfer = session.retrieve if order.is_load else session.store
        transfer(order.job, order.mark, self.config.mq_timeout)

    def _guarded(self, act: Callable[[ServerSession], None]) -> Exception | None:
        """Do something with the session, if there is one; the error when it went wrong, which may end the session."""
        if self._session is None:
            return TransferError("the LMCache server is gone")
        try:
            act(self._session)
        except Exception as err:  # thread main: the job fails, the engine lives
            if isinstance(err, TransferError) and not isinstance(err, TransferRefused):
                self._end_session()
            return err
        return None

    def _register(self, chunk_tokens: int) -> None:
        assert self._handshake is not None and self._make_session is not None
        if chunk_tokens != self._handshake.chunk_tokens:
            raise HostError(f"its chunks have {chunk_tokens} tokens now, not {self._handshake.chunk_tokens}")
        session = self._make_session()
        try:
            session.register(self._handshake.model_name, self.host.world_size)
        except BaseException:
            session.close()
            raise
        self._session = session

    def _end_session(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def _look_for_server(self) -> None:
        if time.monotonic() < self._next_try_s:
            return
        self._next_try_s = time.monotonic() + RETRY_S
        try:
            self._register(self._connection.probe(timeout_s=RETRY_TIMEOUT_S))
        except Exception as err:  # thread main: the next try may do
            logger.info("the LMCache server is still gone: %s", err)
        else:
            logger.info("registered with the LMCache server %s again", self.config.url)


def only_group(host: HostInfo) -> GroupInfo:
    """The engine's KV cache group. ConfigError when tokens do not address its KV."""
    (group,) = host.groups  # hosts see to it: the class is not SupportsHMA
    if group.kind is AttentionKind.OTHER:
        raise ConfigError(
            f"layers {', '.join(group.layer_names[:3])} ... are neither full nor sliding-window attention; the "
            "LMCacheMPConnector cannot store them"
        )
    return group


def _model_name(host: HostInfo, config: LMCacheConfig, geometry: ServerChunks, layout: KVLayout) -> str:
    """What all bytes under one name agree on, so that neither LMCache's own clients nor other engines are misled."""
    identity = [
        _FORMAT,
        model_identity(host, config.weights_version),
        host.tp_size,
        host.pp_size,
        sorted(settings_identity(host).items()),
        geometry.row_bytes,
        layout.payload_description(),
    ]
    readable = re.sub(r"[^A-Za-z0-9._-]", "", Path(host.model).name)[:40]
    return f"kvferry-{readable}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}"

"""Worker side of the P2P connectors: carries out the scheduler side's orders, and reports how they ended.

It decides nothing: which request is received, failed or sent is told only when the core said so, exactly once each.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry.contract.base import KVConnectorMetadata, KVConnectorTransferResults
from kvferry.contract.host import HostInfo
from kvferry.contract.sides import WorkerSide
from kvferry.kv.layout import KVLayout
from kvferry.p2p.config import P2PConfig
from kvferry.p2p.digester import Digester
from kvferry.p2p.geometry import EngineGeometry, encode_geometry, rank_geometry
from kvferry.p2p.links import Links
from kvferry.p2p.step_messages import P2PHandshake, P2PStepMetadata, P2PWorkerReport
from kvferry.p2p.transports.choice import AUTO, create_transports
from kvferry.p2p.transports.shm import SharedPool
from kvferry.p2p.transports.transport import Region, Transport, TransportSetup

if TYPE_CHECKING:
    import torch


class P2PWorkerSide(WorkerSide):
    """Owns the transports of one worker. No hook waits for a transfer."""

    variant: Mapping[str, Any] = {}

    def __init__(self, host: HostInfo) -> None:
        super().__init__(host)
        self.config = P2PConfig.parse(host.extra_config, self.variant)
        shm_dir = Path(self.config.shm_dir) if self.config.shm_dir else None
        is_auto = self.config.transport == AUTO
        self._pool = SharedPool(host.engine_id, shm_dir, is_optional=is_auto) if self.config.uses_pool else None
        self.transports: dict[str, Transport] = {}
        """Those that serve this worker's KV, by name."""
        self._digester: Digester | None = None
        """There where this worker makes digests of its blocks."""
        self._links = Links(host.rank, self.config.transport, self.transports)
        self._geometry = b""
        self._anchors: list[torch.Tensor] = []
        self._done: P2PStepMetadata | None = None
        self._results = KVConnectorTransferResults()

    def get_mem_pool_context(self) -> AbstractContextManager[Any] | None:
        """KV memory that peers on this machine can map, where shared memory may be used."""
        return self._pool.context() if self._pool else None

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Describe the KV cache and make it reachable. ConfigError when no transport can serve it."""
        host = self.host
        layout, self._anchors = KVLayout.from_tensors(kv_caches, host.groups, host.num_blocks)
        storages = [(anchor.untyped_storage(), anchor.device) for anchor in self._anchors]
        regions = [Region(storage.data_ptr(), storage.nbytes(), str(device)) for storage, device in storages]
        rank = rank_geometry(
            layout, host.groups, [region.num_bytes for region in regions],
            total_kv_heads=host.total_kv_heads, key_elements=host.key_elements, page_form=host.page_form,
            tp_rank=host.rank, tp_size=host.tp_size,
        )  # fmt: skip
        self._geometry = encode_geometry(EngineGeometry((rank,)))
        if self.config.verify_loads and all(device.type == "cpu" for _, device in storages):
            self._digester = Digester(layout, rank, [region.address for region in regions])
            self._links.digester = self._digester
        address = self.config.control(None)
        setup = TransportSetup(
            host.engine_id, host=address.host, advertised_host=address.dialled_host, pool=self._pool
        )  # fmt: skip
        made = create_transports(self.config.transport, regions, setup, self.config.transport_configs)
        self.transports.update(made)

    def get_handshake_metadata(self) -> P2PHandshake:
        """What the scheduler side, and through it peers, must know of this worker."""
        blobs = {name: transport.local_blob() for name, transport in self.transports.items()}
        return P2PHandshake(self.host.rank, self._geometry, blobs, self._digester is not None)

    def handle_preemptions(self, metadata: KVConnectorMetadata) -> None:
        """Carry out the step's orders, first thing in it, so that transfers overlap the forward."""
        assert isinstance(metadata, P2PStepMetadata)
        self._done = metadata
        self._results.finished_recving.update(metadata.received)
        self._results.failed_recving.update(metadata.failed)
        self._results.finished_sending.update(metadata.sent)
        for order in metadata.opens:
            self._links.open(order)
        for job in metadata.jobs:
            self._links.start(job)
        for digest_job in metadata.digests:
            self._links.digest(digest_job)
        for connection in metadata.fences:
            self._links.fence(connection)
        for connection in metadata.closes:
            self._links.close(connection)

    def start_load_kv(self, metadata: KVConnectorMetadata) -> None:
        """Loads have begun already, unless the host does not call `handle_preemptions`."""
        if self._done is not metadata:
            self.handle_preemptions(metadata)

    def wait_for_save(self, metadata: KVConnectorMetadata) -> None:
        """Nothing is saved layer by layer. Prompts that are whole now get their digests.

        That is computing, a small part of what the forward took; later it would cost the hand-over a step of this
        engine, which may be long, or never come.
        """
        assert isinstance(metadata, P2PStepMetadata)
        for job in metadata.prompt_digests:
            self._links.digest_now(job)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """What this step's orders named."""
        results, self._results = self._results, KVConnectorTransferResults()
        return results

    def build_connector_worker_meta(self) -> P2PWorkerReport | None:
        """Jobs that ended and connections that are gone."""
        report = self._links.poll()
        return None if report.is_empty() else report

    def shutdown(self) -> None:
        """End all transfers; peers see that this engine's memory is gone."""
        for transport in self.transports.values():
            transport.close()
        if self._digester is not None:
            self._digester.close()
        if self._pool is not None:
            self._pool.close()

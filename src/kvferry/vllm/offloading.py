"""OffloadingConnector inside vLLM."""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA

from kvferry.connectors.offloading.scheduler import OffloadingSchedulerSide
from kvferry.connectors.offloading.worker import OffloadingWorkerSide
from kvferry.vllm.facade import vllm_facade


class OffloadingConnector(
    vllm_facade(OffloadingSchedulerSide, OffloadingWorkerSide),  # type: ignore[misc]
    KVConnectorBase_V1,
    SupportsHMA,
):
    """kvferry's OffloadingConnector on vLLM's base class; same settings, same stored files."""

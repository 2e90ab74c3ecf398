"""OffloadingConnector: KV outlives the engine, in host memory and in the tiers below it."""

from kvferry.contract.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from kvferry.contract.facade import facade_mixin
from kvferry.offloading.scheduler_side import OffloadingSchedulerSide
from kvferry.offloading.worker_side import OffloadingWorkerSide


class OffloadingConnector(
    facade_mixin(OffloadingSchedulerSide, OffloadingWorkerSide, KVConnectorRole.SCHEDULER),  # type: ignore[misc]
    KVConnectorBase_V1,
    SupportsHMA,
):
    """Stores KV chunks in host memory and in tiers below it, and loads them for requests with the same prefix.

    Settings stand in `kv_connector_extra_config`: see `kvferry.offloading.config.OffloadingConfig`.
    """

    supports_v2_model_runner = True


__all__ = ["OffloadingConnector", "OffloadingSchedulerSide", "OffloadingWorkerSide"]

"""What differs between our contract types and vLLM's of the same names."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vllm.distributed import kv_events as vllm_events
from vllm.distributed.kv_transfer.kv_connector.v1 import base as vllm_base

from kvferry.contract import base as own
from kvferry.contract.facade import facade_mixin
from kvferry.contract.sides import SchedulerSide, WorkerSide

vllm_base.KVConnectorMetadata.register(own.KVConnectorMetadata)
vllm_base.KVConnectorHandshakeMetadata.register(own.KVConnectorHandshakeMetadata)
vllm_base.KVConnectorWorkerMetadata.register(own.KVConnectorWorkerMetadata)


def vllm_facade(scheduler_side: type[SchedulerSide], worker_side: type[WorkerSide]) -> type[Any]:
    """The hook facade with answers in vLLM's types. Put it before vLLM's own base in the class's bases."""
    mixin = facade_mixin(scheduler_side, worker_side, vllm_base.KVConnectorRole.SCHEDULER)

    class VllmFacade(mixin):  # type: ignore[misc, valid-type]
        def get_transfer_results(self, finished_req_ids: set[str]) -> vllm_base.KVConnectorTransferResults:
            results = super().get_transfer_results(finished_req_ids)
            return vllm_base.KVConnectorTransferResults(
                results.finished_sending, results.finished_recving, results.failed_recving
            )

        def get_kv_connector_stats(self) -> None:
            """Nothing: vLLM wants objects of its own kind here."""

        def take_events(self) -> list[Any]:
            return [
                getattr(vllm_events, type(event).__name__)(**{f.name: getattr(event, f.name) for f in fields(event)})
                for event in super().take_events()
            ]

        def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
            sources = super().get_external_cache_hit_sources(request, num_external_tokens)
            return {vllm_base.CacheHitSource[source.name]: tokens for source, tokens in sources.items()}

    return VllmFacade

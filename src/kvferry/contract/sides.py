"""The two faces of a built-in connector, over our own types.

A built-in connector is a `SchedulerSide` and a `WorkerSide`; a facade (one per host, both made by `facade.py` from
the hook table) turns host objects into our views and calls these. Sides know no host. A connector of a third party
need not use them: it subclasses `KVConnectorBase_V1`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from kvferry.contract.base import (
    CacheHitSource,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from kvferry.contract.explain import PrefixRange
from kvferry.contract.host import HostInfo
from kvferry.contract.plugins import Registry
from kvferry.contract.views import BlockIds, RequestView, StepView
from kvferry.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from kvferry.contract.kv_cache import KVConnectorOutput


class SchedulerSide(ABC):
    """Decides what is loaded and saved. Lives in the scheduler's thread; nothing here may block."""

    cache_hit_source: CacheHitSource = CacheHitSource.EXTERNAL_UNSPECIFIED
    requires_kv_delivery: bool = False
    supports_divergent_local_hybrid_hits: bool = False
    registries: ClassVar[Sequence[Registry]] = ()
    """Of the parts that its settings may name, and installed packages may add (`kvferry connectors` lists them)."""

    def __init__(self, host: HostInfo) -> None:
        self.host = host

    @classmethod
    def check(cls, host: HostInfo) -> list[str]:
        """What this machine lacks for such a connector, each with its remedy. Makes nothing; asked before every start.

        ConfigError for settings that are wrong on any machine: it runs the parser that the constructor runs.
        """
        return []

    @abstractmethod
    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> tuple[int | None, bool]:
        """(tokens that can be loaded beyond `num_computed_tokens` or None for "ask again", asynchronously?)."""

    @abstractmethod
    def update_state_after_alloc(self, request: RequestView, block_ids: BlockIds, num_external_tokens: int) -> None:
        """Blocks are allocated (the whole table per group); plan the load when `num_external_tokens` > 0."""

    @abstractmethod
    def build_connector_meta(self, step: StepView) -> KVConnectorMetadata:
        """This step's orders to the workers."""

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """The host's block pool, for pins."""

    def on_new_request(self, request: RequestView) -> None:
        """A request was added."""

    def get_loaded_kv_cache_group_ids(self, request: RequestView) -> tuple[int, ...]:
        """Groups that the coming asynchronous load fills."""
        return tuple(range(len(self.host.groups)))

    def get_external_cache_hit_sources(
        self, request: RequestView, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        """Where the external tokens came from."""
        return {self.cache_hit_source: num_external_tokens}

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """The workers' reports."""

    def request_finished(self, request: RequestView, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        """(delay the free, kv_transfer_params)."""
        return False, None

    def register_finished_partial_tail(self, request: RequestView, block_ids: Any, tails: Any) -> bool:
        """Recurrent producers only."""
        return False

    def take_events(self) -> Iterable[Any]:
        """KV events since the last call."""
        return ()

    def has_pending_block_frees(self) -> bool:
        """True when blocks will come free soon."""
        return False

    def has_pending_push_work(self) -> bool:
        """True while the engine must keep stepping for us."""
        return False

    def get_finished_count(self) -> int | None:
        """How many workers report each transfer."""
        return None

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """Every rank's handshake metadata."""

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """Every (pp, tp) rank's handshake metadata; several stages are refused unless overridden."""
        if any(pp > 0 for pp, _ in metadata):
            raise ConfigError("pipeline parallelism is not supported by this connector; use one pipeline stage")
        self.set_xfer_handshake_metadata({tp: meta for (_, tp), meta in metadata.items()})

    def reset_cache(self) -> bool | None:
        """Forget everything stored."""
        return None

    def explain_prefix(self, request: RequestView, num_computed_tokens: int) -> list[PrefixRange]:
        """Where the KV of the tokens behind `num_computed_tokens` is, and why."""
        return []

    def get_kv_connector_stats(self) -> Any:
        """Statistics since the last call."""
        return None

    def shutdown(self) -> None:
        """Release everything."""


class WorkerSide(ABC):
    """Moves bytes between the pool and elsewhere. Called by the model runner's thread."""

    def __init__(self, host: HostInfo) -> None:
        self.host = host

    @abstractmethod
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Every layer's KV tensor."""

    @abstractmethod
    def start_load_kv(self, metadata: KVConnectorMetadata) -> None:
        """Start this step's loads (before the forward with synchronous loads, else after it)."""

    @abstractmethod
    def wait_for_save(self, metadata: KVConnectorMetadata) -> None:
        """The forward is done: start this step's saves; never waits for one."""

    @abstractmethod
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Transfers that ended."""

    def get_mem_pool_context(self) -> AbstractContextManager[Any] | None:
        """Context for KV allocation."""
        return None

    def set_host_xfer_buffer_ops(self, copy_operation: Any) -> None:
        """The host's block copy function."""

    def reset_capture_state(self) -> None:
        """After graph capture."""

    def handle_preemptions(self, metadata: KVConnectorMetadata) -> None:
        """First in every step: blocks freed in the last one may be written from now on."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Before a layer's attention."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any) -> None:
        """After a layer's attention."""

    def finish_forward(self) -> None:
        """After the forward (second runner)."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """As `get_transfer_results`, in the older form."""
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending or None, results.finished_recving or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks whose load failed."""
        return set()

    def get_kv_connector_stats(self) -> Any:
        """Statistics since the last call."""
        return None

    def get_kv_connector_kv_cache_events(self) -> Any:
        """KV events since the last call."""
        return None

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Report to the scheduler side."""
        return None

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """What the scheduler side must know of this rank."""
        return None

    def shutdown(self) -> None:
        """Release everything."""

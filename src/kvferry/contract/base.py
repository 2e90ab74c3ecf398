"""`KVConnectorBase_V1`: the surface connector authors subclass, and the form in which engines call connectors.

One class, two instances per engine. The *scheduler* instance lives beside the scheduler: it decides what is loaded and
saved. One *worker* instance per rank lives beside the model: it moves bytes. They may be in different processes and
talk only through the metadata that `build_connector_meta` returns (scheduler -> worker, every step) and through
completions and `build_connector_worker_meta` (worker -> scheduler, every step).

    engine start   WORKER.__init__ -> register_kv_caches -> SCHEDULER.__init__ -> bind_kv_cache_manager
                   -> get_finished_count -> WORKER.get_handshake_metadata -> SCHEDULER.set_xfer_handshake_metadata
    each step      SCHEDULER: (get_num_new_matched_tokens -> update_state_after_alloc)*, build_connector_meta
                   WORKER:    handle_preemptions, bind_connector_metadata, [start_load_kv if sync loads],
                              per layer (wait_for_layer_load, save_kv_layer), [start_load_kv otherwise], wait_for_save,
                              get_transfer_results, get_block_ids_with_load_errors, get_kv_connector_stats,
                              get_kv_connector_kv_cache_events, build_connector_worker_meta, clear_connector_metadata
                   SCHEDULER: request_finished* per finished request, update_connector_output, take_events
    engine stop    WORKER.shutdown, SCHEDULER.shutdown

Names, arguments and meanings are vLLM 0.32's, so that a connector written here reads the same there.
`contract/hooks.py` says as data which hook runs when.

A cache may lose, never lie: no hook may claim tokens it cannot deliver. Answers are checked by the host; a bad one is
a `ContractError` for that request, which is then computed without the connector.
"""

from __future__ import annotations

import enum
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from kvferry.config import KVTransferConfig
from kvferry.contract.explain import PrefixRange
from kvferry.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from kvferry.contract.kv_cache import KVCacheConfig, KVConnectorOutput

logger = logging.getLogger(__name__)

CONNECTOR_API = (1, 0)
"""Version of this contract: (major, minor). A minor adds hooks with defaults; a major changes what exists."""


class KVConnectorRole(enum.Enum):
    """Which of the two instances this is."""

    SCHEDULER = 0
    WORKER = 1


class CacheHitSource(enum.Enum):
    """Where external hit tokens came from, for statistics."""

    DEVICE = "device"
    HOST = "host"
    P2P = "p2p"
    DISK = "disk"
    EXTERNAL_UNSPECIFIED = "external_unspecified"


class KVConnectorMetadata(ABC):
    """What the scheduler instance tells the worker instances for one step. Must be picklable by the host."""


class KVConnectorHandshakeMetadata(ABC):
    """What one worker tells the scheduler instance once, after its KV caches are registered."""


class KVConnectorWorkerMetadata(ABC):
    """What a worker tells the scheduler instance after a step; merged over ranks before it arrives."""

    @abstractmethod
    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """The combination of this rank's metadata and another's."""


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """One block of one request's load that did not arrive, or not whole."""

    request_id: str
    group_id: int
    block_index: int
    """Position in the request's block table of that group, counted from 0."""


@dataclass
class KVConnectorTransferResults:
    """Request ids whose transfers ended in this step. A failed receive is in both receive sets."""

    finished_sending: set[str] = field(default_factory=set)
    finished_recving: set[str] = field(default_factory=set)
    failed_recving: set[str] = field(default_factory=set)
    """Nothing of these requests' loads may be used."""
    failed_blocks: set[LoadFailure] = field(default_factory=set)
    """Blocks that failed, where the rest of the load is good (kvferry's own; vLLM's runners do not read it)."""


class SupportsHMA(ABC):
    """Marks a connector that understands several KV cache groups (hybrid KV caches)."""

    @abstractmethod
    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `KVConnectorBase_V1.request_finished`, with one list of block ids per group."""


def supports_hma(connector: Any) -> bool:
    """True for a connector class or instance that supports hybrid KV caches."""
    if isinstance(connector, type):
        return issubclass(connector, SupportsHMA)
    return isinstance(connector, SupportsHMA)


class KVConnectorBase_V1(ABC):
    """Base of all KV connectors. Construct as `(vllm_config, role, kv_cache_config)`; all three are required.

    `vllm_config` is the host's configuration (vLLM's VllmConfig, or `kvferry.engine` EngineConfig, which offers the
    same attributes to the extent connectors read them). Seven methods are abstract; all others have a default.
    Raises ConfigError when there is no transfer config or no KV cache config.
    """

    CONNECTOR_API: ClassVar[tuple[int, int]] = CONNECTOR_API
    """Version of the contract the connector was written for; hosts refuse another major or a later minor."""
    supports_v2_model_runner: ClassVar[bool] = False
    """True when the connector keeps the second model runner's timetable of hooks (`finish_forward` and so on)."""
    _cache_hit_source: CacheHitSource = CacheHitSource.EXTERNAL_UNSPECIFIED

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        if kv_cache_config is None:
            raise ConfigError(
                f"{type(self).__name__} was built without kv_cache_config: "
                "pass the engine's KVCacheConfig as the third argument"
            )
        if vllm_config.kv_transfer_config is None:
            raise ConfigError(f"{type(self).__name__} needs a kv_transfer_config; the host's configuration has none")
        self._vllm_config = vllm_config
        self._kv_transfer_config: KVTransferConfig = vllm_config.kv_transfer_config
        self._kv_cache_config = kv_cache_config
        self._role = role
        self._connector_metadata: KVConnectorMetadata | None = None
        self._kv_cache_manager: Any = None

    @property
    def role(self) -> KVConnectorRole:
        """Which of the two instances this is."""
        return self._role

    # ---- worker side ------------------------------------------------------------------------------------------

    def get_mem_pool_context(self) -> AbstractContextManager[Any] | None:
        """A context in which the host allocates KV memory, or None."""
        return None

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Called once with every layer's KV tensor, a strided view [blocks, heads, tokens, content]; read strides."""

    def set_host_xfer_buffer_ops(self, copy_operation: Any) -> None:
        """Called once after registration with the host's block copy function, where it has one."""

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Called first in every step, before freed blocks may be written again."""

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Called in every step, empty ones included, with this step's metadata."""
        self._connector_metadata = connector_metadata

    def clear_connector_metadata(self) -> None:
        """Called at the end of every step."""
        self._connector_metadata = None

    def _get_connector_metadata(self) -> KVConnectorMetadata:
        """The metadata of the step that is running; only between bind and clear."""
        assert self._connector_metadata is not None, "no step metadata is bound"
        return self._connector_metadata

    def has_connector_metadata(self) -> bool:
        """True between bind and clear."""
        return self._connector_metadata is not None

    @abstractmethod
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start this step's loads. Runs before the forward when the step has synchronous loads, otherwise after it.

        `kwargs` differ between model runners and must be accepted. Asynchronous loads must not block here.
        """

    @abstractmethod
    def wait_for_layer_load(self, layer_name: str) -> None:
        """Return when this layer's synchronous loads are in the pool; called right before its attention."""

    @abstractmethod
    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Called right after this layer's attention; may start a save of it."""

    @abstractmethod
    def wait_for_save(self) -> None:
        """Called after the forward of every step. Saves still running on return must hold their source blocks."""

    def finish_forward(self) -> None:
        """Called right after the forward by the second model runner only."""

    def reset_capture_state(self) -> None:
        """Called after CUDA graph capture by the second model runner only."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """(requests whose sends ended, requests whose receives ended) since the last call; each id exactly once.

        `finished_req_ids` are the requests the scheduler ended in the step before.
        """
        return None, None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """What the runner really calls; wraps `get_finished`. Override it to report failed receives."""
        sent, received = self.get_finished(finished_req_ids)
        return KVConnectorTransferResults(set(sent or ()), set(received or ()))

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Block ids whose load failed since the last call; they will be computed again or fail their requests."""
        return set()

    def get_kv_connector_stats(self) -> Any:
        """Statistics since the last call, or None. Called on both sides."""
        return None

    def get_kv_connector_kv_cache_events(self) -> Any:
        """KV events of this worker since the last call, or None."""
        return None

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What the scheduler side should hear from this worker after this step, or None."""
        return None

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """What the scheduler side must know of this worker, once, after registration."""
        return None

    def shutdown(self) -> None:
        """Release everything; called once per instance, also when the engine dies."""

    # ---- scheduler side ---------------------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Called once with the host's KV cache manager; passes its block pool on."""
        self._kv_cache_manager = kv_cache_manager
        self.bind_gpu_block_pool(kv_cache_manager.block_pool)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Called once with the host's block pool (for pins: `touch` and `free_blocks`)."""

    def on_new_request(self, request: Any) -> None:
        """Called when a request is added, before it is scheduled."""

    @property
    def supports_divergent_local_hybrid_hits(self) -> bool:
        """True only for a connector that restores lagging recurrent state."""
        return False

    @property
    def requires_kv_delivery(self) -> bool:
        """True if output must be withheld when its KV could not be handed on. Caches answer False."""
        return self._kv_transfer_config.is_kv_producer

    @abstractmethod
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """(tokens beyond `num_computed_tokens` that can be loaded, whether they load asynchronously).

        Asked many times per request: pure, cheap, never blocking. (None, _) means: still looking, ask again next
        step. A synchronous claim must leave at least one token to compute; (0, True) is illegal.
        """

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        """Groups whose blocks the coming asynchronous load fills."""
        return self._kv_cache_config.prefix_cacheable_group_ids

    @abstractmethod
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Called after blocks were allocated: `blocks.get_block_ids()` gives all blocks of the request per group.

        With `num_external_tokens` > 0 the load is on: plan it now. Called again with 0 when an asynchronous load
        has ended and the request is admitted.
        """

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[CacheHitSource, int]:
        """How many of the external tokens came from where; sums to `num_external_tokens`."""
        return {self._cache_hit_source: num_external_tokens}

    @abstractmethod
    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """This step's orders to the workers. Called exactly once per step, empty steps included; mutates nothing."""

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Called with what the workers reported for a step, when they reported anything."""

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """(keep the blocks until this id is reported as sent, kv_transfer_params for the response).

        Called once per request however it ends, before its blocks are freed. False for a request still loading. Of one
        that ended with an error, `load_error` in the parameters is told with it. `load_error_param` beside it names the
        request's own parameter that is to blame; clients are then answered 400.
        """
        return False, None

    def register_finished_partial_tail(self, request: Any, block_ids: Any, partial_tail_offloads: Any) -> bool:
        """Producers of recurrent state only: True to take over the partial tail."""
        return False

    def take_events(self) -> Iterable[Any]:
        """KV events of the scheduler side since the last call."""
        return ()

    def has_pending_block_frees(self) -> bool:
        """True when blocks will come free soon, so that nothing need be preempted."""
        return False

    def has_pending_push_work(self) -> bool:
        """True while the engine must keep stepping although no request runs. Never without a deadline."""
        return False

    def get_finished_count(self) -> int | None:
        """How many workers report each finished transfer; None means all."""
        return None

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """Called once with every rank's handshake metadata (tp rank -> metadata); may be empty."""

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """As above for (pp rank, tp rank). The default refuses pipeline parallelism."""
        if any(pp > 0 for pp, _ in metadata):
            raise ConfigError(f"{type(self).__name__} does not support pipeline parallelism; use one pipeline stage")
        self.set_xfer_handshake_metadata({tp: meta for (_, tp), meta in metadata.items()})

    def reset_cache(self) -> bool | None:
        """Forget everything stored: True done, False failed, None not implemented."""
        logger.debug("%s does not implement reset_cache", type(self).__name__)
        return None

    def explain_prefix(self, request: Any, num_computed_tokens: int) -> list[PrefixRange]:
        """Where the KV of the request's tokens behind `num_computed_tokens` is, and why it can or cannot be loaded.

        Asked only when a user wants to know (kvferry's own hook; vLLM never calls it). Changes nothing, never blocks.
        """
        return []

    # ---- asked of the class, before there is an instance ------------------------------------------------------

    @classmethod
    def supports_hma_config(cls, kv_transfer_config: KVTransferConfig) -> bool:
        """True when an instance built from this configuration supports hybrid KV caches; composites ask their parts."""
        return supports_hma(cls)

    @classmethod
    def supports_v2_model_runner_config(cls, kv_transfer_config: KVTransferConfig) -> bool:
        """True when an instance built from this configuration keeps the second model runner's timetable of hooks."""
        return cls.supports_v2_model_runner

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """The physical KV layout this connector insists on, or None."""
        return None

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """True when layer hooks need piecewise CUDA graphs."""
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        """Rebuild a statistics object from its dict, or None."""
        return None

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> Any:
        """The connector's Prometheus metrics, or None."""
        return None

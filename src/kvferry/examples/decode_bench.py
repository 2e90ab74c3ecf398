"""DecodeBenchConnector: prompts cost nothing, so that decoding alone is measured.

It claims a prompt's KV but for the last token, as vLLM's connector of the same name does, and fills the claimed tokens'
blocks with noise. The engine then computes that token and decodes at full context length. Answers mean nothing, and
neither does the KV: the engine's own prefix cache holds it from then on, and so does every connector that saves it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kvferry.config import parse_settings
from kvferry.contract.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from kvferry.contract.facade import facade_mixin
from kvferry.contract.host import HostInfo
from kvferry.contract.sides import SchedulerSide, WorkerSide
from kvferry.contract.views import BlockIds, RequestView, StepView
from kvferry.errors import ConfigError
from kvferry.kv.layout import KVLayout
from kvferry.types import NULL_BLOCK_ID, AttentionKind

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DecodeBenchConfig:
    """Settings, in `kv_connector_extra_config`."""

    fill_mean: float = 0.015
    """Mean of the noise; the defaults of `fill_mean` and `fill_std` are vLLM's."""
    fill_std: float = field(default=0.0, metadata={"minimum": 0})
    """Standard deviation of the noise; 0 fills with the mean."""
    startup_fill: Literal[False] = False
    """vLLM's setting, False only: kvferry fills only blocks of requests."""
    seed: int = field(default=0, metadata={"minimum": 0, "maximum": (1 << 63) - 1})
    """Seed of the noise of one engine's life, together with the rank of the worker."""

    @classmethod
    def parse(cls, host: HostInfo) -> DecodeBenchConfig:
        """Read the settings; ConfigError names what is wrong with them, or with the layers they are for."""
        config = parse_settings(cls, host.extra_config, "kv_connector_extra_config")
        for group in host.groups:
            if group.kind is AttentionKind.OTHER:
                raise ConfigError(
                    f"KV cache group {group.group_id} (layers {', '.join(group.layer_names[:3])} ...) is neither full "
                    "nor sliding-window attention: the DecodeBenchConnector cannot make up its state"
                )
        return config


@dataclass(slots=True)
class DecodeBenchMetadata(KVConnectorMetadata):
    """A step's orders: the blocks to fill, by KV cache group."""

    fills: dict[int, list[int]] = field(default_factory=dict)


class DecodeBenchSchedulerSide(SchedulerSide):
    """Claims whatever may be claimed."""

    def __init__(self, host: HostInfo) -> None:
        super().__init__(host)
        DecodeBenchConfig.parse(host)
        self._num_local_tokens: dict[str, int] = {}
        self._fills: dict[int, list[int]] = {}
        logger.warning("DecodeBenchConnector: the KV of prompts is made up, so answers mean nothing")

    @classmethod
    def check(cls, host: HostInfo) -> list[str]:
        """Settings and layers."""
        DecodeBenchConfig.parse(host)
        return []

    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> tuple[int | None, bool]:
        """All but the last token, which the engine must compute."""
        self._num_local_tokens[request.request_id] = num_computed_tokens
        return max(0, request.num_tokens - 1 - num_computed_tokens), False

    def update_state_after_alloc(self, request: RequestView, block_ids: BlockIds, num_external_tokens: int) -> None:
        """Order the noise for the blocks of claimed tokens, in each group those that the request really has.

        The last block may hold more tokens than were claimed: the engine writes these later, over the noise.
        """
        if not num_external_tokens:
            return
        first = self._num_local_tokens[request.request_id]
        for group, table in zip(self.host.groups, block_ids, strict=True):
            size = group.block_tokens
            blocks = table[first // size : -(-(first + num_external_tokens) // size)]
            fills = self._fills.setdefault(group.group_id, [])
            fills.extend(block_id for block_id in blocks if block_id != NULL_BLOCK_ID)

    def build_connector_meta(self, step: StepView) -> DecodeBenchMetadata:
        """What was ordered."""
        metadata, self._fills = DecodeBenchMetadata(self._fills), {}
        return metadata

    def request_finished(self, request: RequestView, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        """Forget the request."""
        self._num_local_tokens.pop(request.request_id, None)
        return False, None

    def reset_cache(self) -> bool:
        """True: nothing is stored here."""
        return True


class DecodeBenchWorkerSide(WorkerSide):
    """Makes noise."""

    def __init__(self, host: HostInfo) -> None:
        super().__init__(host)
        self.config = DecodeBenchConfig.parse(host)
        self._layers: dict[int, list[torch.Tensor]] = {}
        self._generators: dict[torch.device, torch.Generator] = {}

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Split each layer into logical blocks. ConfigError for KV that no noise can be written to."""
        import torch

        KVLayout.from_tensors(kv_caches, self.host.groups, self.host.num_blocks)
        for group in self.host.groups:
            tensors = [kv_caches[name] for name in group.layer_names]
            layers = [tensor.view(self.host.num_blocks, -1, *tensor.shape[1:]) for tensor in tensors]
            for layer in layers:
                if not layer.is_floating_point():
                    raise ConfigError(f"KV of dtype {layer.dtype} cannot be filled with noise: use a floating KV dtype")
                if layer.device not in self._generators:
                    generator = torch.Generator(layer.device)
                    self._generators[layer.device] = generator.manual_seed(self.config.seed + self.host.rank)
            self._layers[group.group_id] = layers

    def start_load_kv(self, metadata: KVConnectorMetadata) -> None:
        """Fill the blocks, each in the layers of the group that owns it."""
        import torch

        assert isinstance(metadata, DecodeBenchMetadata)
        mean, std = self.config.fill_mean, self.config.fill_std
        for group_id, block_ids in metadata.fills.items():
            for layer in self._layers[group_id]:
                noise = torch.empty(layer.shape[1:], dtype=torch.float32, device=layer.device)
                for block_id in block_ids:
                    layer[block_id].copy_(noise.normal_(mean, std, generator=self._generators[layer.device]))

    def wait_for_save(self, metadata: KVConnectorMetadata) -> None:
        """Nothing is saved."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Nothing: no transfer outlives its step."""
        return KVConnectorTransferResults()


class DecodeBenchConnector(
    facade_mixin(DecodeBenchSchedulerSide, DecodeBenchWorkerSide, KVConnectorRole.SCHEDULER),  # type: ignore[misc]
    KVConnectorBase_V1,
    SupportsHMA,
):
    """Makes up the KV of prompts, to measure decoding alone; settings: `DecodeBenchConfig`."""

    supports_v2_model_runner = True

"""Runs one planned step: the batch, one forward, samples; the worker connector around it.

What both model runners share is here. They differ in the timetable the connector keeps (`timetable`), in the blocks
attention works in (`layout_choice`), and in where a batch comes from: `ListBatches` below (V1), `RowBatches` (V2).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from kvferry.engine.attention import PackedBatch, SequenceChunk, pack_batch
from kvferry.engine.config import EngineConfig
from kvferry.engine.connector_host import HostedConnectors, WorkerConnector
from kvferry.engine.kv_groups import KVBuffer
from kvferry.engine.kv_manager import KVManager
from kvferry.engine.model_loader import EngineModel
from kvferry.engine.outputs import BatchItem, SchedulerOutput, StepResult
from kvferry.engine.request import Request, Sampled
from kvferry.engine.row_batches import RowBatches
from kvferry.engine.sampler import sample


class Batches(Protocol):
    """Makes the forward's input of a plan."""

    def pack(self, plan: SchedulerOutput) -> PackedBatch | None:
        """Called once per step, also when nothing is to be computed (None)."""

    def load_kwargs(self, plan: SchedulerOutput) -> dict[str, Any]:
        """What `start_load_kv` gets by keyword in the step that was packed last."""

    def note_sampled(self, sampled: dict[str, Sampled]) -> None:
        """What was chosen, by request id."""

    def check_integrity(self, requests: Iterable[Request], manager: KVManager) -> None:
        """Assert that what is remembered agrees with the scheduler's running requests and their block tables."""


class ListBatches:
    """V1: every step anew from the requests' own lists; nothing is remembered."""

    def __init__(self, block_size: int, device: str) -> None:
        self._block_size = block_size
        self._device = device

    def pack(self, plan: SchedulerOutput) -> PackedBatch | None:
        """See `Batches`."""
        chunks = []
        for item in plan.batch:
            first = item.request.num_computed_tokens
            tokens = item.request.all_token_ids[first : first + item.num_tokens]
            chunks.append(SequenceChunk(tokens, first, item.block_ids, item.samples))
        return pack_batch(chunks, self._block_size, self._device) if chunks else None

    def load_kwargs(self, plan: SchedulerOutput) -> dict[str, Any]:
        """None in this runner."""
        return {}

    def note_sampled(self, sampled: dict[str, Sampled]) -> None:
        """The requests know."""

    def check_integrity(self, requests: Iterable[Request], manager: KVManager) -> None:
        """Nothing can disagree."""


class ModelRunner:
    """Owns model and KV memory."""

    def __init__(self, model: EngineModel, kv: KVBuffer, batches: Batches, connector: WorkerConnector) -> None:
        self._model = model
        self._kv = kv
        self._batches = batches
        self._connector = connector
        self.num_forwards = 0

    def execute(self, plan: SchedulerOutput) -> StepResult:
        """Run the step. Blocks for the forward; empty steps only let the connector work."""
        batch = self._batches.pack(plan)
        self._connector.begin_step(plan, batch, self._batches.load_kwargs(plan))
        try:
            sampled = {} if batch is None else self._forward(batch, plan)
        except BaseException:
            self._connector.clear()
            raise
        self._batches.note_sampled(sampled)
        output, sync_loads_unproved, failures_lost = self._connector.end_step(plan)
        return StepResult(sampled, output, sync_loads_unproved, failures_lost)

    def _forward(self, batch: PackedBatch, plan: SchedulerOutput) -> dict[str, Sampled]:
        self.num_forwards += 1
        logits = self._model.forward(batch, self._kv, self._connector)
        self._connector.after_forward(plan)
        return _sample(logits, plan.batch)

    def check_integrity(self, requests: Iterable[Request], manager: KVManager) -> None:
        """Assert that what the runner remembers of running `requests` is the scheduler's truth; between steps only."""
        self._batches.check_integrity(requests, manager)


def _sample(logits: torch.Tensor, items: list[BatchItem]) -> dict[str, Sampled]:
    requests = [item.request for item in items if item.samples]
    if not requests:
        return {}
    with torch.inference_mode():
        tokens = sample(logits, requests)
    return {request.request_id: token for request, token in zip(requests, tokens, strict=True)}


def make_runner(model: EngineModel, hosted: HostedConnectors, config: EngineConfig, device: str) -> ModelRunner:
    """The runner that `config.use_v2_model_runner` names."""
    batches: Batches = ListBatches(config.cache_config.block_size, device)
    if config.use_v2_model_runner:
        batches = RowBatches(config, len(hosted.kv.config.kv_cache_groups), device)
    return ModelRunner(model, hosted.kv, batches, hosted.worker)

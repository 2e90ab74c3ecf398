"""Runs one planned step: packs the batch, one forward, samples; the worker connector around it."""

from __future__ import annotations

import torch

from kvferry.engine.attention import PackedBatch, SequenceChunk, pack_batch
from kvferry.engine.connector_host import WorkerConnector
from kvferry.engine.kv_groups import KVBuffer
from kvferry.engine.model_loader import EngineModel
from kvferry.engine.outputs import BatchItem, SchedulerOutput, StepResult
from kvferry.engine.request import SampledToken
from kvferry.engine.sampler import sample


class ModelRunner:
    """Owns model and KV memory. Stateless between steps: a plan carries all that is needed."""

    def __init__(
        self, model: EngineModel, kv: KVBuffer, block_size: int, device: str, connector: WorkerConnector
    ) -> None:
        self._model = model
        self._kv = kv
        self._block_size = block_size
        self._device = device
        self._connector = connector
        self.num_forwards = 0

    def execute(self, plan: SchedulerOutput) -> StepResult:
        """Run the step. Blocks for the forward; empty steps only let the connector work."""
        batch = self._pack(plan.batch) if plan.batch else None
        self._connector.begin_step(plan, batch)
        try:
            sampled = {} if batch is None else self._forward(batch, plan.batch)
        except BaseException:
            self._connector.clear()
            raise
        output, sync_loads_unproved, failures_lost = self._connector.end_step(plan)
        return StepResult(sampled, output, sync_loads_unproved, failures_lost)

    def _pack(self, items: list[BatchItem]) -> PackedBatch:
        chunks = []
        for item in items:
            first = item.request.num_computed_tokens
            tokens = item.request.all_token_ids[first : first + item.num_tokens]
            chunks.append(SequenceChunk(tokens, first, item.block_ids, item.samples))
        return pack_batch(chunks, self._block_size, self._device)

    def _forward(self, batch: PackedBatch, items: list[BatchItem]) -> dict[str, SampledToken]:
        self.num_forwards += 1
        logits = self._model.forward(batch, self._kv, self._connector)
        requests = [item.request for item in items if item.samples]
        if not requests:
            return {}
        with torch.inference_mode():
            tokens = sample(logits, requests)
        return {request.request_id: token for request, token in zip(requests, tokens, strict=True)}

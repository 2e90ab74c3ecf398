"""Runs one planned step: the batch, one forward, samples; the worker connector around it.

The two model runners differ in the timetable that the connector keeps (`timetable`), in the blocks that attention works
in (`layout_choice`), and in what `start_load_kv` gets by keyword.
"""

from __future__ import annotations

from typing import Any

import torch

from kvferry.engine.attention import PackedBatch, SequenceChunk, pack_batch
from kvferry.engine.config import EngineConfig
from kvferry.engine.connector_host import HostedConnectors, WorkerConnector
from kvferry.engine.kv_manager import BlockIds
from kvferry.engine.model_loader import EngineModel
from kvferry.engine.outputs import BatchItem, SchedulerOutput, StepResult
from kvferry.engine.request import Sampled
from kvferry.engine.sampler import sample


class BatchMaker:
    """Makes the forward's input of a plan, anew in every step, from the requests' own lists.

    Block tables are in kernel blocks: block `b` of the scheduler is the kernel blocks `b * ratio` to
    `b * ratio + ratio - 1`.
    """

    def __init__(self, config: EngineConfig, device: str) -> None:
        block_size = config.cache_config.block_size
        self._block_tokens = config.cache_config.kernel_block_size or block_size
        self._parts = range(block_size // self._block_tokens)
        self._device = device
        self._is_v2 = config.use_v2_model_runner
        self._rows: dict[str, int] = {}
        self._free_rows = list(range(config.scheduler_config.max_num_seqs))

    def pack(self, plan: SchedulerOutput) -> PackedBatch | None:
        """The batch, or None where nothing is computed."""
        chunks = []
        for item in plan.batch:
            first = item.request.num_computed_tokens
            tokens = item.request.all_token_ids[first : first + item.num_tokens]
            chunks.append(SequenceChunk(tokens, first, self._kernel_blocks(item.block_ids), item.samples))
        return pack_batch(chunks, self._block_tokens, self._device) if chunks else None

    def _kernel_blocks(self, block_ids: BlockIds) -> BlockIds:
        ratio = len(self._parts)
        return (
            block_ids
            if ratio == 1
            else tuple([b * ratio + i for b in table for i in self._parts] for table in block_ids)
        )

    def load_kwargs(self, plan: SchedulerOutput) -> dict[str, Any]:
        """What `start_load_kv` gets by keyword in this step; to be called once per step.

        Nothing in V1. In V2, as in vLLM's, `request_state_indices` is an int64 tensor [requests] on the device: the row
        that a request keeps from its first tokens in a batch until its end or preemption.
        """
        if not self._is_v2:
            return {}
        gone = plan.finished_req_ids | plan.preempted_req_ids
        self._free_rows += [self._rows.pop(request_id) for request_id in gone & self._rows.keys()]
        if not plan.batch:
            return {}
        for request_id in plan.num_scheduled_tokens.keys() - self._rows.keys():
            self._rows[request_id] = self._free_rows.pop()
        rows = [self._rows[request_id] for request_id in plan.num_scheduled_tokens]
        return {
            "scheduler_output": plan,
            "request_state_indices": torch.tensor(rows, device=self._device),
            "request_ids": list(plan.num_scheduled_tokens),
            "num_tokens": plan.total_num_scheduled_tokens,
        }


class ModelRunner:
    """Owns model and KV memory."""

    def __init__(self, model: EngineModel, hosted: HostedConnectors, config: EngineConfig, device: str) -> None:
        self._model = model
        self._kv = hosted.kv
        self._connector: WorkerConnector = hosted.worker
        self._batches = BatchMaker(config, device)
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
        output, sync_loads_unproved, failures_lost = self._connector.end_step(plan)
        return StepResult(sampled, output, sync_loads_unproved, failures_lost)

    def _forward(self, batch: PackedBatch, plan: SchedulerOutput) -> dict[str, Sampled]:
        self.num_forwards += 1
        logits = self._model.forward(batch, self._kv, self._connector)
        self._connector.after_forward(plan)
        return _sample(logits, plan.batch)


def _sample(logits: torch.Tensor, items: list[BatchItem]) -> dict[str, Sampled]:
    requests = [item.request for item in items if item.samples]
    if not requests:
        return {}
    with torch.inference_mode():
        tokens = sample(logits, requests)
    return {request.request_id: token for request, token in zip(requests, tokens, strict=True)}

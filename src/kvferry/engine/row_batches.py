"""The second model runner's batches: requests keep a row in arrays that live on between steps.

    token_ids     | r3: 17 4 9 88 2 ...      |        a step tells only what is new: rows that come and go, blocks that
    tables[group] | r3: 12 13 14 15 40 41 .. |        were added, how far requests have come. The batch is gathered from
    num_computed  | 4 |  num_tokens | 5 |             the arrays; no list of a request is read again.

Tables hold kernel blocks: block b of the scheduler is b * ratio ... b * ratio + ratio - 1. A request has a row from its
first tokens in a batch until its end or preemption; a resumed request is a new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvferry.engine.attention import PackedBatch, PackedSequence
from kvferry.engine.config import EngineConfig
from kvferry.engine.kv_manager import BlockIds, KVManager
from kvferry.engine.outputs import SchedulerOutput
from kvferry.engine.request import Request, Sampled, SampledToken
from kvferry.types import NULL_BLOCK_ID

Ints = npt.NDArray[np.int64]


class RowBatches:
    """V2's `Batches`: room for `max_num_seqs` requests of `max_model_len` tokens (memory is taken where it is used)."""

    def __init__(self, config: EngineConfig, num_groups: int, device: str) -> None:
        cache, num_rows = config.cache_config, config.scheduler_config.max_num_seqs
        longest = config.model_config.max_model_len
        self._block_tokens = cache.kernel_block_size or cache.block_size
        self._ratio = cache.block_size // self._block_tokens
        self._device = device
        self._rows: dict[str, int] = {}
        self._free_rows = list(range(num_rows))
        self._batch_rows: Ints = np.zeros(0, np.int64)
        self.token_ids: Ints = np.zeros((num_rows, longest), np.int64)
        self.num_prompt: Ints = np.zeros(num_rows, np.int64)
        self.num_tokens: Ints = np.zeros(num_rows, np.int64)
        self.num_computed: Ints = np.zeros(num_rows, np.int64)
        num_blocks = -(-longest // cache.block_size) * self._ratio
        self.tables: list[Ints] = [np.zeros((num_rows, num_blocks), np.int64) for _ in range(num_groups)]
        self.num_blocks: Ints = np.zeros((num_groups, num_rows), np.int64)

    # ---- what a plan changes ----------------------------------------------------------------------------------

    def pack(self, plan: SchedulerOutput) -> PackedBatch | None:
        """Take in what the plan changes, then gather the batch (None: nothing is computed)."""
        gone = plan.finished_req_ids | plan.preempted_req_ids | plan.scheduled_cached_reqs.resumed_req_ids
        for request_id in gone & self._rows.keys():
            self._free_rows.append(self._rows.pop(request_id))
        for new in plan.scheduled_new_reqs:
            self._add(new.req_id, new.prefill_token_ids, len(new.prompt_token_ids), new.block_ids)
            self.num_computed[self._rows[new.req_id]] = new.num_computed_tokens
        self._update_cached(plan)
        rows = [self._rows[request_id] for request_id in plan.num_scheduled_tokens]
        self._batch_rows = np.array(rows, np.int64)
        if not rows:
            return None
        return self._gather(np.fromiter(plan.num_scheduled_tokens.values(), np.int64, len(rows)))

    def _update_cached(self, plan: SchedulerOutput) -> None:
        cached = plan.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            new_ids, num_output = cached.new_block_ids[i], cached.num_output_tokens[i]
            if request_id in cached.resumed_req_ids:
                tokens = cached.all_token_ids[request_id]
                assert new_ids is not None
                self._add(request_id, tokens, len(tokens) - num_output, new_ids)
            elif new_ids is not None:
                self._append_blocks(self._rows[request_id], new_ids)
            row = self._rows[request_id]
            # The plan counts, not what was sampled: the output of a step may have been discarded.
            self.num_tokens[row] = self.num_prompt[row] + num_output
            self.num_computed[row] = cached.num_computed_tokens[i]

    def _add(self, request_id: str, token_ids: Sequence[int], num_prompt: int, block_ids: BlockIds) -> None:
        assert request_id not in self._rows, f"{request_id} has a row already"
        row = self._rows[request_id] = self._free_rows.pop()
        self.token_ids[row, : len(token_ids)] = token_ids
        self.num_tokens[row], self.num_prompt[row] = len(token_ids), num_prompt
        self.num_blocks[:, row] = 0
        self._append_blocks(row, block_ids)

    def _append_blocks(self, row: int, block_ids: BlockIds) -> None:
        for group, new in enumerate(block_ids):
            first = self.num_blocks[group, row]
            end = first + len(new) * self._ratio
            self.tables[group][row, first:end] = self._kernel_blocks(new)
            self.num_blocks[group, row] = end

    def _kernel_blocks(self, block_ids: Sequence[int]) -> Ints:
        ids = np.asarray(block_ids, np.int64)[:, None]
        return (ids * self._ratio + np.arange(self._ratio)).ravel()

    # ---- the batch --------------------------------------------------------------------------------------------

    def _gather(self, counts: Ints) -> PackedBatch:
        """Lay the next `counts[i]` tokens of each row of the batch side by side."""
        rows = self._batch_rows
        computed, ends = self.num_computed[rows], np.cumsum(counts)
        starts, kv_tokens = ends - counts, computed + counts
        token_rows = np.repeat(rows, counts)
        positions = np.arange(ends[-1]) + np.repeat(computed - starts, counts)
        blocks = positions // self._block_tokens
        num_blocks = -(-kv_tokens // self._block_tokens)
        tables = [self._on_device(table[rows, : num_blocks.max()]) for table in self.tables]
        return PackedBatch(
            input_ids=self._on_device(self.token_ids[token_rows, positions]),
            positions=self._on_device(positions),
            write_blocks=tuple(self._on_device(table[token_rows, blocks]) for table in self.tables),
            write_offsets=self._on_device(positions % self._block_tokens),
            logits_rows=self._on_device((ends - 1)[kv_tokens == self.num_tokens[rows]]),
            sequences=tuple(
                PackedSequence(start, end, num, tuple(table[i, :used] for table in tables))
                for i, (start, end, num, used) in enumerate(
                    zip(starts.tolist(), ends.tolist(), kv_tokens.tolist(), num_blocks.tolist(), strict=True)
                )
            ),
        )

    def _on_device(self, array: Ints) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def load_kwargs(self, plan: SchedulerOutput) -> dict[str, Any]:
        """As vLLM's second runner: rows [requests] on the device, ids in the same order, tokens of the forward."""
        if not plan.batch:
            return {}
        return {
            "scheduler_output": plan,
            "request_state_indices": self._on_device(self._batch_rows),
            "request_ids": list(plan.num_scheduled_tokens),
            "num_tokens": plan.total_num_scheduled_tokens,
        }

    def note_sampled(self, sampled: dict[str, Sampled]) -> None:
        """Write chosen tokens behind their request's last one; the next plan says whether they count."""
        for request_id, token in sampled.items():
            if not isinstance(token, SampledToken):
                continue
            row = self._rows[request_id]
            self.token_ids[row, self.num_tokens[row]] = token.token_id

    def check_integrity(self, requests: Iterable[Request], manager: KVManager) -> None:
        """See `Batches`: every running request has a row with its tokens and blocks, and no row is used twice."""
        used = list(self._rows.values())
        assert sorted(used + self._free_rows) == list(range(len(self.num_tokens))), "rows are lost or used twice"
        for request in requests:
            row = self._rows[request.request_id]
            assert self.num_prompt[row] == request.num_prompt_tokens
            assert self.token_ids[row, : request.num_tokens].tolist() == request.all_token_ids, "wrong tokens in a row"
            for group, ids in enumerate(manager.get_block_ids(request.request_id)):
                row_ids = self.tables[group][row, : self.num_blocks[group, row]]
                wanted = self._kernel_blocks(ids)
                # Blocks that left a window are given back without a word to the worker, which reads them no more.
                kept = np.repeat(np.asarray(ids, np.int64), self._ratio) != NULL_BLOCK_ID
                assert len(row_ids) == len(wanted) and bool((row_ids == wanted)[kept].all()), "wrong blocks in a row"

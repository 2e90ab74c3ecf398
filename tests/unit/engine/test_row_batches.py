"""Rows of several KV groups, whose tables differ, through a request's whole life; against literal values."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.engine.config import CacheConfig, EngineConfig, ModelConfig, SamplingParams, SchedulerConfig
from kvferry.engine.outputs import BatchItem, CachedRequestData, NewRequestData, SchedulerOutput
from kvferry.engine.request import Request, SampledToken
from kvferry.engine.row_batches import RowBatches

GREEDY = SamplingParams(max_tokens=8, temperature=0)


class Manager:
    """Block tables as a test sets them."""

    def __init__(self) -> None:
        self.tables: dict[str, tuple[list[int], ...]] = {}

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        return self.tables[request_id]


@pytest.fixture
def batches() -> RowBatches:
    """Two groups, blocks of 4 in kernel blocks of 2, two requests of 16 tokens."""
    import torch

    config = EngineConfig(
        CacheConfig(4, 20, True, kernel_block_size=2),
        ModelConfig("", torch.float32, 16, 0, None),
        SchedulerConfig(2, 16),
        None,
        "",
    )
    return RowBatches(config, 2, "cpu")


def plan(num_scheduled: dict[str, int], **fields: Any) -> SchedulerOutput:
    manager: Any = Manager()
    item: Any = None
    return SchedulerOutput(
        manager, batch=[BatchItem(item, num, ()) for num in num_scheduled.values()],
        num_scheduled_tokens=num_scheduled, **fields,
    )  # fmt: skip


def new(request_id: str, tokens: list[int], block_ids: tuple[list[int], ...], num_computed: int = 0) -> NewRequestData:
    return NewRequestData(request_id, tokens, block_ids, num_computed, GREEDY, tokens)


def cached(request_id: str, computed: int, output: int, ids: Any, tokens: list[int] | None = None) -> CachedRequestData:
    resumed = {} if tokens is None else {request_id: tokens}
    return CachedRequestData([request_id], [ids], [computed], [output], set(resumed), resumed)


def test_a_request_from_first_to_last_token(batches: RowBatches) -> None:
    batch = batches.pack(plan({"a": 5}, scheduled_new_reqs=[new("a", [7, 8, 9, 10, 11], ([3, 5], [0, 6]))]))
    assert batch is not None
    assert batch.input_ids.tolist() == [7, 8, 9, 10, 11]
    assert [blocks.tolist() for blocks in batch.write_blocks] == [[6, 6, 7, 7, 10], [0, 0, 1, 1, 12]]
    assert batch.write_offsets.tolist() == [0, 1, 0, 1, 0]
    assert batch.logits_rows.tolist() == [4]
    (sequence,) = batch.sequences
    assert [table.tolist() for table in sequence.block_tables] == [[6, 7, 10], [0, 1, 12]]
    batches.note_sampled({"a": SampledToken(12)})
    # What was sampled was discarded, and two tokens are to be computed again.
    batch = batches.pack(plan({"a": 2}, scheduled_cached_reqs=cached("a", 3, 0, None)))
    assert batch is not None
    assert (batch.input_ids.tolist(), batch.positions.tolist()) == ([10, 11], [3, 4])
    batches.note_sampled({"a": SampledToken(13)})
    ids = ([9], [8])
    batch = batches.pack(plan({"a": 1}, scheduled_cached_reqs=cached("a", 5, 1, ids)))
    assert batch is not None
    assert (batch.input_ids.tolist(), batch.positions.tolist(), batch.logits_rows.tolist()) == ([13], [5], [0])
    assert [blocks.tolist() for blocks in batch.write_blocks] == [[10], [12]]
    assert batches.tables[1][batches._rows["a"], :6].tolist() == [0, 1, 12, 13, 16, 17]
    assert batches.pack(plan({}, finished_req_ids={"a"})) is None
    assert batches._rows == {}


def test_rows_are_given_back_before_they_are_taken(batches: RowBatches) -> None:
    two = [new(name, [1, 2], ([1], [2])) for name in "ab"]
    batches.pack(plan({"a": 2, "b": 2}, scheduled_new_reqs=two))
    # The same id again in the step that tells its end, and another in place of one that lost its blocks.
    again = [new("a", [3, 4, 5], ([4], [5])), new("c", [6], ([7], [8]))]
    batch = batches.pack(
        plan({"a": 3, "c": 1}, scheduled_new_reqs=again, finished_req_ids={"a"}, preempted_req_ids={"b"})
    )
    assert batch is not None
    assert batch.input_ids.tolist() == [3, 4, 5, 6]
    assert batches.load_kwargs(plan({"a": 3, "c": 1}))["request_ids"] == ["a", "c"]
    resumed = cached("b", 0, 1, ([9], [1]), [1, 2, 30])
    batch = batches.pack(plan({"b": 3}, scheduled_cached_reqs=resumed, finished_req_ids={"a", "never seen"}))
    assert batch is not None
    assert batch.input_ids.tolist() == [1, 2, 30]
    assert batch.logits_rows.tolist() == [2]
    assert batches.num_prompt[batches._rows["b"]] == 2


def test_the_check_allows_what_a_window_gave_back_and_nothing_else(batches: RowBatches) -> None:
    manager: Any = Manager()
    request = Request("a", [1, 2, 3, 4, 5], GREEDY, block_size=4)
    batches.pack(plan({"a": 5}, scheduled_new_reqs=[new("a", request.prompt_token_ids, ([3, 5], [4, 6]))]))
    manager.tables = {"a": ([3, 5], [4, 6])}
    batches.check_integrity([request], manager)
    manager.tables = {"a": ([3, 5], [0, 6])}
    batches.check_integrity([request], manager)
    for wrong in (([3, 5], [7, 6]), ([3], [4, 6]), ([3, 5, 8], [4, 6])):
        manager.tables = {"a": wrong}
        with pytest.raises(AssertionError, match="wrong blocks"):
            batches.check_integrity([request], manager)


def test_a_new_row_has_the_tokens_that_a_prefill_engine_chose(batches: RowBatches) -> None:
    """A decode engine's new request may have output tokens already; the prompt alone ended the sampler (IndexError)."""
    handed = NewRequestData("r", [5, 6, 7], ([3], [6]), 3, GREEDY, [5, 6, 7, 8])
    batch = batches.pack(plan({"r": 1}, scheduled_new_reqs=[handed]))
    assert batch is not None
    assert (batch.input_ids.tolist(), batch.positions.tolist(), batch.logits_rows.tolist()) == ([8], [3], [0])

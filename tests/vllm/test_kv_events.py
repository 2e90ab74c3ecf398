"""vLLM's own decoder reads our events, and inside vLLM the connector answers in vLLM's classes."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import msgspec
from vllm.distributed import kv_events as theirs

from kvferry import kv_events as ours
from kvferry.vllm import OffloadingConnector

EVENTS: list[ours.KVCacheEvent] = [
    ours.BlockStored([b"\1" * 32], b"\0" * 32, [], 64, None, "CPU", None, 0),
    ours.BlockStored([b"\2" * 32], None, [7, 8], 2, None, "STORAGE", None, 1, "fs"),
    ours.BlockRemoved([b"\1" * 32], "STORAGE", 0, "fs"),
    ours.AllBlocksCleared(),
]


def check(found: list[Any]) -> None:
    assert [type(event) for event in found] == [getattr(theirs, type(event).__name__) for event in EVENTS]
    for event, other in zip(EVENTS, found, strict=True):
        assert {f.name: getattr(event, f.name) for f in fields(event)} == {
            f.name: getattr(other, f.name) for f in fields(event)
        }


def test_vllms_subscribers_read_our_messages() -> None:
    batch = msgspec.msgpack.decode(ours.encode(EVENTS, 1.5), type=theirs.KVEventBatch)
    assert (batch.ts, batch.data_parallel_rank) == (1.5, 0)
    check(batch.events)


def test_inside_vllm_events_are_vllms() -> None:
    connector = object.__new__(OffloadingConnector)
    connector._scheduler_side, connector._worker_side = SimpleNamespace(take_events=lambda: iter(EVENTS)), None
    connector.has_guard = True  # as a MultiConnector's child; a guard of its own is made at the start
    check(connector.take_events())

"""When a worker's hooks are called: the timetables of vLLM 0.32's two model runners (facts/contract.md, section 1c)."""

from __future__ import annotations

from dataclasses import dataclass

_HEAD = ("handle_preemptions", "bind_connector_metadata")
_TAIL = (
    "wait_for_save",
    "get_transfer_results",
    "get_block_ids_with_load_errors",
    "get_kv_connector_stats",
    "get_kv_connector_kv_cache_events",
    "build_connector_worker_meta",
    "clear_connector_metadata",
)


@dataclass(frozen=True, slots=True)
class Timetable:
    """Hooks by moment. Where `start_load_kv` stands before the forward it is called if the step has synchronous loads,
    where it stands later if it has none."""

    name: str
    before_forward: tuple[str, ...]
    after_forward: tuple[str, ...]
    """The layers' hooks are over, tokens are not yet chosen."""
    after_sampling: tuple[str, ...]
    without_forward: tuple[str, ...]
    """All hooks of a step that computes nothing."""


V1_TIMETABLE = Timetable(
    "V1",
    before_forward=(*_HEAD, "start_load_kv"),
    after_forward=("start_load_kv", *_TAIL),
    after_sampling=(),
    without_forward=(*_HEAD, "start_load_kv", *_TAIL),
)
V2_TIMETABLE = Timetable(
    "V2",
    before_forward=(*_HEAD, "start_load_kv"),
    after_forward=("finish_forward",),
    after_sampling=("start_load_kv", *_TAIL),
    without_forward=(*_HEAD, "finish_forward", "start_load_kv", *_TAIL),
)

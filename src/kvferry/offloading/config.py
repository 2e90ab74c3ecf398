"""Settings of the OffloadingConnector (`kv_connector_extra_config`) and the sizes that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvferry.config import VllmsOwn, parse_settings, without_vllms_own
from kvferry.errors import ConfigError
from kvferry.kv.keys import UNIT_TOKENS
from kvferry.kv.space import folder_of
from kvferry.types import AttentionKind, GroupInfo

EXTRA_CONFIG = "kv_connector_extra_config"
_SLOT_ALIGNMENT_BYTES = 4096
_DEFAULT_CHUNK_TOKENS = 64

_TIERS = "kvferry's tiers stand in secondary_tiers; leave the key out"
_VLLMS_OWN: VllmsOwn = {
    "spec_name": (("CPUOffloadingSpec", "TieringOffloadingSpec"), _TIERS),
    "spec_module_path": ((None,), "a tier of your own goes into secondary_tiers, with tier_module_path"),
    "eviction_policy": (
        ("lru",),
        "kvferry always evicts what was used least recently; leave the key out",
    ),
    "cache_policy_module_path": ((None,), "kvferry always evicts what was used least recently; leave the key out"),
    "store_threshold": ((0, 1), "kvferry stores what is computed for the first time; leave the key out"),
    "max_tracker_size": ((), "it belongs to store_threshold, which kvferry does not have; leave the key out"),
    "offload_prompt_only": ((False,), "kvferry stores answers too, for the next turn finds them; leave the key out"),
    "self_describing_kv_events": ((False,), "kvferry's events name chunks by key; leave the key out"),
    "canonical_layout": ((False,), "kvferry's stored layout is its own; leave the key out"),
    "backpressure": ((None,), "kvferry bounds each tier itself; max_bytes limits a tier"),
    "enable_telemetry": ((False,), "kvferry's counters are always on /metrics; leave the key out"),
}
"""Key -> values that say what holds for kvferry anyway, and what to do about others."""


@dataclass(frozen=True)
class OffloadingConfig:
    """Settings of the user. `parse` checks every key; the error for an unknown key names the nearest known key."""

    cpu_bytes_to_use: int = field(metadata={"minimum": 1})
    """Host memory for KV, in bytes, for all workers together."""
    load_async: bool = True
    """True: load while other requests compute, which takes one more engine step. False: load within the step that
    needs the KV."""
    chunk_tokens: int | None = field(default=None, metadata={"minimum": UNIT_TOKENS})
    """Size of a stored chunk, in tokens: a multiple of 16 and of every block size; by default the smallest such
    multiple that is at least 64."""
    block_size: int | None = field(default=None, metadata={"minimum": UNIT_TOKENS})
    """vLLM's name for `chunk_tokens`."""
    blocks_per_chunk: int | None = field(default=None, metadata={"minimum": 1})
    """vLLM's setting for the size of a chunk, in blocks of the engine; where block sizes differ, in units of their
    least common multiple."""
    secondary_tiers: tuple[Mapping[str, Any], ...] = ()
    """Tiers below host memory, nearest first, e.g. {"type": "fs", "path": ..., "max_bytes": ...}."""
    verify_host_loads: bool = True
    """Prove each chunk against its digest at every load from host memory, not only when the chunk comes from a tier
    below. When false, only the scrubbing of idle steps finds a bit that flips in host memory."""
    weights_version: str | None = None
    """Name of the weights in keys, instead of a fingerprint of their files; required for random weights."""
    arena_dir: str | None = None
    """Folder for the host memory's mapping where /dev/shm is too small."""
    stall_timeout_s: float = field(default=2.0, metadata={"minimum": 0})
    """Longest time, in seconds, that a request waits for a tier below host memory that makes no progress."""
    shutdown_timeout_s: float = field(default=30.0, metadata={"minimum": 0})
    """Longest time, in seconds, for pending writes to the tiers at shutdown."""

    @property
    def arena_folder(self) -> Path | None:
        """`arena_dir` as a path; ConfigError when it begins with the home of a user who is none."""
        return None if self.arena_dir is None else folder_of(self.arena_dir, f"{EXTRA_CONFIG}.arena_dir")

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any]) -> OffloadingConfig:
        """Read `kv_connector_extra_config`. Raises ConfigError naming key, value and remedy."""
        given = [key for key in ("chunk_tokens", "block_size", "blocks_per_chunk") if extra_config.get(key) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"{EXTRA_CONFIG}.{given[0]} and .{given[1]} both say how large a chunk is: give one of them"
            )
        return parse_settings(
            cls, without_vllms_own(extra_config, _VLLMS_OWN, EXTRA_CONFIG, "OffloadingConnector"), EXTRA_CONFIG
        )


@dataclass(frozen=True, slots=True)
class ChunkGeometry:
    """Sizes of chunks and slots for one engine."""

    chunk_tokens: int
    block_alignment_tokens: int
    """Claims end at multiples of this: the least common multiple of the groups' block sizes."""
    payload_bytes: tuple[int, ...]
    """Bytes of one chunk of one worker, per group."""
    slot_bytes: int
    num_slots: int

    @classmethod
    def of(
        cls, config: OffloadingConfig, groups: Sequence[GroupInfo], block_bytes: Sequence[int], world_size: int
    ) -> ChunkGeometry:
        """Derive the sizes. Raises ConfigError when host memory does not hold one chunk of every group and worker."""
        alignment = math.lcm(*(group.block_tokens for group in groups))
        chunk_tokens = _chunk_tokens(config, alignment)
        payloads = tuple(
            chunk_tokens // group.block_tokens * size for group, size in zip(groups, block_bytes, strict=True)
        )
        slot_bytes = -(-max(payloads) // _SLOT_ALIGNMENT_BYTES) * _SLOT_ALIGNMENT_BYTES
        num_slots = config.cpu_bytes_to_use // slot_bytes
        need = len(groups) * world_size
        if num_slots < need:
            raise ConfigError(
                f"{EXTRA_CONFIG}.cpu_bytes_to_use={config.cpu_bytes_to_use} holds {num_slots} slots of "
                f"{slot_bytes} bytes; "
                f"one chunk of {chunk_tokens} tokens needs {need}: raise it to at least {need * slot_bytes}"
            )
        return cls(chunk_tokens, alignment, payloads, slot_bytes, num_slots)


def _chunk_tokens(config: OffloadingConfig, alignment: int) -> int:
    unit = math.lcm(alignment, UNIT_TOKENS)
    key, configured = "chunk_tokens", config.chunk_tokens
    if config.block_size is not None:
        key, configured = "block_size", config.block_size
    if config.blocks_per_chunk is not None:
        tokens = config.blocks_per_chunk * alignment
        if tokens % unit:
            raise ConfigError(
                f"{EXTRA_CONFIG}.blocks_per_chunk={config.blocks_per_chunk} makes chunks of {tokens} tokens; they must "
                f"be a multiple of {UNIT_TOKENS}: the next is {-(-tokens // unit) * unit // alignment}"
            )
        return tokens
    if configured is None:
        return -(-_DEFAULT_CHUNK_TOKENS // unit) * unit
    if configured % unit:
        raise ConfigError(
            f"{EXTRA_CONFIG}.{key}={configured} must be a multiple of {unit} (16 and every block size); "
            f"the nearest are {configured // unit * unit or unit} and {-(-configured // unit) * unit}"
        )
    return configured


def check_groups(groups: Sequence[GroupInfo]) -> None:
    """Refuse KV that tokens do not address. Raises ConfigError naming the layers."""
    for group in groups:
        if group.kind is AttentionKind.OTHER:
            raise ConfigError(
                f"KV cache group {group.group_id} (layers {', '.join(group.layer_names[:3])} ...) is neither full nor "
                "sliding-window attention; the OffloadingConnector cannot store it yet"
            )

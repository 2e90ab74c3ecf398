"""What an OffloadingConnector so configured would hold, and whether this machine has the room. Opens nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvferry.contract.host import host_info
from kvferry.contract.kv_cache import KVCacheConfig
from kvferry.kv.arena import ArenaInfo, no_room
from kvferry.kv.segment import SHM_DIRECTORY
from kvferry.kv.space import space_at
from kvferry.offloading.config import EXTRA_CONFIG, ChunkGeometry, OffloadingConfig, check_groups
from kvferry.offloading.store.registry import tier_room
from kvferry.offloading.store.tiered import HOST, check_tier_names


@dataclass(frozen=True, slots=True)
class TierCapacity:
    """One tier: the tokens of KV it holds (all layers; None: not known), and why."""

    name: str
    num_tokens: int | None
    reason: str
    problem: str | None = None
    folder: Path | None = None
    """Where it lies: of host memory the arena's, of a disk the one that it has for itself alone."""
    host_bytes: int = 0
    """Of the arena."""


def offloading_capacity(vllm_config: Any, kv_cache_config: KVCacheConfig) -> list[TierCapacity]:
    """Host memory and the tiers below it, nearest first. Raises ConfigError for settings that are wrong anywhere.

    `problem` says what this machine lacks for a tier, with the remedy.
    """
    host = host_info(vllm_config, kv_cache_config)
    check_groups(host.groups)
    config = OffloadingConfig.parse(host.extra_config)
    specs = [group.kv_cache_spec.page_size_bytes * len(group.layer_names) for group in kv_cache_config.kv_cache_groups]
    geometry = ChunkGeometry.of(config, host.groups, specs, host.world_size)
    parts = len(host.groups) * host.world_size
    capacities = [_host_capacity(config, geometry, parts)]
    for i, settings in enumerate(config.secondary_tiers):
        room = tier_room(settings, max(geometry.payload_bytes), where=f"{EXTRA_CONFIG}.secondary_tiers[{i}]")
        num_tokens = None if room.num_chunks is None else room.num_chunks // parts * geometry.chunk_tokens
        capacities.append(TierCapacity(room.name, num_tokens, room.reason, room.problem, room.folder))
    check_tier_names([capacity.name for capacity in capacities[1:]])
    return capacities


def _host_capacity(config: OffloadingConfig, geometry: ChunkGeometry, parts: int) -> TierCapacity:
    folder = config.arena_folder or SHM_DIRECTORY
    arena = ArenaInfo(str(folder / "arena"), geometry.num_slots, geometry.slot_bytes, b"")
    space = space_at(folder)
    problem = None
    if space.free_bytes < arena.total_bytes:
        problem = str(no_room(arena, folder, have=f"{space.free_bytes} bytes are free"))
    elif not space.is_writable:
        problem = f"cannot make an arena in {folder}: it is no writable folder; set arena_dir to another folder"
    return TierCapacity(
        HOST,
        geometry.num_slots // parts * geometry.chunk_tokens,
        f"cpu_bytes_to_use {config.cpu_bytes_to_use}: {geometry.num_slots} slots of {geometry.slot_bytes} bytes, one "
        f"a chunk of {geometry.chunk_tokens} tokens; the arena takes {arena.total_bytes} of {space.free_bytes} free "
        f"bytes in {folder}",
        problem,
        folder,
        arena.total_bytes,
    )

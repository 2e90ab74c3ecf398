"""One worker's registration with the server, and the shared memory through which KV goes.

    engine's blocks <-- copies of ours --> staging slots (shared memory) <-- the server's copies --> the server's memory

The server only ever sees the staging. What stands in a slot proves itself:

    | blocks' payloads, in order | unused | digest, 16 bytes | chain value, 32 | rank, u16 LE |
    0                                     slot_bytes - 50

A session ends with its first failure, and its staging with it: whatever a server does that was stopped and goes on
later, it does to memory that nobody reads. Slot 0 stays unused: the server takes block 0 for "no KV".
"""

from __future__ import annotations

import math
import os
import secrets
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvferry.errors import ConfigError, HostError, TierCorrupt, TransferError
from kvferry.kv.arena import Arena
from kvferry.kv.keys import DIGEST_BYTES, UNIT_TOKENS, digest
from kvferry.kv.layout import GroupLayout
from kvferry.kv.segment import PAGE_BYTES, SHM_DIRECTORY
from kvferry.kv.space import space_at
from kvferry.lmcache.config import EXTRA_CONFIG
from kvferry.lmcache.messages import ChunkMove, ServerTransfer
from kvferry.lmcache.wire import PROBE_TIMEOUT_S, ServerConnection, ServerKey, shared_tensor
from kvferry.offloading.copier import Copier

_PROOF = struct.Struct(f"<{DIGEST_BYTES}s32sH")
_MIN_SLOTS = 2


class TransferRefused(TransferError):
    """The server cannot do this one thing; the session goes on."""


class ChunkCorrupt(TierCorrupt):
    """A chunk came from the server with other bytes than were stored under its name."""

    def __init__(self, move: ChunkMove) -> None:
        super().__init__(f"chunk {move.chunk} came from the LMCache server with other bytes than were stored")
        self.chain_value = move.chain_value


@dataclass(frozen=True, slots=True)
class ServerChunks:
    """Sizes of the server's chunks for one worker; as a tensor, a slot is [chunk_tokens, row_bytes] of bytes."""

    chunk_tokens: int
    blocks_per_chunk: int
    block_bytes: int
    row_bytes: int
    num_slots: int

    @classmethod
    def of(cls, chunk_tokens: int, block_tokens: int, block_bytes: int, staging_bytes: int) -> ServerChunks:
        """Derive them. ConfigError when blocks do not fill a chunk, or the staging does not hold one."""
        if chunk_tokens % math.lcm(block_tokens, UNIT_TOKENS):
            raise ConfigError(
                f"the LMCache server has chunks of {chunk_tokens} tokens, not a multiple of {UNIT_TOKENS} and of this "
                f"engine's block_size={block_tokens}: change block_size, or start the server with another --chunk-size"
            )
        per_chunk = chunk_tokens // block_tokens
        slot_bytes = -(-(per_chunk * block_bytes + _PROOF.size) // math.lcm(chunk_tokens, PAGE_BYTES))
        slot_bytes *= math.lcm(chunk_tokens, PAGE_BYTES)
        if (num_slots := staging_bytes // slot_bytes) < _MIN_SLOTS:
            raise ConfigError(
                f"{EXTRA_CONFIG}.staging_bytes={staging_bytes} is too little for chunks of {slot_bytes} bytes: "
                f"raise it to at least {_MIN_SLOTS * slot_bytes}"
            )
        return cls(chunk_tokens, per_chunk, block_bytes, slot_bytes // chunk_tokens, num_slots)

    @property
    def slot_bytes(self) -> int:
        """Of one slot: of a chunk and its proof."""
        return self.chunk_tokens * self.row_bytes

    def check_room(self) -> None:
        """ConfigError when there is too little shared memory for the staging."""
        need_bytes = (self.num_slots + 1) * self.slot_bytes
        if (free_bytes := space_at(SHM_DIRECTORY).free_bytes) < need_bytes:
            raise ConfigError(
                f"{EXTRA_CONFIG}.staging_bytes: {need_bytes} bytes are needed in {SHM_DIRECTORY}, {free_bytes} are "
                "free: lower it, or give the container more shared memory (docker --shm-size)"
            )


class ServerSession:
    """Made, registered, used until the first TransferError that is no TransferRefused, closed. For one thread at a
    time."""

    def __init__(
        self,
        connection: ServerConnection,
        geometry: ServerChunks,
        group: GroupLayout,
        copier: Copier,
        rank: int,
        *,
        keeps_nan_apart: bool,
    ) -> None:
        """Make the staging. Blocks while its memory is made. ConfigError when there is too little of it.

        Unless the host `keeps_nan_apart`, no KV with a NaN or an infinity is stored.
        """
        geometry.check_room()
        self._connection = connection
        self._geometry = geometry
        self._group = group
        self._copier = copier
        self._rank = rank
        self._keeps_nan_apart = keeps_nan_apart
        self._instance_id = secrets.randbits(62)
        self._arena = Arena.create(
            engine_id="lmcache", num_slots=geometry.num_slots, slot_bytes=geometry.slot_bytes, is_named=True
        )
        copier.map_host(self._arena.address, geometry.num_slots * geometry.slot_bytes)

    def register(self, model_name: str, world_size: int) -> None:
        """Show the server the staging. Blocks for at most 5 s; HostError, saying what to do, when it is not taken."""
        info, geometry = self._arena.info, self._geometry
        shape = (info.num_slots, geometry.chunk_tokens, geometry.row_bytes)
        tensor = shared_tensor(info.path, info.total_bytes, info.data_offset_bytes, shape)
        instance = (self._instance_id, [tensor], model_name, world_size)
        try:
            self._call("register_kv_cache", *instance, "vllm", {}, [], returns=None, timeout_s=PROBE_TIMEOUT_S)
        except TransferError as err:
            raise HostError(
                f"the LMCache server answers, but does not take kvferry's shared memory ({err}): the server must run "
                f"on this machine, as this user and with the same {SHM_DIRECTORY}, and must drive transfers "
                "(--supported-transfer-mode lmcache_driven, the default, or auto); the server's log says more"
            ) from err
        os.unlink(info.path)  # both have it mapped: nothing is left behind if we are killed

    def ping(self, timeout_s: float) -> None:
        """Tell the server that we live."""
        self._call("ping", self._instance_id, returns=bool, timeout_s=timeout_s)

    def store(self, job: ServerTransfer, mark: Any, timeout_s: float) -> None:
        """Send a job's chunks. Blocks; TransferError at the first that was not taken, or must not be stored."""
        for moves in self._batches(job.moves):
            num_good = 0
            for slot, move in enumerate(moves, start=1):
                self._gather(slot, move, mark)
                if not self._keeps_nan_apart and not self._group.is_finite(self._payload(slot)):
                    break
                num_good = slot
            if num_good:
                self._transfer("store", job, moves[:num_good], timeout_s)
            if num_good < len(moves):
                # Another request's NaN may have spoilt this prompt's KV: stored, it would for ever.
                raise TransferRefused(f"the KV in blocks {list(moves[num_good].block_ids)} has a NaN or an infinity")

    def retrieve(self, job: ServerTransfer, mark: Any, timeout_s: float) -> None:
        """Fetch a job's chunks into the engine's blocks, once they are proved. Blocks; TransferError or ChunkCorrupt
        at the first that is not right, and the rest is unlocked."""
        for moves in self._batches(job.moves):
            try:
                self._transfer("retrieve", job, moves, timeout_s)
                for slot, move in enumerate(moves, start=1):
                    self._scatter(slot, move, mark)
            except (TransferRefused, ChunkCorrupt):
                if moves[-1] is not job.moves[-1]:
                    key = self._key(job, moves[-1].chunk + 1, job.moves[-1].chunk + 1)
                    self._call("free_lookup_locks", key, key.world_size, returns=None, timeout_s=timeout_s)
                raise

    def _batches(self, moves: Sequence[ChunkMove]) -> Iterator[Sequence[ChunkMove]]:
        size = self._geometry.num_slots - 1
        for first in range(0, len(moves), size):
            yield moves[first : first + size]

    def _transfer(self, operation: str, job: ServerTransfer, moves: Sequence[ChunkMove], timeout_s: float) -> None:
        key = self._key(job, moves[0].chunk, moves[-1].chunk + 1)
        slots = [list(range(1, len(moves) + 1))]
        more = (0,) if operation == "retrieve" else ()
        arguments = (key, self._instance_id, slots, b"", *more)
        event, is_done = self._call(operation, *arguments, returns=tuple[bytes, bool], timeout_s=timeout_s)
        if not is_done and not event:
            raise TransferError(f"the LMCache server does not know this worker any more, so it does not {operation}")
        if not is_done:
            raise TransferRefused(f"the LMCache server refused to {operation} tokens {key.start} to {key.end}")

    def _key(self, job: ServerTransfer, first_chunk: int, end_chunk: int) -> ServerKey:
        size = self._geometry.chunk_tokens
        return job.key.part(first_chunk * size, end_chunk * size, self._rank)

    def _call(self, operation: str, *arguments: Any, returns: Any, timeout_s: float) -> Any:
        return self._connection.call(operation, *arguments, returns=returns, timeout_s=timeout_s)

    def _payload(self, slot: int) -> memoryview:
        num_bytes = self._geometry.blocks_per_chunk * self._geometry.block_bytes
        return self._arena.slot_view(slot)[:num_bytes]

    def _proof(self, slot: int, move: ChunkMove) -> bytes:
        return _PROOF.pack(digest(self._payload(slot)), move.chain_value, self._rank)

    def _gather(self, slot: int, move: ChunkMove, mark: Any) -> None:
        self._copier.gather(mark, self._group.block_ranges(move.block_ids), self._arena.slot_address(slot))
        self._arena.slot_view(slot)[-_PROOF.size :] = self._proof(slot, move)

    def _scatter(self, slot: int, move: ChunkMove, mark: Any) -> None:
        if bytes(self._arena.slot_view(slot)[-_PROOF.size :]) != self._proof(slot, move):
            raise ChunkCorrupt(move)
        address = self._arena.slot_address(slot) + move.first_block * self._geometry.block_bytes
        self._copier.scatter(mark, address, self._group.block_ranges(move.block_ids))

    def close(self) -> None:
        """Give the staging up; the server keeps its own view of it."""
        self._copier.unmap_host()
        self._arena.close()

    def unregister(self, timeout_s: float) -> None:
        """Tell the server to forget us."""
        self._call("unregister_kv_cache", self._instance_id, returns=None, timeout_s=timeout_s)

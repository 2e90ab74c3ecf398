"""Copies between a worker's KV pool and arena slots, as byte ranges; and the digest of what was copied.

A digest of bytes that have just been copied finds them in the CPU's cache: taken piece by piece, beside the copies, it
costs a fifth of their speed, taken over a whole chunk afterwards a third.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from kvferry.kv.keys import Digest
from kvferry.kv.layout import ByteRange

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_PIECE_BYTES = 384 << 10  # of a copy: stays in the cache until it is hashed


class Copier(Protocol):
    """Moves ranges of the pool to or from one contiguous host buffer. Blocks the calling thread until done.

    `proof` takes in what was copied, in the order of the ranges: bytes that arrived in host memory as they arrived,
    those that went to a device as the host buffer has them.
    """

    def map_host(self, address: int, num_bytes: int) -> None:
        """All host addresses will lie in this mapping, which lives until `unmap_host`."""
        ...

    def unmap_host(self) -> None:
        """The mapping goes away; idempotent."""
        ...

    def mark(self) -> Any:
        """Called by the model's thread: what copies must wait for, so that they see all work launched so far."""
        ...

    def gather(self, mark: Any, ranges: Sequence[ByteRange], address: int, proof: Digest | None = None) -> None:
        """Pool -> host bytes starting at `address`, in the order of `ranges`."""
        ...

    def scatter(self, mark: Any, address: int, ranges: Sequence[ByteRange], proof: Digest | None = None) -> None:
        """Host bytes starting at `address` -> pool, in the order of `ranges`."""
        ...


class HostCopier:
    """KV in host memory: plain memmove, which releases the GIL."""

    def __init__(self, anchors: Sequence[torch.Tensor]) -> None:
        self._anchors = list(anchors)  # keeps the storages alive
        self._bases = [tensor.untyped_storage().data_ptr() for tensor in anchors]

    def map_host(self, address: int, num_bytes: int) -> None:
        """Nothing to prepare."""

    def unmap_host(self) -> None:
        """Nothing to undo."""

    def mark(self) -> None:
        """Nothing to wait for: host kernels have finished when they return."""

    def gather(self, mark: None, ranges: Sequence[ByteRange], address: int, proof: Digest | None = None) -> None:
        """Pool -> host."""
        for storage, offset, length in ranges:
            _copy(address, self._bases[storage] + offset, length, proof)
            address += length

    def scatter(self, mark: None, address: int, ranges: Sequence[ByteRange], proof: Digest | None = None) -> None:
        """Host -> pool."""
        for storage, offset, length in ranges:
            _copy(self._bases[storage] + offset, address, length, proof)
            address += length


def _copy(destination: int, source: int, num_bytes: int, proof: Digest | None) -> None:
    if proof is None:
        ctypes.memmove(destination, source, num_bytes)
        return
    for at in range(0, num_bytes, _PIECE_BYTES):
        length = min(_PIECE_BYTES, num_bytes - at)
        ctypes.memmove(destination + at, source + at, length)
        proof.update(_memory(destination + at, length))


def _memory(address: int, num_bytes: int) -> ctypes.Array[ctypes.c_uint8]:
    return (ctypes.c_uint8 * num_bytes).from_address(address)


class DeviceCopier:
    """KV in an accelerator's memory: ranges of a flat byte view, on a stream of their own, ordered by an event.

    Unchecked so far: no GPU was at hand; `make test-gpu` is the check.
    """

    def __init__(self, anchors: Sequence[torch.Tensor]) -> None:
        import torch

        self._torch = torch
        self._device = anchors[0].device
        self._flat = [
            torch.empty(0, dtype=torch.uint8, device=self._device).set_(tensor.untyped_storage()) for tensor in anchors
        ]
        self._stream = torch.Stream(device=self._device)
        self._pinned_address: int | None = None

    def map_host(self, address: int, num_bytes: int) -> None:
        """Pin the mapping (CUDA), so that copies run at full speed; unpinned, they are slower but right."""
        if self._device.type != "cuda":
            return
        status = self._torch.cuda.cudart().cudaHostRegister(  # type: ignore[no-untyped-call]
            address, num_bytes, 0
        )
        if int(status) == 0:
            self._pinned_address = address
        else:
            logger.warning(
                "cannot pin the %d bytes of host KV (CUDA error %s): copies will be slower", num_bytes, status
            )

    def unmap_host(self) -> None:
        """Unpin."""
        if self._pinned_address is not None:
            self._torch.cuda.cudart().cudaHostUnregister(self._pinned_address)  # type: ignore[no-untyped-call]
            self._pinned_address = None

    def mark(self) -> Any:
        """An event behind all work launched so far on the model's stream."""
        event = self._torch.Event(device=self._device)
        event.record(self._torch.accelerator.current_stream(self._device))
        return event

    def gather(self, mark: Any, ranges: Sequence[ByteRange], address: int, proof: Digest | None = None) -> None:
        """Device -> host."""
        self._run(mark, [(self._host(at, n), self._flat[s][o : o + n]) for (s, o, n), at in _placed(ranges, address)])
        self._prove(address, ranges, proof)

    def scatter(self, mark: Any, address: int, ranges: Sequence[ByteRange], proof: Digest | None = None) -> None:
        """Host -> device."""
        self._run(mark, [(self._flat[s][o : o + n], self._host(at, n)) for (s, o, n), at in _placed(ranges, address)])
        self._prove(address, ranges, proof)

    def _prove(self, address: int, ranges: Sequence[ByteRange], proof: Digest | None) -> None:
        if proof is not None:
            proof.update(_memory(address, sum(length for _, _, length in ranges)))

    def _host(self, address: int, length: int) -> torch.Tensor:
        return self._torch.frombuffer(_memory(address, length), dtype=self._torch.uint8)

    def _run(self, mark: Any, copies: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._stream.wait_event(mark)
        with self._stream:
            for destination, source in copies:
                destination.copy_(source, non_blocking=True)
        self._stream.synchronize()


def _placed(ranges: Sequence[ByteRange], address: int) -> list[tuple[ByteRange, int]]:
    placed = []
    for r in ranges:
        placed.append((r, address))
        address += r.length
    return placed


def make_copier(anchors: Sequence[torch.Tensor]) -> Copier:
    """The copier for the device the pool lives on."""
    return HostCopier(anchors) if anchors[0].device.type == "cpu" else DeviceCopier(anchors)

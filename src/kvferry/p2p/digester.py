"""Digests of a worker's own blocks, for what two engines compare of a hand-over (`kvferry.p2p.proof`)."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections import deque
from collections.abc import Sequence

import numpy as np

from kvferry.kv.keys import DIGEST_BYTES, Digest
from kvferry.kv.layout import GroupLayout, KVLayout
from kvferry.p2p.actions import DigestJob
from kvferry.p2p.geometry import LayerGeometry, RankGeometry
from kvferry.p2p.proof import RankDigests
from kvferry.types import NULL_BLOCK_ID

logger = logging.getLogger(__name__)

_JOIN_S = 5.0


class Digester:
    """Makes digests of one worker's blocks in host memory, on a thread of its own. No call but `close` waits."""

    def __init__(self, layout: KVLayout, rank: RankGeometry, addresses: Sequence[int]) -> None:
        self._layout = layout
        self._rank = rank
        self._addresses = addresses
        self._wake = threading.Condition()
        self._jobs: deque[DigestJob] = deque()
        self._made: list[tuple[str, RankDigests | None]] = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._main, name="kvferry-p2p-digests", daemon=True)
        self._thread.start()

    def submit(self, job: DigestJob) -> None:
        """Queue a job; from any thread."""
        with self._wake:
            self._jobs.append(job)
            self._wake.notify()

    def poll(self) -> list[tuple[str, RankDigests | None]]:
        """Jobs that ended since the last call; None where the blocks could not be read."""
        with self._wake:
            made, self._made = self._made, []
        return made

    def close(self) -> None:
        """Ends with the block that is read now. Idempotent."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._thread.join(_JOIN_S)

    def _main(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._is_closing or self._jobs)
                if self._is_closing:
                    return
                job = self._jobs.popleft()
            try:
                digests: RankDigests | None = self.digests(job)
            except Exception:  # a thread's main: the job must end
                logger.exception("digests of %s", job.job_id)
                digests = None
            with self._wake:
                self._made.append((job.job_id, digests))

    def digests(self, job: DigestJob) -> RankDigests:
        """What a job answers."""
        return tuple(
            self._group(number, group, job.blocks[number], token_range)
            for token_range in (job.token_range, job.check_range)
            if token_range is not None
            for number, group in enumerate(self._layout.groups)
        )

    def _group(self, number: int, group: GroupLayout, blocks: Sequence[int], token_range: tuple[int, int]) -> bytes:
        first, end, size = *token_range, group.block_tokens
        stop = -(-end // size)
        out = bytearray(stop * DIGEST_BYTES)
        for position in range(-(-first // size), stop):
            num_tokens = min(size, end - position * size)
            if blocks[position] == NULL_BLOCK_ID or self._is_closing:
                continue
            is_whole = num_tokens == size
            block = blocks[position]
            of = self._whole(group, block) if is_whole else self._beginning(number, block, num_tokens)
            out[position * DIGEST_BYTES : (position + 1) * DIGEST_BYTES] = of
        return bytes(out)

    def _whole(self, group: GroupLayout, block: int) -> bytes:
        proof = Digest()
        for storage, offset, length in group.block_ranges((block,)):
            proof.update((ctypes.c_uint8 * length).from_address(self._addresses[storage] + offset))
        return proof.digest()

    def _beginning(self, number: int, block: int, num_tokens: int) -> bytes:
        """Of the first tokens: layer by layer, page by page, part by part."""
        proof = Digest()
        for layer in self._rank.layers:
            if layer.group == number:
                self._add_beginning(proof, layer, block, num_tokens)
        return proof.digest()

    def _add_beginning(self, proof: Digest, layer: LayerGeometry, block: int, num_tokens: int) -> None:
        y = layer.layout
        for page in range(-(-num_tokens // y.shape[1])):
            tokens = min(y.shape[1], num_tokens - page * y.shape[1])
            at = y.offset_bytes + (block * y.ratio + page) * y.kernel_block_stride_bytes
            for part in layer.placed_parts().values():
                shape = (y.shape[0], tokens, part.width, y.element_bytes)
                strides = (y.strides[0], part.token_stride, part.element_stride, 1)
                memory = _Memory(self._addresses[y.storage] + at + part.offset, shape, strides)
                proof.update(np.asarray(memory).tobytes())


class _Memory:
    """Bytes at an address, as numpy takes them."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.__array_interface__ = {
            "data": (address, True), "shape": shape, "strides": strides, "typestr": "|u1", "version": 3,
        }  # fmt: skip

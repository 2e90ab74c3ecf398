"""Host tier: store and load through the OffloadingConnector's own worker, against a bare paged gather and scatter.

store   pool blocks -> arena slots, digest of each slot included, on the connector's copy thread
load    arena slots -> pool blocks, generation checks and the proof of each chunk's digest included, as `store`
unproved  as load, without the proof (`verify_host_loads` false)
bound   numpy: `take(pool, ids, out=host)` and `pool[ids] = host`, whole blocks, one thread, all memory touched before
hashed  the bound of what has a digest: `memmove` and xxh3-128 of each piece in turn, and nothing else, one thread

All move the same shuffled blocks; every round measures all six in turn, so that other work on the machine hits all
alike. Ratios are per round. Rates are in GB/s (1e9) of wall time.
"""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import plots
import record
import torch

from kvferry.contract import FullAttentionSpec, make_kv_cache_config
from kvferry.contract.host import HostInfo
from kvferry.kv.arena import Arena
from kvferry.kv.keys import Digest
from kvferry.offloading.messages import ChunkPart, CopyJob, OffloadingStepMetadata
from kvferry.offloading.worker_side import OffloadingWorkerSide
from kvferry.types import AttentionKind, GroupInfo, SlotRef

BLOCK_TOKENS = 16
CHUNK_TOKENS = 64
BLOCKS_PER_CHUNK = CHUNK_TOKENS // BLOCK_TOKENS
_FASTEST_BYTES_PER_S = 8e9
_PIECE_BYTES = 384 << 10
RATIOS = (
    ("store", "gather"),
    ("store", "hashed"),
    ("load", "scatter"),
    ("load", "hashed"),
    ("unproved", "scatter"),
    ("hashed", "gather"),
)


@dataclass(frozen=True)
class Shape:
    """A model's KV per token."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    num_tokens: int
    """Moved per sample."""


SHAPES = (
    Shape("SmolLM2-135M bf16", 30, 3, 64, 8192),
    Shape("Llama-3-8B bf16", 32, 8, 128, 2048),
)


class Subject:
    """A pool twice the size of what is moved, an arena that holds it, and the connector's worker between them."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.num_chunks = shape.num_tokens // CHUNK_TOKENS
        num_blocks = 1 + 2 * self.num_chunks * BLOCKS_PER_CHUNK
        spec = FullAttentionSpec(
            block_size=BLOCK_TOKENS,
            num_kv_heads=shape.num_kv_heads,
            head_size=shape.head_size,
            dtype=torch.bfloat16,
        )
        names = [f"layer.{i}" for i in range(shape.num_layers)]
        config = make_kv_cache_config(num_blocks, dict.fromkeys(names, spec))
        self.block_bytes = config.kv_cache_tensors[0].block_stride
        self.num_bytes = self.num_chunks * BLOCKS_PER_CHUNK * self.block_bytes
        storage = torch.randint(-128, -1, (num_blocks * self.block_bytes,), dtype=torch.int8)  # no NaN in bfloat16
        self.pool = storage.numpy().view(np.int64).reshape(num_blocks, -1)
        self.block_ids = random.Random(seed).sample(range(1, num_blocks), self.num_chunks * BLOCKS_PER_CHUNK)
        self.ids = np.array(self.block_ids)
        self.host = np.zeros((len(self.ids), self.pool.shape[1]), dtype=np.int64)
        self.host.fill(1)  # touched, so that no page fault is timed
        self.arena = self._arena()
        self.digests: dict[int, bytes] = {}  # of the slots, by chunk
        self.worker = OffloadingWorkerSide(_host_info(names, num_blocks))
        self.worker.register_kv_caches(_views(storage, config, spec))

    def _arena(self) -> Arena:
        slot_bytes = -(-BLOCKS_PER_CHUNK * self.block_bytes // 4096) * 4096
        return Arena.create(engine_id="bench", num_slots=self.num_chunks, slot_bytes=slot_bytes)

    def jobs(self, *, is_proved: bool = False) -> list[CopyJob]:
        """One job per chunk, as the scheduler side makes them."""
        size = BLOCKS_PER_CHUNK * self.block_bytes
        parts = [
            ChunkPart(0, 0, self._blocks(i), (self._slot(i),), 0, size, (self.digests[i],) if is_proved else ())
            for i in range(self.num_chunks)
        ]
        return [CopyJob(i, f"request{i}", (part,)) for i, part in enumerate(parts)]

    def _blocks(self, chunk: int) -> tuple[int, ...]:
        return tuple(self.block_ids[chunk * BLOCKS_PER_CHUNK : (chunk + 1) * BLOCKS_PER_CHUNK])

    def _slot(self, chunk: int) -> SlotRef:
        return SlotRef(chunk, self.arena.generation(chunk))

    def store(self) -> None:
        """Pool -> arena through the connector's worker."""
        self.worker.wait_for_save(OffloadingStepMetadata(self.arena.info, [], self.jobs()))
        self._wait()

    def load(self) -> None:
        """Arena -> pool through the connector's worker."""
        self.worker.start_load_kv(OffloadingStepMetadata(self.arena.info, self.jobs(is_proved=True), []))
        self._wait()

    def unproved(self) -> None:
        """As `load`, without the digest."""
        self.worker.start_load_kv(OffloadingStepMetadata(self.arena.info, self.jobs(), []))
        self._wait()

    def _wait(self) -> None:
        time.sleep(self.num_bytes / _FASTEST_BYTES_PER_S)  # an engine looks once per step, not all the time
        waiting = self.num_chunks
        while waiting:
            self.worker.get_transfer_results(set())
            report = self.worker.build_connector_worker_meta()
            for item in report.reports if report is not None else ():
                assert item.error is None, item.error
                if item.digests[0]:
                    self.digests[item.job_id] = item.digests[0]
                waiting -= 1
            time.sleep(0.0002)

    def gather(self) -> None:
        """The bound of a store."""
        np.take(self.pool, self.ids, axis=0, out=self.host, mode="clip")

    def hashed(self) -> None:
        """The bound of a store that makes a digest: pieces that stay in the CPU's cache are copied, then hashed."""
        source, target = self.pool.ctypes.data, self.host.ctypes.data
        proof = Digest()
        for block_id in self.block_ids:
            for at in range(0, self.block_bytes, _PIECE_BYTES):
                length = min(_PIECE_BYTES, self.block_bytes - at)
                ctypes.memmove(target + at, source + block_id * self.block_bytes + at, length)
                proof.update((ctypes.c_uint8 * length).from_address(target + at))
            target += self.block_bytes
        proof.digest()

    def scatter(self) -> None:
        """The bound of a load."""
        self.pool[self.ids] = self.host

    def check(self) -> None:
        """What was stored and loaded is what was there."""
        before = self.pool.copy()
        self.store()
        self.pool[self.ids] = 0
        self.load()
        assert np.array_equal(self.pool, before), "loaded blocks differ from stored ones"

    def close(self) -> None:
        """Release worker and arena."""
        self.worker.shutdown()
        self.arena.close()


def _views(storage: torch.Tensor, config: Any, spec: FullAttentionSpec) -> dict[str, torch.Tensor]:
    tensor = config.kv_cache_tensors[0]
    typed = storage.view(torch.bfloat16)
    content = 2 * spec.head_size
    shape = (config.num_blocks, spec.num_kv_heads, BLOCK_TOKENS, content)
    strides = (tensor.block_stride // 2, content, spec.num_kv_heads * content, 1)
    return {
        name: typed.as_strided(shape, strides, i * tensor.layer_stride // 2) for i, name in enumerate(tensor.layers)
    }


def _host_info(names: list[str], num_blocks: int) -> HostInfo:
    return HostInfo(
        engine_id="bench",
        model="none",
        weights_are_random=True,
        max_model_len=1 << 20,
        num_blocks=num_blocks,
        groups=(GroupInfo(0, tuple(names), BLOCK_TOKENS, AttentionKind.FULL),),
        tp_size=1,
        pp_size=1,
        rank=0,
        load_failure_policy="recompute",
        extra_config={},
        numerics={},
    )


def _rate(subject: Subject, action: Callable[[], None]) -> float:
    started = time.perf_counter()
    action()
    return subject.num_bytes / (time.perf_counter() - started) / 1e9


def measure(shape: Shape, rounds: int, seed: int) -> dict[str, Any]:
    """All rates of one shape, one sample a round, and the ratios of their medians."""
    subject = Subject(shape, seed)
    try:
        subject.check()
        actions = {
            name: getattr(subject, name) for name in ("store", "gather", "load", "unproved", "scatter", "hashed")
        }
        samples: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(rounds):
            for name, action in actions.items():
                samples[name].append(_rate(subject, action))
    finally:
        subject.close()
    ratios = {
        f"{name} / {bound}": statistics.median(a / b for a, b in zip(samples[name], samples[bound], strict=True))
        for name, bound in RATIOS
    }
    return {
        "shape": shape.name,
        "bytes_per_sample": subject.num_bytes,
        "block_bytes": subject.block_bytes,
        "median_gb_per_s": {name: statistics.median(values) for name, values in samples.items()},
        "ratio": ratios,
        "samples_gb_per_s": samples,
    }


def main() -> None:
    """Measure, print, write bench/results/host_tier.{json,png}."""
    parser = record.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=7)
    options = record.parse(parser, rounds=1)
    torch.set_num_threads(1)
    results = [measure(shape, options.rounds, options.seed) for shape in SHAPES]
    for result in results:
        print(result["shape"])
        for kind, bound in RATIOS:
            rates = result["median_gb_per_s"]
            print(
                f"  {kind:8} {rates[kind]:6.2f} GB/s   {bound:7} {rates[bound]:6.2f} GB/s"
                f"   ratio {result['ratio'][f'{kind} / {bound}']:.2f}"
            )
    path = record.write("host_tier", {"machine": record.machine(), "seed": options.seed, "results": results})
    plots.save(path)


if __name__ == "__main__":
    main()

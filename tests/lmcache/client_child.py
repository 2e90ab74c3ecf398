"""A client process: one worker side that stores or retrieves given bytes. Prints what stands in its pool afterwards.

argv: port, "store" or "retrieve", seed of the bytes (store only). Bytes and keys are made here, without an engine.
"""

from __future__ import annotations

import hashlib
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch

from kvferry.config import KVTransferConfig
from kvferry.contract import FullAttentionSpec, make_kv_cache_config
from kvferry.contract.host import host_info
from kvferry.lmcache.lookups import Lookups
from kvferry.lmcache.messages import ChunkMove, LMCacheMetadata, ServerTransfer
from kvferry.lmcache.wire import ServerKey
from kvferry.lmcache.worker_side import LMCacheWorkerSide

BLOCK, CHUNK, NUM_CHUNKS, NUM_BLOCKS = 16, 64, 6, 64
TOKENS = tuple((i * 37 + 5) % 1000 for i in range(NUM_CHUNKS * CHUNK))
CHAIN = [hashlib.sha256(f"chunk {i}".encode()).digest() for i in range(NUM_CHUNKS)]


def worker_side(port: int) -> LMCacheWorkerSide:
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.bfloat16)
    extra: dict[str, Any] = {"host": "127.0.0.1", "port": port, "weights_version": "client", "staging_bytes": 1 << 16}
    extra |= {"mq_timeout": 60.0, "lookup_timeout_s": 30.0}
    transfer = KVTransferConfig("LMCacheMPConnector", kv_role="kv_both", kv_connector_extra_config=extra)
    config = SimpleNamespace(
        kv_transfer_config=transfer,
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, rank=0),
        model_config=SimpleNamespace(model="client", max_model_len=4096),
    )
    return LMCacheWorkerSide(host_info(config, make_kv_cache_config(NUM_BLOCKS, [{"a": spec, "b": spec}])))


def transfer(worker: LMCacheWorkerSide, key: ServerKey, first_block: int, *, is_load: bool) -> None:
    per_chunk = CHUNK // BLOCK
    moves = tuple(
        ChunkMove(i, CHAIN[i], 0, tuple(range(first_block + i * per_chunk, first_block + (i + 1) * per_chunk)))
        for i in range(NUM_CHUNKS)
    )
    job = ServerTransfer(1, key.request_id, key, moves)
    worker.handle_preemptions(LMCacheMetadata(None, [job] if is_load else [], [] if is_load else [job]))
    deadline, report = time.monotonic() + 60, None
    while report is None:
        assert time.monotonic() < deadline
        worker.get_transfer_results(set())
        report = worker.build_connector_worker_meta()
        time.sleep(0.01)
    assert report.reports[0].error is None, report


def find(worker: LMCacheWorkerSide, key: ServerKey) -> None:
    """Look the key up until all of it is there: a server says that it has stored before it can be found."""
    lookups = Lookups(worker.config, CHUNK)
    deadline, number, found = time.monotonic() + 90, 0, 0
    while found < NUM_CHUNKS:
        assert time.monotonic() < deadline, found
        lookups.begin(key)
        while (answer := lookups.result(key.request_id)) is None:
            time.sleep(0.005)
        if (found := answer) < NUM_CHUNKS:
            lookups.release(key.part(0, found * CHUNK, None))
        number += 1
    lookups.close()


def main() -> None:
    port, what = int(sys.argv[1]), sys.argv[2]
    worker = worker_side(port)
    pools: dict[str, Any] = {name: torch.zeros(NUM_BLOCKS, 2, BLOCK, 16, dtype=torch.bfloat16) for name in "ab"}
    first_block = 1 if what == "store" else 30
    blocks = slice(first_block, first_block + NUM_CHUNKS * CHUNK // BLOCK)
    if what == "store":
        generator = torch.Generator().manual_seed(int(sys.argv[3]))
        for pool in pools.values():
            pool[blocks] = torch.randn(pool[blocks].shape, generator=generator).to(torch.bfloat16)
    worker.register_kv_caches(pools)
    name = worker.get_handshake_metadata().model_name
    key = ServerKey(name, 1, None, TOKENS, 0, len(TOKENS), f"client-{time.time_ns()}")
    if what == "retrieve":
        find(worker, key)
    transfer(worker, key, first_block, is_load=what == "retrieve")
    worker.shutdown()
    others = [pool.clone() for pool in pools.values()]
    for other in others:
        other[blocks] = 0
    assert what == "store" or not any(other.any() for other in others), "bytes outside the asked blocks have changed"
    digest = hashlib.sha256()
    for pool in pools.values():
        digest.update(pool[blocks].contiguous().view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest(), "lmcache" in sys.modules)


if __name__ == "__main__":
    main()

"""A stand-in for LMCache's server in a thread: the operations kvferry uses, and faults. Written from the protocol."""

from __future__ import annotations

import mmap
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import zmq

CHUNK_TOKENS = 64
Fault = Callable[[list[Any]], Any]
SILENT = object()
"""As a fault's answer: none at all."""


class FakeServer:
    """Holds chunks by (model, rank, salt, tokens up to the chunk's end). `faults[operation]` is asked first."""

    def __init__(self, chunk_tokens: int = CHUNK_TOKENS, port: int = 0) -> None:
        self.chunk_tokens = chunk_tokens
        self.chunks: dict[tuple[Any, ...], bytes] = {}
        self.locks: Counter[tuple[Any, ...]] = Counter()
        self.calls: list[str] = []
        self.faults: dict[str, Fault] = {}
        self._tensors: dict[int, Any] = {}
        self._sessions: dict[str, dict[str, Any]] = {}
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self.url = f"tcp://127.0.0.1:{self.port}"
        self._is_over = False
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_over = True
        self._thread.join()
        self._context.term()

    @property
    def num_locked(self) -> int:
        return sum(self.locks.values())

    def _main(self) -> None:
        while not self._is_over:
            if self._socket.poll(10):
                sender, number, operation, *arguments = self._socket.recv_multipart()
                name = msgspec.msgpack.decode(operation)
                self.calls.append(name)
                decoded = [msgspec.msgpack.decode(argument) for argument in arguments]
                answer = self.faults[name](decoded) if name in self.faults else None
                if answer is None:
                    handler = getattr(self, f"on_{name}", lambda *_: SILENT)
                    answer = handler(*decoded)
                if answer is not SILENT:
                    result = [] if answer is None else [msgspec.msgpack.encode(answer)]
                    self._socket.send_multipart([sender, number, operation, *result])
        self._socket.close()

    # ---- operations -------------------------------------------------------------------------------------------

    def on_get_chunk_size(self) -> int:
        return self.chunk_tokens

    def on_ping(self, instance: int | None) -> bool:
        return True

    def on_register_kv_cache(self, instance: int, tensors: list[Any], *_: Any) -> None:
        told = msgspec.msgpack.decode(tensors[0].data)
        assert (tensors[0].code, told["type"], told["version"]) == (1, "cpu_shm", 1)
        with open(f"/dev/shm{told['shm_name']}", "r+b") as file:
            mapping = mmap.mmap(file.fileno(), told["nbytes"])
        shape, start = told["metadata"]["shape"], told["metadata"]["storage_offset"]
        flat = np.frombuffer(mapping, dtype=np.uint8)[start : start + int(np.prod(shape))]
        self._tensors[instance] = flat.reshape(shape[0], -1)

    def on_unregister_kv_cache(self, instance: int) -> None:
        self._tensors.pop(instance, None)

    def _names(self, key: dict[str, Any], ranks: range | None = None) -> list[tuple[Any, ...]]:
        size, tokens = self.chunk_tokens, key["token_ids"]
        assert key["num_kv_readers"] >= 1
        assert key["start"] % size == key["end"] % size == 0
        assert key["end"] <= len(tokens)
        of = range(key["worker_id"], key["worker_id"] + 1) if ranks is None else ranks
        ends = range(key["start"] + size, key["end"] + 1, size)
        return [(key["model_name"], r, key["cache_salt"], tuple(tokens[:end])) for end in ends for r in of]

    def on_store(self, key: dict[str, Any], instance: int, blocks: list[list[int]], event: bytes) -> Any:
        if instance not in self._tensors:
            return b"", False
        assert 0 not in blocks[0], "block 0 means no KV"
        for name, block in zip(self._names(key), blocks[0], strict=True):
            self.chunks.setdefault(name, self._tensors[instance][block].tobytes())
        return b"event", True

    def on_lookup(self, key: dict[str, Any], world_size: int) -> None:
        found = 0
        for end in range(self.chunk_tokens, key["end"] + 1, self.chunk_tokens):
            names = self._names({**key, "start": end - self.chunk_tokens, "end": end}, range(key["world_size"]))
            if not all(name in self.chunks for name in names):
                break
            self.locks.update(names)
            found += 1
        self._sessions[key["request_id"]] = {"found": found, "at": time.monotonic()}

    def on_query_prefetch_status(self, request_id: str) -> int:
        session = self._sessions.get(request_id)
        return session["found"] if session else 0

    def _unlock(self, names: list[tuple[Any, ...]]) -> None:
        for name in names:
            assert self.locks[name] > 0, "an unlock of what is not locked"
            self.locks[name] -= 1

    def on_free_lookup_locks(self, key: dict[str, Any], world_size: int) -> None:
        self._unlock(self._names(key, None if key["worker_id"] is not None else range(key["world_size"])))

    def on_retrieve(self, key: dict[str, Any], instance: int, blocks: list[list[int]], event: bytes, skip: int) -> Any:
        names = self._names(key)
        self._unlock(names)
        if instance not in self._tensors:
            return b"", False
        if not all(name in self.chunks for name in names):
            return b"event", False
        for name, block in zip(names, blocks[0], strict=True):
            self._tensors[instance][block] = np.frombuffer(self.chunks[name], dtype=np.uint8)
        return b"event", True

    def on_end_session(self, request_id: str) -> None:
        self._sessions.pop(request_id, None)

"""An embedded engine on the stub model, in a process of its own, that the test can stop in the middle of a transfer.

It steps as long as it lives, and takes orders over a pipe: a method of `Child` and its arguments. It sends
("port", number) when it has started, ("reply", value), ("output", one finished request) and ("half", operation), the
last when the gate has shut: some bytes of a transfer have moved, and no more will until the gate is opened.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import threading
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import numpy as np
import torch

from kvferry import LLM, SamplingParams
from kvferry.p2p.scheduler_side import P2PSchedulerSide
from kvferry.p2p.transports import shm
from kvferry.p2p.transports.threaded import Step, ThreadedTransport, Transfer
from kvferry.p2p.transports.transport import PeerHandle, Pieces, TransferOp
from kvferry.testing.stub_model import StubModel

BLOCK = 4
NUM_BLOCKS = 161
PART_BYTES = 256
PARTS_MOVED = 5
REST_S = 0.001


class Gate:
    """What all transfers of this process pass through, a few hundred bytes at a time."""

    is_armed = False
    is_open = threading.Event()
    tell: Callable[[TransferOp], None]
    steps: ClassVar[Counter[int]] = Counter()

    @classmethod
    def lets_pass(cls, transfer: Transfer) -> bool:
        cls.steps[transfer.ticket] += 1
        if cls.is_armed and cls.steps[transfer.ticket] > PARTS_MOVED:
            cls.is_armed = False
            cls.is_open.clear()
            cls.tell(transfer.op)
        return cls.is_open.is_set()


def in_parts(pieces: Pieces) -> Pieces:
    """The same copies, none of more than `PART_BYTES`."""
    counts = -(-pieces.length // PART_BYTES)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * PART_BYTES
    length = np.minimum(np.repeat(pieces.length, counts) - start, PART_BYTES)
    source, destination = pieces.source_offset, pieces.destination_offset
    regions = (np.repeat(region, counts) for region in (pieces.source_region, pieces.destination_region))
    source_region, destination_region = regions
    offsets = np.repeat(source, counts) + start, np.repeat(destination, counts) + start
    return Pieces(source_region, offsets[0], destination_region, offsets[1], length)


def gated(transport: type[ThreadedTransport]) -> type[ThreadedTransport]:
    """This transport, with a gate between any two steps."""

    class Gated(transport):  # type: ignore[valid-type,misc]
        def submit(self, peer: PeerHandle, op: TransferOp, pieces: Pieces, then: Any = None) -> int:
            return super().submit(peer, op, in_parts(pieces), then)  # type: ignore[no-any-return]

        def _advance(self, transfer: Transfer) -> Step:
            return super()._advance(transfer) if Gate.lets_pass(transfer) else Step.WAITING  # type: ignore[no-any-return]

    return Gated


def install_gate(transport: str) -> None:
    """What is used from now on in this process."""
    Gate.is_open.set()
    if transport == "nixl":
        from kvferry.p2p.transports import nixl

        nixl._POST_BYTES = PART_BYTES
        nixl.NixlTransport = gated(nixl.NixlTransport)  # type: ignore[misc]
    else:
        shm._SHORT_STEP_BYTES = shm._LONG_STEP_BYTES = PART_BYTES
        shm.ShmTransport = gated(shm.ShmTransport)  # type: ignore[misc]


class Child:
    """The engine and its orders."""

    def __init__(self, connection: Connection, transport: str, settings: dict[str, Any], policy: str) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._is_closing = False
        Gate.tell = lambda op: self.send("half", op.value)  # type: ignore[assignment]
        install_gate(transport)
        config = {
            "kv_connector": "P2PConnector", "kv_role": "kv_both", "kv_load_failure_policy": policy,
            "kv_connector_extra_config": {"transport": transport} | settings,
        }  # fmt: skip
        self.llm = LLM(
            StubModel(), kv_transfer_config=config, num_kv_blocks=NUM_BLOCKS, block_size=BLOCK,
            max_num_batched_tokens=256,
        )  # fmt: skip
        side = self.llm.connector.side  # type: ignore[union-attr]
        assert isinstance(side, P2PSchedulerSide)
        self.side = side

    def send(self, kind: str, value: Any) -> None:
        with self._lock:
            self._connection.send((kind, value))

    def run(self) -> None:
        """Step, until told to close or the test is gone; rest after a step that did nothing, as our hosts do."""
        self.send("port", self.side.agent.address.port)
        while not self._is_closing:
            while self._connection.poll(0 if self.llm.has_moved else REST_S):
                name, *arguments = self._connection.recv()
                self.send("reply", getattr(self, name)(*arguments))
            for output in self.llm.step():
                if not output.finished:
                    continue
                one = output.outputs[0]
                self.send(
                    "output",
                    {
                        "request_id": output.request_id, "tokens": one.token_ids, "reason": one.finish_reason,
                        "error": output.error, "params": output.kv_transfer_params,
                        "num_external": output.num_external_tokens,
                    },
                )  # fmt: skip
        self.llm.shutdown()
        self.llm.scheduler.check_integrity()

    def add(self, request_id: str, prompt: list[int], max_tokens: int, params: dict[str, Any] | None) -> str:
        extra = None if params is None else {"kv_transfer_params": params}
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, extra_args=extra)
        self.llm.add_request(prompt, sampling, request_id=request_id)
        return "added"  # nobody waits for this

    def abort(self, request_id: str) -> str:
        self.llm.abort_request(request_id)
        return "added"  # nobody waits for this

    def reset(self) -> bool:
        """Forget the cached KV, the connector's too."""
        return self.llm.reset_prefix_cache(reset_connector=True)

    def cut(self, ports: list[int]) -> int:
        """Close this process's connections from or to these ports, as a cut cable does; answers how many."""
        num_cut = 0
        for fd in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):  # closed meanwhile, or not connected
                if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                    continue
                with socket.socket(fileno=os.dup(fd)) as connection:
                    ends = connection.getsockname(), connection.getpeername()
                    if any(isinstance(end, tuple) and end[1] in ports for end in ends):
                        connection.shutdown(socket.SHUT_RDWR)
                        num_cut += 1
        return num_cut

    def gate(self, what: str) -> None:
        if what == "arm":
            Gate.is_armed = True
        else:
            Gate.is_open.set()

    def close(self) -> None:
        self._is_closing = True

    def state(self) -> dict[str, Any]:
        """Where this engine's blocks are, and what it has open with others."""
        self.llm.check_integrity()
        self.side.check_integrity()
        pool = self.llm.scheduler.manager.block_pool
        stats = self.side.get_kv_connector_stats()
        books = self.side.agent.use(lambda core, now: core.snapshot())
        counters = self.llm.counters
        assert counters.hook_errors == counters.contract_errors == {}
        return books | {
            "lost_blocks": len(pool.blocks) - 1 - pool.get_num_free_blocks(),
            "pinned_blocks": sum(map(len, self.side._pins.values())),
            "told_held_blocks": stats.held_blocks,
            "engine_held_blocks": self.llm.scheduler.stats().num_held_blocks,
            "num_loads": len(self.side._loads),
        }


def main(connection: Connection, log: str, transport: str, settings: dict[str, Any], policy: str) -> None:
    """Of the process; libraries write to its standard output too, so all output goes to the log."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(name)s: %(message)s", force=True)
    torch.set_num_threads(1)
    Child(connection, transport, settings, policy).run()

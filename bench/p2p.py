"""Transports between two processes on one host, against what bounds them; part "transports" of the P2P benchmark.

gather bound     torch `index_select` of pages into one buffer, one thread, all in this process
shm, gather      our shared-memory transport, READ: as the bound, from pages all over a pool to one half of another
shm, scatter     from one half of a pool to pages all over another, as into a pool long in use
shm, both        from all over to all over
shm, busy host   as "gather", beside a thread of this process that spins in Python
raw nixl         the library itself, as it comes: its Python API, default settings, READ, one request; as "gather",
                 and in pieces of 8 and 32 MiB too
nixl             our NIXL transport, READ, as "gather"
nixl, merged     the same in pieces of 8 MiB: what the planner makes of blocks that are adjacent on both sides

All move as many bytes, in another order on either side (the bound: in order on its far side). Every round measures all
in turn, so that other work on the machine hits all alike. Rates are in GB/s (1e9) of wall time, from submit to the
completion seen by polling. NIXL lives in an environment of its own: `--native-python`; without it the exit status is 2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch

from kvferry.p2p.transports.choice import create_transports
from kvferry.p2p.transports.shm import SharedPool
from kvferry.p2p.transports.transport import Pieces, Region, TransferOp, TransferStatus, Transport, TransportSetup

ROOT = Path(__file__).parent.parent
PIECE_BYTES = (16 << 10, 64 << 10, 256 << 10, 2 << 20)
MERGED_BYTES = 8 << 20
RAW_BYTES = (*PIECE_BYTES, MERGED_BYTES, 32 << 20)
SHM_GOAL = 0.8
SHM_TO_NIXL_GOAL = 3.0
NIXL_GOAL = 0.95
Samples = dict[str, dict[int, list[float]]]
KINDS = (
    "gather bound", "shm, gather", "shm, scatter", "shm, both", "shm, busy host", "raw nixl", "nixl", "nixl, merged",
)  # fmt: skip


def some_pieces(num_bytes: int, piece_bytes: int, seed: int, shape: str = "gather") -> Pieces:
    """Half of a pool in pieces of one size, shuffled on both sides; `shape` as above."""
    order = np.random.default_rng(seed)
    count = num_bytes // piece_bytes
    region, length = np.zeros(count, dtype=np.int64), np.full(count, piece_bytes, dtype=np.int64)
    from_, to = (
        order.permutation((1 + (shape != half)) * count)[:count] * piece_bytes for half in ("scatter", "gather")
    )
    return Pieces(region, from_, region, to, length)


@contextmanager
def spinning() -> Iterator[None]:
    """A thread that wants the GIL all the time."""
    end = threading.Event()

    def spin() -> None:
        while not end.is_set():
            pass

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


class End:
    """One process: its KV memory, and both transports over it."""

    def __init__(self, name: str, num_bytes: int) -> None:
        self.pool = SharedPool(name)
        self.memory = self.pool.zeros(2 * num_bytes)
        region = Region(self.memory.data_ptr(), 2 * num_bytes)
        self.transports: dict[str, Transport] = {}
        for each in ("shm", "nixl"):
            self.transports |= create_transports(each, [region], TransportSetup(name, pool=self.pool), {})

    def blobs(self) -> dict[str, str]:
        """For the other process."""
        return {name: transport.local_blob().hex() for name, transport in self.transports.items()}

    def close(self) -> None:
        """Give all back."""
        for transport in self.transports.values():
            transport.close()
        self.pool.close()


def own(num_bytes: int) -> None:
    """The other process: memory full of noise, until stdin ends."""
    end = End("owner", num_bytes)
    end.memory.view(torch.int64).copy_(torch.arange(num_bytes // 4) * 0x9E3779B97F4A7C1)
    print("blobs", json.dumps(end.blobs()), int(end.memory.data_ptr()), flush=True)
    sys.stdin.read()
    end.close()


class Subject:
    """The measuring process."""

    def __init__(self, num_bytes: int) -> None:
        command = [sys.executable, __file__, "--own", str(num_bytes)]
        self.owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.num_bytes = num_bytes
        self.end = End("bench", num_bytes)
        self.out = torch.ones(num_bytes, dtype=torch.int8)
        assert self.owner.stdout is not None
        words = [""]
        while words[0] != "blobs":  # NIXL logs on stdout
            line = self.owner.stdout.readline()
            assert line, "the owner has died"
            words = line.split(" ", 1)
        text, _, address = words[1].rpartition(" ")
        self.blobs = {name: bytes.fromhex(blob) for name, blob in json.loads(text).items()}
        self.remote_address = int(address)
        self.peers = {name: each.connect(self.blobs[name]) for name, each in self.end.transports.items()}
        self.expected = torch.arange(num_bytes // 4) * 0x9E3779B97F4A7C1

    def ours(self, name: str, pieces: Pieces) -> None:
        """One transfer through our transport."""
        transport = self.end.transports[name]
        ticket = transport.submit(self.peers[name], TransferOp.READ, pieces)
        while not (ended := transport.poll()):
            time.sleep(0.0002)
        assert (ended[0].ticket, ended[0].status) == (ticket, TransferStatus.OK), ended

    def gather(self, pieces: Pieces) -> None:
        """The bound."""
        pages = self.end.memory.view(torch.int64).view(2 * len(pieces.length), -1)
        out = self.out.view(torch.int64).view(len(pieces.length), -1)
        torch.index_select(pages, 0, torch.from_numpy(pieces.source_offset // pieces.length[0]), out=out)

    def raw(self) -> tuple[Any, Callable[[Pieces], None]]:
        """A default agent, made for this round only (its thread spins), and what it does."""
        import msgspec
        from nixl._api import nixl_agent, nixl_agent_config

        agent = nixl_agent(f"raw-{time.monotonic_ns()}", nixl_agent_config(backends=["UCX"]))
        local = self.end.memory.data_ptr()
        agent.register_memory([(local, 2 * self.num_bytes, 0, "")], "DRAM")
        peer = agent.add_remote_agent(msgspec.msgpack.decode(self.blobs["nixl"])["metadata"])

        def read(pieces: Pieces) -> None:
            zeros = np.zeros_like(pieces.length)
            rows = [
                np.stack([base + offset, pieces.length, zeros], axis=1).astype(np.uint64)
                for base, offset in ((local, pieces.destination_offset), (self.remote_address, pieces.source_offset))
            ]
            descriptors = [agent.get_xfer_descs(each, "DRAM") for each in rows]
            handle = agent.initialize_xfer("READ", *descriptors, peer)
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            assert state == "DONE", state
            agent.release_xfer_handle(handle)

        read(some_pieces(self.num_bytes, self.num_bytes, 0))  # connects
        return agent, read

    def check(self, pieces: Pieces, what: str) -> None:
        """What was read is what the owner has."""
        words = int(pieces.length[0]) // 8
        got = self.end.memory.view(torch.int64).view(-1, words)[pieces.destination_offset // pieces.length[0]]
        want = self.expected.view(-1, words)[pieces.source_offset // pieces.length[0]]
        assert torch.equal(got, want), f"{what}: bytes differ"
        self.end.memory.fill_(0)

    def round(self, seed: int, samples: Samples) -> None:
        """One sample of everything."""
        agent, raw = self.raw()
        for piece_bytes in RAW_BYTES:
            self._sample(samples, "raw nixl", piece_bytes, raw, some_pieces(self.num_bytes, piece_bytes, seed))
        agent.agent = None
        merged = some_pieces(self.num_bytes, MERGED_BYTES, seed)
        self._sample(samples, "nixl, merged", MERGED_BYTES, self.nixl, merged)
        for size in PIECE_BYTES:
            gathered, scattered, both = (
                some_pieces(self.num_bytes, size, seed, shape) for shape in ("gather", "scatter", "both")
            )
            self._time(samples["gather bound"][size], lambda p=gathered: self.gather(p))
            for name, pieces in (("shm, gather", gathered), ("shm, scatter", scattered), ("shm, both", both)):
                self._sample(samples, name, size, self.shm, pieces)
            with spinning():
                self._time(samples["shm, busy host"][size], lambda p=gathered: self.shm(p))
            self.check(gathered, "shm, busy host")
            self._sample(samples, "nixl", size, self.nixl, gathered)

    def shm(self, pieces: Pieces) -> None:
        """Ours."""
        self.ours("shm", pieces)

    def nixl(self, pieces: Pieces) -> None:
        """Ours."""
        self.ours("nixl", pieces)

    def _sample(self, samples: Samples, name: str, size: int, move: Callable[[Pieces], None], pieces: Pieces) -> None:
        self._time(samples[name][size], lambda: move(pieces))
        self.check(pieces, name)

    def _time(self, samples: list[float], action: Callable[[], None]) -> None:
        started = time.perf_counter()
        action()
        samples.append(self.num_bytes / (time.perf_counter() - started) / 1e9)

    def close(self) -> None:
        """End both processes' part."""
        self.end.close()
        self.owner.communicate()


def measure(num_bytes: int, rounds: int) -> dict[str, Any]:
    """Samples of all rounds; the first round warms up and is not counted."""
    torch.set_num_threads(1)
    subject = Subject(num_bytes)
    sizes = {"raw nixl": RAW_BYTES, "nixl, merged": (MERGED_BYTES,)}
    samples: Samples = {name: {size: [] for size in sizes.get(name, PIECE_BYTES)} for name in KINDS}
    try:
        for seed in range(rounds + 1):
            subject.round(seed, samples)
    finally:
        subject.close()
    return {name: {str(size): values[1:] for size, values in by_size.items()} for name, by_size in samples.items()}


def summary(samples: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Medians, all ratios of interest, and the goals; ratios are medians of ratios per round."""

    def ratio(name: str, size: int, bound: str, bound_size: int) -> float:
        pairs = zip(samples[name][str(size)], samples[bound][str(bound_size)], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    medians = {name: {size: statistics.median(values) for size, values in by.items()} for name, by in samples.items()}
    best = int(max(medians["raw nixl"], key=lambda size: medians["raw nixl"][size]))
    shm = [name for name in samples if name.startswith("shm")]
    to_bound = {name: {str(size): ratio(name, size, "gather bound", size) for size in PIECE_BYTES} for name in shm}
    first = PIECE_BYTES[0]
    goals = {
        **{f"shm, gather / gather bound, {_name(int(size))}": (value, SHM_GOAL)
           for size, value in to_bound["shm, gather"].items()},
        f"shm, gather / raw nixl, {_name(first)}": (ratio("shm, gather", first, "raw nixl", first), SHM_TO_NIXL_GOAL),
        "nixl, merged / raw nixl, its best piece size": (
            ratio("nixl, merged", MERGED_BYTES, "raw nixl", best), NIXL_GOAL
        ),
    }  # fmt: skip
    return {
        "median_gb_per_s": medians,
        "raw_nixl_best_piece_bytes": best,
        "to_gather_bound": to_bound,
        "nixl_to_raw_same_pieces": {str(size): ratio("nixl", size, "raw nixl", size) for size in PIECE_BYTES},
        "goals": {name: {"value": value, "goal": goal, "met": value >= goal} for name, (value, goal) in goals.items()},
    }


def _name(size: int) -> str:
    return f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"


def _transports(native_python: Path, num_bytes: int, rounds: int) -> None:
    import plots

    machine = record.machine()
    command = [native_python, __file__, "--measure", "--bytes", str(num_bytes), "--rounds", str(rounds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result = json.loads(done.stdout.splitlines()[-1])
    samples = result["samples"]
    said = summary(samples)
    for name, by_size in said["median_gb_per_s"].items():
        print(f"{name:15}", "  ".join(f"{int(size) >> 10:5} KiB {rate:6.2f}" for size, rate in by_size.items()), "GB/s")
    for name in ("to_gather_bound", "nixl_to_raw_same_pieces"):
        print(f"{name}: {said[name]}")
    for name, goal in said["goals"].items():
        print(f"{name}: {goal['value']} (goal {goal['goal']}) {'met' if goal['met'] else 'MISSED'}")
    machine["load_average_at_end"] = list(os.getloadavg())
    machine["versions"] |= result["versions"]
    content = {"machine": machine, "bytes_per_sample": num_bytes, **said, "samples_gb_per_s": samples}
    plots.save(record.write("p2p_transports", content))


def main() -> None:
    """Measure, print, write bench/results/p2p_transports.{json,png}."""
    parser = record.parser(__doc__)
    parser.add_argument("part", nargs="?", choices=["transports"], default="transports")
    parser.add_argument("--native-python", type=Path, default=ROOT / ".venv-native" / "bin" / "python")
    parser.add_argument("--bytes", type=int, default=256 << 20)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--own", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = record.parse(parser, bytes=64 << 20, rounds=1)
    if options.own:
        own(options.own)
    elif options.measure:
        from importlib.metadata import version

        samples = measure(options.bytes, options.rounds)
        print(json.dumps({"samples": samples, "versions": {"nixl": version("nixl"), "torch (nixl)": version("torch")}}))
    else:
        if not options.native_python.exists():
            print(f"{options.native_python} is missing: make venv-native, or --native-python", file=sys.stderr)
            sys.exit(2)
        _transports(options.native_python, options.bytes, options.rounds)


if __name__ == "__main__":
    main()

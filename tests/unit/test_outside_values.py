"""Whatever a file, or a server, holds where kvferry reads: nothing but kvferry's own errors comes of it.

Beside the messages and blobs of peers, whose tests stand in `tests/unit/p2p` (test_fuzz, test_shm).
"""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from safetensors.torch import save

from kvferry.errors import HostError, TierCorrupt, TierError, TransferError
from kvferry.examples.example import _digest, _read
from kvferry.examples.hidden_states import load_hidden_states
from kvferry.lmcache.wire import ServerConnection
from kvferry.offloading.tiers.disk_format import HEADER_BYTES, ChunkFormat
from kvferry.types import Namespace, StoreKey

SEED = 20261128
DEEP = b"[" * 100_000


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one thing wrong, or several."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 9))):
        at = rng.randrange(len(made) + 1)
        match rng.randrange(5):
            case 0:
                del made[at:]
            case 1:
                made[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                made[at:at] = rng.randbytes(rng.randrange(9))
            case 3:
                del made[at : at + rng.randrange(9)]
            case 4:
                made[at : at + 8] = rng.choice((b"\0" * 8, b"\xff" * 8, (2**63).to_bytes(8, "little")))
    return bytes(made)


def safetensors(header: bytes) -> bytes:
    """A file of that header and 64 bytes of tensors."""
    return len(header).to_bytes(8, "little") + header + bytes(64)


def strange_headers() -> Iterator[bytes]:
    yield from (b"", b"[]", b"null", b"1", b'"x"', b"{}", b"\xff\xfe", DEEP, b'{"a":' * 50_000, b"{" + b" " * 200)
    for about in (1, [], None, {"digest": 1}, {"digest": None}, {"digest": "x"}, {"hidden_state_layers": 5}):
        yield json.dumps({"__metadata__": about}).encode()
    for dtype in ("F32", "BF16", "F8_E8M0", "F4", "C64", "U64", "NONE", 7):
        for shape in ([2, 2], [], [2**62, 4], [-1], [0], "x"):
            for offsets in ([0, 16], [0, 2**63], [16, 0], [], None):
                tensor = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
                yield json.dumps({"kv": tensor, "digest": tensor, "token_ids": tensor}).encode()


# -- ExampleConnector's files ------------------------------------------------------------------------------------------

PAGE = torch.arange(12, dtype=torch.float32).reshape(3, 4)


def example_files() -> Iterator[bytes]:
    rng = random.Random(SEED)
    proof = _digest("label", PAGE)
    good = save({"kv": PAGE, "digest": proof})
    yield from (spoilt(good, rng) for _ in range(300))
    for page in (PAGE.double(), PAGE.reshape(12), PAGE[:0], PAGE + 1):
        yield save({"kv": page, "digest": proof})
    for dtype in (torch.float32, torch.int32, torch.uint8, torch.bool, torch.bfloat16, torch.complex64):
        yield save({"kv": PAGE, "digest": (proof + 1).to(dtype)})
    for strange in (proof[:3], proof.reshape(4, 4), torch.zeros(0), torch.zeros(())):
        yield save({"kv": PAGE, "digest": strange})
    yield from (save({"kv": PAGE}), save({"digest": proof}), save({}))
    yield from map(safetensors, strange_headers())


def test_a_block_is_read_as_it_was_written_or_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "block"
    path.write_bytes(save({"kv": PAGE, "digest": _digest("label", PAGE)}))
    assert torch.equal(_read(path, "label", PAGE), PAGE)
    num_refused = 0
    for data in example_files():
        path.write_bytes(data)
        try:
            assert torch.equal(_read(path, "label", PAGE), PAGE)
        except TierCorrupt:
            num_refused += 1
    assert num_refused > 300


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
@pytest.mark.timeout(20)
def test_a_block_that_is_no_file_is_not_waited_for(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "block")
    with pytest.raises((OSError, TierCorrupt)):
        _read(tmp_path / "block", "label", PAGE)


def test_no_more_is_read_of_a_block_than_it_may_have(tmp_path: Path) -> None:
    with (tmp_path / "block").open("wb") as file:
        file.truncate(1 << 40)  # more than any machine's memory, and no disk space
    with pytest.raises(TierCorrupt):
        _read(tmp_path / "block", "label", PAGE)


# -- files of hidden states --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
def test_a_file_of_hidden_states_is_read_or_corrupt(tmp_path: Path, verify: bool) -> None:
    rng, path = random.Random(SEED), tmp_path / "states"
    good = save({"hidden_states": PAGE, "token_ids": torch.tensor([4, 5])}, {"hidden_state_layers": "[1]"})
    path.write_bytes(good)
    assert load_hidden_states(path, token_ids=[4, 5], layers=[1], verify=verify).keys() == {
        "hidden_states",
        "token_ids",
    }
    no_ids = save({"hidden_states": PAGE})
    files = [no_ids, *(spoilt(good, rng) for _ in range(300)), *map(safetensors, strange_headers())]
    for data in files:
        path.write_bytes(data)
        with suppress(TierError):
            load_hidden_states(path, token_ids=[4, 5], layers=[1], verify=verify)


# -- chunk files -------------------------------------------------------------------------------------------------------


def test_a_chunk_header_is_whole_or_a_tier_error() -> None:
    rng, key = random.Random(SEED), StoreKey(b"k" * 32)
    form = ChunkFormat(Namespace("00", {"a": 1}))
    good = form.header(key, 100, b"d" * 16)
    assert form.check(good, key, 100) == b"d" * 16
    for _ in range(500):
        body = spoilt(good[:-4], rng)[: HEADER_BYTES - 4].ljust(HEADER_BYTES - 4, b"\0")
        data = body + struct.pack("<I", zlib.crc32(body))  # whoever writes to the folder can do that
        with suppress(TierError):
            assert form.check(data, key, 100) is not None


# -- LMCache's server --------------------------------------------------------------------------------------------------


class RawServer:
    """Answers each request with the next of `replies`, as frames after the request's number and operation."""

    def __init__(self, replies: list[Any]) -> None:
        self._replies = iter(replies)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self.url = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def _main(self) -> None:
        while not self._is_over.is_set():
            if self._socket.poll(10):
                sender, number, operation, *_ = self._socket.recv_multipart()
                self._socket.send_multipart([sender, *next(self._replies)(number, operation)])

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._socket.close()
        self._context.term()


def raw_replies() -> list[Any]:
    rng = random.Random(SEED)
    values: list[Any] = [None, 1, -1, 2**64 - 1, "x", b"\xff", [], {}, True, 0.5, [b"", True], [b"", 3], "\ud800"[:0]]
    frames = [msgspec.msgpack.encode(value) for value in values]
    frames += [
        b"",
        b"\xc1",
        b"\x91" * 50_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xc7\xff\x01" + b"x" * 255,
        b"\xd6\xff\0\0\0\0",
    ]
    frames += [rng.randbytes(rng.randrange(1, 40)) for _ in range(60)]
    replies: list[Any] = [lambda number, operation, frame=frame: [number, operation, frame] for frame in frames]
    replies += [
        lambda number, operation: [number],
        lambda number, operation: [number, operation],
        lambda number, operation: [number, operation, number, number],
        lambda number, operation: [b"\x91" * 5000, operation, number],
        lambda number, operation: [msgspec.msgpack.encode("1"), operation],
        lambda number, operation: [b"", b"", b""],
    ]
    return replies


@pytest.mark.parametrize("returns", [int, bool, None, int | None, tuple[bytes, bool]])
def test_whatever_a_server_answers_is_the_type_or_a_transfer_error(returns: Any) -> None:
    replies = raw_replies()
    server = RawServer(replies)
    connection = ServerConnection(server.url)
    for _ in replies:
        with suppress(TransferError):
            found = connection.call("operation", returns=returns, timeout_s=30)
            assert msgspec.convert(found, returns) == found
    connection.close()
    server.close()


@pytest.mark.parametrize(
    "reply",
    [b"", b"\0" * 50, b"HTTP/1.1 abc\r\n\r\n", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n",
     b"HTTP/1.1 200 OK\r\n" + b"x" * 70_000, b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\nxx",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 200 OK\r\n\r\n" + DEEP[:999],
     b"HTTP/1.1 200 OK\r\n\r\n" + b"9" * 900, b"HTTP/1.1 200 OK\r\n\r\n\xff\xfe",
     b"HTTP/1.1 302 F\r\nLocation: ftp:\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_version_is_a_host_error(reply: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with listener.accept()[0] as client, suppress(OSError):
                client.recv(4096)
                client.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        connection = ServerConnection("tcp://127.0.0.1:1")
        with pytest.raises(HostError, match=r"http_port|no LMCache server answers|needs 0\.5\.6"):
            connection.probe(http_port=listener.getsockname()[1], timeout_s=2)
        thread.join()
        connection.close()

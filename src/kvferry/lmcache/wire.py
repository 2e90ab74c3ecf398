"""The wire of LMCache's multi-process server, as release 0.5.6 speaks it: ZMQ, msgpack, one request at a time.

    request   DEALER -> ROUTER   frames: number, operation, then one for each argument (each msgpack)
    reply                        number, operation, then the result (no third frame when there is none)

Operations are named by text. Numbers, which the server takes as well, have moved between releases, so an older server
would do something else; a name it does not know it does not answer. That is the protocol's only way to say no: every
call here has a deadline.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
import urllib.request
from http.client import HTTPException
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from kvferry.errors import HostError, TransferError

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 5.0
OLDEST_SERVER = (0, 5, 6)
_MAX_REPLY_BYTES = 1 << 20
_TENSOR_EXTENSION = 1


class ServerKey(msgspec.Struct, frozen=True):
    """Tokens [start, end) of a request, as the server names them; it hashes `token_ids` itself, chunk by chunk.

    `worker_id` None means the shards of all workers. `request_id` names the server's session, which remembers the
    request's tokens: it must never be used for others. `num_kv_readers` is the number of workers that read one shard.
    """

    model_name: str
    world_size: int
    worker_id: int | None
    token_ids: tuple[int, ...]
    start: int
    end: int
    request_id: str
    cache_salt: str = ""
    request_configs: dict[str, Any] | None = None
    num_kv_readers: int = 1

    def part(self, start: int, end: int, worker_id: int | None) -> ServerKey:
        """The same for other bounds and another worker."""
        return msgspec.structs.replace(self, start=start, end=end, worker_id=worker_id)

    def grown(self, token_ids: tuple[int, ...]) -> ServerKey:
        """The same request with more tokens."""
        return msgspec.structs.replace(self, token_ids=token_ids, end=len(token_ids))


def shared_tensor(path: str, total_bytes: int, offset_bytes: int, shape: tuple[int, int, int]) -> msgspec.msgpack.Ext:
    """The descriptor of a uint8 tensor without gaps in a mapping under /dev/shm, for `register_kv_cache`."""
    _, rows, columns = shape
    described = {
        "type": "cpu_shm",
        "version": 1,
        "metadata": {
            "dtype": "uint8",
            "shape": shape,
            "stride": (rows * columns, columns, 1),
            "storage_offset": offset_bytes,
            "device_uuid": "cpu",
        },
        "shm_name": f"/{path.rpartition('/')[2]}",
        "nbytes": total_bytes,
    }
    return msgspec.msgpack.Ext(_TENSOR_EXTENSION, msgspec.msgpack.encode(described))


class ServerConnection:
    """Calls the server at `url` ("tcp://host:port"); for one thread at a time.

    After a failure the socket is closed and the next call opens another, so that no late answer is taken for a later
    one's. A server that went away while nobody called fails the next call: it may have forgotten all registrations.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._number = 0

    def call(self, operation: str, *arguments: Any, returns: Any, timeout_s: float) -> Any:
        """Run one operation, whose result must be of type `returns`. Blocks for at most `timeout_s`; TransferError when
        there is no answer or one of another type."""
        self._number += 1
        frames = [msgspec.msgpack.encode(part) for part in (self._number, operation, *arguments)]
        deadline_s = time.monotonic() + timeout_s
        try:
            socket = self._socket or self._open()
            self._wait(socket, zmq.POLLOUT, deadline_s)
            socket.send_multipart(frames, zmq.NOBLOCK)
            while True:
                self._wait(socket, zmq.POLLIN, deadline_s)
                number, _, *result = socket.recv_multipart(zmq.NOBLOCK)
                if msgspec.msgpack.decode(number, type=int) == self._number:
                    return msgspec.msgpack.decode(result[0] if result else b"\xc0", type=returns)
        except TimeoutError:
            self._close_socket()
            raise TransferError(f"{self.url} has not answered {operation!r} within {timeout_s:g} s") from None
        except (zmq.ZMQError, ConnectionError, msgspec.MsgspecError, ValueError) as err:
            self._close_socket()
            raise TransferError(f"{operation!r} at {self.url} failed: {err}") from err

    def _open(self) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket = socket
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a server that is not there
        socket.setsockopt(zmq.MAXMSGSIZE, _MAX_REPLY_BYTES)
        self._monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.connect(self.url)
        return socket

    def _wait(self, socket: zmq.Socket[bytes], event: int, deadline_s: float) -> None:
        assert self._monitor is not None
        poller = zmq.Poller()
        poller.register(socket, event)
        poller.register(self._monitor, zmq.POLLIN)
        ready = dict(poller.poll(math.ceil(max(0.0, deadline_s - time.monotonic()) * 1000)))
        if self._monitor in ready:
            recv_monitor_message(self._monitor)
            raise ConnectionError("the server has closed the connection")
        if not ready:
            raise TimeoutError

    def probe(self, *, http_port: int | None = None, timeout_s: float = PROBE_TIMEOUT_S) -> int:
        """Tokens of one of the server's chunks. HostError, which says what to do, when no fitting server answers."""
        if http_port is not None:
            self._check_version(http_port, timeout_s)
        try:
            chunk_tokens: int = self.call("get_chunk_size", returns=int, timeout_s=timeout_s)
            self.call("ping", None, returns=bool, timeout_s=timeout_s)
        except TransferError as err:
            raise HostError(
                f"no LMCache server answers: {err}; start `lmcache server` {_dotted(OLDEST_SERVER)} or later (earlier "
                "ones do not know operations by name), or correct lmcache.mp.host and lmcache.mp.port"
            ) from err
        if chunk_tokens < 1:
            raise HostError(f"the LMCache server at {self.url} says that its chunks have {chunk_tokens} tokens")
        return chunk_tokens

    def _check_version(self, http_port: int, timeout_s: float) -> None:
        host = self.url.removeprefix("tcp://").rpartition(":")[0]
        address = f"http://{host}:{http_port}/lmc_version"
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(address, timeout=timeout_s) as reply:
                version = str(json.loads(reply.read(1000)))
        except (OSError, ValueError, HTTPException, RecursionError) as err:
            raise HostError(f"http_port: the LMCache server's {address} does not report its version: {err}") from err
        numbers = version_numbers(version)
        if numbers < OLDEST_SERVER:
            raise HostError(
                f"the LMCache server at {self.url} is {version}; kvferry's client needs {_dotted(OLDEST_SERVER)} "
                "or later"
            )

    def _close_socket(self) -> None:
        if self._socket is not None:
            self._socket.disable_monitor()
            if self._monitor is not None:
                self._monitor.close(linger=0)
            self._socket.close(linger=0)
        self._socket = self._monitor = None

    def close(self) -> None:
        """Give the connection up. Idempotent; what is not sent yet is lost."""
        self._close_socket()
        self._context.term()


def version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version text: (0, 5, 6) of "0.5.6.post1"; () where it has none."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))

"""What listening sockets share."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

import pytest

from kvferry import connections
from kvferry.connections import Acceptor


class Exhausted(socket.socket):
    """Has no descriptors for the first two that come."""

    num_failures = 2

    def accept(self) -> Any:
        if self.num_failures:
            self.num_failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_who_comes_while_no_descriptors_are_left_is_accepted_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "_BUSY_S", 0.01)

    async def accept_one() -> None:
        with Exhausted() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            come: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
            acceptor = Acceptor(listener, "test", come.set_result)
            with socket.create_connection(listener.getsockname()), await asyncio.wait_for(come, 30) as accepted:
                assert accepted.gettimeout() == 0
            acceptor.close()
            acceptor.close()

    asyncio.run(accept_one())
    assert [record.getMessage() for record in caplog.records] == [
        "test: a connection cannot be accepted: [Errno 24] Too many open files"
    ]

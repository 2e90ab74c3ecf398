"""Strangers in numbers: what they may hold of a control channel, and that engines get through beside them."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from test_control import (
    Note,
    admitted,
    channel,
    connected,
    frame,
    greeting,
    is_alive,
    is_answered,
    raw,
    rss_bytes,
    until,
    wait_for,
)  # fmt: skip

from kvferry.connections import descriptor_share
from kvferry.p2p import control
from kvferry.p2p.control import Connected, ControlChannel
from kvferry.p2p.link import Lost
from kvferry.p2p.wire import Address, Codec

__all__ = ["channel"]  # a fixture


def introduced(server: ControlChannel[Note], make: Callable[..., ControlChannel[Note]]) -> tuple[Any, str, str]:
    """A client that the server's owner keeps, its name for the server, and the server's name for it."""
    client = make()
    peer = connected(client, server)
    client.send(peer, Note("hello"))
    ((sender, _),) = wait_for(server, bool)
    server.keep(sender)
    return client, peer, sender


def test_idle_strangers_neither_keep_engines_out_nor_push_them_out(channel, caplog) -> None:
    server = channel(max_connections=16)
    client, peer, sender = introduced(server, channel)
    with ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(raw(server, greeting()))
            assert sum(not link.lost.done() for link in list(server._accepted)) <= 16
        until(lambda: server.num_cut >= 60 - 8)
        is_alive(server, channel)
        client.send(peer, Note("still here"))
        assert (sender, Note("still here")) in wait_for(server, bool)
        server.send(sender, Note("so am I"))
        assert wait_for(client, bool) == [(peer, Note("so am I"))], "the connection never broke"
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "more than 16" in told
    assert "ulimit -n" in told


def test_who_claims_to_be_an_engine_in_numbers_leaves_slots_for_others(channel) -> None:
    """Where there is no key, anybody can introduce itself."""
    server = channel(max_connections=16)
    with ExitStack() as stack:
        for _ in range(40):
            connection, sender = admitted(server)
            stack.enter_context(connection)
            server.keep(sender)
            assert sum(not link.lost.done() for link in list(server._accepted)) <= 16
        is_alive(server, channel)


def test_limits_go_by_the_descriptors_that_the_process_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, share in ((1024, 128), (65536, 1024), (20, 4), (resource.RLIM_INFINITY, 1024)):
        monkeypatch.setattr(resource, "getrlimit", lambda which, limit=limit: (limit, limit))
        assert descriptor_share(1024, 8) == share


def test_a_crowd_does_not_take_the_descriptors_of_a_process(channel) -> None:
    limit = 256
    with ExitStack() as stack:
        child = stack.enter_context(
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("flooded_child.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
            )
        )  # fmt: skip
        stack.callback(child.kill)
        assert child.stdout is not None
        port = int(child.stdout.readline())
        for _ in range(limit + 50):
            idle = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            idle.sendall(greeting())
        is_answered(Address("127.0.0.1", port), channel)
        until(lambda: len(list(Path(f"/proc/{child.pid}/fd").iterdir())) < limit // 2)


def test_strangers_that_ask_and_never_read_hold_little(channel) -> None:
    """The answer is as large as an engine's Hello may be; 40 strangers ask for 4,000 of them."""
    server = channel(handshake_s=30.0)
    question = frame(Codec(Note).encode(Note("hello?")))
    before = rss_bytes()
    with ExitStack() as stack:
        strangers = [admitted(server) for _ in range(40)]
        for connection, _ in strangers:
            stack.enter_context(connection)
        for _ in range(100):
            for connection, sender in strangers:
                connection.sendall(question)
                server.send(sender, Note("h" * 200_000))
            until(lambda: not server._outbox)
        held = [each.unsent_bytes for each in list(server._accepted)]
        assert len(held) == 40, "all are still there"
        assert max(held) < 600_000
        assert rss_bytes() - before < 120 << 20, "16 answers of each would be 128 MB"
        server.poll()
        is_alive(server, channel)


def test_strangers_fill_half_of_the_inbox(channel) -> None:
    server = channel(max_peer_inbox_bytes=4000, max_inbox_bytes=16_000)
    client, peer, sender = introduced(server, channel)
    with ExitStack() as stack:
        strangers = [admitted(server)[0] for _ in range(8)]
        for connection in strangers:
            stack.enter_context(connection)
            connection.sendall(frame(Codec(Note).encode(Note("n" * 500))) * 20)
        until(lambda: server._inbox_bytes.total() > 7000)
        client.send(peer, Note("me too"))
        until(lambda: sender in server._inbox_bytes)
        assert server._inbox_bytes.total() < 9000
        assert (sender, Note("me too")) in server.poll()


def test_an_engine_is_heard_before_what_strangers_have_sent_already(channel) -> None:
    server = channel()
    client, peer, sender = introduced(server, channel)
    with ExitStack() as stack:
        for connection in [stack.enter_context(admitted(server)[0]) for _ in range(3)]:
            connection.sendall(frame(Codec(Note).encode(Note("n"))) * 3000)
        until(lambda: server._inbox_bytes.total() > 9000 * 256)
        client.send(peer, Note("first"))
        until(lambda: sender in server._inbox_bytes)
        heard = server.poll()
        assert heard[0] == (sender, Note("first"))
        assert len(heard) < 70, "what the owner does with one poll is bounded"
        assert len({who for who, _ in heard}) == 4, "strangers take turns"
        wait_for(server, lambda more: len(heard) + len(more) == 9001)


def test_strangers_who_send_nonsense_are_one_line_in_the_log(channel, caplog) -> None:
    server = channel()
    for _ in range(5):
        with raw(server, greeting() + frame(b"nonsense")):
            until(lambda: server.poll() or server.num_dropped)
        server.num_dropped = 0
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


def test_what_waits_for_the_thread_is_bounded_in_bytes(channel) -> None:
    client = channel(max_outbox_bytes=100_000)
    go_on = threading.Event()
    client._call(lambda: go_on.wait(30))  # the thread stands still
    for _ in range(50):
        client.send("127.0.0.1:1", Note("x" * 9000))
    assert client.num_dropped >= 50 - 11
    go_on.set()


def test_a_name_that_is_slow_to_look_up_delays_nobody_else(channel, monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = channel(), channel()
    go_on = threading.Event()

    def getaddrinfo(host: str, *args: Any, **options: Any) -> Any:
        assert go_on.wait(30)
        if host == "nobody.example":
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::ffff:127.0.0.1", server.address.port, 0, 0))]

    monkeypatch.setattr(control.socket, "getaddrinfo", getaddrinfo)
    slow, nobody = (f"{name}.example:{server.address.port}" for name in ("slow", "nobody"))
    client.connect(slow)
    client.connect(nobody)
    peer = connected(client, server)
    client.send(peer, Note("meanwhile"))
    assert [what for _, what in wait_for(server, bool)] == [Note("meanwhile")]
    go_on.set()
    news = dict(wait_for(client, lambda items: len(items) == 2))
    assert news[slow] == Connected()
    assert isinstance(news[nobody], Lost)
    assert "the name 'nobody.example' cannot be resolved" in str(news[nobody])
    assert "advertised_host" in str(news[nobody])
    client.send(slow, Note("by name"))
    assert [what for _, what in wait_for(server, bool)] == [Note("by name")]


def test_all_addresses_of_a_name_are_tried(channel, monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = channel(), channel()
    port = server.address.port
    addresses = [(9999, ("a family that this machine lacks", port)), (socket.AF_INET, ("127.0.0.2", port)),
                 (socket.AF_INET, ("127.0.0.1", port))]  # fmt: skip
    found = [(family, socket.SOCK_STREAM, 6, "", address) for family, address in addresses]
    monkeypatch.setattr(control.socket, "getaddrinfo", lambda *_, **__: found)
    client.connect(f"three.example:{port}")
    assert wait_for(client, bool) == [(f"three.example:{port}", Connected())]


def test_names_that_are_never_found_are_bounded(channel, monkeypatch: pytest.MonkeyPatch) -> None:
    client, go_on = channel(), threading.Event()

    def getaddrinfo(*args: Any, **options: Any) -> Any:
        go_on.wait(30)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(control.socket, "getaddrinfo", getaddrinfo)
    for number in range(40):
        client.connect(f"n{number}.example:1")
    news = wait_for(client, lambda items: len(items) == 8)
    assert {str(lost).split(": ")[1].split(";")[0] for _, lost in news} == {"32 other names are being looked up"}
    assert sum(thread.name == "kvferry-p2p-name" for thread in threading.enumerate()) == 32
    go_on.set()
    wait_for(client, lambda items: len(items) == 32)

"""The control channel over real sockets: messages, keys, and everything strangers may try."""

from __future__ import annotations

import random
import re
import secrets
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from tests.patience import PATIENCE_S

from kvferry.errors import ConfigError, TransferError
from kvferry.p2p import control
from kvferry.p2p.config import P2PConfig
from kvferry.p2p.control import Connected, ControlChannel, ControlSettings
from kvferry.p2p.link import GREETING, NAME_BYTES, Lost, tls_contexts
from kvferry.p2p.wire import Address, Codec

KEY = "correct horse battery staple"


class Note(msgspec.Struct, tag="note", frozen=True):
    text: str = ""
    number: int = 0


@pytest.fixture
def channel() -> Iterator[Callable[..., ControlChannel[Note]]]:
    made: list[ControlChannel[Note]] = []

    def make(
        max_bytes: int = 1 << 20, on_news: Callable[[], None] | None = None, **settings: Any
    ) -> ControlChannel[Note]:
        made.append(ControlChannel(ControlSettings(**settings), Codec(Note, max_bytes), on_news))
        return made[-1]

    yield make
    for each in made:
        each.close()


def wait_for(channel: ControlChannel[Note], found: Callable[[list[Any]], Any], timeout_s: float = 30) -> list[Any]:
    """Poll until `found(all items so far)`."""
    items: list[Any] = []
    deadline_s = time.monotonic() + timeout_s
    while not found(items):
        assert time.monotonic() < deadline_s, items[-20:]
        items += channel.poll()
        time.sleep(0.002)
    return items


def connected(client: ControlChannel[Note], server: ControlChannel[Note]) -> str:
    peer = str(server.address)
    client.connect(peer)
    assert wait_for(client, bool) == [(peer, Connected())]
    return peer


def is_alive(server: ControlChannel[Note], channel: Callable[..., ControlChannel[Note]], **settings: Any) -> None:
    """A new client gets through, and gets an answer."""
    client = channel(**settings)
    peer = connected(client, server)
    client.send(peer, Note("alive?"))
    items = wait_for(server, lambda items: [what for _, what in items if what == Note("alive?")])
    server.send(next(sender for sender, what in items if what == Note("alive?")), Note("yes"))
    assert wait_for(client, bool) == [(peer, Note("yes"))]


@pytest.mark.parametrize("settings", [{}, {"key": KEY}, {"host": "::1"}, {"host": "localhost"}])
def test_messages_go_both_ways_in_order(channel, settings: dict[str, Any]) -> None:
    wakes: list[int] = []
    server, client = channel(on_news=lambda: wakes.append(1), **settings), channel(**settings)
    peer = connected(client, server)
    for number in range(10):
        client.send(peer, Note("to", number))
    items = wait_for(server, lambda items: len(items) == 10)
    (sender,) = {who for who, _ in items}
    assert [what for _, what in items] == [Note("to", number) for number in range(10)]
    assert wakes
    for number in range(10):
        server.send(sender, Note("fro", number))
    assert wait_for(client, lambda items: len(items) == 10) == [(peer, Note("fro", n)) for n in range(10)]


def test_what_comes_while_the_owner_polls_is_told(channel, monkeypatch: pytest.MonkeyPatch) -> None:
    wakes: list[int] = []
    server, client = channel(on_news=lambda: wakes.append(1)), channel()
    peer = connected(client, server)
    client.send(peer, Note("not polled yet"))
    until(lambda: wakes)
    take, polled = server.take, []

    def poll_before_it_is_taken(*message: Any) -> bool:
        polled.extend(server.poll())
        return take(*message)

    monkeypatch.setattr(server, "take", poll_before_it_is_taken)
    wakes.clear()
    client.send(peer, Note("now"))
    until(lambda: wakes)
    assert [what.text for _, what in polled + server.poll()] == ["not polled yet", "now"]


def until(holds: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


def test_where_messages_do_not_fit_commands_do(channel) -> None:
    server, client = channel(), channel(max_outbox=0)
    peer = connected(client, server)
    client.send(peer, Note("no room"))
    assert client.num_dropped == 1
    client.disconnect(peer)
    until(lambda: not client._dialled)


def test_two_clients_are_told_apart(channel) -> None:
    server, one, two = channel(), channel(), channel()
    for client, text in ((one, "one"), (two, "two")):
        client.send(connected(client, server), Note(text))
    senders = {what.text: who for who, what in wait_for(server, lambda items: len(items) == 2)}
    server.send(senders["two"], Note("for two"))
    assert wait_for(two, bool)[0][1] == Note("for two")
    assert one.poll() == []


def test_a_restarted_listener_is_lost_and_connected_again(channel) -> None:
    server, client = channel(), channel()
    peer = connected(client, server)
    server.close()
    assert isinstance(wait_for(client, bool)[0][1], Lost)
    client.send(peer, Note("into the void"))
    successor = channel(port=server.address.port)
    wait_for(client, lambda items: (peer, Connected()) in items)
    client.send(peer, Note("again"))
    assert wait_for(successor, bool)[0][1] == Note("again"), "nothing old may come late"


def test_who_was_lost_is_dialled_at_once_when_asked(channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The channel itself tries again, but after 100 s at the earliest here."""
    monkeypatch.setattr(control, "_FIRST_RECONNECT_S", 100)
    server, client = channel(), channel()
    peer = connected(client, server)
    server.close()
    assert isinstance(wait_for(client, bool)[0][1], Lost)
    client.connect(peer)
    assert wait_for(client, bool) == [(peer, Lost("the peer cannot be reached"))]
    successor = channel(port=server.address.port)
    client.connect(peer)
    assert wait_for(client, bool) == [(peer, Connected())]
    client.connect(peer)  # changes nothing
    client.send(peer, Note("again"))
    assert wait_for(successor, bool)[0][1] == Note("again")
    assert client.poll() == []


def test_nobody_there_is_told_once(channel) -> None:
    client = channel()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        peer = f"127.0.0.1:{unused.getsockname()[1]}"
        client.connect(peer)
        assert wait_for(client, bool) == [(peer, Lost("the peer cannot be reached"))]
        time.sleep(1)
        assert client.poll() == []
        client.disconnect(peer)


def test_what_to_do_about_a_lost_peer_is_said(channel) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        for peer, remedy in (
            (f"127.0.0.1:{unused.getsockname()[1]}", "host, advertised_host and port"),
            (str(channel(key=KEY).address), "kv_connector_extra_config.key_file"),
        ):
            client = channel(key=KEY + "!")
            client.connect(peer)
            ((_, lost),) = wait_for(client, bool)[:1]
            assert str(lost).startswith(lost.reason)
            assert remedy in str(lost)


def test_a_client_that_has_gone_is_lost_when_written_to(channel) -> None:
    server, client = channel(), channel()
    client.send(connected(client, server), Note("hello"))
    ((sender, _),) = wait_for(server, bool)
    client.close()
    deadline_s = time.monotonic() + 30
    items: list[Any] = []
    while not items:
        assert time.monotonic() < deadline_s
        server.send(sender, Note("still there?"))
        time.sleep(0.05)
        items = server.poll()
    assert items[0][0] == sender
    assert isinstance(items[0][1], Lost)


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "::", "", "192.168.1.1"])
def test_no_open_port_without_a_key(channel, host: str) -> None:
    with pytest.raises(ConfigError, match="key_file"):
        channel(host=host)


def test_a_wildcard_with_a_key_listens_everywhere(channel) -> None:
    server = channel(host="0.0.0.0", key=KEY)
    assert server.address.host == socket.gethostname()
    client = channel(key=KEY)
    client.connect(f"127.0.0.2:{server.address.port}")
    assert wait_for(client, bool)[0][1] == Connected()
    assert channel(host="*", key=KEY, advertised_host="example").address.host == "example"


def test_an_address_in_use_is_a_config_error(channel) -> None:
    with pytest.raises(ConfigError, match="cannot be bound"):
        channel(port=channel().address.port)


@pytest.mark.parametrize("key", [None, KEY + "!"])
def test_without_the_key_nobody_gets_in(channel, key: str | None) -> None:
    server, client = channel(key=KEY), channel(key=key)
    client.connect(str(server.address))
    client.send(str(server.address), Note("let me in"))
    assert isinstance(wait_for(client, bool)[0][1], Lost)
    client.send(str(server.address), Note("let me in"))
    is_alive(server, channel, key=KEY)
    assert server.poll() == []


@pytest.mark.parametrize("certificate", [None, KEY + "!"])
def test_who_does_not_check_the_server_is_not_admitted(channel, certificate: str | None) -> None:
    """The client's key is proved too: whoever has none, or another one, is refused after the server's proof."""
    server = channel(key=KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if certificate is not None:
        context = tls_contexts(certificate)[1]
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with suppress(ssl.SSLError, ConnectionError), context.wrap_socket(raw(server)) as stranger:
        stranger.sendall(greeting() + frame(Codec(Note).encode(Note("let me in"))))
        assert stranger.recv(100) == b""
    is_alive(server, channel, key=KEY)
    assert server.poll() == []
    assert server.num_dropped == 0


def test_engines_before_asyncio_are_refused_with_a_reason(channel) -> None:
    """Their channel stood on ZMQ. Both directions, for either may be upgraded first."""
    server, client = channel(), channel()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as listening, context.socket(zmq.DEALER) as dialling:
        listening.linger = dialling.linger = 0
        client.connect(f"127.0.0.1:{listening.bind_to_random_port('tcp://127.0.0.1')}")
        assert "must run the same version of kvferry" in str(wait_for(client, bool)[0][1])
        events = dialling.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_DISCONNECTED)
        dialling.connect(f"tcp://{server.address}")
        assert events.poll(30_000), "it is hung up on"
        dialling.disable_monitor()
        events.close(0)
    is_alive(server, channel)
    assert server.poll() == []


def test_without_cryptography_a_key_is_refused_before_the_start_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    text = r"cryptography is not installed, which key_file needs: pip install "
    with pytest.raises(ConfigError, match=text):
        ControlChannel(ControlSettings(key=KEY), Codec(Note))
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o600)
    (problem,) = P2PConfig(transport="shm", key_file=str(tmp_path / "key")).problems()
    assert re.match(text, problem)
    assert P2PConfig(transport="shm").problems() == []


def test_limits_of_what_is_sent_and_dialled(channel) -> None:
    client = channel(max_bytes=1000, max_dialled=2)
    with pytest.raises(TransferError, match="above 1000"):
        client.send("127.0.0.1:1", Note("x" * 1000))
    for peer in ("nonsense", "eth0;127.0.0.1:5", "127.0.0.1:0"):
        with pytest.raises(TransferError):
            client.connect(peer)
    for port in (1, 2, 2):
        client.connect(f"127.0.0.1:{port}")
    with pytest.raises(TransferError, match="2 peers"):
        client.connect("127.0.0.1:3")
    client.disconnect("127.0.0.1:1")
    client.connect("127.0.0.1:3")


def raw(server: ControlChannel[Note], *parts: bytes) -> socket.socket:
    made = socket.create_connection(server.address, timeout=10)
    with suppress(ConnectionError):  # cut already
        for part in parts:
            made.sendall(part)
    return made


def admitted(server: ControlChannel[Note]) -> tuple[socket.socket, str]:
    """A stranger that speaks by hand and has got one message through; and its name."""
    connection = raw(server, greeting() + frame(Codec(Note).encode(Note("stranger"))))
    assert read_exactly(connection, len(GREETING)) == GREETING
    ((sender, what),) = wait_for(server, bool)
    assert what == Note("stranger")
    return connection, sender


def greeting() -> bytes:
    return GREETING + secrets.token_bytes(NAME_BYTES)


def frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


def is_cut(connection: socket.socket, timeout_s: float = 30) -> bool:
    """The other side has ended the connection."""
    connection.settimeout(timeout_s)
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("key", [None, KEY])
def test_random_bytes_kill_nobody(channel, key: str | None) -> None:
    print("seed 8")
    rng = random.Random(8)
    server = channel(key=key)
    for _ in range(150):
        start = rng.choice((b"", GREETING[: rng.randrange(16)], GREETING, greeting()))
        with raw(server) as connection:
            try:
                connection.sendall(start + rng.randbytes(rng.randrange(300)))
            except ConnectionError:
                continue
    is_alive(server, channel, key=key)


def test_random_messages_kill_nobody(channel) -> None:
    print("seed 9")
    rng = random.Random(9)
    server = channel()
    good = Codec(Note).encode(Note("good", 1))
    with raw(server, greeting()) as stranger:
        for _ in range(500):
            stranger.sendall(frame(rng.choice((good, rng.randbytes(rng.randrange(1, 100))))))
        stranger.sendall(frame(good))
        items = wait_for(server, lambda items: len(items) > 100 and len(items) + server.num_dropped == 501)
        assert {what for _, what in items} == {Note("good", 1)}
        assert server.num_dropped > 100
    is_alive(server, channel)


def test_what_cannot_be_understood_is_told_once_per_peer(channel, caplog: pytest.LogCaptureFixture) -> None:
    server = channel()
    connection, sender = admitted(server)
    with connection:
        for _ in range(3):
            connection.sendall(frame(b"KVF\x07another version"))
        connection.sendall(frame(Codec(Note).encode(Note("good"))))
        assert [what for _, what in wait_for(server, bool)] == [Note("good")]
    assert server.num_dropped == 3
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert f"{sender} sent a control message of version 07, this engine speaks 01" in record.getMessage()


def test_a_huge_frame_is_cut_before_it_is_sent(channel) -> None:
    server = channel(max_bytes=10_000)
    connection, _ = admitted(server)
    with connection:
        connection.sendall((10_001).to_bytes(4, "big"))
        assert is_cut(connection)
    is_alive(server, channel)


def test_half_messages_of_many_are_bounded_in_all(channel) -> None:
    server = channel(max_backlog_bytes=4 << 20)
    before = rss_bytes()
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(raw(server, greeting() + frame(bytes(1 << 20))[:-1]))
        until(lambda: server.num_cut >= 36)
        assert sum(link.unread_bytes for link in list(server._accepted)) <= 4 << 20
        assert rss_bytes() - before < 30 << 20
        is_alive(server, channel)


def rss_bytes(pid: int | str = "self") -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("key", [None, KEY])
def test_half_open_handshakes_end(channel, key: str | None) -> None:
    server = channel(key=key, handshake_s=3.0)
    silent = [raw(server), raw(server, (GREETING if key is None else b"\x16\x03\x01\x02\x00\x01")[:6])]
    is_alive(server, channel, key=key)
    assert all(map(is_cut, silent))
    for connection in silent:
        connection.close()


def test_a_flood_of_connections_is_cut_at_the_limit(channel) -> None:
    server = channel(max_connections=8)
    flood = [raw(server, greeting()) for _ in range(60)]
    deadline_s = time.monotonic() + 30
    while sum(is_cut(connection, 0.01) for connection in flood) < 52:
        assert time.monotonic() < deadline_s, "connections over the limit live"
    assert len(server._accepted) <= 8
    for connection in flood:
        connection.close()
    deadline_s = time.monotonic() + 30
    while server._accepted:
        assert time.monotonic() < deadline_s, "connections that have ended are still counted"
        time.sleep(0.05)
    is_alive(server, channel)


def test_messages_nobody_polls_are_bounded_and_one_flooder_does_not_silence_others(channel) -> None:
    server = channel(max_bytes=20_000, max_peer_inbox_bytes=100_000, max_inbox_bytes=250_000)
    flooder, other = channel(max_bytes=20_000), channel(max_bytes=20_000)
    peer = connected(flooder, server)
    for _ in range(100):
        flooder.send(peer, Note("x" * 10_000))
    until(lambda: server._inbox_bytes.total() > 80_000)
    connected(other, server)
    other.send(peer, Note("me too"))
    until(lambda: len(server._inbox_bytes) == 2)
    assert server._inbox_bytes.total() <= 110_000
    items = server.poll()
    assert sum(what == Note("me too") for _, what in items) == 1
    assert len(items) <= 11
    wait_for(server, lambda more: len(items) + len(more) == 101)
    assert server.num_dropped + flooder.num_dropped == 0, "what there was no room for has waited"


def test_tiny_messages_nobody_polls_are_bounded_too(channel) -> None:
    """And whoever sends more than the owner takes is stopped by TCP."""
    server = channel(max_peer_inbox_bytes=10_000)
    connection, _ = admitted(server)
    before = rss_bytes()
    with connection:
        connection.settimeout(1)
        with pytest.raises(TimeoutError):
            connection.sendall(frame(b"x") * 5_000_000)
        assert sum(map(len, server._inbox.values())) < 50
        assert rss_bytes() - before < 20 << 20
        is_alive(server, channel)


def test_a_reader_that_does_not_read_costs_a_bounded_queue(channel) -> None:
    server = channel(max_bytes=200_000)
    slow, sender = admitted(server)
    with slow:
        before = rss_bytes()
        for _ in range(500):  # 95 MB
            server.send(sender, Note("x" * 190_000))
            deadline_s = time.monotonic() + 30
            while server._outbox:
                assert time.monotonic() < deadline_s, "its thread stands still"
                time.sleep(0.001)
        assert server.num_dropped > 300
        assert rss_bytes() - before < 60 << 20
        assert slow.fileno() >= 0
    is_alive(server, channel)


@contextmanager
def overheard(address: tuple[str, int]) -> Iterator[tuple[int, bytearray]]:
    """A port that relays its first connection to `address`, and all bytes that pass, both ways."""
    said = bytearray()
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.callback(listener.shutdown, socket.SHUT_RDWR)  # ends `accept`

        def relay() -> None:
            with suppress(OSError), listener.accept()[0] as near, socket.create_connection(address) as far:
                far_end = {near: far, far: near}
                while data := (source := select.select(list(far_end), [], [])[0][0]).recv(65536):
                    said.extend(data)
                    far_end[source].sendall(data)

        thread = threading.Thread(target=relay, daemon=True)
        thread.start()
        yield listener.getsockname()[1], said
    thread.join(30)


@pytest.mark.parametrize("key", [None, KEY])
def test_with_a_key_nobody_on_the_way_reads_along(channel, key: str | None) -> None:
    server, client = channel(key=key), channel(key=key)
    with overheard(server.address) as (port, said):
        client.connect(f"127.0.0.1:{port}")
        assert wait_for(client, bool)[0][1] == Connected()
        client.send(f"127.0.0.1:{port}", Note("to: open sesame"))
        ((sender, what),) = wait_for(server, bool)
        server.send(sender, Note("fro: open sesame"))
        assert (what, wait_for(client, bool)[0][1]) == (Note("to: open sesame"), Note("fro: open sesame"))
        assert [text in said for text in (b"to: open sesame", b"fro: open sesame")] == [key is None] * 2
        client.close()  # ends the relay


@contextmanager
def answering_process() -> Iterator[tuple[subprocess.Popen[bytes], Address]]:
    """A listener in another process, which answers everything at length."""
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("flooded_child.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        yield child, Address("127.0.0.1", int(child.stdout.readline()))
    finally:
        child.stdin.close()
        child.wait(30)
        child.stdout.close()


def is_answered(address: Address, channel: Callable[..., ControlChannel[Note]]) -> None:
    client = channel()
    client.connect(str(address))
    assert wait_for(client, bool, PATIENCE_S) == [(str(address), Connected())]
    deadline_s = time.monotonic() + PATIENCE_S
    while not (items := client.poll()):  # an answer is dropped while those to a stranger fill the outbox
        assert time.monotonic() < deadline_s, "no answer"
        client.send(str(address), Note("alive?"))
        time.sleep(0.02)
    assert isinstance(items[0][1], Note)


def test_who_floods_never_reads_hangs_up_and_comes_again_leaves_nothing(channel) -> None:
    """Messages of connections that have ended are held nowhere: ZMQ, which this channel stood on, kept all of them."""
    with answering_process() as (child, address):
        is_answered(address, channel)
        before = rss_bytes(child.pid)
        for number in range(40):
            with socket.create_connection(address, timeout=30) as stranger, suppress(ConnectionError):
                stranger.sendall(greeting())
                stranger.settimeout(0.1)
                with suppress(TimeoutError):  # it is not read further than its answers are
                    stranger.sendall(frame(Codec(Note).encode(Note("h" * 200))) * 20_000)
            if number % 10 == 0:
                is_answered(address, channel)
        assert rss_bytes(child.pid) - before < 40 << 20, "up to 4 MB were sent 40 times"


def test_connections_of_one_name_may_break_when_they_like(channel) -> None:
    """As when an engine dials anew after its connection broke, before the other one sees it break."""
    message = frame(Codec(Note).encode(Note("late")))
    with answering_process() as (child, address), ExitStack() as stack:
        for _ in range(5):
            hello = greeting()
            old, new = (stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(2))
            for each in (old, new):
                each.sendall(hello + message)
                assert read_exactly(each, len(GREETING)) == GREETING
                assert len(read_exactly(each, 1000)) == 1000
            with suppress(ConnectionError):
                old.sendall(message * 100)
            assert is_cut(old), "the newer one has its place"
            new.sendall(message)
        is_answered(address, channel)
        assert child.poll() is None


def read_exactly(from_: socket.socket, num_bytes: int) -> bytes:
    content = b""
    while len(content) < num_bytes:
        content += from_.recv(num_bytes - len(content))
    return content


def test_who_is_connected_again_is_reached_by_its_old_name(channel) -> None:
    server, client = channel(), channel()
    peer = connected(client, server)
    client.send(peer, Note("hello"))
    ((name, _),) = wait_for(server, bool)
    for number in range(3):
        client._call(client._dialled[peer].link.cut)
        changes = wait_for(client, lambda items: (peer, Connected()) in items)
        assert [type(change) for _, change in changes] == [Lost, Connected]
        deadline_s = time.monotonic() + 30
        while (peer, Note("back?", number)) not in client.poll():  # it may not have been seen to be back yet
            assert time.monotonic() < deadline_s
            server.send(name, Note("back?", number))
            time.sleep(0.01)
    assert {sender for sender, _ in server.poll()} <= {name}

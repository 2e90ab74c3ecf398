"""The control channel of one engine: small messages to and from other engines. Nothing here ever waits or raises late.

    listener   bound once; whoever dials us is known by the name that it gives itself: @ and random hex
    dialled    one connection per peer, known by the host:port we dialled; made again by itself when it breaks
    message    one frame of `kvferry.p2p.link`
    thread     owns all sockets, on an asyncio loop; the owner only fills the outbox and empties the inbox

Messages may be lost (not connected, queue full) but not altered; what comes from one peer comes in order. With a key
every connection is TLS and admits those alone who have it. Without one only loopback addresses are bound.

What peers can cost is bounded: the size of a message, the time for a handshake, connections (by this process's
descriptors), what was received of unfinished messages, messages that wait for `poll` (per peer and in all: whoever has
too many there is not read any further), and bytes that wait to be sent. Strangers get half of the connections and of
the inbox; of peers that the owner wants to `keep` none is cut for a stranger's sake. Names are looked up by threads of
their own.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
import ssl
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Generic

from kvferry.connections import Acceptor, descriptor_share, watch
from kvferry.errors import ConfigError, TransferError
from kvferry.p2p.link import GREETING, NAME_BYTES, Link, Lost, lost_by, tls_contexts
from kvferry.p2p.wire import LOOPBACK, Address, Codec, M, is_allowed, is_ip

logger = logging.getLogger(__name__)

_FIRST_RECONNECT_S = 0.1
_LAST_RECONNECT_S = 5.0
_LONGEST_S = 1_000_000.0
_WILDCARDS = ("", "*", "0.0.0.0", "::")
_JOIN_S = 5.0
_MAX_WARNED = 1000
_MESSAGE_BYTES = 256  # what one costs here beside its content, so that small ones are bounded too
_MAX_LOOKUPS = 32  # of names, at once
_POLLED_AT_ONCE = 64
_KEPT_SHARE = 0.75  # of the slots, for those that are kept; the others are for those who come
_STRANGER_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """Address and bounds of the control channel. Port 0 selects a free port; `kv_transfer_params` carry it to peers."""

    host: str = "127.0.0.1"
    port: int = 0
    advertised_host: str | None = None
    """Host that peers dial; by default the bound host, or, where that is a wildcard, the name of this machine."""
    key: str | None = None
    silence_s: float = 6.0
    """Longest time, in seconds, without an acknowledgement of a peer's machine, also on an idle connection; then the
    peer is lost."""
    handshake_s: float = 5.0
    """Longest time, in seconds, for a handshake; then either side closes the connection."""
    max_connections: int = 1024
    """Largest number of accepted connections; also at most an eighth of this process's descriptors."""
    max_dialled: int = 1024
    """Largest number of dialled peers; also at most a sixteenth of this process's descriptors."""
    max_backlog_bytes: int = 64 << 20
    """Largest number of bytes over all connections: received parts of messages that are incomplete or have no room, and
    bytes that wait to be sent."""
    max_stranger_unsent_bytes: int = 256 << 10
    """Largest number of bytes that wait to be sent to a stranger, beside one message."""
    max_peer_unsent_bytes: int = 8 << 20
    """Largest number of bytes that wait to be sent to a known peer."""
    max_inbox_bytes: int = 32 << 20
    max_peer_inbox_bytes: int = 4 << 20
    max_outbox: int = 4096
    max_outbox_bytes: int = 32 << 20

    @property
    def num_dialled(self) -> int:
        """How many peers may be dialled in this process."""
        return descriptor_share(self.max_dialled, 16)

    @property
    def dialled_host(self) -> str:
        """The host that peers dial."""
        return self.advertised_host or (socket.gethostname() if self.host in _WILDCARDS else self.host)


@dataclass(frozen=True, slots=True)
class Connected:
    """A dialled peer can be talked to from now on."""


_UNREACHABLE = Lost(
    "the peer cannot be reached",
    "does that engine run, do its host, advertised_host and port (kv_connector_extra_config) name an address that "
    "this machine reaches, and does no firewall stand between?",
)
_SLOW_REMEDY = (
    "does that engine stand still, or have too few cores? handshake_s (kv_connector_extra_config) is how long to wait"
)
_NO_NAME_REMEDY = (
    "give the engine another host or advertised_host (kv_connector_extra_config): an address, or a name that the "
    "machines of its peers resolve"
)


@dataclass(slots=True)
class _Dialled:
    task: asyncio.Task[None]
    link: Link | None = None
    """Once it has greeted, until it is lost."""
    is_connected: bool | None = None  # None: not known yet


def check_listening(settings: ControlSettings) -> None:
    """ConfigError when the address cannot be bound, or may not be without a key. It is free again afterwards."""
    _check_key(settings)
    _bind(settings).close()


def _check_key(settings: ControlSettings) -> None:
    if settings.key is None and not is_allowed(settings.host, LOOPBACK):
        raise ConfigError(
            f"kv_connector_extra_config.host={settings.host!r} can be reached from other machines, which could "
            "then read and write KV memory: set key_file (the same key in all engines and the proxy), or bind "
            "127.0.0.1"
        )


def _bind(settings: ControlSettings) -> socket.socket:
    host = {"localhost": "127.0.0.1", "*": ""}.get(settings.host, settings.host)
    is_dual = host == "" and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual or ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, settings.port), family=family, backlog=128, dualstack_ipv6=is_dual)
    except OSError as error:
        raise ConfigError(
            f"kv_connector_extra_config.host={settings.host!r}, port={settings.port} cannot be bound: {error}; "
            "give an address of this machine, and a port that is free (0: any)"
        ) from error


def _cost(item: object) -> int:
    return _MESSAGE_BYTES + len(item) if isinstance(item, bytes) else 0


class ControlChannel(Generic[M]):
    """`on_news` is called on the channel's thread whenever `poll` has something; it must not block.

    ConfigError when the address cannot be bound, or may not be without a key, or `cryptography` is missing for one.
    """

    def __init__(self, settings: ControlSettings, codec: Codec[M], on_news: Callable[[], None] | None = None) -> None:
        _check_key(settings)
        self.num_dropped = 0
        """Messages given up: not connected, too much unsent, not understood."""
        self.num_cut = 0
        """Connections of others that were ended for what they cost."""
        self._settings = settings
        self._codec = codec
        self._on_news = on_news or (lambda: None)
        self._tls: tuple[ssl.SSLContext | None, ssl.SSLContext | None] = (None, None)
        if settings.key is not None:
            self._tls = tls_contexts(settings.key)
        self._handshake_s = min(max(0.001, settings.handshake_s), _LONGEST_S)
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._inbox: dict[str, deque[bytes | Connected | Lost]] = {}
        self._inbox_bytes: Counter[str] = Counter()
        self._is_inbox_full = False
        self._warned: set[str] = set()
        self._outbox: deque[tuple[str, bytes | None]] = deque()  # empty: dial; None: hang up
        self._outbox_bytes = 0
        self._wanted: set[str] = set()
        self._kept: set[str] = set()
        self._dialled: dict[str, _Dialled] = {}
        self._accepted: dict[Link, asyncio.Task[None]] = {}  # oldest first
        self._named: dict[str, Link] = {}
        self._num_lookups = 0
        self._max_dialled = settings.num_dialled
        self._max_accepted = descriptor_share(settings.max_connections, 8)
        self._is_closing = asyncio.Event()
        self._listener = _bind(settings)
        self._listener.setblocking(False)
        watch(self._listener, min(settings.silence_s, _LONGEST_S))
        self.address = Address(settings.dialled_host, self._listener.getsockname()[1])
        self._loop = asyncio.SelectorEventLoop()  # whatever policy the host has set
        self._thread = threading.Thread(target=self._main, name="kvferry-p2p-control", daemon=True)
        self._thread.start()

    # ---- for the owner, any thread ----------------------------------------------------------------------------

    def connect(self, peer: str) -> None:
        """Dial `host:port`, unless connected; `Connected` or `Lost` follows. TransferError: malformed, or too many.

        A link that is lost is dialled again in silence, less and less often; another `connect` does it at once.
        """
        Address.parse(peer)
        with self._lock:
            if peer not in self._wanted and len(self._wanted) >= self._max_dialled:
                raise TransferError(f"{peer}: {len(self._wanted)} peers are connected already")
            self._wanted.add(peer)
        self._put(peer, b"")

    def send(self, peer: str, message: M) -> None:
        """To a peer that was dialled, or one that wrote to us. TransferError when the message is too large."""
        self._put(peer, self._codec.encode(message))

    def keep(self, peer: str) -> None:
        """This peer is no stranger: it has introduced itself. Until `disconnect`."""
        if peer.startswith("@"):
            self._kept.add(peer)

    def disconnect(self, peer: str) -> None:
        """Hang up a dialled peer; one that wrote to us is a stranger again."""
        with self._lock:
            self._wanted.discard(peer)
        if peer.startswith("@"):
            self._kept.discard(peer)
        else:
            self._put(peer, None)

    def poll(self) -> list[tuple[str, M | Connected | Lost]]:
        """What has come, as (peer, message or change), in order per peer.

        Of one peer's messages only some at once, and so of all strangers' together: what is left is news again.
        """
        with self._lock:
            taken = self._take_from_inbox()
            was_full, self._is_inbox_full = self._is_inbox_full, False
            is_more = bool(self._inbox)
        if was_full:
            self._call(self._resume)
        if is_more:
            self._on_news()
        out: list[tuple[str, M | Connected | Lost]] = []
        for peer, item in taken:
            try:
                out.append((peer, self._codec.decode(item) if isinstance(item, bytes) else item))
            except TransferError as error:
                self.num_dropped += 1
                self._warn_once(peer, error)
        return out

    def _take_from_inbox(self) -> list[tuple[str, bytes | Connected | Lost]]:
        strangers = dict.fromkeys([peer for peer in self._inbox if self._is_stranger(peer)])
        share = max(1, _POLLED_AT_ONCE // max(1, len(strangers)))
        polled = [*(peer for peer in self._inbox if peer not in strangers), *list(strangers)[:_POLLED_AT_ONCE]]
        taken: list[tuple[str, bytes | Connected | Lost]] = []
        for peer in polled:
            waiting = self._inbox.pop(peer)
            for _ in range(min(len(waiting), share if peer in strangers else _POLLED_AT_ONCE)):
                item = waiting.popleft()
                taken.append((peer, item))
                self._inbox_bytes[peer] -= _cost(item)
            if waiting:
                self._inbox[peer] = waiting  # behind the others
            else:
                del self._inbox_bytes[peer]
        return taken

    def _is_stranger(self, peer: str) -> bool:
        return peer.startswith("@") and peer not in self._kept

    def _warn_once(self, peer: str, error: TransferError) -> None:
        """Once per peer; strangers give themselves new names at will, and are one."""
        who = "@" if self._is_stranger(peer) else peer
        is_news = who not in self._warned and len(self._warned) < _MAX_WARNED
        if is_news:
            self._warned.add(who)
        logger.log(
            logging.WARNING if is_news else logging.DEBUG,
            "%s sent %s: dropped, and more from there in silence; do all engines run the same version of kvferry?",
            peer, error,
        )  # fmt: skip

    def close(self) -> None:
        """Hang up everything and stop listening. Idempotent."""
        self._call(self._is_closing.set)
        self._thread.join(_JOIN_S)

    def _put(self, peer: str, frame: bytes | None) -> None:
        """Only messages may be lost: who dials waits for an answer."""
        size = len(frame or b"")
        with self._lock:
            is_full = (
                len(self._outbox) >= self._settings.max_outbox
                or self._outbox_bytes + size > self._settings.max_outbox_bytes
            )
            if frame and is_full:
                self.num_dropped += 1
                return
            self._outbox_bytes += size
            self._outbox.append((peer, frame))
            is_first = len(self._outbox) == 1
        if is_first:
            self._call(self._empty_outbox)

    def _call(self, what: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(what)

    # ---- the thread -------------------------------------------------------------------------------------------

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        acceptor = Acceptor(self._listener, "p2p control channel", self._accept)
        await self._is_closing.wait()
        acceptor.close()
        for link in list(self._links()):
            link.cut()  # and the Runner cancels all tasks

    def _empty_outbox(self) -> None:
        with self._lock:
            outbox, self._outbox = self._outbox, deque()
            self._outbox_bytes = 0
        for peer, frame in outbox:
            if frame is None:
                self._hang_up(peer)
            elif frame == b"":
                self._dial(peer)
            else:
                self._send(peer, frame)

    def _send(self, peer: str, frame: bytes) -> None:
        if peer.startswith("@"):
            if (link := self._named.get(peer)) is None:
                self.num_dropped += 1
                self._put_inbox(peer, Lost("the peer's connection has ended"))
                return
        else:
            dialled = self._dialled.get(peer)
            link = None if dialled is None else dialled.link
        if link is None or self._is_too_much(link, len(frame)):
            self.num_dropped += 1
        else:
            link.send(frame)

    def _is_too_much(self, link: Link, num_bytes: int) -> bool:
        if not (unsent := link.unsent_bytes):
            return False
        settings = self._settings
        most = settings.max_stranger_unsent_bytes if self._is_stranger(link.peer) else settings.max_peer_unsent_bytes
        total = sum(each.unsent_bytes for each in self._links())
        return unsent + num_bytes > most or total + num_bytes > settings.max_backlog_bytes

    def _links(self) -> Iterable[Link]:
        yield from self._accepted
        yield from (each.link for each in self._dialled.values() if each.link is not None)

    # ---- those who dial us ------------------------------------------------------------------------------------

    def _accept(self, connection: socket.socket) -> None:
        link = Link(self, connection, self._codec.max_bytes, GREETING)
        self._accepted[link] = asyncio.create_task(self._welcome(link, connection))
        self._make_room()

    async def _welcome(self, link: Link, connection: socket.socket) -> None:
        try:
            await self._shake_hands(link, connection, self._tls[0])
            await link.lost
        except OSError as error:  # TimeoutError is one
            logger.debug("p2p control channel: a handshake failed: %s", error)
        finally:
            link.cut()
            del self._accepted[link]
            if self._named.get(link.peer) is link:
                del self._named[link.peer]

    def _make_room(self) -> None:
        """Half of the slots at most are for strangers: one more, and the oldest of them goes. Peers that are kept stay,
        unless they fill three quarters."""
        most = self._max_accepted
        links = [link for link in self._accepted if not link.lost.done()]
        kept = [link for link in links if link.peer in self._kept][: int(_KEPT_SHARE * most)]
        others = [link for link in links if link not in kept]
        room = min(most - len(kept), max(1, int(_STRANGER_SHARE * most)))
        for link in others[: max(0, len(others) - room)]:
            self._cut(link)

    def _cut(self, link: Link) -> None:
        self.num_cut += 1
        if self.num_cut == 1:
            logger.warning(
                "p2p control channel: a connection was cut for the first time, because it leaves too much unfinished "
                "or there are more than %d connections (an eighth of the process's descriptors: raise ulimit -n for "
                "more engines)",
                self._max_accepted,
            )
        link.cut()

    async def _shake_hands(self, link: Link, over: socket.socket, tls: ssl.SSLContext | None, **options: Any) -> None:
        """Until the other side has greeted, or the link is lost. OSError, TimeoutError."""
        if tls is not None:
            options = {**options, "ssl": tls, "ssl_handshake_timeout": self._handshake_s}
        async with asyncio.timeout(self._handshake_s):
            if link.peer:
                await self._loop.create_connection(lambda: link, sock=over, **options)
            else:
                await self._loop.connect_accepted_socket(lambda: link, over, **options)
            await asyncio.wait((link.is_greeted, link.lost), return_when=asyncio.FIRST_COMPLETED)

    # ---- what links tell --------------------------------------------------------------------------------------

    def greeted(self, link: Link) -> None:
        """Who dialled us before under this name is reached through this connection from now on."""
        if link.name:
            link.peer = f"@{link.name.hex()}"
            if (old := self._named.get(link.peer)) is not None:
                old.cut()
            self._named[link.peer] = link
        elif (dialled := self._dialled.get(link.peer)) is not None:
            dialled.link, dialled.is_connected = link, True
            self._put_inbox(link.peer, Connected())

    def take(self, link: Link, content: bytes) -> bool:
        """Into the inbox, if there is room for it; for strangers half of it."""
        peer, size = link.peer, _cost(content)
        settings = self._settings
        with self._lock:
            if self._inbox_bytes[peer] + size > settings.max_peer_inbox_bytes or (
                self._inbox_bytes.total() + size > settings.max_inbox_bytes // (1 + self._is_stranger(peer))
            ):
                self._is_inbox_full = True
                return False
            self._inbox_bytes[peer] += size
            self._inbox.setdefault(peer, deque()).append(content)
        self._on_news()
        return True

    def grown(self, link: Link) -> None:
        """Cut those that leave most unfinished until the total is within its limit; strangers first."""
        links = list(self._links())
        total = sum(each.unread_bytes for each in links)
        if total > self._settings.max_backlog_bytes:
            for each in sorted(links, key=lambda each: (not self._is_stranger(each.peer), -each.unread_bytes)):
                if total > self._settings.max_backlog_bytes:
                    total -= each.unread_bytes
                    self._cut(each)

    def _resume(self) -> None:
        for link in list(self._links()):
            link.resume()

    def _put_inbox(self, peer: str, change: Connected | Lost) -> None:
        with self._lock:
            self._inbox.setdefault(peer, deque()).append(change)
        self._on_news()

    # ---- those we dial ----------------------------------------------------------------------------------------

    def _dial(self, peer: str) -> None:
        known = self._dialled.get(peer)
        if known is None or known.is_connected is False:
            self._hang_up(peer)
            self._dialled[peer] = _Dialled(asyncio.create_task(self._stay_connected(peer)))

    def _hang_up(self, peer: str) -> None:
        if (dialled := self._dialled.pop(peer, None)) is not None:
            dialled.task.cancel()

    async def _stay_connected(self, peer: str) -> None:
        """Until cancelled."""
        pause_s = _FIRST_RECONNECT_S
        while True:
            lost = await self._connection(peer)
            me = self._dialled[peer]
            if me.is_connected:
                pause_s = _FIRST_RECONNECT_S
            if me.is_connected is not False:
                me.is_connected = False
                self._put_inbox(peer, lost)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_RECONNECT_S)

    async def _connection(self, peer: str) -> Lost:
        """One attempt, and how it ended."""
        address = Address.parse(peer)
        try:
            over = await self._connect_to(await self._look_up(address))
        except (OSError, UnicodeError) as error:
            return Lost(f"the name {address.host!r} cannot be resolved: {error}", _NO_NAME_REMEDY)
        if over is None:
            return _UNREACHABLE
        link = Link(self, over, self._codec.max_bytes, GREETING + self._name_for(peer), peer=peer)
        try:
            await self._shake_hands(link, over, self._tls[1], server_hostname="kvferry" if self._tls[1] else None)
            return await link.lost
        except TimeoutError:
            return Lost(f"the peer's handshake took longer than {self._handshake_s:g} s", _SLOW_REMEDY)
        except OSError as error:
            return lost_by(error)
        finally:
            link.cut()
            if peer in self._dialled and self._dialled[peer].link is link:
                self._dialled[peer].link = None

    def _name_for(self, peer: str) -> bytes:
        """What we are called by whom we dial as `peer`: the same whenever that is dialled, so that the link before is
        let go. Under another name of the same engine another one: the links would take each other's place for ever."""
        return hmac.digest(self._secret, peer.encode(), "sha256")[:NAME_BYTES]

    async def _connect_to(self, found: list[tuple[int, tuple[object, ...]]]) -> socket.socket | None:
        """The first of these addresses that answers."""
        for family, address in found:
            with suppress(OSError), ExitStack() as stack:  # TimeoutError is one
                over = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                over.setblocking(False)
                watch(over, min(self._settings.silence_s, _LONGEST_S))
                async with asyncio.timeout(self._handshake_s):
                    await self._loop.sock_connect(over, address)
                stack.pop_all()
                return over
        return None

    async def _look_up(self, address: Address) -> list[tuple[int, tuple[object, ...]]]:
        """On a thread of its own, unless it is an address already: it may take half a minute. OSError, UnicodeError."""
        host, port = address
        if is_ip(host):
            return [(socket.AF_INET6 if ":" in host else socket.AF_INET, (host, port))]
        if self._num_lookups >= _MAX_LOOKUPS:
            raise OSError(f"{_MAX_LOOKUPS} other names are being looked up")
        found: asyncio.Future[list[tuple[int, tuple[object, ...]]]] = self._loop.create_future()

        def tell(addresses: Any, error: Exception | None) -> None:
            self._num_lookups -= 1
            if found.cancelled():
                return
            if error is None:
                found.set_result([(family, address) for family, *_, address in addresses])
            else:
                found.set_exception(error)

        def look_up() -> None:
            try:
                addresses, error = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), None
            except (OSError, UnicodeError) as failure:
                addresses, error = [], failure
            self._call(lambda: tell(addresses, error))

        self._num_lookups += 1
        threading.Thread(target=look_up, name="kvferry-p2p-name", daemon=True).start()
        return await found

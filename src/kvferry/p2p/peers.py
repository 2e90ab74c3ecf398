"""Who we talk to: control link, handshake and transport connection per peer; restarts, silence, backoff, eviction.

            want / Hello received                     Hello accepted
    absent ───────────────────────► greeting ──────────────────────────────► open (one numbered connection)
       ▲                              │  ▲                                     │
       │ idle                 refused │  │ backoff over, and still wanted      │ link lost, peer silent, new generation,
       │                              ▼  │                                     │ a transfer failed or never ended, idle
       └─────────────────────────── failed ◄────── peer_closed ────── closing ◄┘

A connection is closed before the next one is opened, and numbers are never used twice, so whatever was bound to a
connection (a load, a claim) knows when nothing of it can land any more. A peer's generation is its life: an answer
of another generation at the same address means that it restarted; what was bound to the old life fails, the old
connection is destroyed, and a new handshake follows. So it does when the peer destroyed its end (its epoch rose).
A Hello that nobody asked for may be late, from a life that is over: it only makes us ask.

After a failure: everything bound to the connection was told (`connection_failing`), `ClosePeer` was asked for once,
and `connection_closed` follows when the driver says so, never on our own guess.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

from kvferry.p2p.actions import Action, ClosePeer, Connect, Disconnect, LocalEngine, OpenPeer, P2PSettings, Send
from kvferry.p2p.messages import PROTOCOL, ClaimMessage, Hello, HelloRefused
from kvferry.p2p.transports.calls import Calls, row

GeometryCheck = Callable[[bytes, bytes, bool], list[str]]
"""(local geometry, remote geometry, whether KV comes from the remote engine) -> one line per reason why it cannot.

That a geometry cannot be read is such a reason."""
Emit = Callable[[Action], None]


def same_life(generation: str | None, other: str | None) -> bool:
    """Whether two generations name the same life of an engine."""
    return generation == other


def same_tokens(digest: bytes, other: bytes) -> bool:
    """Whether two digests stand for the same tokens, salt, adapter and media."""
    return digest == other


@dataclass(slots=True)
class Peer:
    """One address we know."""

    name: str
    heard_s: float
    owes_s: float = inf  # since when it owes us answers
    is_up: bool = False  # the control link
    is_dialling: bool = False
    is_source: bool = False  # we want KV from it
    hello: Hello | None = None  # of the life we talk to
    nonce: str = ""  # of our last question
    owed_nonce: str = ""  # of its question, which is answered when our old end is destroyed
    is_asked: bool = False  # somebody wants a connection, as soon as this one is closed
    is_leaving: bool = False  # forgotten when its connection is destroyed, unless somebody asks
    epoch: int = 0  # ours towards it, in our hello
    connection: int | None = None
    closing: int | None = None
    refusal: str = ""
    num_failures: int = 0
    retry_s: float = 0.0

    @property
    def generation(self) -> str | None:
        """The life we talk to."""
        return self.hello.generation if self.hello else None

    @property
    def state(self) -> str:
        """One word, for people."""
        if self.connection is not None:
            return "open"
        if self.closing is not None:
            return "closing"
        return "failed" if self.num_failures else "greeting"


class Peers:
    """The registry. Pure; emits actions."""

    def __init__(
        self,
        local: LocalEngine,
        settings: P2PSettings,
        check: GeometryCheck,
        calls: Calls,
        emit: Emit,
        new_id: Callable[[], str],
    ) -> None:
        self._local, self._settings, self._check = local, settings, check
        self._calls, self._emit, self._new_id = calls, emit, new_id
        self._peers: dict[str, Peer] = {}
        self._num_connections = 0
        self._num_closed = 0
        self._room_s = 0.0  # when to look again for room for peers that are wanted
        self._listeners: tuple[Role, ...] = ()

    def listen(self, *listeners: Role) -> None:
        """Tell these of every connection."""
        self._listeners = listeners

    def get(self, name: str) -> Peer | None:
        """The record of a peer, if there is one."""
        return self._peers.get(name)

    def check_of(self, name: str, hello: Hello) -> Callable[[], object]:
        """The check of this peer's geometry, of which its Hello makes use."""
        peer = self._peers.get(name)
        return partial(self._check, self._local.geometry, hello.geometry, peer is not None and peer.is_source)

    def reaches(self, name: str, generation: str | None) -> bool:
        """Whether a message to this life of the peer may arrive."""
        peer = self._peers.get(name)
        return peer is not None and peer.is_up and (generation is None or same_life(generation, peer.generation))

    def refusal(self, name: str, now: float) -> str:
        """Why there is no use in asking this peer now; empty when there may be."""
        peer = self._peers.get(name)
        return peer.refusal if peer and now < peer.retry_s else ""

    def want(self, name: str, now: float) -> None:
        """See to it that there will be an open connection with a peer whose KV we want; `tick` makes room for it."""
        if name not in self._peers and len(self._sources()) >= self._settings.max_sources:
            return
        if (peer := self._record(name, now)) is None:
            return
        peer.is_source, peer.is_leaving = True, False
        if peer.connection is not None or peer.closing is not None or now < peer.retry_s:
            return
        if peer.is_up:
            self._greet(peer, now)
        elif not peer.is_dialling:
            peer.is_dialling = True
            self._emit(Connect(name))

    def connected(self, name: str, now: float) -> None:
        """The control link is up."""
        if (peer := self._record(name, now)) is not None:
            was_dialling, peer.is_up, peer.is_dialling, peer.heard_s = peer.is_dialling, True, False, now
            if was_dialling:
                self._greet(peer, now)

    def lost(self, name: str, reason: str, now: float) -> None:
        """The control link is down, or could not be made."""
        if (peer := self._peers.get(name)) is not None:
            was_dialling, peer.is_up, peer.is_dialling = peer.is_dialling, False, False
            self._calls.answered("hello", name)
            self.close(peer, reason, now)
            if was_dialling:  # there is nobody: whoever waits need not wait longer, and the next one dials anew
                self._emit(Disconnect(name))
                self._tell_refused(name, f"{name}: {reason}", now)
            else:
                self._back_off(peer, now)

    def on_hello(self, name: str, hello: Hello, now: float) -> None:
        """A peer introduced itself: answer its question, or believe its answer to ours."""
        if (peer := self._record(name, now)) is None:
            return
        peer.is_up, peer.is_dialling, peer.heard_s = True, False, now
        differences = self._differences(peer, hello)
        if not hello.is_answer:
            self._answer(peer, hello, differences, now)
        elif hello.nonce == peer.nonce and self._calls.answered("hello", name):
            if differences:
                self._refuse(peer, "; ".join(differences), now)
                return
            if peer.hello and not same_life(peer.generation, hello.generation):
                self.close(peer, f"{name} restarted", now)
            elif peer.hello and peer.hello.epoch != hello.epoch:
                self.close(peer, f"{name} destroyed its end", now)
            peer.hello, peer.is_asked = hello, True
            self._open(peer, now)

    def on_hello_refused(self, name: str, message: HelloRefused, now: float) -> None:
        """A peer cannot exchange KV with us."""
        peer = self._peers.get(name)
        if peer is not None and self._calls.answered("hello", name):
            self._refuse(peer, "; ".join(message.differences), now)

    def sender(self, name: str, message: ClaimMessage, now: float) -> Peer | None:
        """The peer that sent a message, when it is in the life we know and means ours; else it is asked for a Hello."""
        peer, generation = self._record(name, now), message.generation
        if peer is None:
            return None
        peer.is_up, peer.is_dialling = True, False
        is_known = same_life(peer.generation, generation) and same_life(message.to, self._local.generation)
        if is_known:
            peer.heard_s = now
        if not is_known or peer.connection is None:
            self._greet(peer, now)
        return peer if is_known and peer.hello else None

    def close(self, peer: Peer, reason: str, now: float) -> None:
        """Destroy its connection, if it has an open one."""
        if peer.connection is not None:
            self._num_closed += 1
            self._calls.answered("hello", peer.name)
            peer.closing, peer.connection, peer.epoch, peer.is_asked = peer.connection, None, self._num_closed, False
            self._emit(ClosePeer(peer.name, peer.closing, reason))
            for listener in self._listeners:
                listener.connection_failing(peer.closing, reason, now)

    def close_connection(self, name: str, connection: int | None, reason: str, now: float) -> None:
        """Destroy exactly this connection, if it is still open."""
        peer = self._peers.get(name)
        if peer is not None and peer.connection == connection:
            self.close(peer, reason, now)
            peer.is_asked = True  # so that it is greeted anew, and does not learn of it by what it does next

    def closed(self, name: str, connection: int, now: float) -> None:
        """The driver destroyed a connection."""
        peer = self._peers.get(name)
        if peer is not None and peer.closing == connection:
            peer.closing = None
            for listener in self._listeners:
                listener.connection_closed(connection, now)
            if peer.is_asked and peer.is_up:
                self._greet(peer, now)
            if peer.owed_nonce:
                self._emit(Send(peer.name, self._hello(peer, peer.owed_nonce, is_answer=True)))
                peer.owed_nonce = ""
            is_leaving, peer.is_leaving = peer.is_leaving, False
            if is_leaving and not peer.is_asked:
                self._forget(peer)

    def forgive(self, now: float) -> None:
        """We were frozen ourselves: nobody owes us answers since before."""
        for peer in self._peers.values():
            peer.owes_s = now if peer.owes_s < now else peer.owes_s

    def tick(self, now: float, wanted: Set[str], busy: Set[str]) -> None:
        """Dial and greet `wanted` peers; give up silent ones among `busy` (they owe answers); evict idle ones."""
        for name in sorted(wanted):
            if name not in self._peers:
                self._room_s = now + self._settings.retry_s
                self._make_room(wanted | busy, now)
            self.want(name, now)
        for peer in list(self._peers.values()):
            peer.owes_s = min(peer.owes_s, now) if peer.name in busy else inf
            if peer.name in busy:
                if peer.connection is not None and now >= self._silent_s(peer):
                    self.close(peer, f"{peer.name} was silent for {self._settings.liveness_s} s", now)
                    self._back_off(peer, now)
            elif peer.name not in wanted and now - peer.heard_s >= self._settings.idle_s:
                self.close(peer, f"{peer.name} was idle", now)
                if peer.closing is None:
                    self._forget(peer)

    def next_deadline(self, wanted: Set[str], busy: Set[str]) -> float:
        """When `tick` has something to do."""
        moments = [self._room_s if wanted - self._peers.keys() else inf]
        for peer in self._peers.values():
            if peer.name in busy and peer.connection is not None:
                moments.append(self._silent_s(peer))
            elif peer.name in wanted and peer.connection is None and peer.closing is None and not peer.is_dialling:
                moments.append(peer.retry_s)
            elif peer.name not in busy and peer.closing is None:
                moments.append(peer.heard_s + self._settings.idle_s)
        return min(moments)

    def snapshot(self) -> list[dict[str, Any]]:
        """One row per peer."""
        names = "name state generation connection closing heard_s num_failures refusal"
        return [row(peer, names) for peer in self._peers.values()]

    def _silent_s(self, peer: Peer) -> float:
        return max(peer.heard_s, peer.owes_s) + self._settings.liveness_s

    def _record(self, name: str, now: float) -> Peer | None:
        if name not in self._peers:
            if len(self._peers) >= self._settings.max_peers:
                self._forget_a_stranger()
            if len(self._peers) < self._settings.max_peers:
                self._peers[name] = Peer(name, heard_s=now, epoch=self._num_closed)
        return self._peers.get(name)

    def _sources(self) -> list[Peer]:
        return [peer for peer in self._peers.values() if peer.is_source]

    def _make_room(self, needed: Set[str], now: float) -> None:
        """Where there are as many as there may be, let go of the one without business that was silent longest."""
        crowd = self._sources()
        if len(crowd) < self._settings.max_sources:
            crowd = list(self._peers.values()) if len(self._peers) >= self._settings.max_peers else []
        idle = [peer for peer in crowd if peer.name not in needed and not peer.is_dialling]
        if not idle or any(peer.is_leaving for peer in idle):
            return
        peer = min(idle, key=lambda peer: (peer.connection is not None, peer.heard_s))
        self.close(peer, f"{peer.name} was idle, and others are wanted", now)
        if peer.closing is None:
            self._forget(peer)
        else:
            peer.is_leaving = True

    def _forget_a_stranger(self) -> None:
        """Whoever wrote to us longest ago and never introduced itself; anybody can make many of those."""
        strangers = (x for x in self._peers.values() if x.hello is None and not x.is_source and x.closing is None)
        if (peer := min(strangers, key=lambda x: x.heard_s, default=None)) is not None:
            self._forget(peer)

    def _forget(self, peer: Peer) -> None:
        self._calls.answered("hello", peer.name)
        self._emit(Disconnect(peer.name))
        del self._peers[peer.name]

    def _hello(self, peer: Peer, nonce: str, *, is_answer: bool) -> Hello:
        me = self._local
        ours = dict(me.transports)
        return Hello(me.engine_id, PROTOCOL, me.geometry, ours, peer.epoch, nonce, is_answer, generation=me.generation)

    def _greet(self, peer: Peer, now: float) -> None:
        """Ask for a Hello: at once, so that the peer is answered before what we send next."""
        if peer.closing is None and not self._calls.has("hello", peer.name, now):
            peer.nonce, peer.retry_s = self._new_id(), now + self._settings.handshake_s
            question = self._hello(peer, peer.nonce, is_answer=False)
            self._emit(Send(peer.name, question))
            again_s = now + self._settings.retry_s
            self._calls.start("hello", peer.name, peer.name, None, question, again_s, peer.retry_s)

    def _answer(self, peer: Peer, hello: Hello, differences: list[str], now: float) -> None:
        if differences:
            self._emit(Send(peer.name, HelloRefused(tuple(differences), generation=self._local.generation)))
            return
        peer.is_asked = True
        is_known = peer.hello is not None and same_life(peer.generation, hello.generation)
        is_current = is_known and peer.hello is not None and peer.hello.epoch == hello.epoch
        if peer.connection is None or not is_current:
            self._greet(peer, now)
        if peer.closing is None and (peer.connection is None or is_current):
            self._emit(Send(peer.name, self._hello(peer, hello.nonce, is_answer=True)))
        else:
            peer.owed_nonce = hello.nonce

    def _differences(self, peer: Peer, hello: Hello) -> list[str]:
        if hello.protocol != PROTOCOL:
            return [f"protocol: {PROTOCOL} here, {hello.protocol} at {hello.engine_id}"]
        if not set(hello.transports) & set(self._local.transports):
            return [
                f"transports: {sorted(self._local.transports)} here, {sorted(hello.transports)} at {hello.engine_id}"
            ]
        found = self._check(self._local.geometry, hello.geometry, peer.is_source)
        return [line[:2048] for line in found[:256]]

    def _open(self, peer: Peer, now: float) -> None:
        if peer.connection is None and peer.closing is None and peer.hello is not None:
            self._num_connections += 1
            peer.connection, peer.refusal, peer.num_failures, peer.retry_s = self._num_connections, "", 0, 0.0
            self._emit(OpenPeer(peer.name, peer.connection, peer.hello))
            for listener in self._listeners:
                listener.connection_opened(peer.name, now)

    def _refuse(self, peer: Peer, reason: str, now: float) -> None:
        peer.refusal = f"{peer.name} and this engine cannot exchange KV: {reason}"
        self.close(peer, peer.refusal, now)
        peer.num_failures += 1
        self._back_off(peer, now)
        self._tell_refused(peer.name, peer.refusal, now)

    def _tell_refused(self, name: str, reason: str, now: float) -> None:
        for listener in self._listeners:
            listener.peer_refused(name, reason, now)

    def _back_off(self, peer: Peer, now: float) -> None:
        """One failure after a success costs no time: it may have restarted, and is there already."""
        wait_s = self._settings.backoff_s * (2 ** min(peer.num_failures, 16) - 1)
        peer.num_failures += 1
        peer.retry_s = now + min(wait_s, self._settings.max_backoff_s)


class Role:
    """What producer and consumer have in common: their surroundings, and ears for what happens to connections."""

    def __init__(
        self,
        local: LocalEngine,
        settings: P2PSettings,
        peers: Peers,
        calls: Calls,
        emit: Emit,
        new_id: Callable[[], str],
    ) -> None:
        self._local, self._settings, self._peers = local, settings, peers
        self._calls, self._emit, self._new_id = calls, emit, new_id

    def connection_opened(self, peer: str, now: float) -> None:
        """Transfers with this peer can start."""

    def connection_failing(self, connection: int, reason: str, now: float) -> None:
        """Start nothing more on it; what runs may still land."""

    def connection_closed(self, connection: int, now: float) -> None:
        """Nothing of it can land any more."""

    def peer_refused(self, peer: str, reason: str, now: float) -> None:
        """KV cannot be moved between this peer and us."""

    def _ids(self, claim_id: str, to: str | None) -> dict[str, Any]:
        return {"generation": self._local.generation, "claim_id": claim_id, "to": to}

    def _send(self, peer: str, message: ClaimMessage) -> None:
        self._emit(Send(peer, message))

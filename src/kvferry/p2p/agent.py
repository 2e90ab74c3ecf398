"""The P2P core and its control channel, on a thread of their own, so that peers are answered during a long forward.

    hooks (scheduler's thread) ── use(...) ──► core ◄── messages, deadlines ── agent's thread ◄── control channel
              ▲                                  │
              └──────── take_events() ◄──────────┴──► Connect, Disconnect, Send: carried out

One lock around the core; everything done under it takes microseconds. The agent's thread holds it for one message at a
time, and lets whoever waits for it go first. Whether KV can be exchanged with a peer takes longer (up to 0.2 s, of a
Hello as large as it may be), so that is found out before, without the lock, and in a part of the time only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from kvferry.clock import Clock
from kvferry.errors import TransferError
from kvferry.p2p.actions import Action, Connect, Disconnect, OpenPeer, Send
from kvferry.p2p.control import Connected, ControlChannel, ControlSettings
from kvferry.p2p.core import P2PCore
from kvferry.p2p.link import Lost
from kvferry.p2p.messages import CODEC, AnyMessage, Hello
from kvferry.p2p.wire import Address

logger = logging.getLogger(__name__)

T = TypeVar("T")
_LONGEST_WAIT_S = 1.0
_JOIN_S = 5.0
_CHECKING = 0.2  # of the time may go into checks of Hellos
_CHECK_AHEAD_S = 0.1  # of them may be spent at once
_MAX_WAITING_BYTES = 8 << 20


class HelloQueue:
    """Hellos that wait for their check: the latest of each peer, the smallest first; the largest are dropped.

    One need not wait while `may_check`: while checks take less than their part of the time. A flood of Hellos whose
    checks are dear thus delays others, smaller ones least, and takes no more of the time.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._spare_s = _CHECK_AHEAD_S
        self._at_s = clock()
        self._waiting: dict[str, Hello] = {}

    def may_check(self) -> bool:
        """Whether there is time for one more check now."""
        return self.wait_s() <= 0

    def wait_s(self) -> float:
        """How long until there is."""
        now = self._clock()
        self._spare_s = min(_CHECK_AHEAD_S, self._spare_s + _CHECKING * (now - self._at_s))
        self._at_s = now
        return -self._spare_s / _CHECKING

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Whatever is done within counts as a check."""
        begun_s = self._clock()
        try:
            yield
        finally:
            self._spare_s -= self._clock() - begun_s

    def put(self, peer: str, hello: Hello) -> None:
        """Keep it until there is time."""
        self._waiting[peer] = hello
        while sum(map(_size, self._waiting.values())) > _MAX_WAITING_BYTES:
            del self._waiting[max(self._waiting, key=lambda name: _size(self._waiting[name]))]

    def take(self) -> tuple[str, Hello]:
        """The next one; only while there are any."""
        peer = min(self._waiting, key=lambda name: _size(self._waiting[name]))
        return peer, self._waiting.pop(peer)

    def __len__(self) -> int:
        return len(self._waiting)


def _size(hello: Hello) -> int:
    return 1024 + len(hello.geometry) + sum(len(blob) for blobs in hello.transports.values() for blob in blobs)


class P2PAgent:
    """Owns core, channel and thread. ConfigError when the channel cannot listen; nothing is left running then."""

    def __init__(self, settings: ControlSettings, make_core: Callable[[Address], P2PCore], clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._queue = threading.Lock()  # who waits for the other one: it is not taken again past whoever does
        self._hellos = HelloQueue()
        self._news = threading.Event()
        self._events: list[Action] = []
        self._is_closing = False
        self._channel = ControlChannel(settings, CODEC, self._news.set)
        self.address = self._channel.address
        self._core = make_core(self.address)
        self._thread = threading.Thread(target=self._main, name="kvferry-p2p-agent", daemon=True)
        self._thread.start()

    def use(self, call: Callable[[P2PCore, float], T]) -> T:
        """Give the core an input, from any thread: `call(core, now)`. What it raises, this raises."""
        with self._core_held():
            try:
                return call(self._core, self._clock.now())
            finally:
                self._settle()
                self._news.set()  # the next deadline may have come nearer

    def take_events(self) -> list[Action]:
        """What the core wants of the engine, in order."""
        with self._core_held():
            events, self._events = self._events, []
        return events

    @property
    def has_events(self) -> bool:
        """True when `take_events` has something."""
        return bool(self._events)

    def close(self) -> None:
        """Stop thread and channel. Idempotent; bounded."""
        self._is_closing = True
        self._news.set()
        self._thread.join(_JOIN_S)
        self._channel.close()

    def _main(self) -> None:
        while not self._is_closing:
            try:
                self._turn()
            except Exception:  # a thread's main: peers must still be answered
                logger.exception("P2P agent")
                time.sleep(_LONGEST_WAIT_S / 10)

    @contextmanager
    def _core_held(self) -> Iterator[None]:
        with self._queue:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _turn(self) -> None:
        with self._core_held():
            wait_s = self._core.next_deadline() - self._clock.now()
        if self._hellos:
            wait_s = min(wait_s, self._hellos.wait_s())
        if wait_s > 0:
            self._news.wait(min(wait_s, _LONGEST_WAIT_S))
        self._news.clear()
        for peer, item in self._channel.poll():
            if isinstance(item, Hello) and not self._hellos.may_check():
                self._hellos.put(peer, item)
            else:
                self._hear(peer, item)
        if self._hellos and self._hellos.may_check():
            self._hear(*self._hellos.take())
        with self._core_held():
            self._core.tick(self._clock.now())
            self._settle()

    def _hear(self, peer: str, item: AnyMessage | Connected | Lost) -> None:
        if isinstance(item, Hello):
            with self._hellos.checking():
                with self._core_held():
                    check = self._core.check_of(peer, item)
                check()  # the core asks again, and is answered at once
        with self._core_held():
            now = self._clock.now()
            match item:
                case Connected():
                    self._core.peer_connected(peer, now)
                case Lost():
                    # Of those who dialled us it matters where KV moves, and closing that connection is logged.
                    level = logging.DEBUG if peer.startswith("@") else logging.INFO
                    logger.log(level, "the control link to %s is down: %s", peer, item)
                    self._core.peer_lost(peer, str(item), now)
                case _:
                    self._core.message(peer, item, now)
            self._settle()

    def _settle(self) -> None:
        """Carry out what the core wants of the network; keep the rest for the engine."""
        while actions := self._core.take_actions():
            for action in actions:
                if isinstance(action, Connect):
                    self._connect(action.peer)
                elif isinstance(action, Disconnect):
                    self._channel.disconnect(action.peer)
                elif isinstance(action, Send):
                    self._send(action)
                else:
                    if isinstance(action, OpenPeer):
                        self._channel.keep(action.peer)
                    self._events.append(action)

    def _connect(self, peer: str) -> None:
        try:
            self._channel.connect(peer)
        except TransferError as error:
            self._core.peer_lost(peer, str(error), self._clock.now())

    def _send(self, action: Send) -> None:
        try:
            self._channel.send(action.peer, action.message)  # type: ignore[arg-type]  # every message is one of the union
        except TransferError as error:
            logger.warning("to %s: %s", action.peer, error)

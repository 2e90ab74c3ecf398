"""The P2P core and its control channel, on a thread of their own, so that peers are answered during a long forward.

    hooks (scheduler's thread) ── use(...) ──► core ◄── messages, deadlines ── agent's thread ◄── control channel
              ▲                                  │
              └──────── take_events() ◄──────────┴──► Connect, Disconnect, Send: carried out

One lock around the core; everything done under it takes microseconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from kvferry.clock import Clock
from kvferry.errors import TransferError
from kvferry.p2p.actions import Action, Connect, Disconnect, Send
from kvferry.p2p.control import Connected, ControlChannel, ControlSettings, Lost
from kvferry.p2p.core import P2PCore
from kvferry.p2p.messages import CODEC, AnyMessage
from kvferry.p2p.wire import Address

logger = logging.getLogger(__name__)

T = TypeVar("T")
_LONGEST_WAIT_S = 1.0
_JOIN_S = 5.0


class P2PAgent:
    """Owns core, channel and thread. ConfigError when the channel cannot listen; nothing is left running then."""

    def __init__(self, settings: ControlSettings, make_core: Callable[[Address], P2PCore], clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
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
        with self._lock:
            try:
                return call(self._core, self._clock.now())
            finally:
                self._settle()
                self._news.set()  # the next deadline may have come nearer

    def take_events(self) -> list[Action]:
        """What the core wants of the engine, in order."""
        with self._lock:
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

    def _turn(self) -> None:
        with self._lock:
            wait_s = self._core.next_deadline() - self._clock.now()
        if wait_s > 0:
            self._news.wait(min(wait_s, _LONGEST_WAIT_S))
        self._news.clear()
        news = self._channel.poll()
        with self._lock:
            now = self._clock.now()
            for peer, item in news:
                self._hear(peer, item, now)
            self._core.tick(now)
            self._settle()

    def _hear(self, peer: str, item: AnyMessage | Connected | Lost, now: float) -> None:
        match item:
            case Connected():
                self._core.peer_connected(peer, now)
            case Lost():
                logger.info("the control link to %s is down: %s", peer, item)
                self._core.peer_lost(peer, str(item), now)
            case _:
                self._core.message(peer, item, now)

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

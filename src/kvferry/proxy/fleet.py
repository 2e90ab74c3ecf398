"""The engines behind the proxy: who is in rotation, who is how busy, and who takes the next leg."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kvferry.clock import Clock
from kvferry.proxy.breaker import EngineBreaker, State
from kvferry.proxy.config import ProxyConfig
from kvferry.proxy.metrics import ProxyMetrics
from kvferry.proxy.prefixes import PrefixMemory

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Engine:
    """One engine in one role."""

    url: str
    role: str
    breaker: EngineBreaker
    memory: PrefixMemory
    load: int = 0
    """Of prefill engines, pieces of prompts to be computed; of decode engines, requests."""
    num_in_flight: int = 0
    num_begun: int = 0
    held_bytes: int = 0
    """Of its replies that are being read."""
    full_until_s: float = -math.inf
    """It said that it has no room, and when to ask again."""
    has_worked: bool = False
    last_failure: str = "not tried yet"
    """Of the last time it was tried; empty when that worked."""

    def cost(self, hashes: Sequence[int]) -> int:
        """Pieces it would have to compute; at least 1."""
        return 1 + len(hashes) - self.memory.num_known(hashes)


@dataclass(slots=True, eq=False)
class Pair:
    """A prefill and a decode engine, between which KV moves."""

    name: str
    breaker: EngineBreaker
    transfers: bool | None = None
    """Whether the last transfer worked; None: there was none."""
    last_failure: str = "not tried yet"
    """As of an engine."""


@dataclass(slots=True)
class Fleet:
    """All engines. One thread."""

    config: ProxyConfig
    clock: Clock
    metrics: ProxyMetrics
    prefill: list[Engine] = field(init=False)
    decode: list[Engine] = field(init=False)
    pairs: dict[tuple[Engine, Engine], Pair] = field(init=False)
    doubted: set[Engine | Pair] = field(default_factory=set)
    """They answered with an error that may be the request's own: probes shall tell."""
    doubts_came: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.prefill = [self._engine(url, "prefill") for url in self.config.prefill]
        self.decode = [self._engine(url, "decode") for url in self.config.decode]
        self.pairs = {
            (p, d): Pair(f"transfers from {p.url} to {d.url}", self._breaker())
            for p in self.prefill
            for d in self.decode
        }

    def _engine(self, url: str, role: str) -> Engine:
        return Engine(url, role, self._breaker(), PrefixMemory(self.config.prefix_memory_chunks))

    def _breaker(self) -> EngineBreaker:
        config = self.config
        return EngineBreaker(self.clock, config.failure_threshold, config.min_backoff_s, config.max_backoff_s)

    # ---- who takes the next leg -------------------------------------------------------------------------------

    def pick_prefill(self, hashes: Sequence[int], tried: Collection[Engine] = ()) -> Engine | None:
        """The engine that would be done first: what waits there, and what it would have to compute of this prompt.

        `tried` ones come last. None: there is none in rotation that some decode engine can take KV from.
        """
        able = [p for p in self.prefill if p.breaker.is_available and self._partners(p)]
        now_s = self.clock.now()
        return min(
            able,
            key=lambda p: (p.full_until_s > now_s, p in tried, p.load + p.cost(hashes), p.num_begun),
            default=None,
        )

    def pick_decode(self, prefill: Engine | None, tried: Collection[Engine] = ()) -> Engine | None:
        """The least busy one that can take KV from `prefill` (None: no KV is to be taken); `tried` ones come last."""
        able = self._partners(prefill) if prefill else [d for d in self.decode if d.breaker.is_available]
        now_s = self.clock.now()
        return min(able, key=lambda d: (d.full_until_s > now_s, d in tried, d.load, d.num_begun), default=None)

    def _partners(self, prefill: Engine) -> list[Engine]:
        return [d for d in self.decode if d.breaker.is_available and self.pairs[prefill, d].breaker.is_available]

    @contextmanager
    def using(self, engine: Engine, cost: int, pair: Pair | None = None) -> Iterator[None]:
        """While a leg is under way there."""
        breakers = [engine.breaker] if pair is None else [engine.breaker, pair.breaker]
        trials = [(breaker, breaker.begin()) for breaker in breakers]
        engine.load += cost
        engine.num_in_flight += 1
        engine.num_begun += 1
        try:
            yield
        finally:
            engine.load -= cost
            engine.num_in_flight -= 1
            for breaker, trial in trials:
                breaker.abandoned(trial)

    # ---- what became of it ------------------------------------------------------------------------------------

    def worked(self, engine: Engine) -> None:
        """It answered."""
        if engine.breaker.state is not State.CLOSED:
            logger.info("%s engine %s is back in rotation", engine.role, engine.url)
        engine.breaker.succeeded()
        engine.has_worked, engine.last_failure = True, ""

    def failed(self, engine: Engine, why: str, *, is_gone: bool = False) -> None:
        """It did not, or not as it should; `is_gone`: it could not even be reached."""
        engine.last_failure = why
        if is_gone:
            engine.memory.clear()  # with its process, its cache
        if engine.breaker.failed():
            logger.warning("%s engine %s is out of rotation: %s", engine.role, engine.url, why)

    def doubt(self, one: Engine | Pair, why: str) -> None:
        """It answered, with an error: neither a success nor a failure, but the next probe comes soon."""
        one.last_failure = why
        self.doubted.add(one)
        self.doubts_came.set()

    def full(self, engine: Engine, retry_after_s: float) -> None:
        """It works and has no room: neither a success nor a failure."""
        engine.full_until_s = self.clock.now() + retry_after_s

    def until_room_s(self, full: Engine, prefill: Engine | None) -> float:
        """Seconds until an engine of the role of `full` may be asked; `prefill`: it is to take KV from there."""
        if full.role == "prefill":
            able = [p for p in self.prefill if p.breaker.is_available and self._partners(p)]
        else:
            able = self._partners(prefill) if prefill else [d for d in self.decode if d.breaker.is_available]
        return max(0.0, min((engine.full_until_s for engine in {full, *able}), default=0.0) - self.clock.now())

    def transferred(self, pair: Pair) -> None:
        """KV came over from one engine to the other."""
        if pair.breaker.state is not State.CLOSED:
            logger.info("%s are back in rotation", pair.name)
        pair.transfers, pair.last_failure = True, ""
        pair.breaker.succeeded()

    def not_transferred(self, pair: Pair, why: str, *, is_fault: bool = True) -> None:
        """It did not; `is_fault`: that counts towards taking the pair out of rotation."""
        pair.transfers, pair.last_failure = False, why
        if is_fault and pair.breaker.failed():
            logger.warning("%s are out of rotation: %s", pair.name, why)

    def probe_refused(self, pair: Pair, why: str) -> None:
        """Which says nothing of transfers, but why nobody knows how they do."""
        if pair.last_failure != why:
            logger.warning("%s", why)
        pair.last_failure = why

    # ---- how it stands ----------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """True when a request would be answered: strict, when KV was seen to move between two engines in rotation.

        Without probes, two engines between which nothing has failed yet are enough.
        """
        return any(self._is_ready(*engines, pair) for engines, pair in self.pairs.items())

    def pairs_to_probe(self) -> list[tuple[Engine, Engine]]:
        """All but those that are ready, busy and not doubted: requests tell there, and probes would wait behind."""
        return [
            (p, d)
            for (p, d), pair in self.pairs.items()
            if not (p.num_in_flight or d.num_in_flight)
            or not self._is_ready(p, d, pair)
            or not self.doubted.isdisjoint((p, d, pair))
        ]

    def _is_ready(self, prefill: Engine, decode: Engine, pair: Pair) -> bool:
        if any(breaker.state is not State.CLOSED for breaker in (prefill.breaker, decode.breaker, pair.breaker)):
            return False
        if not self.config.probe_interval_s:
            return not (self.config.strict and pair.transfers is False)
        return bool(pair.transfers) if self.config.strict else prefill.has_worked and decode.has_worked

    @property
    def wait_s(self) -> int:
        """Whole seconds until something that is out of rotation may be tried; at least 1."""
        breakers = [engine.breaker for engine in (*self.prefill, *self.decode)]
        breakers += [pair.breaker for pair in self.pairs.values()]
        return max(1, math.ceil(min((b.wait_s for b in breakers if b.wait_s), default=1)))

    def problems(self) -> list[str]:
        """Who is not in rotation, and why."""
        engines = [e for e in (*self.prefill, *self.decode) if e.breaker.state is not State.CLOSED]
        pairs = [pair for pair in self.pairs.values() if pair.breaker.state is not State.CLOSED]
        return [f"{e.role} engine {e.url} is {e.breaker.state.value}: {e.last_failure}" for e in engines] + [
            f"{pair.name} are {pair.breaker.state.value}: {pair.last_failure}" for pair in pairs
        ]

    def describe(self) -> dict[str, Any]:
        """The state of all of them, for people."""
        return {
            "engines": [
                {"url": engine.url, "role": engine.role, "state": engine.breaker.state.value}
                | ({"last_failure": engine.last_failure} if engine.last_failure else {})
                for engine in (*self.prefill, *self.decode)
            ],
            "pairs": [
                {"prefill": p.url, "decode": d.url, "state": pair.breaker.state.value, "transfers": pair.transfers}
                | ({"last_failure": pair.last_failure} if pair.last_failure else {})
                for (p, d), pair in self.pairs.items()
            ],
        }

    def enter_metrics(self) -> None:
        """Set the gauges."""
        for engine in (*self.prefill, *self.decode):
            is_up = engine.breaker.state is State.CLOSED
            self.metrics.engine_up.labels(engine.role, engine.url).set(is_up)
            self.metrics.engine_in_flight.labels(engine.role, engine.url).set(engine.num_in_flight)
        for (prefill, decode), pair in self.pairs.items():
            self.metrics.pair_transfers.labels(prefill.url, decode.url).set(bool(pair.transfers))

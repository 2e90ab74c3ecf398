"""Asks the server what it has, on a thread of its own, so that nobody in the engine waits for it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from kvferry.errors import HostError, TransferError
from kvferry.lmcache.config import LMCacheConfig
from kvferry.lmcache.wire import ServerConnection, ServerKey

logger = logging.getLogger(__name__)

RETRY_S = 2.0
"""How often a server that is gone is looked for again."""
RETRY_TIMEOUT_S = 1.0
_POLL_S = 0.002
_MAX_UNSENT = 10_000


@dataclass(slots=True)
class _Question:
    key: ServerKey
    found: int | None = None
    is_abandoned: bool = False


class _LookupOrder(NamedTuple):
    operation: str
    key: ServerKey
    question: _Question | None = None


class Lookups:
    """One engine's questions: `begin`, then `result` until it is not None, then `release` what will not be read, and
    `end` when nobody will read any more. None of these waits.

    What a lookup finds stays locked at the server until it is read or released (else for minutes). While the server
    is gone every answer is "nothing".
    """

    def __init__(self, config: LMCacheConfig, chunk_tokens: int) -> None:
        self._config = config
        self._chunk_tokens = chunk_tokens
        self._connection = ServerConnection(config.url)
        self._orders: queue.SimpleQueue[_LookupOrder | None] = queue.SimpleQueue()
        self._num_put = self._num_done = 0
        self._is_closing = False
        self._asked: dict[str, _Question] = {}
        """By request id, until the answer is told. The caller's; all else but `is_down` is the thread's."""
        self._lock = threading.Lock()
        self._pending: list[_Question] = []
        self._unsent: deque[_LookupOrder] = deque(maxlen=_MAX_UNSENT)
        """Releases and ends from the time when the server was gone."""
        self._next_try_s = 0.0
        self._next_beat_s = 0.0
        self.is_down = False
        self._thread = threading.Thread(target=self._main, name="kvferry-lmcache-lookup", daemon=True)
        self._thread.start()

    def begin(self, key: ServerKey) -> None:
        """Ask for the longest prefix of the key's range that the server has, and lock it for all workers."""
        question = self._asked[key.request_id] = _Question(key, 0 if self.is_down else None)
        if question.found is None:
            self._put(_LookupOrder("lookup", key, question))

    def result(self, request_id: str) -> int | None:
        """Chunks that were found, told once: from now on they are the caller's to release. None: not known yet."""
        found = self._asked[request_id].found
        if found is not None:
            del self._asked[request_id]
        return found

    def release(self, key: ServerKey) -> None:
        """Unlock the key's range of what a lookup found."""
        if key.start < key.end:
            self._put(_LookupOrder("free_lookup_locks", key))

    def end(self, key: ServerKey) -> None:
        """Nobody will ask again; what a lookup has found, or finds, without having told it is released."""
        question = self._asked.pop(key.request_id, None)
        if question is not None:
            with self._lock:
                question.is_abandoned = True
            self.release(key.part(0, (question.found or 0) * self._chunk_tokens, None))
        self._put(_LookupOrder("end_session", key))

    def _put(self, order: _LookupOrder) -> None:
        self._num_put += 1
        self._orders.put(order)

    @property
    def is_busy(self) -> bool:
        """True while the server has not been told all. It should be before the workers unregister: with the last of
        them it forgets the model's layout, and then it answers neither releases nor ends."""
        return not self.is_down and self._num_done < self._num_put

    def close(self) -> None:
        """Stop; blocks until what was ordered has been told, or one call has had no answer."""
        self._is_closing = True
        self._orders.put(None)
        self._thread.join()

    # ---- the thread -------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while self._turn():
                pass
        except Exception:  # thread main: the cache is lost, the engine lives
            logger.exception("LMCache lookups have ended: no further lookup finds KV")
            self._lose("the thread has ended")
        finally:
            self._connection.close()

    def _turn(self) -> bool:
        order: _LookupOrder | None = None
        try:
            wait_s = _POLL_S if self._pending else min(RETRY_S, self._config.heartbeat_interval)
            if (order := self._orders.get(timeout=wait_s)) is None:
                return False
        except queue.Empty:
            pass
        try:
            if self.is_down:
                self._look_for_server()
            if order is not None and order.question is None:
                self._unsent.append(order)
            while self._unsent and not self.is_down:
                self._run(self._unsent.popleft())
            if order is not None and order.question is not None and not self.is_down:
                self._run(order)
            self._poll()
            self._beat()
        except TransferError as err:
            self._lose(str(err))
        self._num_done += order is not None
        if self.is_down and order is not None and order.question is not None:
            self._answer(order.question, 0)
        return True

    def _run(self, order: _LookupOrder) -> None:
        operation, key, question = order
        timeout_s = self._config.mq_timeout if question is None else self._config.lookup_timeout_s
        timeout_s = min(timeout_s, RETRY_TIMEOUT_S) if self._is_closing else timeout_s
        if operation != "end_session":
            self._connection.call(operation, key, key.world_size, returns=None, timeout_s=timeout_s)
        elif all(pending.key.request_id != key.request_id for pending in self._pending):
            self._connection.call(operation, key.request_id, returns=None, timeout_s=timeout_s)
        if question is not None:
            self._pending.append(question)

    def _poll(self) -> None:
        for question in list(self._pending):
            name, timeout_s = question.key.request_id, self._config.lookup_timeout_s
            found = self._connection.call("query_prefetch_status", name, returns=int | None, timeout_s=timeout_s)
            if found is None:
                continue
            self._pending.remove(question)
            found = max(0, min(found, question.key.end // self._chunk_tokens))
            if not self._answer(question, found):
                if found:
                    key = question.key.part(0, found * self._chunk_tokens, None)
                    self._run(_LookupOrder("free_lookup_locks", key))
                self._run(_LookupOrder("end_session", question.key))

    def _answer(self, question: _Question, found: int) -> bool:
        """False when nobody wants to know."""
        with self._lock:
            question.found = found
            return not question.is_abandoned

    def _beat(self) -> None:
        if not self.is_down and time.monotonic() >= self._next_beat_s:
            self._connection.call("ping", None, returns=bool, timeout_s=self._config.mq_timeout)
            self._next_beat_s = time.monotonic() + self._config.heartbeat_interval

    def _lose(self, why: str) -> None:
        if not self.is_down:
            logger.warning("no lookups go to the LMCache server until it answers again: %s", why)
        self.is_down = True
        self._next_try_s = time.monotonic() + RETRY_S
        for question in self._pending:
            self._answer(question, 0)
        self._pending.clear()

    def _look_for_server(self) -> None:
        if time.monotonic() < self._next_try_s:
            return
        self._next_try_s = time.monotonic() + RETRY_S
        try:
            chunk_tokens = self._connection.probe(timeout_s=RETRY_TIMEOUT_S)
        except HostError:
            return
        if chunk_tokens != self._chunk_tokens:
            logger.error("the LMCache server now has chunks of %d tokens, not %d", chunk_tokens, self._chunk_tokens)
            return
        logger.info("LMCache answers again")
        self.is_down = False

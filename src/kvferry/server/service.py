"""Between asyncio and the engine: one thread steps it, coroutines only queue orders and read what comes of them.

The engine is not thread-safe and its steps block, so everything that touches it runs on its thread, between steps, as
an order from a queue. After each step all news go to the event loop in one call. The number of unfinished requests is
bounded: who comes beyond it is refused at once, since a queue that only grows helps nobody.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from kvferry.engine.config import SamplingParams
from kvferry.engine.llm import LLM
from kvferry.engine.outputs import RequestOutput
from kvferry.errors import KVFerryError
from kvferry.metrics import Metrics
from kvferry.server.observe import EngineObserver

logger = logging.getLogger(__name__)

T = TypeVar("T")
_REST_S = 0.0005  # after a step that did nothing: others must move first
_IDLE_STEP_S = 0.05  # an idle engine steps now and then, for its connector writes, reads and checks meanwhile


class Overloaded(KVFerryError):
    """The server has as many unfinished requests as it may have; nothing was queued."""


class EngineStopped(KVFerryError):
    """The engine is stopping, or its thread has ended; the text says why."""


class EngineFailed(EngineStopped):
    """The engine's thread has ended by a fault while it had the request, which may be the cause."""


@dataclass(frozen=True, slots=True)
class EngineJob:
    """One prompt to complete. `params.output_kind` must be DELTA."""

    prompt_token_ids: list[int]
    params: SamplingParams
    cache_salt: str | None = None


class Generation:
    """The outputs of one client's jobs as they come: an async iterator of (index of the job, output), once through.

    Raises EngineStopped when the engine ends first. `close` it in any case. Belongs to the event loop's thread.
    """

    def __init__(self, service: EngineService, num_jobs: int, name: str) -> None:
        self._service = service
        self._queue: asyncio.Queue[tuple[str, RequestOutput] | EngineStopped] = asyncio.Queue()
        self._indexes = {name if num_jobs == 1 else f"{name}-{index}": index for index in range(num_jobs)}
        self._unfinished = set(self._indexes)

    @property
    def request_ids(self) -> list[str]:
        """The engine's request ids, one per job: the name, or with several jobs `name-0`, `name-1` and so on."""
        return list(self._indexes)

    @property
    def is_done(self) -> bool:
        """True when every job has finished (or this was closed)."""
        return not self._unfinished

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        if not self._unfinished:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, EngineStopped):
            raise item
        request_id, output = item
        if output.finished:
            self._unfinished.discard(request_id)
        return self._indexes[request_id], output

    def put(self, item: tuple[str, RequestOutput] | EngineStopped) -> None:
        """For the service: news of a job."""
        self._queue.put_nowait(item)

    def close(self) -> None:
        """Abort what has not finished. Idempotent, never waits."""
        self._unfinished.clear()
        self._service.release(self.request_ids)


class EngineService:
    """Owns the engine's thread. All methods are for the event loop's thread, in which `start` was called."""

    def __init__(self, llm: LLM, metrics: Metrics, max_unfinished: int, log_interval_s: float = 0) -> None:
        self.max_unfinished = max_unfinished
        self.on_failure: Callable[[str], None] = lambda reason: None
        """Called once on the event loop's thread, with the reason, when a fault has ended the engine."""
        self._llm = llm
        self._metrics = metrics
        self._observer = EngineObserver(llm, metrics, log_interval_s=log_interval_s)
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="kvferry-engine", daemon=True)
        self._streams: dict[str, Generation] = {}
        self._pending: set[Future[Any]] = set()
        self._refusal: str | None = None
        self._has_ended = self._has_failed = False
        self._is_stopping = False  # read and written by the engine's thread only

    def start(self) -> None:
        """Start stepping. Call once, in a running event loop."""
        self._loop = asyncio.get_running_loop()
        self._metrics.set("kvferry:engine_up", 1)
        self._thread.start()

    # ---- for coroutines ---------------------------------------------------------------------------------------

    @property
    def refusal(self) -> str | None:
        """Why nothing can be submitted any more; None while it can."""
        return self._refusal

    @property
    def has_ended(self) -> bool:
        """True once the engine's thread has ended, by order or by a fault."""
        return self._has_ended

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not finished."""
        return len(self._streams)

    @property
    def degraded_tiers(self) -> list[str]:
        """Tiers below the engine that could not be written to at its last step."""
        return self._observer.degraded_tiers

    async def submit(self, jobs: Sequence[EngineJob], name: str | None = None) -> Generation:
        """Queue all jobs or none; returns when the engine has taken them, after the step under way.

        `name` is what the client will know them by; it must be new.
        Raises Overloaded, EngineStopped, and ConfigError when one of them cannot run.
        """
        if self._refusal is not None:
            self._metrics.add("vllm:admission_rejections", 1, "stopping")
            raise EngineStopped(self._refusal)
        if len(self._streams) + len(jobs) > self.max_unfinished:
            self._metrics.add("vllm:admission_rejections", 1, "queue_full")
            raise Overloaded(
                f"the server has {len(self._streams)} unfinished requests of at most {self.max_unfinished}"
            )
        generation = Generation(self, len(jobs), name or f"req-{secrets.token_hex(8)}")
        for request_id in generation.request_ids:
            self._streams[request_id] = generation
        try:
            await self.call(lambda: self._add(generation.request_ids, jobs))
        except BaseException:
            generation.close()
            raise
        return generation

    async def call(self, order: Callable[[], T]) -> T:
        """Run `order` on the engine's thread between two steps; its result or exception."""
        if self._refusal is not None:
            raise EngineStopped(self._refusal)
        future: Future[T] = Future()
        self._pending.add(future)
        self._orders.put(lambda: _run(order, future))
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._pending.discard(future)

    async def reset_prefix_cache(self, reset_connector: bool) -> bool:
        """`LLM.reset_prefix_cache` between two steps."""
        return await self.call(lambda: self._llm.reset_prefix_cache(reset_connector))

    async def explain(self, name: str) -> list[dict[str, Any]]:
        """`LLM.explain` of the request of this id, or of all that were submitted under this name; [] when unknown."""
        names = [name, *(f"{name}-{index}" for index in range(self.max_unfinished))]
        found = await self.call(lambda: [self._llm.explain(request_id) for request_id in names])
        return [explanation for explanation in found if explanation is not None]

    async def live_requests(self) -> list[dict[str, Any]]:
        """`LLM.live_requests` between two steps."""
        return await self.call(self._llm.live_requests)

    def release(self, request_ids: Sequence[str]) -> None:
        """Forget these requests and abort those that have not finished; never waits."""
        for request_id in request_ids:
            if self._streams.pop(request_id, None) is not None and not self._has_ended:
                self._orders.put(partial(self._llm.abort_request, request_id))

    def refuse_new(self, reason: str) -> None:
        """From now on `submit` raises EngineStopped; what is under way goes on."""
        self._refusal = self._refusal or reason

    async def close(self) -> None:
        """Abort what is unfinished, shut the engine down (its connector writes what it owes) and end the thread."""
        self.refuse_new("the server is stopping")
        self._orders.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    # ---- on the engine's thread -------------------------------------------------------------------------------

    def _main(self) -> None:
        reason = "the server is stopping"
        try:
            while True:
                self._take_orders()
                if self._is_stopping:
                    break
                self._step()
        except Exception as err:  # thread main: clients must hear of it
            logger.exception("the engine failed; the server ends")
            reason = f"the engine failed: {type(err).__name__}: {err}"
            self._has_failed = True
        self._metrics.set("kvferry:engine_up", 0)
        self._tell(lambda: self._end(reason))
        try:
            self._llm.shutdown()
        except Exception:  # thread main: nobody is left to raise it to
            logger.exception("the engine could not be shut down in good order")

    def _take_orders(self) -> None:
        """Carry out all orders that wait; with nothing to step for, wait for one."""
        patience_s = self._patience_s()
        try:
            if patience_s != 0:
                self._orders.get(timeout=patience_s)()
            while True:
                self._orders.get_nowait()()
        except queue.Empty:
            pass

    def _patience_s(self) -> float | None:
        """How long to wait for an order before the next step; None: for ever."""
        llm = self._llm
        if llm.scheduler.running or llm.scheduler.waiting or llm.scheduler.loaded:
            return 0 if llm.has_moved else _REST_S
        if llm.has_requests():
            return _REST_S
        llm.check_when_idle()
        return None if llm.connector is None else _IDLE_STEP_S

    def _step(self) -> None:
        if not self._llm.has_requests() and self._llm.connector is None:
            return
        outputs = self._llm.step()
        self._observer.step_done(outputs)
        if outputs:
            self._tell(lambda: self._deliver(outputs))

    def _add(self, request_ids: Sequence[str], jobs: Sequence[EngineJob]) -> None:
        added: list[str] = []
        try:
            for request_id, job in zip(request_ids, jobs, strict=True):
                self._llm.add_request(
                    job.prompt_token_ids, job.params, cache_salt=job.cache_salt, request_id=request_id
                )
                added.append(request_id)
        except BaseException:
            for request_id in added:
                self._llm.abort_request(request_id)
            raise

    def _stop(self) -> None:
        self._is_stopping = True

    def _tell(self, news: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(news)
        except RuntimeError:  # the loop is closed: nobody listens
            logger.debug("news came after the end of the event loop")

    # ---- back on the loop's thread ----------------------------------------------------------------------------

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            generation = self._streams.get(output.request_id)
            if generation is not None:
                generation.put((output.request_id, output))
                if output.finished:
                    del self._streams[output.request_id]

    def _end(self, reason: str) -> None:
        self._refusal, self._has_ended = reason, True
        for generation in set(self._streams.values()):
            generation.put(EngineFailed(reason) if self._has_failed else EngineStopped(reason))
        self._streams.clear()
        for future in self._pending:  # of orders that nobody will carry out
            if not future.done():
                future.set_exception(EngineStopped(reason))
        if self._has_failed:
            self.on_failure(reason)


def _run(order: Callable[[], T], future: Future[T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(order())
        except Exception as err:  # belongs to whoever waits for it
            future.set_exception(err)

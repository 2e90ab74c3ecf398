"""A request's way: a prefill leg, a decode leg with what the first one answered, and both again where that helps.

Nothing is tried again once the client has been sent anything, and a leg's connection is closed before the next one
begins. What the prefill engine handed over is used again only when the decode engine never took it; else it may be
spent, and the prefill engine is asked anew. What nobody will fetch any more is given back, and its blocks come free.

An engine that is full has not failed: the hand-over is kept, another engine is asked, and if all are full, the request
waits for as long as they say. A request during which two engines went away, or fell silent, is not tried a third time:
it may be what ends them. OpenAI's clients are told not to send it again, which they would do by themselves.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Literal
from urllib.parse import urlsplit

import httpx2

from kvferry.clock import Clock
from kvferry.http import ApiError
from kvferry.proxy.bodies import ClientCall, Params, SignPeer, decode_body, prefill_body, release_body
from kvferry.proxy.breaker import State
from kvferry.proxy.config import ProxyConfig
from kvferry.proxy.events import DONE, end_of, verdicts, whole_events
from kvferry.proxy.fleet import Engine, Fleet, Pair
from kvferry.proxy.legs import EngineFull, HandOver, LegFailed, LegRefused, LegReply, ended_engines
from kvferry.proxy.metrics import ProxyMetrics
from kvferry.proxy.prefixes import piece_hashes
from kvferry.proxy.replies import (
    NO_TOKEN,
    EngineError,
    ReplyVerdict,
    error_of,
    holding,
    is_object,
    judge_reply,
    one_line,
)

logger = logging.getLogger(__name__)

Timeout = Literal["prefill_timeout_s", "decode_timeout_s", "answer_timeout_s", "probe_timeout_s"]
"""The setting that limits a leg; the option of that name sets it."""
_KEEPALIVE_S = 2.0  # below uvicorn's 5 s: a connection that the engine is about to close is not used
_RETRY_AFTER_S = 1.0  # where a full engine does not say when to come again
_MIN_WAIT_S = 0.1
_MAX_WAIT_S = 60.0  # a full engine is asked again after so long, whatever it said
_NUM_RELEASES = 5  # tries to give a hand-over back to a full engine, one second apart
_CLOSE_S = 2.0  # releases under way may take, when the proxy ends
_DRAIN_S = 10.0  # for the end of a stream behind [DONE], so that its connection can be used again
_MAX_DRAIN_BYTES = 1 << 16
_MAX_EVENT_BYTES = 16 << 20


@dataclass(slots=True)
class _Attempts:
    hashes: list[int]
    is_split: bool
    begun_s: float
    tried: set[Engine] = field(default_factory=set)
    hand_over: HandOver | None = None
    has_lapsed: bool = False
    """Whether a hand-over was given up because all decode engines were full for longer than it is kept."""
    deaths: list[LegFailed] = field(default_factory=list)


@dataclass(slots=True)
class _DecodeLeg:
    engine: Engine
    pair: Pair | None
    """None when no KV is to be transferred."""
    hand_over: HandOver | None
    request_id: str
    timeout: Timeout
    has_recomputed: bool = False
    has_begun: bool = False
    """Whether its stream has said more than who speaks."""


class Relay:
    """Carries requests. One event loop; `aclose` at the end."""

    def __init__(
        self,
        config: ProxyConfig,
        fleet: Fleet,
        metrics: ProxyMetrics,
        clock: Clock,
        sign_peer: SignPeer | None = None,
        *,
        is_prober: bool = False,
    ) -> None:
        """`is_prober`: it carries probes, which tell whose an error is that an engine answers."""
        self._leaves_to_probes = bool(config.probe_interval_s) and not is_prober
        self._is_prober = is_prober
        self._config = config
        self._fleet = fleet
        self._metrics = metrics
        self._clock = clock
        self._sign_peer = sign_peer
        limits = httpx2.Limits(keepalive_expiry=_KEEPALIVE_S)
        # An engine's cookies are for one client, and this one carries the requests of all.
        no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))
        self._releases: set[asyncio.Task[None]] = set()
        self._max_event_bytes = min(_MAX_EVENT_BYTES, config.max_reply_bytes)
        self._client = httpx2.AsyncClient(limits=limits, trust_env=False, follow_redirects=False, cookies=no_cookies)

    async def aclose(self) -> None:
        """Give back what is to be given back, as far as that is soon done, and close idle connections."""
        if self._releases:
            _, late = await asyncio.wait(self._releases, timeout=_CLOSE_S)
            for release in late:
                release.cancel()
        await self._client.aclose()

    async def open(self, call: ClientCall) -> LegReply:
        """A reply whose first token, or whole content, is there. Raises ApiError."""
        why_whole = call.whole_because
        if why_whole is not None:
            if self._config.strict:
                raise ApiError(
                    400, f"{why_whole}: cannot be split into a prefill and a decode leg; send one request for each, "
                    "or start the proxy with --no-strict, which lets the decode engine compute the prompt",
                )  # fmt: skip
            self._recomputed("not_split")
        attempts = _Attempts(piece_hashes(call.body), why_whole is None, self._clock.now())
        try:
            return await self._try_until_answered(call, attempts)
        except LegRefused as refused:
            self.give_back(attempts.hand_over)
            return refused.reply
        except BaseException:  # also when the client has left
            self.give_back(attempts.hand_over)
            raise

    async def _try_until_answered(self, call: ClientCall, attempts: _Attempts) -> LegReply:
        number = 1
        while True:
            try:
                return await self._attempt(call, attempts)
            except EngineFull as full:
                await self._wait_for_room(full, attempts)
            except LegFailed as failure:
                self._check_retry(failure, attempts, number)
                number += 1
                if failure.engine.role == "prefill" and number == self._config.max_attempts:
                    self._skip_prefill(attempts)

    def _check_retry(self, failure: LegFailed, attempts: _Attempts, number: int) -> None:
        """Note the failure of attempt `number`; ApiError when nothing is to be tried any more."""
        if failure.is_death:
            attempts.deaths.append(failure)
        if len(attempts.deaths) > 1:
            raise ended_engines(attempts.deaths) from failure
        is_late = self._clock.now() - attempts.begun_s >= self._config.retry_deadline_s
        if is_late or number == self._config.max_attempts:
            raise failure.for_client(number) from failure
        self._note_retry(failure, attempts)
        if failure.was_taken:
            self.give_back(attempts.hand_over)
            attempts.hand_over = None

    def _note_retry(self, failure: LegFailed, attempts: _Attempts) -> None:
        logger.info("%s engine %s: %s; trying again", failure.engine.role, failure.engine.url, failure.why)
        self._metrics.retries.labels(failure.engine.role).inc()
        attempts.tried.add(failure.engine)

    async def _wait_for_room(self, full: EngineFull, attempts: _Attempts) -> None:
        """Return when some engine may have room for the leg; ApiError when that would be too late.

        The hand-over is kept meanwhile. When it has grown too old for that, there is one new prefill, not two.
        """
        hand_over, now_s = attempts.hand_over, self._clock.now()
        wait_s = self._fleet.until_room_s(full.engine, hand_over.engine if hand_over else None)
        if now_s + wait_s - attempts.begun_s > self._config.retry_deadline_s:
            if full.engine.role == "decode" or self._config.strict:
                raise full.for_client() from full
            self._skip_prefill(attempts)
            return
        if hand_over is not None and now_s + wait_s - hand_over.made_s > self._config.hand_over_s:
            if attempts.has_lapsed:
                raise full.for_client() from full
            self.give_back(hand_over)
            attempts.has_lapsed, attempts.hand_over = True, None
        self._note_retry(full, attempts)
        await asyncio.sleep(wait_s)

    def _skip_prefill(self, attempts: _Attempts) -> None:
        """Not strict, an answer without any prefill engine is better than none."""
        if not self._config.strict:
            attempts.is_split = False
            self._recomputed("no_prefill_engine")

    async def _attempt(self, call: ClientCall, attempts: _Attempts) -> LegReply:
        if attempts.is_split and attempts.hand_over is None:
            prefill = self._fleet.pick_prefill(attempts.hashes, attempts.tried)
            if prefill is not None:
                attempts.hand_over = await self.prefill(call, prefill, attempts.hashes, "prefill_timeout_s")
            elif self._config.strict:
                raise self._none_available("prefill")
            else:
                self._skip_prefill(attempts)
        decode = self._fleet.pick_decode(attempts.hand_over.engine if attempts.hand_over else None, attempts.tried)
        if decode is None:
            raise self._none_available("decode")
        timeout: Timeout = "decode_timeout_s" if call.is_stream else "answer_timeout_s"
        return await self.decode(call, decode, attempts.hand_over, timeout)

    def _none_available(self, role: str) -> ApiError:
        problems = "; ".join(self._fleet.problems())
        return ApiError(
            503, f"no {role} engine is in rotation that works with one of the other role ({problems}). The "
            "proxy tries these engines again; /ready shows the state of all",
            code="no_engine", headers={"Retry-After": str(self._fleet.wait_s)},
        )  # fmt: skip

    # ---- legs -------------------------------------------------------------------------------------------------

    async def prefill(self, call: ClientCall, engine: Engine, hashes: list[int], timeout: Timeout) -> HandOver:
        """Let one engine prefill. Raises LegFailed, strict also when it hands nothing over; Refused."""
        hand_over = HandOver(call, engine, uuid.uuid4().hex, None)
        try:
            hand_over.params = await self._prefilled(call, engine, hashes, timeout, hand_over)
        except asyncio.CancelledError:  # its answer may have been on the way
            self.give_back(hand_over)
            raise
        hand_over.made_s, hand_over.is_given_back = self._clock.now(), hand_over.params is None
        return hand_over

    async def _prefilled(
        self, call: ClientCall, engine: Engine, hashes: list[int], timeout: Timeout, hand_over: HandOver
    ) -> Params | None:
        async with AsyncExitStack() as stack:
            stack.enter_context(self._fleet.using(engine, engine.cost(hashes)))
            engine.memory.remember(hashes)  # at once: what comes with the same prefix meanwhile should follow
            begun_s = self._clock.now()
            async with self._deadline(engine, timeout):
                response = await self._send(engine, call, prefill_body(call, hand_over.transfer_id), stack)
                hand_over.hosts = _hosts(engine, response)
                verdict = self._judge(engine, await self._content(engine, response))
            self._metrics.leg_seconds.labels("prefill").observe(self._clock.now() - begun_s)
        if verdict.error is not None:
            raise self._failed(engine, verdict.error, is_death=verdict.is_death, is_answer=not verdict.is_death)
        if verdict.hand_over is not None and verdict.hand_over.get("transfer_id") not in (None, hand_over.transfer_id):
            raise self._failed(engine, "its kv_transfer_params have the transfer_id of another request")
        if verdict.hand_over is None:
            if self._config.strict and verdict.not_handed_over:
                self._fleet.worked(engine)
                raise ApiError(
                    400, f"prefill engine {engine.url} hands over no KV for this request: {verdict.not_handed_over}; "
                    "start the proxy with --no-strict, which lets the decode engine compute the prompt",
                    code="not_handed_over",
                )  # fmt: skip
            if self._config.strict:
                raise self._failed(
                    engine, "it answered without kv_transfer_params that hand KV over: start it with a P2P connector "
                    "(kv_role kv_producer or kv_both), or the proxy with --no-strict",
                )  # fmt: skip
            self._recomputed("no_params")
        self._fleet.worked(engine)
        return verdict.hand_over

    async def decode(self, call: ClientCall, engine: Engine, hand_over: HandOver | None, timeout: Timeout) -> LegReply:
        """Let one engine decode, up to a stream's first token. Raises LegFailed, Refused; ApiError for a recompute."""
        params = hand_over.params if hand_over else None
        pair = self._fleet.pairs[hand_over.engine, engine] if hand_over is not None and params else None
        leg = _DecodeLeg(engine, pair, hand_over, call.headers.get("X-Request-Id", ""), timeout)
        ids = (hand_over.transfer_id, hand_over.hosts) if hand_over else ("", ())
        content = decode_body(call, params, ids[0], self._sign_peer, ids[1])
        async with AsyncExitStack() as stack:
            stack.enter_context(self._fleet.using(engine, 1, pair))
            begun_s = self._clock.now()
            async with self._deadline(engine, timeout):
                response = await self._send(engine, call, content, stack, pair)
                if call.is_stream and response.headers.get("content-type", "").startswith("text/event-stream"):
                    reply = await self._begin_stream(leg, response, stack)
                else:
                    data = await self._content(engine, response)
                    self._check(leg, self._judge(engine, data))
                    if call.is_stream:
                        raise self._failed(engine, "it answered a request for a stream with something else")
                    reply = LegReply(200, "application/json", data, outcome="ok")
            self._fleet.worked(engine)
            if pair is not None and not leg.has_recomputed:
                self._fleet.transferred(pair)
            self._metrics.leg_seconds.labels("decode").observe(self._clock.now() - begun_s)
            reply.stack = stack.pop_all()
        return reply

    async def _begin_stream(self, leg: _DecodeLeg, response: httpx2.Response, stack: AsyncExitStack) -> LegReply:
        events = await stack.enter_async_context(aclosing(self._judged(leg, response)))
        held = b""
        try:
            with holding(leg.engine, self._max_event_bytes) as hold:
                async for news in events:
                    held += news
                    hold(len(held))
                    if leg.has_begun:
                        break
        except ValueError as err:
            raise self._failed(leg.engine, f"its stream does not come to an answer: {err}") from err
        reply = LegReply(200, "text/event-stream")
        reply.events = await stack.enter_async_context(aclosing(self._pass_on(leg, reply, held, events)))
        return reply

    async def _judged(self, leg: _DecodeLeg, response: httpx2.Response) -> AsyncGenerator[bytes]:
        """A stream's whole events, unchanged. LegFailed or ApiError where they break off, or say what ends them.

        Nothing is held while the client is slow. What comes behind [DONE] is nobody's.
        """
        try:
            with holding(leg.engine, self._max_event_bytes) as hold:
                async with aclosing(response.aiter_raw()) as pieces, aclosing(whole_events(pieces, hold)) as events:
                    while True:
                        async with self._deadline(leg.engine, leg.timeout):
                            news = await anext(events, b"")
                        end = end_of(news)
                        for verdict in verdicts(news[:end]):
                            self._check(leg, verdict)
                            leg.has_begun |= verdict.has_content
                        leg.has_begun |= end is not None
                        if news:
                            yield news[:end]
                        if end is not None:
                            await self._drain(pieces)
                            return
                        if not news:
                            break
        except httpx2.RequestError as err:
            raise self._failed(leg.engine, f"its stream broke off: {_text(err)}", is_death=True) from err
        except ValueError as err:
            raise self._failed(leg.engine, f"its stream has an event that is wrong: {err}") from err
        raise self._failed(leg.engine, "its stream ended without [DONE]", is_death=True)

    async def _drain(self, pieces: AsyncIterator[bytes]) -> None:
        num_bytes = 0
        with suppress(httpx2.RequestError, TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                async for piece in pieces:
                    num_bytes += len(piece)
                    if num_bytes > _MAX_DRAIN_BYTES:
                        break

    async def _pass_on(
        self, leg: _DecodeLeg, reply: LegReply, held: bytes, events: AsyncIterator[bytes]
    ) -> AsyncGenerator[bytes]:
        """All events; where they break off, an error as the last one."""
        num_bytes, num_events = len(held), _num_events(held)
        try:
            yield held
            async for news in events:
                num_bytes, num_events = num_bytes + len(news), num_events + _num_events(news)
                yield news
            reply.outcome = "ok"
        except (ApiError, LegFailed) as err:
            reply.outcome = "cut"
            error = err if isinstance(err, ApiError) else err.for_client()
            logger.warning(
                "request %s: the stream of decode engine %s broke off after %d events (%d bytes) passed on: %s",
                leg.request_id, leg.engine.url, num_events, num_bytes, err,
            )  # fmt: skip
            yield b"data: " + json.dumps(error.body()).encode() + b"\n\n" + DONE

    # ---- pieces of a leg --------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _deadline(self, engine: Engine, timeout: Timeout) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._seconds(timeout)):
                yield
        except TimeoutError as err:
            raise self._too_late(engine, timeout) from err

    def _seconds(self, timeout: Timeout) -> float:
        seconds: float = getattr(self._config, timeout)
        return seconds

    def _too_late(self, engine: Engine, timeout: Timeout) -> LegFailed:
        option = f"--{timeout.replace('_', '-')}"
        why = f"no answer within {self._seconds(timeout):g} s (the proxy's {option})"
        return self._failed(engine, why, 504, is_death=True)

    async def _send(
        self,
        engine: Engine,
        call: ClientCall,
        content: bytes,
        stack: AsyncExitStack,
        pair: Pair | None = None,
    ) -> httpx2.Response:
        """The engine's reply, its status good and its body to be read; `stack` closes it. The caller has a deadline.

        `pair`: KV is to be transferred between these. An engine tells by status 500, or blame of
        `kv_transfer_params`, that it was not.
        """
        limits = httpx2.Timeout(None, connect=self._config.connect_timeout_s)  # the caller has a deadline
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **call.headers}
        try:
            request = self._client.build_request(
                "POST" if content else "GET", engine.url + call.path, content=content, headers=headers, timeout=limits
            )
            response = await self._client.send(request, stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as err:
            raise self._failed(engine, f"cannot connect: {_text(err)}", was_taken=False) from err
        except httpx2.RequestError as err:
            raise self._failed(engine, _text(err), is_death=True) from err
        except httpx2.InvalidURL as err:  # the engine's: paths are known ones, or quoted
            raise self._failed(engine, f"its URL cannot be used: {err}", was_taken=False) from err
        stack.push_async_callback(response.aclose)
        if response.headers.get("content-encoding", "identity") != "identity":
            raise self._failed(engine, "its reply has a Content-Encoding, and none was asked for")
        if response.status_code == 200:
            return response
        data = await self._content(engine, response)
        error = error_of(data)
        if response.status_code == 429 or (response.status_code == 503 and error.is_full):
            raise self._full(engine, response, error)
        if error.is_requests_own:
            raise self._no_token(engine, error.message)
        is_hand_overs = pair is not None and (response.status_code == 500 or error.blames_hand_over)
        if 400 <= response.status_code < 500 and not is_hand_overs:
            self._fleet.worked(engine)
            if not is_object(data):
                told = ApiError(response.status_code, f"{engine.role} engine {engine.url}: {error.message}")
                data = json.dumps(told.body()).encode()
            raise LegRefused(engine, LegReply(response.status_code, "application/json", data, outcome="refused"))
        why = f"status {response.status_code}: {error.message}"
        if pair is not None and is_hand_overs and not error.is_death:
            self._not_transferred(pair, why, is_told=error.blames_hand_over)
            raise LegFailed(engine, why)
        is_answer = response.status_code == 500 and not error.is_death
        status = 503 if response.status_code == 503 else 502
        raise self._failed(engine, why, status, is_death=error.is_death, is_answer=is_answer)

    def _full(self, engine: Engine, response: httpx2.Response, error: EngineError) -> EngineFull:
        """No failure: neither the breaker nor readiness hears of it."""
        seconds = response.headers.get("retry-after", "")
        retry_after_s = float(seconds) if re.fullmatch("[0-9]{1,6}", seconds) else _RETRY_AFTER_S
        self._fleet.full(engine, min(max(retry_after_s, _MIN_WAIT_S), _MAX_WAIT_S))
        return EngineFull(engine, error.message, response.status_code, error.code or "overloaded", retry_after_s)

    async def _content(self, engine: Engine, response: httpx2.Response) -> bytes:
        data = bytearray()
        try:
            with holding(engine, self._config.max_reply_bytes) as hold:
                async for piece in response.aiter_raw():
                    data += piece
                    hold(len(data))
        except httpx2.RequestError as err:
            raise self._failed(engine, f"its reply broke off: {_text(err)}", is_death=True) from err
        except ValueError as err:
            raise self._failed(engine, f"its reply is too large: {err}") from err
        return bytes(data)

    def _judge(self, engine: Engine, data: bytes) -> ReplyVerdict:
        try:
            return judge_reply(data)
        except ValueError as err:
            raise self._failed(engine, f"its reply is not OpenAI's: {err}") from err

    def _check(self, leg: _DecodeLeg, verdict: ReplyVerdict) -> None:
        """Raise what a decode engine's word means."""
        if verdict.error is not None:
            if verdict.is_requests_own:
                raise self._no_token(leg.engine, verdict.error)
            if leg.pair is None or verdict.is_death:
                is_answer = not verdict.is_death
                raise self._failed(leg.engine, verdict.error, is_death=verdict.is_death, is_answer=is_answer)
            self._not_transferred(leg.pair, verdict.error, is_told=bool(verdict.load_error))
            raise LegFailed(leg.engine, verdict.error)
        if verdict.num_recomputed_tokens <= 0 or leg.pair is None or leg.has_recomputed:
            return
        leg.has_recomputed = True
        self.give_back(leg.hand_over)
        self._recomputed("decode_engine")
        why = verdict.load_error or "look at its log for why the transfer failed"
        again = f"computed {verdict.num_recomputed_tokens} prompt tokens again that the prefill engine had"
        self._fleet.not_transferred(leg.pair, f"{again}: {why}", is_fault=self._config.strict)
        if self._config.strict:
            raise ApiError(
                502, f"decode engine {leg.engine.url} {again}: {why}; or start the proxy with --no-strict",
                code="recomputed",
            )  # fmt: skip

    def _failed(
        self,
        engine: Engine,
        why: str,
        status: int = 502,
        *,
        was_taken: bool = True,
        is_death: bool = False,
        is_answer: bool = False,
    ) -> LegFailed:
        """`is_answer`: the engine itself said so, and it may be about this request alone."""
        why = one_line(why)
        if is_answer and self._leaves_to_probes:
            self._fleet.doubt(engine, why)
        else:
            self._fleet.failed(engine, why, is_gone=not was_taken)
            self._probe_again(engine, why)
        return LegFailed(engine, why, status, was_taken=was_taken, is_death=is_death)

    def _not_transferred(self, pair: Pair, why: str, *, is_told: bool) -> None:
        """The decode engine answered with an error, most probably since KV did not come; `is_told`: for sure."""
        if self._leaves_to_probes and not is_told:
            self._fleet.doubt(pair, why)
        else:
            self._fleet.not_transferred(pair, why)
            self._probe_again(pair, why)

    def _probe_again(self, one: Engine | Pair, why: str) -> None:
        """Where a probe failed, and too few have failed to take it out of rotation, the next probe comes soon."""
        if self._is_prober and one.breaker.state is State.CLOSED:
            self._fleet.doubt(one, why)

    def _no_token(self, engine: Engine, why: str) -> ApiError:
        """For the client: the engine works, and another one, of the same model, would say the same."""
        self._fleet.worked(engine)
        return ApiError(500, f"{engine.role} engine {engine.url}: {why}", code=NO_TOKEN)

    def _recomputed(self, reason: str) -> None:
        self._metrics.recomputed.labels(reason).inc()

    # ---- what nobody will fetch -------------------------------------------------------------------------------

    def give_back(self, hand_over: HandOver | None) -> None:
        """Tell the prefill engine, once and in the background, that it need not keep this KV; None: nothing."""
        if hand_over is None or hand_over.is_given_back:
            return
        hand_over.is_given_back = True
        release = asyncio.ensure_future(self._release(hand_over))
        self._releases.add(release)
        release.add_done_callback(self._releases.discard)

    async def _release(self, hand_over: HandOver) -> None:
        """Where it cannot be told, the engine keeps the KV for as long as its `lease_s` says."""
        content = release_body(hand_over.call, hand_over.params, hand_over.transfer_id)
        headers = {"Content-Type": "application/json", **hand_over.call.headers}
        url, timeout = f"{hand_over.engine.url}/v1/completions", self._config.probe_timeout_s
        why = ""
        for _ in range(_NUM_RELEASES):
            try:
                async with (
                    asyncio.timeout(timeout),
                    self._client.stream("POST", url, content=content, headers=headers) as reply,
                ):
                    status = reply.status_code  # which comes when all is done; the body is nobody's
            except (httpx2.RequestError, httpx2.InvalidURL, TimeoutError) as err:
                why = one_line(_text(err))
                break
            why = f"status {status}"
            if status not in (429, 503):
                break
            await asyncio.sleep(_RETRY_AFTER_S)
        if why != "status 200":
            logger.info("prefill engine %s keeps KV that nobody fetches for its lease_s: %s", hand_over.engine.url, why)

    # ---- the rest ---------------------------------------------------------------------------------------------

    async def ask(self, call: ClientCall) -> LegReply:
        """GET `call.path` from some engine."""
        tried: set[Engine] = set()
        while True:
            engine = self._fleet.pick_decode(None, tried)
            if engine is None:
                raise self._none_available("decode")
            tried.add(engine)
            try:
                return await self._ask(call, engine)
            except LegRefused as refused:
                return refused.reply
            except EngineFull as full:
                raise full.for_client() from full
            except LegFailed as failure:
                if len(tried) >= min(self._config.max_attempts, len(self._fleet.decode)):
                    raise failure.for_client(len(tried)) from failure

    async def _ask(self, call: ClientCall, engine: Engine) -> LegReply:
        async with AsyncExitStack() as stack, self._deadline(engine, "probe_timeout_s"):
            response = await self._send(engine, call, b"", stack)
            data = await self._content(engine, response)
            if not is_object(data):
                raise self._failed(engine, "its reply is no JSON object")
            return LegReply(200, "application/json", data, outcome="ok")


def _num_events(events: bytes) -> int:
    return events.count(b"\n\n") + events.count(b"\r\n\r\n")


def _hosts(engine: Engine, response: httpx2.Response) -> tuple[str, ...]:
    """What the engine's URL names, and the address that answered."""
    stream = response.extensions.get("network_stream")
    address = stream.get_extra_info("server_addr") if stream is not None else None
    named = urlsplit(engine.url).hostname or ""
    return (named, str(address[0])) if address else (named,)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

"""A request's legs: what comes of one, and how one fails."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from kvferry.http import ApiError
from kvferry.proxy.bodies import ClientCall, Params
from kvferry.proxy.fleet import Engine
from kvferry.proxy.replies import error_of


@dataclass(slots=True)
class LegReply:
    """What the client gets. `aclose` it in any case; then nothing is under way for it any more."""

    status: int
    content_type: str
    content: bytes = b""
    events: AsyncIterator[bytes] | None = None
    outcome: str = "client_gone"
    """One of `metrics.OUTCOMES`; of a stream once it has ended."""
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def aclose(self) -> None:
        """Close the decode leg."""
        await self.stack.aclose()


class LegFailed(Exception):
    """A leg failed before the client was sent anything."""

    def __init__(
        self, engine: Engine, why: str, status: int = 502, *, was_taken: bool = True, is_death: bool = False
    ) -> None:
        """`was_taken`: the engine may have begun; `is_death`: it ended, or fell silent, while it had the request."""
        super().__init__(why)
        self.engine = engine
        self.why = why
        self.status = status
        self.was_taken = was_taken
        self.is_death = is_death

    def for_client(self, num_attempts: int = 1) -> ApiError:
        """What the client hears when nothing more is tried."""
        tries = "" if num_attempts == 1 else f" (the last of {num_attempts} attempts)"
        return ApiError(
            self.status,
            f"{self.engine.role} engine {self.engine.url}{tries}: {self.why}. Look at /ready of the proxy and at the "
            "engine's log",
            code="engine_failed",
            headers={"Retry-After": "1"} if self.status == 503 else None,
        )


class EngineFull(LegFailed):
    """An engine has no room for the request now: nothing was begun, and it may be asked again."""

    def __init__(self, engine: Engine, why: str, status: int, code: str, retry_after_s: float) -> None:
        super().__init__(engine, why, status, was_taken=False)
        self.code = code
        self.retry_after_s = retry_after_s

    def for_client(self, num_attempts: int = 1) -> ApiError:
        """The engine's own answer, with its name."""
        return ApiError(
            self.status, f"{self.engine.role} engine {self.engine.url} is full: {self.why}", code=self.code,
            headers={"Retry-After": str(max(1, math.ceil(self.retry_after_s)))},
        )  # fmt: skip


class LegRefused(Exception):
    """An engine says that the request is wrong: the client's to know."""

    def __init__(self, engine: Engine, reply: LegReply) -> None:
        super().__init__(f"{engine.role} engine {engine.url}: {reply.status} {error_of(reply.content).message}")
        self.reply = reply


def ended_engines(deaths: list[LegFailed]) -> ApiError:
    """What the client hears when its request may be what ends engines."""
    named = "; ".join(f"{death.engine.role} engine {death.engine.url}: {death.why}" for death in deaths)
    return ApiError(
        502, f"{len(deaths)} engines in a row ended or fell silent while they had this request ({named}). It is not "
        "tried again, for it may be what ends them: look at the engines' logs before you send it once more",
        code="engines_ended", headers={"x-should-retry": "false"},
    )  # fmt: skip


@dataclass(slots=True)
class HandOver:
    """A prefill leg's outcome."""

    call: ClientCall
    engine: Engine
    transfer_id: str
    params: Params | None
    hosts: tuple[str, ...] = ()
    """By which the proxy reaches the engine: of its URL, and where that led."""
    made_s: float = 0.0
    is_given_back: bool = False

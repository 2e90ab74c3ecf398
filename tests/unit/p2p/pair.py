"""Two or more cores, a perfect network that the test moves by hand, and a record of all other actions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from kvferry.p2p import actions as a
from kvferry.p2p import messages as m
from kvferry.p2p.core import P2PCore
from kvferry.p2p.transports.transport import TransferStatus

P, D, E = "p:1", "d:2", "e:3"


def digest_at(num_tokens: int) -> bytes:
    """What both engines make of as many of the request's tokens."""
    return num_tokens.to_bytes(32, "big")


TOKENS = m.TokenProof(12, digest_at(12))
RULES = (a.GroupRule(4), a.GroupRule(4, window_tokens=8))


class Pair:
    """`now` is the time; `lost(message)` decides what the network swallows."""

    def __init__(self, names: Iterable[str] = (P, D), *, makes_digests: bool = False, **settings: Any) -> None:
        self.now = 0.0
        self.makes_digests = makes_digests
        self.settings = a.P2PSettings(**settings)
        self.ids = itertools.count(1)
        self.cores: dict[str, P2PCore] = {}
        self.done: dict[str, list[Any]] = {}
        self.sent: list[tuple[str, str, m.Message]] = []
        self.lost: Callable[[m.Message], bool] = lambda message: False
        self.differences: list[str] = []
        self.unreachable: set[str] = set()
        self.num_dials = 0
        for name in names:
            self.restart(name)

    def restart(self, name: str) -> None:
        host, port = name.split(":")
        blobs = {"fake": (name.encode(),)}
        me = f"id-{host}", self.new_id(), host, int(port), 2, b"geometry", blobs, RULES
        local = a.LocalEngine(*me, makes_digests=self.makes_digests)
        self.cores[name] = P2PCore(local, lambda *_: self.differences, self.settings, self.new_id)
        self.done[name] = []

    def new_id(self) -> str:
        return f"{next(self.ids):032x}"

    def call(self, name: str, method: str, *args: Any, **kwargs: Any) -> Any:
        """One input, then messages until silence."""
        answer = getattr(self.cores[name], method)(*args, now=self.now, **kwargs)
        self.settle()
        return answer

    def settle(self) -> None:
        for _ in range(100):
            actions = [(name, action) for name, core in self.cores.items() for action in core.take_actions()]
            if not actions:
                return
            for name, action in actions:
                self.act(name, action)
            for core in self.cores.values():
                core.check_integrity()
        raise AssertionError("the cores never fall silent")

    def act(self, name: str, action: a.Action) -> None:
        match action:
            case a.Send():
                self.sent.append((name, action.peer, action.message))
                if not self.lost(action.message):
                    self.cores[action.peer].message(name, m.CODEC.decode(m.CODEC.encode(action.message)), self.now)
            case a.Connect() if action.peer in self.unreachable:
                self.num_dials += 1
                self.cores[name].peer_lost(action.peer, "the peer cannot be reached", self.now)
            case a.Connect():
                self.num_dials += 1
                self.cores[name].peer_connected(action.peer, self.now)
            case _:
                self.done[name].append(action)

    def advance(self, seconds: float) -> None:
        """Let time pass, with every tick that is due."""
        end = self.now + seconds
        for _ in range(10_000):
            due = min(core.next_deadline() for core in self.cores.values())
            if due > end:
                break
            self.now = max(self.now, due)
            for core in self.cores.values():
                core.tick(self.now)
            self.settle()
        self.now = end

    def take(self, name: str, kind: type) -> list[Any]:
        """The actions of this kind so far, removed."""
        found = [x for x in self.done[name] if isinstance(x, kind)]
        self.done[name] = [x for x in self.done[name] if not isinstance(x, kind)]
        return found

    def end_job(self, name: str, job: a.TransferJob, status: TransferStatus = TransferStatus.OK) -> None:
        for rank in (0, 1):
            self.call(name, "transfer_ended", job.job_id, rank, status, "")

    def finish(self, request_id: str = "r", consumers: int = 1, **kwargs: Any) -> dict[str, Any]:
        """P prefilled 12 tokens into blocks 1, 2, 3 and (a window of 8) 4, 5, 6."""
        self.call(P, "request_started", request_id, None, consumers)
        blocks = [[1, 2, 3, 9], [4, 5, 6, 8]]
        return self.call(P, "finish", request_id, a.FinishReason.LENGTH, blocks, 12, [7], digest_at, **kwargs)

    def load(self, name: str, params: dict[str, Any], request_id: str = "x") -> None:
        self.call(name, "announce", request_id, params, TOKENS)
        self.call(name, "park", request_id, [[11, 12, 13], [0, 15, 16]], (0, 12))

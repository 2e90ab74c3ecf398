"""A third engine that has overheard every id of a hand-over, and says with them whatever there is to say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from pair import TOKENS, D, E, P, Pair, digest_at

from kvferry.p2p import actions as a
from kvferry.p2p import messages as m
from kvferry.p2p.core import P2PCore
from kvferry.p2p.transports.transport import TransferStatus

PUSH = {"remote_host": "p", "remote_port": 1, "transfer_id": "t", "transfer_mode": "push", "do_remote_prefill": True}
BLOCKS = ((11, 12, 13), (0, 15, 16))
_KINDS = [kind for kind in m.AnyMessage.__args__ if issubclass(kind, m.ClaimMessage)]
_FIELDS: dict[type, dict[str, Any]] = {
    m.Claim: {"lease_id": "0" * 32, "lease_generation": "0" * 32, "tokens": TOKENS},
    m.Granted: {"blocks": BLOCKS, "num_tokens": 12, "remaining_ms": 1, "tokens_digest": digest_at(12)},
    m.Refused: {"why": m.Why.UNKNOWN},
    m.Renewed: {"remaining_ms": 86_400_000},
    m.Verdict: {"is_valid": True},
    m.Register: {
        "transfer_id": "another", "blocks": BLOCKS, "first_token": 0, "end_token": 12, "epoch": 0, "tokens": TOKENS,
    },
    m.Pushed: {"ok": True, "reason": "", "num_tokens": 12, "tokens_digest": digest_at(12)},
}  # fmt: skip


def forged(kind: type, claim_id: str, generation: str, to: str) -> m.ClaimMessage:
    made: m.ClaimMessage = kind(**_FIELDS.get(kind, {}), claim_id=claim_id, generation=generation, to=to)
    return made


class Thief(Pair):
    """E, which claims to live the life of whom it is not talking to, says `kind` before each message of a claim."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.num_forged = 0
        for victim, other in ((P, D), (D, P)):
            self.meet(victim, self.cores[other].local.generation)
        self.lost = self.overhear

    def meet(self, victim: str, generation: str) -> None:
        """A stranger under a name of its own introduces itself, and answers the question that it is asked."""
        name = f"@{E} at {victim}"
        self.cores[name] = P2PCore(
            replace(self.cores[P].local, engine_id="id-e", generation=generation), lambda *_: [], self.settings,
            self.new_id,
        )  # fmt: skip
        self.done[name] = []
        me = self.cores[name].local
        what = "id-e", m.PROTOCOL, me.geometry, dict(me.transports), 0, self.new_id(), False
        self.cores[victim].message(name, m.Hello(*what, generation=generation), self.now)
        self.settle()

    def overhear(self, message: m.Message) -> bool:
        if isinstance(message, m.ClaimMessage) and {*self.sent[-1][:2]} == {P, D}:
            for victim, other in ((P, D), (D, P)):
                said = forged(
                    self.kind, message.claim_id, self.cores[other].local.generation, self.cores[victim].local.generation
                )
                self.cores[victim].message(f"@{E} at {victim}", said, self.now)
                self.num_forged += 1
        return False


@pytest.fixture(params=_KINDS, ids=lambda kind: kind.__name__)
def pair(request: pytest.FixtureRequest) -> Iterator[Thief]:
    thief = Thief(request.param)
    yield thief
    assert thief.num_forged


def test_a_pull_is_none_of_its_business(pair: Thief) -> None:
    params = pair.finish()
    pair.load(D, params)
    (start,) = pair.take(D, a.StartTransfer)
    assert start.job.remote_blocks == ((1, 2, 3), (0, 5, 6)), "the producer's word counts, not the thief's"
    pair.advance(20)
    assert not pair.take(P, a.Release), "D still reads"
    assert not pair.take(D, a.LoadEnded)
    pair.end_job(D, start.job)
    assert pair.take(D, a.LoadEnded) == [a.LoadEnded("x", True, "", False, 12)]
    assert pair.take(P, a.Release) == [a.Release("r", "done")]


def test_a_push_is_none_of_its_business(pair: Thief) -> None:
    pair.call(P, "request_started", "r", "t", 1)
    pair.load(D, PUSH)
    pair.call(P, "finish", "r", a.FinishReason.STOP, [[1, 2, 3], [4, 5, 6]], 12, [7], digest_at)
    (start,) = pair.take(P, a.StartTransfer)
    assert (start.job.peer, start.job.remote_blocks) == (D, BLOCKS)
    pair.advance(10)
    assert not pair.take(D, a.LoadEnded), "P still writes"
    pair.end_job(P, start.job)
    assert pair.take(D, a.LoadEnded) == [a.LoadEnded("x", True, "", False, 12)]
    assert pair.take(P, a.Release) == [a.Release("r", "done")]


@pytest.mark.parametrize("lost", [m.Withdraw, m.Pushed, m.Register])
def test_blocks_of_a_push_that_was_given_up_come_back_and_not_too_early(pair: Thief, lost: type) -> None:
    """Also where each side's first word is lost: the thief must not end what is repeated."""
    pair.call(P, "request_started", "r", "t", 1)
    pair.call(P, "finish", "r", a.FinishReason.STOP, [[1, 2, 3], [4, 5, 6]], 12, [7], digest_at)
    num_lost = iter(range(10))
    pair.lost = lambda message: pair.overhear(message) or (isinstance(message, lost) and next(num_lost) < 2)
    pair.load(D, PUSH)
    pair.advance(1)
    (start,) = pair.take(P, a.StartTransfer)
    pair.call(D, "abort", "x")
    assert pair.take(D, a.LoadEnded)[0].blocks_quarantined
    pair.advance(3)
    assert not pair.take(D, a.BlocksSafe), "P writes"
    pair.end_job(P, start.job, TransferStatus.OK)
    pair.advance(4)
    assert pair.take(D, a.BlocksSafe) == [a.BlocksSafe("x")]
    assert len(pair.take(P, a.Release)) == 1
    assert not [x for name in (P, D) for x in pair.take(name, a.ClosePeer)], "nothing was unclear"

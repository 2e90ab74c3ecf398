"""Hand-overs step by step: what each role does, and what is true after each failure."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import msgspec
import pytest
from pair import RULES, TOKENS, D, E, P, Pair, digest_at

from kvferry.errors import ConfigError, TransferError
from kvferry.p2p import actions as a
from kvferry.p2p import consumer, producer
from kvferry.p2p import messages as m
from kvferry.p2p.config import P2PConfig
from kvferry.p2p.selection import select_blocks
from kvferry.p2p.transports.transport import TransferOp, TransferStatus

PUSH = {"remote_host": "p", "remote_port": 1, "transfer_id": "t", "transfer_mode": "push", "do_remote_prefill": True}


def started(pair: Pair, **finish: Any) -> a.TransferJob:
    """A pull that D's ranks have to read now."""
    pair.load(D, pair.finish(**finish))
    return pair.take(D, a.StartTransfer)[0].job


def test_pull_ends_with_proved_blocks_and_freed_leases() -> None:
    pair = Pair()
    params = pair.finish()
    assert params["remote_block_ids"] == [[1, 2, 3], [0, 5, 6]]
    assert (params["remote_host"], params["remote_port"], params["remote_num_tokens"]) == ("p", 1, 12)
    before = dict(params)
    pair.load(D, params)
    assert params == before
    (job,) = [start.job for start in pair.take(D, a.StartTransfer)]
    assert (job.op, job.remote_blocks, job.token_range) == (TransferOp.READ, ((1, 2, 3), (0, 5, 6)), (0, 12))
    pair.call(D, "transfer_ended", job.job_id, 0, TransferStatus.OK, "")
    assert not pair.take(D, a.LoadEnded), "one rank is still reading"
    assert not pair.take(P, a.Release), "claimed"
    pair.call(D, "transfer_ended", job.job_id, 1, TransferStatus.OK, "")
    assert pair.take(D, a.LoadEnded) == [a.LoadEnded("x", True, "", False, 12)]
    assert pair.take(P, a.Release) == [a.Release("r", "done")]


@pytest.mark.parametrize("is_finished_first", [True, False])
def test_push_pairs_by_transfer_id_in_either_order(is_finished_first: bool) -> None:
    pair = Pair()
    pair.call(P, "request_started", "r", "t", 1)
    steps = [
        lambda: pair.call(
            P, "finish", "r", a.FinishReason.STOP, [[1, 2, 3], [4, 5, 6]], 12, [7], digest_at, mode="push"
        ),
        lambda: pair.load(D, PUSH),
    ]
    for step in steps if is_finished_first else reversed(steps):
        step()
    (job,) = [start.job for start in pair.take(P, a.StartTransfer)]
    assert (job.op, job.peer, job.remote_blocks) == (TransferOp.WRITE, D, ((11, 12, 13), (0, 15, 16)))
    assert not pair.take(P, a.Release)
    pair.end_job(P, job)
    assert pair.take(D, a.LoadEnded) == [a.LoadEnded("x", True, "", False, 12)]
    assert pair.take(P, a.Release) == [a.Release("r", "done")]


@pytest.mark.parametrize("reason", [a.FinishReason.STOP, a.FinishReason.LENGTH])
def test_any_normal_finish_is_handed_over_also_without_blocks(reason: a.FinishReason) -> None:
    pair = Pair()
    params = pair.call(P, "request_started", "r", None, 1) or pair.call(
        P, "finish", "r", reason, [[], []], 0, [7], digest_at
    )
    assert params["remote_block_ids"] == [[], []]
    pair.call(D, "announce", "x", params, m.TokenProof(0, digest_at(0)))
    assert pair.call(D, "park", "x", [[], []], (0, 0))
    assert pair.take(D, a.LoadEnded) == [a.LoadEnded("x", True, "", False, 0)]
    assert pair.take(P, a.Release) == [a.Release("r", "done")]


@pytest.mark.parametrize("reason", [a.FinishReason.ABORT, a.FinishReason.ERROR])
def test_an_abnormal_finish_tells_those_who_registered(reason: a.FinishReason) -> None:
    pair = Pair()
    pair.call(P, "request_started", "r", "t", 1)
    pair.load(D, PUSH)
    assert pair.call(P, "finish", "r", reason, [[1, 2, 3], [4, 5, 6]], 12, [], digest_at) is None
    (ended,) = pair.take(D, a.LoadEnded)
    assert not ended.ok
    assert "aborted" in ended.reason
    assert not ended.blocks_quarantined, "the producer said that it will not write"
    assert not pair.take(P, a.Release), "the blocks never left the host"


def test_lease_is_held_for_a_claim_beyond_its_deadline_but_not_for_ever() -> None:
    pair = Pair(lease_s=10, claim_s=6, max_lease_s=40, load_s=1000, announce_s=1000)
    started(pair)
    pair.advance(39)
    assert not pair.take(P, a.Release), "D renews"
    pair.advance(2)
    assert pair.take(P, a.Release) == [a.Release("r", "expired")]
    (ended,) = pair.take(D, a.LoadEnded)
    assert not ended.ok
    assert ended.blocks_quarantined, "D's ranks still read"


@pytest.mark.parametrize(
    ("waits", "announced_s", "parked_s"), [({"lease_s": 900}, 700, 0), ({"announce_s": 900}, 0, 800)]
)
def test_waits_that_the_user_made_long_are_not_cut(waits: dict[str, int], announced_s: float, parked_s: float) -> None:
    pair = Pair(**asdict(P2PConfig.parse(waits, {}).waits()))
    params = pair.finish()
    pair.advance(announced_s)
    pair.call(D, "announce", "x", params, TOKENS)
    pair.advance(parked_s)
    pair.call(D, "park", "x", [[11, 12, 13], [0, 15, 16]], (0, 12))
    pair.end_job(D, pair.take(D, a.StartTransfer)[0].job)
    assert pair.take(D, a.LoadEnded) == [a.LoadEnded("x", True, "", False, 12)]


def test_a_deadline_that_passes_names_its_setting() -> None:
    pair = Pair(announce_s=20, load_s=30)
    params = pair.finish()
    pair.call(D, "announce", "early", params, TOKENS)
    pair.load(D, params)
    pair.advance(40)
    early, late = pair.take(D, a.LoadEnded)
    assert early.reason == "deadline passed while announced: it may take kv_connector_extra_config.announce_s=20 s"
    assert late.reason == "deadline passed while transferring: it may take kv_connector_extra_config.load_s=30 s"


def test_a_lease_nobody_claims_expires_and_a_late_claim_is_refused() -> None:
    pair = Pair(lease_s=10)
    params = pair.finish()
    pair.advance(11)
    assert pair.take(P, a.Release) == [a.Release("r", "expired")]
    pair.load(D, params)
    (ended,) = pair.take(D, a.LoadEnded)
    assert (ended.ok, ended.blocks_quarantined) == (False, False)
    assert "expired" in ended.reason


def test_what_was_read_under_a_lapsed_claim_is_not_accepted() -> None:
    pair = Pair(lease_s=10, claim_s=6)
    job = started(pair)
    pair.lost = lambda message: True
    pair.cores[P].tick(20.0)
    pair.settle()
    assert pair.take(P, a.Release) == [a.Release("r", "expired")]
    pair.lost = lambda message: False
    pair.end_job(D, job)
    (ended,) = pair.take(D, a.LoadEnded)
    assert not ended.ok
    assert not ended.blocks_quarantined, "all ranks have ended"


@pytest.mark.parametrize("give_up", ["abort", "deadline"])
def test_blocks_of_a_read_that_was_given_up_are_quarantined_until_every_rank_ended(give_up: str) -> None:
    pair = Pair(load_s=3, quarantine_s=100)
    job = started(pair)
    if give_up == "abort":
        pair.call(D, "abort", "x")
    else:
        pair.advance(4)
    (ended,) = pair.take(D, a.LoadEnded)
    assert (ended.ok, ended.blocks_quarantined) == (False, True)
    pair.call(D, "transfer_ended", job.job_id, 0, TransferStatus.OK, "")
    assert not pair.take(D, a.BlocksSafe)
    pair.call(D, "transfer_ended", job.job_id, 1, TransferStatus.OK, "")
    assert pair.take(D, a.BlocksSafe) == [a.BlocksSafe("x")]
    assert pair.take(P, a.Release) == [a.Release("r", "done")], "the claim was withdrawn"


def test_unknown_is_no_end_only_destroying_the_connection_is() -> None:
    pair = Pair()
    job = started(pair)
    pair.end_job(D, job, TransferStatus.UNKNOWN)
    (ended,) = pair.take(D, a.LoadEnded)
    assert ended.blocks_quarantined
    (close,) = pair.take(D, a.ClosePeer)
    pair.advance(100)
    assert not pair.take(D, a.BlocksSafe)
    with pytest.raises(TransferError, match="still has quarantined blocks"):
        pair.cores[D].announce("x", PUSH, TOKENS, pair.now)
    pair.call(D, "peer_closed", P, close.connection)
    assert pair.take(D, a.BlocksSafe) == [a.BlocksSafe("x")]


def test_a_transfer_that_never_ends_costs_the_connection_and_the_next_load_gets_a_new_one() -> None:
    pair = Pair(load_s=3, quarantine_s=2, lease_s=100)
    started(pair)
    pair.advance(6)
    (close,) = pair.take(D, a.ClosePeer)
    pair.call(D, "peer_closed", P, close.connection)
    assert pair.take(D, a.BlocksSafe)
    pair.load(D, pair.finish("s"), "y")
    (theirs,) = pair.take(P, a.ClosePeer)
    assert theirs.reason == "d:2 destroyed its end"
    pair.call(P, "peer_closed", D, theirs.connection)
    pair.advance(1)
    (start,) = pair.take(D, a.StartTransfer)
    assert start.job.connection > close.connection


def test_a_push_that_was_given_up_is_safe_when_the_producer_says_so() -> None:
    pair = Pair()
    pair.call(P, "request_started", "r", "t", 1)
    pair.call(P, "finish", "r", a.FinishReason.STOP, [[1, 2, 3], [4, 5, 6]], 12, [7], digest_at)
    pair.load(D, PUSH)
    (start,) = pair.take(P, a.StartTransfer)
    pair.call(D, "abort", "x")
    assert pair.take(D, a.LoadEnded)[0].blocks_quarantined
    assert not pair.take(D, a.BlocksSafe), "P writes"
    pair.call(P, "abort", "r")
    assert not pair.take(P, a.Release), "P's own ranks read the blocks"
    pair.end_job(P, start.job)
    pair.advance(3)
    assert pair.take(D, a.BlocksSafe) == [a.BlocksSafe("x")]
    assert len(pair.take(P, a.Release)) == 1


def test_a_registration_that_comes_after_its_withdrawal_starts_no_write() -> None:
    pair = Pair()
    held: list[m.Message] = []
    pair.call(P, "request_started", "r", "t", 1)
    pair.lost = lambda message: isinstance(message, m.Register) and not held.append(message)
    pair.load(D, PUSH)
    pair.call(D, "abort", "x")
    assert pair.take(D, a.BlocksSafe) or not pair.take(D, a.LoadEnded)[0].ok
    pair.call(P, "finish", "r", a.FinishReason.STOP, [[1, 2, 3], [4, 5, 6]], 12, [7], digest_at)
    pair.cores[P].message(D, held[0], pair.now)
    pair.settle()
    assert not pair.take(P, a.StartTransfer)


def test_a_registration_of_a_destroyed_connection_starts_no_write() -> None:
    """Found by the simulation (seed 7993): D destroyed its end, knows its blocks safe, and is connected again."""
    pair = Pair()
    held: list[m.Message] = []
    pair.call(P, "request_started", "r", "t", 1)
    pair.lost = lambda message: isinstance(message, m.Register | m.Withdraw) and not held.append(message)
    pair.load(D, PUSH)
    pair.call(D, "peer_lost", P, "glitch")
    (close,) = pair.take(D, a.ClosePeer)
    pair.call(D, "peer_closed", P, close.connection)
    assert pair.take(D, a.BlocksSafe)
    pair.lost = lambda message: isinstance(message, m.Register | m.Withdraw)
    pair.advance(2)
    pair.load(D, PUSH, "y")
    pair.call(P, "finish", "r", a.FinishReason.STOP, [[1, 2, 3], [4, 5, 6]], 12, [7], digest_at)
    for close in pair.take(P, a.ClosePeer):
        pair.call(P, "peer_closed", D, close.connection)
    pair.cores[P].message(D, next(x for x in held if isinstance(x, m.Register)), pair.now)
    pair.settle()
    assert not pair.take(P, a.StartTransfer)


def test_a_registration_for_an_earlier_life_of_the_producer_starts_no_write() -> None:
    """Nor does the new life get to know D before D has destroyed what it had with the old one."""
    pair = Pair()
    held: list[m.Message] = []
    pair.lost = lambda message: isinstance(message, m.Register) and not held.append(message)
    pair.load(D, PUSH)
    pair.restart(P)
    of_d = pair.cores[D].local.generation
    pair.lost = lambda x: (
        isinstance(x, m.Register) or (isinstance(x, m.Hello) and x.generation == of_d and not x.is_answer)
    )
    pair.call(P, "request_started", "r", "t", 1)
    pair.call(P, "finish", "r", a.FinishReason.STOP, [[1, 2, 3], [4, 5, 6]], 12, [7], digest_at)
    for _ in range(2):
        pair.cores[P].message(D, held[0], pair.now)
        pair.settle()
    assert not pair.take(P, a.OpenPeer)
    assert not pair.take(P, a.StartTransfer)


def test_consumers_are_a_set_repeats_count_once() -> None:
    pair = Pair((P, D, E), lease_s=50)
    params = pair.finish(consumers=2)
    pair.load(D, params)
    pair.end_job(D, pair.take(D, a.StartTransfer)[0].job)
    assert pair.take(D, a.LoadEnded)[0].ok
    confirms = [message for name, _, message in pair.sent if name == D and isinstance(message, m.Confirm)]
    for _ in range(5):
        pair.cores[P].message(D, confirms[0], pair.now)
    pair.load(D, params, "again")
    pair.end_job(D, pair.take(D, a.StartTransfer)[0].job)
    assert not pair.take(P, a.Release)
    pair.load(E, params)
    pair.end_job(E, pair.take(E, a.StartTransfer)[0].job)
    assert pair.take(E, a.LoadEnded)[0].ok
    assert pair.take(P, a.Release) == [a.Release("r", "done")]


def test_everything_lost_a_few_times_still_succeeds() -> None:
    pair = Pair()
    seen: dict[type, int] = {}

    def lost(message: m.Message) -> bool:
        seen[type(message)] = seen.get(type(message), 0) + 1
        return seen[type(message)] <= 2

    pair.lost = lost
    pair.load(D, pair.finish())
    pair.advance(10)
    pair.end_job(D, pair.take(D, a.StartTransfer)[0].job)
    pair.advance(10)
    assert pair.take(D, a.LoadEnded)[0].ok
    assert pair.take(P, a.Release) == [a.Release("r", "done")]


def test_a_restarted_producer_is_met_with_a_new_handshake_and_old_params_are_refused() -> None:
    pair = Pair()
    params = pair.finish()
    job = started(pair, request_id="s")
    pair.restart(P)
    pair.load(D, params, "old")
    pair.advance(1)
    assert {x.request_id: x.ok for x in pair.take(D, a.LoadEnded)} == {"x": False, "old": False}
    (close,) = pair.take(D, a.ClosePeer)
    assert (close.connection, "restarted" in close.reason) == (job.connection, True)
    pair.call(D, "peer_closed", P, close.connection)
    assert pair.take(D, a.BlocksSafe) == [a.BlocksSafe("x")]
    pair.load(D, params, "older")
    pair.advance(3)
    (ended,) = pair.take(D, a.LoadEnded)
    assert (ended.request_id, "unknown" in ended.reason) == ("older", True)
    pair.load(D, pair.finish("new"), "new")
    assert pair.take(D, a.StartTransfer)[-1].job.connection > job.connection


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_what_an_earlier_life_promised_is_not_waited_for(mode: str) -> None:
    """A new life knows no lease of the old one, and would wait for a request with that transfer id for ever."""
    pair = Pair()
    pair.call(P, "request_started", "r", "t", 1)
    params = pair.finish(mode=mode)
    pair.restart(P)
    pair.load(D, params)
    (ended,) = pair.take(D, a.LoadEnded)
    assert (ended.ok, ended.reason) == (False, "the producer refused the claim: unknown")
    assert pair.take(D, a.BlocksSafe) or not ended.blocks_quarantined


def test_a_late_hello_of_a_life_that_is_over_changes_nothing() -> None:
    pair = Pair()
    pair.load(D, pair.finish("first"), "first")
    late = [message for name, _, message in pair.sent if name == P and isinstance(message, m.Hello)]
    pair.restart(P)
    pair.load(D, pair.finish("again"), "again")
    for close in pair.take(D, a.ClosePeer):
        pair.call(D, "peer_closed", P, close.connection)
    pair.advance(3)
    pair.load(D, pair.finish("now"), "now")
    for message in late:
        pair.cores[D].message(P, message, pair.now)
        pair.settle()
    assert not pair.take(D, a.ClosePeer)
    pair.end_job(D, pair.take(D, a.StartTransfer)[-1].job)
    assert pair.take(D, a.LoadEnded)[-1].ok


def test_a_lost_link_fails_loads_at_once() -> None:
    pair = Pair()
    started(pair)
    pair.call(D, "peer_lost", P, "reset by peer")
    (ended,) = pair.take(D, a.LoadEnded)
    assert (ended.reason, ended.blocks_quarantined) == ("reset by peer", True)


def test_a_silent_peer_is_given_up() -> None:
    pair = Pair(liveness_s=4, load_s=60)
    started(pair)
    pair.lost = lambda message: True
    pair.advance(5)
    (ended,) = pair.take(D, a.LoadEnded)
    assert "silent" in ended.reason


def test_who_was_frozen_itself_does_not_blame_the_peer() -> None:
    pair = Pair(liveness_s=4, load_s=60, lease_s=60, claim_s=60)
    job = started(pair)
    pair.now += 30
    pair.end_job(D, job)
    assert pair.take(D, a.LoadEnded)[0].ok


def test_a_mismatch_is_refused_at_the_handshake_with_its_differences_and_not_asked_again_soon() -> None:
    pair = Pair(backoff_s=5)
    params = pair.finish()
    pair.differences = ["dtype: float16 here, bfloat16 there", "block size: 16 here, 32 there"]
    pair.load(D, params)
    (ended,) = pair.take(D, a.LoadEnded)
    assert "dtype: float16 here, bfloat16 there; block size: 16 here, 32 there" in ended.reason
    pair.sent.clear()
    pair.load(D, params, "y")
    assert "dtype" in pair.take(D, a.LoadEnded)[0].reason
    assert not pair.sent
    pair.differences = []
    pair.advance(6)
    pair.load(D, params, "z")
    assert pair.take(D, a.StartTransfer)


def test_an_unreachable_peer_fails_the_load_by_the_deadline() -> None:
    pair = Pair(handshake_s=3)
    params = pair.finish()
    pair.lost = lambda message: isinstance(message, m.Hello)
    pair.load(D, params)
    pair.advance(3.1)
    assert "no connection to p:1" in pair.take(D, a.LoadEnded)[0].reason
    assert not pair.call(D, "park", "x", [[11], [12]], (0, 4)), "over"


def test_where_nobody_listens_loads_fail_at_once_and_the_next_one_dials_again() -> None:
    pair = Pair()
    params = pair.finish()
    pair.unreachable = {P}
    for number, request_id in enumerate("xyz", start=1):
        pair.load(D, params, request_id)
        (ended,) = pair.take(D, a.LoadEnded)
        assert (ended.reason, ended.blocks_quarantined) == ("p:1: the peer cannot be reached", False)
        assert pair.take(D, a.Disconnect) == [a.Disconnect(P)]
        assert pair.num_dials == number, "one try per request"
    pair.advance(100)
    assert pair.num_dials == 3, "nobody waits"
    pair.unreachable = set()
    pair.load(D, pair.finish("r2"))
    assert pair.take(D, a.StartTransfer)


def test_after_a_lost_link_the_next_load_needs_a_handshake_and_no_patience() -> None:
    pair = Pair()
    pair.end_job(D, started(pair))
    (opened,) = pair.take(D, a.OpenPeer)
    pair.call(D, "peer_lost", P, "reset by peer")
    pair.call(D, "peer_closed", P, opened.connection)
    pair.take(D, a.StartTransfer)
    pair.load(D, pair.finish("r2"), "y")
    (closing,) = pair.take(P, a.ClosePeer)  # it learns from the handshake that its end is of no use any more
    pair.call(P, "peer_closed", D, closing.connection)
    assert pair.take(D, a.StartTransfer)


def test_a_link_that_breaks_again_and_again_is_dialled_less_and_less_often() -> None:
    pair = Pair(backoff_s=1, handshake_s=60, announce_s=60)
    params = pair.finish()
    pair.lost = lambda message: True
    pair.call(D, "announce", "x", params, TOKENS)
    num_losses = 0
    for _ in range(1000):
        if num_losses < pair.num_dials:
            num_losses += 1
            pair.call(D, "peer_lost", P, "reset by peer")
        pair.advance(0.05)
    assert 4 <= pair.num_dials <= 10


def test_idle_peers_are_evicted() -> None:
    pair = Pair(idle_s=20)
    pair.end_job(D, started(pair))
    pair.advance(30)
    for name, other in ((P, D), (D, P)):
        for close in pair.take(name, a.ClosePeer):
            pair.call(name, "peer_closed", other, close.connection)
    pair.advance(30)
    assert [core.snapshot()["peers"] for core in pair.cores.values()] == [[], []]
    assert pair.take(D, a.Disconnect) == [a.Disconnect(P)], "else its next link would not be told of"
    assert all(core.next_deadline() == float("inf") or core.next_deadline() > pair.now for core in pair.cores.values())


def test_strangers_do_not_keep_engines_out() -> None:
    pair = Pair((P, D, E), max_peers=3)
    pair.end_job(D, started(pair))
    for number in range(5):
        core = pair.cores[P]
        generation, claim_id, to = (pair.new_id() for _ in range(3))
        core.message(f"@{number}", m.Renew(generation=generation, claim_id=claim_id, to=to), pair.now)
        core.take_actions()
    assert [peer["name"] for peer in pair.cores[P].snapshot()["peers"]] == [D, "@3", "@4"]
    pair.load(E, pair.finish("second"))
    pair.end_job(E, pair.take(E, a.StartTransfer)[0].job)
    assert pair.take(E, a.LoadEnded)[0].ok
    assert [peer["name"] for peer in pair.cores[P].snapshot()["peers"]] == [D, "@4", E]


@pytest.mark.parametrize("bounds", [{"max_sources": 2}, {"max_peers": 2}])
def test_a_peer_that_is_wanted_takes_the_place_of_one_without_business(bounds: dict[str, int]) -> None:
    pair = Pair((P, D, E), **bounds)
    there = ["there:1", "there:2"]
    pair.unreachable = {*there, "busy:1"}
    for port in (1, 2):  # those that failed go first
        params = {**pair.finish(str(port)), "remote_host": "there", "remote_port": port}
        pair.call(D, "announce", str(port), params, TOKENS)
    assert [peer["name"] for peer in pair.cores[D].snapshot()["peers"]] == there
    pair.load(D, pair.finish())
    pair.end_job(D, pair.take(D, a.StartTransfer)[0].job)
    assert [end.ok for end in pair.take(D, a.LoadEnded)] == [False, False, True]
    assert {peer["name"] for peer in pair.cores[D].snapshot()["peers"]} == {there[1], P}
    pair.call(D, "announce", "y", {**pair.finish("again"), "remote_host": "busy"}, TOKENS)
    assert {peer["name"] for peer in pair.cores[D].snapshot()["peers"]} == {"busy:1", P}, "an idle one keeps its place"
    pair.call(E, "request_started", "other", None, 1)
    theirs = pair.call(E, "finish", "other", a.FinishReason.LENGTH, [[1, 2, 3], [4, 5, 6]], 12, [7], digest_at)
    pair.advance(1)
    pair.load(D, {**pair.finish("third"), "transfer_id": None}, "z")
    assert pair.take(D, a.StartTransfer), "P is busy"
    pair.load(D, theirs, "e")
    assert {peer["name"] for peer in pair.cores[D].snapshot()["peers"]} == {P, E}
    assert [start.job.peer for start in pair.take(D, a.StartTransfer)] == [E]


def test_an_idle_peer_goes_when_its_connection_is_destroyed() -> None:
    pair = Pair((P, D, E), max_sources=1)
    pair.end_job(D, started(pair))
    pair.call(E, "request_started", "other", None, 1)
    theirs = pair.call(E, "finish", "other", a.FinishReason.LENGTH, [[1, 2, 3], [4, 5, 6]], 12, [7], digest_at)
    pair.load(D, theirs, "e")
    pair.advance(0.3)
    (close,) = pair.take(D, a.ClosePeer)
    assert (close.peer, pair.take(D, a.StartTransfer)) == (P, [])
    pair.call(D, "peer_closed", P, close.connection)
    pair.advance(0.3)
    assert pair.take(D, a.Disconnect) == [a.Disconnect(P)]
    assert [start.job.peer for start in pair.take(D, a.StartTransfer)] == [E]


def test_a_peer_that_asks_again_while_it_is_let_go_keeps_nobody_out() -> None:
    pair = Pair((P, D, E), max_sources=1)
    pair.end_job(D, started(pair))
    hellos = [each for sender, _, each in pair.sent if sender == P and isinstance(each, m.Hello)]
    question = next(each for each in hellos if not each.is_answer)
    pair.call(E, "request_started", "other", None, 1)
    theirs = pair.call(E, "finish", "other", a.FinishReason.LENGTH, [[1, 2, 3], [4, 5, 6]], 12, [7], digest_at)
    pair.load(D, theirs, "e")
    pair.advance(0.3)
    (close,) = pair.take(D, a.ClosePeer)
    pair.call(D, "message", P, question)
    pair.call(D, "peer_closed", P, close.connection)
    pair.advance(0.6)
    assert [start.job.peer for start in pair.take(D, a.StartTransfer)] == [E]


def test_snapshot_says_what_is_open_in_plain_values() -> None:
    pair = Pair()
    started(pair)
    books = {name: msgspec.json.decode(msgspec.json.encode(core.snapshot())) for name, core in pair.cores.items()}
    (lease,) = books[P]["producer"]
    assert (lease["request_id"], lease["state"], lease["claims"][0]["consumer"]) == ("r", "claimed", "id-d")
    (load,) = books[D]["consumer"]
    assert (load["request_id"], load["state"], load["ranks"], load["peer"]) == ("x", "transferring", [0, 1], P)
    assert [peer["state"] for peer in books[D]["peers"]] == ["open"]


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_fewer_tokens_than_wanted_is_a_failure(mode: str) -> None:
    pair = Pair()
    params = leased(pair, mode)
    pair.call(D, "announce", "x", params, m.TokenProof(16, digest_at(16)))
    pair.call(D, "park", "x", [[11, 12, 13, 14], [0, 0, 15, 16]], (0, 16))
    text = "the KV of other tokens" if mode == "pull" else "the lease holds 12"
    assert text in pair.take(D, a.LoadEnded)[0].reason


def leased(pair: Pair, mode: str) -> dict[str, Any]:
    """The parameters of 12 tokens at P."""
    pair.call(P, "request_started", "r", "t" if mode == "push" else None, 1)
    blocks = [[1, 2, 3], [4, 5, 6]]
    params: dict[str, Any] = pair.call(P, "finish", "r", a.FinishReason.LENGTH, blocks, 12, [7], digest_at, mode=mode)
    return params


@pytest.mark.parametrize("liar", [None, producer, consumer], ids=["both check", "D alone checks", "P alone checks"])
@pytest.mark.parametrize("mode", ["pull", "push"])
def test_kv_of_other_tokens_is_not_handed_over_even_if_one_side_does_not_check(
    mode: str, liar: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if liar is not None:
        monkeypatch.setattr(liar, "same_tokens", lambda one, other: True)
    pair = Pair(lease_s=10)
    params = leased(pair, mode)
    pair.call(D, "announce", "x", params, m.TokenProof(12, b"another prompt".ljust(32)))
    pair.call(D, "park", "x", [[11, 12, 13], [0, 15, 16]], (0, 12))
    jobs = [start.job for name in (P, D) for start in pair.take(name, a.StartTransfer)]
    if (mode, liar) == ("push", producer):
        pair.end_job(P, jobs.pop())  # D believes it none the less
    assert not jobs, "no byte moves"
    (ended,) = pair.take(D, a.LoadEnded)
    assert (ended.ok, ended.blocks_quarantined) == (False, False)
    assert "the KV of other tokens" in ended.reason
    if liar is not producer:  # the lease is there for the request it was made for
        assert not pair.take(P, a.Release)
        pair.load(D, params, "right")
        mover = D if mode == "pull" else P
        pair.end_job(mover, pair.take(mover, a.StartTransfer)[0].job)
        assert pair.take(D, a.LoadEnded)[0].ok
    assert pair.take(P, a.Release) == [a.Release("r", "done")]


@pytest.mark.parametrize("wrong", [m.TokenProof(12, b"another prompt".ljust(32)), m.TokenProof(16, digest_at(16))])
@pytest.mark.parametrize("is_given_up", [False, True], ids=["registered", "withdrawn"])
@pytest.mark.parametrize("consumer_name", [D, E])
def test_a_registration_of_other_tokens_does_not_use_up_a_lease_that_is_still_to_come(
    wrong: m.TokenProof, is_given_up: bool, consumer_name: str
) -> None:
    pair = Pair((P, D, E), lease_s=10)
    pair.call(P, "request_started", "r", "t", 1)
    pair.call(consumer_name, "announce", "wrong", PUSH, wrong)
    pair.call(consumer_name, "park", "wrong", [[11, 12, 13, 14], [0, 0, 15, 16]], (0, wrong.num_tokens))
    if is_given_up:
        pair.call(consumer_name, "abort", "wrong")
    leased(pair, "push")
    assert not pair.take(consumer_name, a.LoadEnded)[0].ok
    assert not pair.take(P, a.StartTransfer), "no byte moves"
    assert not pair.take(P, a.Release), "the one that it is for has not come"
    pair.load(D, PUSH, "right")
    pair.end_job(P, pair.take(P, a.StartTransfer)[0].job)
    assert pair.take(D, a.LoadEnded)[0].ok
    assert pair.take(P, a.Release) == [a.Release("r", "done")]


def test_a_right_registration_that_was_given_up_before_the_prefill_ended_frees_the_blocks_at_once() -> None:
    pair = Pair()
    pair.call(P, "request_started", "r", "t", 1)
    pair.load(D, PUSH)
    pair.call(D, "abort", "x")
    leased(pair, "push")
    assert pair.take(P, a.Release) == [a.Release("r", "done")]


@pytest.mark.parametrize("other", ["nobody", "of a request that still runs"])
def test_a_transfer_id_that_is_not_the_told_leases_is_refused_at_once(other: str) -> None:
    """Only who was told by no lease may come before the request, and waits."""
    pair = Pair()
    pair.call(P, "request_started", "runs", "of a request that still runs", 1)
    pair.call(P, "request_started", "r", "t", 1)
    params = leased(pair, "push")
    pair.load(D, params | {"transfer_id": other})
    assert pair.take(D, a.LoadEnded) == [a.LoadEnded("x", False, "the producer refused the claim: unknown", False, 0)]
    assert not pair.take(P, a.StartTransfer)
    pair.load(D, params | {"transfer_id": other, "remote_generation": None}, "early")
    assert not pair.take(D, a.LoadEnded)


def test_kv_beyond_the_proof_cannot_be_asked_for() -> None:
    ids = {"generation": "1" * 32, "claim_id": "2" * 32, "to": "3" * 32}
    good = m.CODEC.encode(m.Register("t", ((1,), (2,)), 0, 12, 0, TOKENS, **ids))
    fields = msgspec.msgpack.decode(good[4:])
    bad = good[:4] + msgspec.msgpack.encode({**fields, "end_token": 13})
    assert m.CODEC.decode(good) == m.Register("t", ((1,), (2,)), 0, 12, 0, TOKENS, **ids)
    with pytest.raises(TransferError, match="tokens up to 13 wanted, 12 proved"):
        m.CODEC.decode(bad)


@pytest.mark.parametrize("mode", ["pull", "push"])
@pytest.mark.parametrize("num_tokens", [0, 5, 8, 12])
def test_fewer_tokens_than_were_computed_can_be_proved_and_loaded(mode: str, num_tokens: int) -> None:
    pair = Pair()
    params = leased(pair, mode)
    pair.call(D, "announce", "x", params, m.TokenProof(num_tokens, digest_at(num_tokens)))
    pair.call(D, "park", "x", [[11, 12, 13], [14, 15, 16]], (0, num_tokens))
    mover = D if mode == "pull" else P
    for start in pair.take(mover, a.StartTransfer):
        assert start.job.token_range == (0, num_tokens)
        pair.end_job(mover, start.job)
    assert pair.take(D, a.LoadEnded) == [a.LoadEnded("x", True, "", False, 12)]
    assert pair.take(P, a.Release) == [a.Release("r", "done")]


def test_engines_of_another_protocol_are_refused_with_both_numbers() -> None:
    pair = Pair()
    hello = m.Hello("id-d", 1, b"geometry", {"fake": (b"",)}, 0, "0" * 32, False, generation="1" * 32)
    pair.call(P, "message", D, hello)
    (refusal,) = [message for _, _, message in pair.sent if isinstance(message, m.HelloRefused)]
    assert refusal.differences == ("protocol: 3 here, 1 at id-d",)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"remote_host": None}, "remote_host"),
        ({"remote_port": "x"}, "remote_port"),
        ({"remote_lease_id": "../../etc"}, "remote_lease_id"),
        ({"remote_lease_id": None}, "must be kvferry too"),
        ({"transfer_mode": "beam"}, "'beam' is neither"),
        ({"transfer_mode": "push", "transfer_id": None}, "needs a transfer_id"),
    ],
)
def test_params_that_cannot_be_used_are_named(change: dict[str, Any], text: str) -> None:
    pair = Pair()
    params = pair.finish() | change
    with pytest.raises(TransferError, match=text):
        pair.cores[D].announce("x", params, TOKENS, 0.0)
    assert pair.cores[D].take_actions() == []


def test_block_selection() -> None:
    assert select_blocks([[1, 2, 3, 4], [5, 6, 7, 8]], RULES, 13) == ((1, 2, 3, 4), (0, 6, 7, 8))
    assert select_blocks([[1, 2], [3, 4]], RULES, 4) == ((1,), (3,))
    with pytest.raises(ValueError, match="group 1 has 1 blocks of 4 tokens for 8 tokens"):
        select_blocks([[1, 2], [3]], RULES, 8)
    with pytest.raises(ValueError, match="blocks of 1 groups"):
        select_blocks([[1]], RULES, 4)


@pytest.mark.parametrize("bad", [{"lease_s": 0}, {"claim_s": 0.5}])
def test_settings_are_checked(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"kv_connector_extra_config.{next(iter(bad))}="):
        a.P2PSettings(**bad)


def both_wait(load_s: float, num_loads: int = 2) -> tuple[Pair, list[str]]:
    """Each of two engines has claimed the other's blocks for loads that wait for blocks of its own."""
    pair = Pair(load_s=load_s, announce_s=1000, lease_s=10)
    names = [f"r{number}" for number in range(num_loads)]
    for name, other in ((P, D), (D, P)):
        for request_id in names:
            blocks = [[1, 2, 3], [4, 5, 6]]
            finished = (request_id, a.FinishReason.LENGTH, blocks, 12, [7], digest_at)
            params = pair.call(name, "finish", *finished)
            pair.now += 0.25
            pair.call(other, "announce", f"of {name} {request_id}", params, TOKENS)
    return pair, names


def test_two_engines_that_wait_for_each_others_blocks_go_on_when_the_newest_load_is_given_up() -> None:
    pair, _ = both_wait(load_s=60)
    pair.advance(59)
    assert not pair.take(P, a.LoadEnded) + pair.take(D, a.LoadEnded) + pair.take(D, a.Release)
    pair.advance(2)
    (ended,) = pair.take(P, a.LoadEnded)
    assert (ended.request_id, ended.ok) == ("of d:2 r1", False)
    assert "other engines have claimed blocks" in ended.reason
    assert pair.take(D, a.Release) == [a.Release("r1", "done")]
    pair.call(D, "park", "of p:1 r0", [[11, 12, 13], [0, 15, 16]], (0, 12))
    (start,) = pair.take(D, a.StartTransfer)
    pair.end_job(D, start.job)
    assert pair.take(D, a.LoadEnded)[-1].ok
    assert a.Release("r0", "done") in pair.take(P, a.Release)


@pytest.mark.parametrize("what", ["nobody has claimed ours", "a load got blocks"])
def test_a_load_waits_for_blocks_as_long_as_it_may_where_nobody_waits_for_ours(what: str) -> None:
    pair = Pair(load_s=60, announce_s=1000, lease_s=10)
    if what == "a load got blocks":
        pair, _ = both_wait(load_s=60)
        for seconds in range(0, 200, 20):
            for name, other in ((P, D), (D, P)):
                params = pair.call(
                    other, "finish", f"n{seconds}", a.FinishReason.LENGTH, [[1, 2, 3], [4, 5, 6]], 12, [7], digest_at
                )
                pair.load(name, params, f"of {seconds}")
                pair.end_job(name, pair.take(name, a.StartTransfer)[0].job)
            pair.advance(20)
    else:
        pair.call(D, "announce", "x", pair.finish(), TOKENS)
        pair.advance(200)
    assert all(ended.ok for name in (P, D) for ended in pair.take(name, a.LoadEnded))

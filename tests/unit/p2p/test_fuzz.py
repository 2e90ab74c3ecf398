"""Nothing a peer sends makes the core raise, or its memory grow without bound."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import msgspec
import pytest
from pair import TOKENS, D, P, Pair, digest_at

from kvferry.errors import TransferError
from kvferry.p2p import actions as a
from kvferry.p2p import messages as m
from kvferry.p2p.transports.transport import TransferStatus

KINDS = m.AnyMessage.__args__


def proof(rng: random.Random) -> m.BytesProof:
    """Of any number of groups and ranks."""
    firsts = rng.choice(((), (0, 0), (1, 99), (0, 0, 0)))
    return m.BytesProof(firsts, rng.randrange(20), (b"0" * 16,) * rng.randrange(4))


def some(rng: random.Random, name: str, ids: list[str], claims: list[str]) -> Any:
    """A value for a field, from those that mean something as often as not."""
    blocks = tuple(tuple(rng.sample(range(20), rng.randrange(4))) for _ in range(rng.randrange(3)))
    values = {
        "generation": lambda: rng.choice(ids), "to": lambda: rng.choice(ids), "claim_id": lambda: rng.choice(claims),
        "lease_id": lambda: rng.choice(claims), "lease_generation": lambda: rng.choice(ids),
        "nonce": lambda: rng.choice(claims), "epoch": lambda: rng.choice((0, 0, 1, 5)),
        "engine_id": lambda: rng.choice(("id-d", "id-p", "x")),
        "protocol": lambda: rng.choice((m.PROTOCOL, m.PROTOCOL, m.PROTOCOL, 1)),
        "geometry": lambda: b"geometry", "transports": lambda: rng.choice(({"fake": (b"",)}, {}, {"other": ()})),
        "is_answer": lambda: rng.random() < 0.5, "differences": lambda: ("no",), "blocks": lambda: blocks,
        "num_tokens": lambda: rng.randrange(30), "remaining_ms": lambda: rng.randrange(9000),
        "why": lambda: rng.choice(list(m.Why)), "is_valid": lambda: rng.random() < 0.5,
        "transfer_id": lambda: rng.choice("tuv"), "first_token": lambda: rng.randrange(9),
        "end_token": lambda: 8 + rng.randrange(9), "tokens": lambda: m.TokenProof(8, digest_at(rng.choice((8, 8, 7)))),
        "tokens_digest": lambda: digest_at(rng.choice((8, 8, 7))), "ok": lambda: rng.random() < 0.5,
        "reason": lambda: "?", "is_proved": lambda: rng.random() < 0.5, "wants_proof": lambda: rng.random() < 0.5,
        "proof": lambda: rng.choice((None, proof(rng))),
    }  # fmt: skip
    return values[name]()


@pytest.mark.parametrize("seed", range(40))
def test_random_messages_in_any_state_never_raise(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    pair = Pair(makes_digests=seed % 2 == 0, max_claims=5, max_remembered=20, max_peers=3, load_s=4, lease_s=5)
    ids = [core.local.generation for core in pair.cores.values()] * 4 + [pair.new_id()]
    claims = [pair.new_id()]
    for step in range(300):
        name = rng.choice((P, D))
        kind = rng.choice(KINDS)
        fields = {field.name: some(rng, field.name, ids, claims) for field in msgspec.structs.fields(kind)}
        if kind is m.Register and fields["end_token"] > 8:
            fields["tokens"] = m.TokenProof(16, digest_at(16))
        sender = rng.choice((P, D, P, D, f"x:{step}"))
        pair.cores[name].message(sender, kind(**fields), pair.now)
        host(rng, pair, name, step)
        for core in pair.cores.values():
            actions = core.take_actions()
            claims += [
                x.message.claim_id for x in actions if isinstance(x, a.Send) and isinstance(x.message, m.ClaimMessage)
            ]
            core.check_integrity()
            books = core.snapshot()
            assert len(books["peers"]) <= 3
            assert sum(len(row["claims"]) for row in books["producer"]) <= 5
            for action in actions:
                if isinstance(action, a.Send) and action.peer in pair.cores and rng.random() < 0.7:
                    pair.cores[action.peer].message(name, action.message, pair.now)
        claims = claims[-30:]
        pair.now += rng.random() * 0.3


def host(rng: random.Random, pair: Pair, name: str, step: int) -> None:
    """Now and then the host does something too."""
    core, now, roll = pair.cores[name], pair.now, rng.randrange(8)
    other = D if name == P else P
    if roll == 0:
        core.request_started(f"r{step}", rng.choice("tuv"), 1, now)
    elif roll == 1:
        core.finish(
            f"r{step - rng.randrange(9)}", rng.choice(list(a.FinishReason)), [[1, 2], [3, 4]], 8, [1], digest_at, now
        )
    elif roll == 2:
        host_name, port = other.split(":")
        handover = m.Handover(remote_host=host_name, remote_port=int(port), transfer_id="t", transfer_mode="push")
        core.announce(f"x{step}", handover, m.TokenProof(8, digest_at(rng.choice((8, 8, 7)))), now)
        core.park(f"x{step}", [[5, 6], [7, 8]], (0, 8), now)
    elif roll == 3:
        core.peer_connected(other, now)
    elif roll == 4:
        for job in [x.job for x in core.take_actions() if isinstance(x, a.StartTransfer | a.StartDigests)]:
            digests = rng.choice((None, (bytes(64), bytes(64))))
            core.transfer_ended(job.job_id, rng.randrange(3), rng.choice(list(TransferStatus)), "?", now, digests)
            core.digests_made(job.job_id, rng.randrange(3), digests, now)
    elif roll == 5:
        for row in core.snapshot()["peers"]:
            core.peer_closed(row["name"], row["closing"] or 0, now)
    elif roll == 7:
        core.prompt_ends(f"r{step - rng.randrange(9)}", [[1, 2], [3, 4]], 8, now)
    elif roll == 6:
        core.abort(f"{rng.choice('rx')}{step - rng.randrange(9)}", now)


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_raise_nothing_but_transfer_errors(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    ids = {"generation": "0" * 32, "claim_id": "1" * 32, "to": "2" * 32}
    good = m.CODEC.encode(m.Register("t", ((1, 2), (3,)), 0, 8, 0, TOKENS, **ids))
    for _ in range(500):
        data = bytearray(good if rng.random() < 0.8 else good[:4] + rng.randbytes(rng.randrange(60)))
        for _ in range(rng.randrange(1, 4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(TransferError):
            m.CODEC.decode(bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.3 else data))


@pytest.mark.parametrize(
    "message",
    [
        {"type": "claim", "generation": "0" * 31, "claim_id": "1" * 32, "to": "2" * 32, "lease_id": "3" * 32,
         "lease_generation": "4" * 32, "tokens": [8, b"5" * 31]},
        {"type": "renew", "generation": "0" * 32 + "\n", "claim_id": "1" * 32, "to": "2" * 32},
        {"type": "renew", "generation": "0" * 32, "claim_id": "1" * 32, "to": "2" * 32, "more": 1},
        {"type": "register", "generation": "0" * 32, "claim_id": "1" * 32, "to": "2" * 32, "transfer_id": "t",
         "blocks": [[-1]], "first_token": 0, "end_token": 1, "epoch": 0, "tokens": [8, b"5" * 32]},
        {"type": "register", "generation": "0" * 32, "claim_id": "1" * 32, "to": "2" * 32, "transfer_id": "t",
         "blocks": [[1]], "first_token": 2, "end_token": 1, "epoch": 0, "tokens": [8, b"5" * 32]},
        {"type": "register", "generation": "0" * 32, "claim_id": "1" * 32, "to": "2" * 32, "transfer_id": "t",
         "blocks": [[1]] * 65, "first_token": 0, "end_token": 1, "epoch": 0, "tokens": [8, b"5" * 32]},
        {"type": "register", "generation": "0" * 32, "claim_id": "1" * 32, "to": "2" * 32, "transfer_id": "t",
         "blocks": [[1]], "first_token": 0, "end_token": 9, "epoch": 0, "tokens": [8, b"5" * 32]},
        {"type": "hand_grenade"},
        [1, 2, 3],
    ],
)  # fmt: skip
def test_bounds_hold(message: Any) -> None:
    with pytest.raises(TransferError):
        m.CODEC.decode(b"KVF\x01" + msgspec.msgpack.encode(message))

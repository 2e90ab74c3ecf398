"""The defects of the field (facts/p2p.md section 5, 1 to 7; 8 was our own), each put back by replacing a small
function.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

from kvferry.p2p import consumer, peers, producer
from kvferry.p2p.actions import FinishReason, P2PSettings
from kvferry.p2p.messages import Confirm, Withdraw

Patch = Callable[[Any], None]


def no_fence(monkeypatch: Any) -> None:
    """1: a transfer that was given up counts as stopped."""
    monkeypatch.setattr(consumer.Consumer, "_is_in_danger", lambda self, load: False)


def no_hold(monkeypatch: Any) -> None:
    """2a: the producer frees at the lease's deadline, whoever is reading."""
    monkeypatch.setattr(
        producer.Lease, "is_held", lambda self, now: len(self.served) < self.num_consumers and now < self.deadline_s
    )
    monkeypatch.setattr(producer.Lease, "is_written_from", lambda self: False)


def no_confirmation(monkeypatch: Any) -> None:
    """2b: what was read counts without asking whether the lease held."""

    def accept(self: Any, load: Any, now: float) -> None:
        self._done(load, load.granted.num_tokens, now)

    monkeypatch.setattr(consumer.Consumer, "_verify", accept)


def no_claims(monkeypatch: Any) -> None:
    """2c: both, as in the field: nobody claims, renews or confirms."""
    no_hold(monkeypatch)
    no_confirmation(monkeypatch)
    monkeypatch.setattr(P2PSettings, "renew_s", property(lambda self: inf))


def no_identity(monkeypatch: Any) -> None:
    """3: block references carry no identity: any lease will do."""
    monkeypatch.setattr(producer.Producer, "_find", lambda self, claim: next(iter(self._leases.values()), None))


def counted_consumers(monkeypatch: Any) -> None:
    """4: messages are counted, a repeat is one more consumer."""
    handle = producer.Producer.on_message
    leases: dict[str, Any] = {}

    def on_message(self: Any, peer: Any, message: Any, now: float) -> None:
        for claim in self._claims.values():
            leases[claim.claim_id] = claim.lease
        if isinstance(message, Confirm | Withdraw) and message.claim_id in leases:
            lease = leases[message.claim_id]
            lease.served.add(f"message {len(lease.served)}")
        handle(self, peer, message, now)
        if message.claim_id in leases:
            self._release_if_over(leases[message.claim_id], now)

    monkeypatch.setattr(producer.Producer, "on_message", on_message)


def no_deadline(monkeypatch: Any) -> None:
    """5: the consumer waits for ever."""
    monkeypatch.setattr(consumer.Consumer, "_deadline", lambda self, now, seconds: inf)


def length_only(monkeypatch: Any) -> None:
    """6: a stop token is no normal end."""
    monkeypatch.setattr(producer, "is_handed_over", lambda reason: reason is FinishReason.LENGTH)


def no_restart(monkeypatch: Any) -> None:
    """7: a new generation at a known address is taken for the old peer."""
    for module in (peers, consumer, producer):
        monkeypatch.setattr(module, "same_life", lambda a, b: True)


def no_token_check(monkeypatch: Any) -> None:
    """8: a lease is handed over to whoever names it, whatever its prompt is."""
    for module in (consumer, producer):
        monkeypatch.setattr(module, "same_tokens", lambda a, b: True)


MUTANTS: dict[str, Patch] = {
    "1 cancel as a fence": no_fence,
    "2 lease ends under a reader": no_hold,
    "2 no confirmation": no_confirmation,
    "2 neither": no_claims,
    "3 no identity": no_identity,
    "4 counted consumers": counted_consumers,
    "5 no deadline": no_deadline,
    "6 length only": length_only,
    "7 restart not seen": no_restart,
    "8 no token check": no_token_check,
}

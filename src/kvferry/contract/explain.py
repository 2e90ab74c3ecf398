"""Why a prefix was a hit or not: what connectors answer when a user asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class PrefixRange:
    """A run of a request's tokens that share one fate."""

    first_token: int
    end_token: int
    """One behind the last."""
    place: str
    """Where its KV is now: "device", "host", the name of a tier ("fs"), a peer, or "nowhere"."""
    reason: str
    """Why it is there, or is not, in one sentence for users: "never stored", "evicted", "on its way up", ..."""
    group_id: int | None = None
    """The KV cache group, where groups differ."""
    source: str = ""
    """Which connector says so."""
    is_claimed: bool = True
    """False when another connector than the one that says so is to load the request's KV."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON shows it."""
        return {
            "tokens": [self.first_token, self.end_token],
            "place": self.place,
            "reason": self.reason,
            **({} if self.group_id is None else {"group": self.group_id}),
            **({"connector": self.source} if self.source else {}),
        }

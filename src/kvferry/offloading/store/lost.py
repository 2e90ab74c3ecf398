"""Why chunks are not there: a bounded memory, for people who ask."""

from __future__ import annotations

from collections import OrderedDict

from kvferry.types import StoreKey

MAX_KEYS = 4096


class LostKeys:
    """The last keys that were lost or could not be stored, each with a reason in words. Nothing is decided by it."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._reasons: OrderedDict[StoreKey, str] = OrderedDict()
        self._otherwise = "never stored"

    def note(self, key: StoreKey, reason: str) -> None:
        """It is gone, or did not come. The last reason counts."""
        self._reasons[key] = reason
        self._reasons.move_to_end(key)
        if len(self._reasons) > self._max_keys:
            self._reasons.popitem(last=False)
            self._otherwise = "never stored, or lost too long ago to remember why"

    def note_all_gone(self, reason: str) -> None:
        """Everything that was there is gone."""
        self._reasons.clear()
        self._otherwise = f"never stored, or {reason}"

    def reason(self, key: StoreKey) -> str:
        """Why a missing chunk is missing."""
        return self._reasons.get(key, self._otherwise)

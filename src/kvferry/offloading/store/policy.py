"""Which chunk goes first when room is needed. The host arena and the disk tier both ask an `EvictionPolicy`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol, TypeVar

K = TypeVar("K", bound=Hashable)


class EvictionPolicy(Protocol[K]):
    """Order among the keys it was told of. Single-threaded; no call waits; it never drops a key by itself."""

    def insert(self, key: K) -> None:
        """A new key, as used just now. ValueError when it is there already."""
        ...

    def touch(self, key: K) -> None:
        """The key was used. Unknown keys are ignored."""
        ...

    def remove(self, key: K) -> None:
        """The key is gone (evicted or dropped). KeyError when unknown."""
        ...

    def victims(self, evictable: Callable[[K], bool]) -> Iterator[K]:
        """Keys to give up, best first, of those that are `evictable`. The policy must not change while this is used."""
        ...

    def __len__(self) -> int: ...

    def __contains__(self, key: object) -> bool: ...


class LRUPolicy(EvictionPolicy[K]):
    """Least recently used first."""

    def __init__(self) -> None:
        self._order: OrderedDict[K, None] = OrderedDict()

    def insert(self, key: K) -> None:
        """As the most recently used."""
        if key in self._order:
            raise ValueError(f"{key!r} is there already")
        self._order[key] = None

    def touch(self, key: K) -> None:
        """Make it the most recently used."""
        if key in self._order:
            self._order.move_to_end(key)

    def remove(self, key: K) -> None:
        """Forget it."""
        del self._order[key]

    def victims(self, evictable: Callable[[K], bool]) -> Iterator[K]:
        """From the least to the most recently used."""
        return filter(evictable, self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, key: object) -> bool:
        return key in self._order

from __future__ import annotations

import pytest

from kvferry.offloading.store.policy import LRUPolicy


def test_least_recently_used_first() -> None:
    policy: LRUPolicy[str] = LRUPolicy()
    for key in "abcd":
        policy.insert(key)
    policy.touch("a")
    policy.remove("c")
    policy.touch("unknown")
    assert list(policy.victims(lambda _: True)) == ["b", "d", "a"]
    assert list(policy.victims(lambda key: key != "b")) == ["d", "a"]
    assert len(policy) == 3
    assert "c" not in policy
    assert "a" in policy


def test_misuse_is_an_error() -> None:
    policy: LRUPolicy[str] = LRUPolicy()
    policy.insert("a")
    with pytest.raises(ValueError, match="already"):
        policy.insert("a")
    with pytest.raises(KeyError):
        policy.remove("b")
